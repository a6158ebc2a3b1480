//! Pods of a two-node cluster beside two namespaces joined by a plain veth pair, in one run.

pub mod traffic;

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use weir_tests::{Cluster, Pod, cluster::cluster_ips, netns::NetNs, reaper};

use self::traffic::{Path, connection_rate, round_trip, tcp_throughput, udp_rate};
use crate::{
    Effort,
    report::{Section, Table},
    statistics::Spread,
};

/// Where servers listen that are reached by their own address.
const PORT: u16 = 8080;
/// Where endpoints of Services listen. Not the same: a connection to the endpoint and one to its
/// Service with the same source port look alike to the endpoint, and clients here use every port
/// many times.
const TARGET_PORT: u16 = 8081;
/// Port of the Services.
const SERVICE_PORT: u16 = 80;
/// Numbers of the Services' addresses.
const LOCAL: u8 = 10;
const REMOTE: u8 = 20;

/// What is measured on each path. Of a round trip, less is better.
const METRICS: [Metric; 5] = [
    Metric {
        name: "TCP throughput, one stream",
        unit: "Gbit/s",
        scale: 1e-9,
        decimals: 1,
    },
    Metric {
        name: "UDP datagrams of 64 bytes",
        unit: "thousand/s",
        scale: 1e-3,
        decimals: 0,
    },
    Metric {
        name: "TCP round trip, p50",
        unit: "µs",
        scale: 1e6,
        decimals: 1,
    },
    Metric {
        name: "TCP round trip, p99",
        unit: "µs",
        scale: 1e6,
        decimals: 1,
    },
    Metric {
        name: "new TCP connections",
        unit: "thousand/s",
        scale: 1e-3,
        decimals: 1,
    },
];

struct Metric {
    name: &'static str,
    unit: &'static str,
    scale: f64,
    decimals: usize,
}

/// The plain veth pair; the others are compared with it.
const VETH: usize = 0;
/// Pod to pod on one node, and across (the third path is between the nodes themselves): what a
/// Service is compared with.
const ONE_NODE: usize = 1;
const ACROSS: usize = 3;
const LOCAL_SERVICE: usize = 4;
const REMOTE_SERVICE: usize = 5;

/// Values by path, then metric, then round.
type Values = Vec<[Vec<f64>; METRICS.len()]>;

/// Measures.
///
/// # Errors
///
/// The cluster does not come up, or traffic fails.
pub fn run(effort: Effort) -> Result<Section> {
    let (rounds, time) = match effort {
        Effort::Quick => (3, Duration::from_millis(200)),
        Effort::Full => (9, Duration::from_millis(500)),
    };
    let mut section = Section::new("pods", "Pods")?;
    section.paragraph(&format!(
        "Two nodes on a bridge, all in network namespaces of one machine; client on one processor, server on another. \
         {rounds} rounds; in each, every path is measured for {} ms, one after the other. Ratios are to the path \
         named, in the same round. Connections are opened and reset one after another by one client.",
        time.as_millis()
    ));
    let bed = Bed::start()?;
    let families: &[bool] = match effort {
        Effort::Quick => &[false],
        Effort::Full => &[false, true],
    };
    for &v6 in families {
        let paths = bed.paths(v6)?;
        let values = measure(&paths, rounds, time)?;
        let family = if v6 { "IPv6" } else { "IPv4" };
        for (at, metric) in METRICS.iter().enumerate() {
            section.table(&table(metric, at, family, &paths, &values)?);
        }
    }
    Ok(section)
}

fn measure(paths: &[Path<'_>], rounds: usize, time: Duration) -> Result<Values> {
    let mut values: Values = paths.iter().map(|_| Default::default()).collect();
    for round in 0..rounds {
        eprintln!("pods: round {} of {rounds}", round + 1);
        for metric in 0..4 {
            // Each round begins with another path, so that none is always the first.
            for turn in 0..paths.len() {
                let number = (round + turn) % paths.len();
                let (path, values) = (&paths[number], &mut values[number]);
                let context = || format!("{}, round {round}", path.name);
                match metric {
                    0 => values[0].push(tcp_throughput(path, time).with_context(context)?),
                    1 => values[1].push(udp_rate(path, time).with_context(context)?),
                    2 => {
                        let times = round_trip(path, time).with_context(context)?;
                        values[2].push(times.p50);
                        values[3].push(times.p99);
                    }
                    _ => values[4].push(connection_rate(path, time).with_context(context)?),
                }
            }
        }
    }
    Ok(values)
}

fn table(
    metric: &Metric,
    at: usize,
    family: &str,
    paths: &[Path<'_>],
    values: &Values,
) -> Result<Table> {
    let mut table = Table::new(
        &format!("{}, {family}", metric.name),
        &[
            "",
            metric.unit,
            "of the veth pair",
            "of the path without Service",
        ],
    );
    let decimals = metric.decimals;
    for (number, path) in paths.iter().enumerate() {
        let own = Spread::of(values[number][at].iter().copied()).context("no rounds")?;
        let ratio = |to: usize| -> Result<String> {
            let pairs = values[number][at].iter().zip(&values[to][at]);
            let spread = Spread::of(pairs.map(|(own, other)| own / other)).context("no rounds")?;
            Ok(format!("{spread:.2}"))
        };
        let base = match number {
            LOCAL_SERVICE => ratio(ONE_NODE)?,
            REMOTE_SERVICE => ratio(ACROSS)?,
            _ => String::new(),
        };
        table.row([
            path.name.to_owned(),
            format!("{:.decimals$}", own.scaled(metric.scale)),
            if number == VETH {
                String::new()
            } else {
                ratio(VETH)?
            },
            base,
        ]);
    }
    Ok(table)
}

/// The cluster and its rival.
struct Bed {
    // Dropped with everything that carries its id, the rival's namespaces too.
    cluster: Cluster,
    pods: [Pod; 3],
    veth: [NetNs; 2],
}

impl Bed {
    fn start() -> Result<Self> {
        let cluster = Cluster::builder("bench")
            .agent_arguments(&["--log", "info"])
            .start()?;
        let pods = [
            cluster.pod("node1", "client")?,
            cluster.pod("node1", "near")?,
            cluster.pod("node2", "far")?,
        ];
        cluster.service_of_pods("near", &cluster_ips(LOCAL), TARGET_PORT, &[&pods[1]])?;
        cluster.service_of_pods("far", &cluster_ips(REMOTE), TARGET_PORT, &[&pods[2]])?;
        let veth = ["veth-a", "veth-b"]
            .map(|name| NetNs::create(&reaper::namespace_name(cluster.id(), name)));
        let [a, b] = veth;
        let veth = [a?, b?];
        veth[0].ip(&format!(
            "link add eth0 type veth peer name eth0 netns {}",
            veth[1].name()
        ))?;
        for (number, netns) in (1..).zip(&veth) {
            netns.ip(&format!(
                "link set eth0 up\naddress add 192.168.78.{number}/24 dev eth0\n\
                 address add fd00:78::{number}/64 dev eth0 nodad\n"
            ))?;
        }
        // A path that loses packets shall be an error, not a pause of two minutes.
        for client in [&pods[0].netns, &cluster.node("node1").netns, &veth[0]] {
            client.sysctl("net/ipv4/tcp_syn_retries", "2")?;
        }
        Ok(Self {
            cluster,
            pods,
            veth,
        })
    }

    fn paths<'a>(&'a self, v6: bool) -> Result<Vec<Path<'a>>> {
        let [client, near, far] = &self.pods;
        let own: IpAddr = if v6 {
            "fd00:78::2".parse()?
        } else {
            "192.168.78.2".parse()?
        };
        let vip = |number| cluster_ips(number)[usize::from(v6)];
        let (node1, node2) = (self.cluster.node("node1"), self.cluster.node("node2"));
        let (near_ip, far_ip) = (near.address(v6)?, far.address(v6)?);
        let (veth_a, veth_b) = (&self.veth[0], &self.veth[1]);
        let direct = |name, client, server, address| Path {
            name,
            client,
            server,
            listen: SocketAddr::new(address, PORT),
            to: SocketAddr::new(address, PORT),
        };
        let through_service = |name, server: &'a Pod, address, number| Path {
            name,
            client: &client.netns,
            server: &server.netns,
            listen: SocketAddr::new(address, TARGET_PORT),
            to: SocketAddr::new(vip(number), SERVICE_PORT),
        };
        Ok(vec![
            direct("plain veth pair", veth_a, veth_b, own),
            direct("pod to pod, one node", &client.netns, &near.netns, near_ip),
            direct(
                "node to node, no pods",
                &node1.netns,
                &node2.netns,
                node2.address(v6)?,
            ),
            direct("pod to pod, other node", &client.netns, &far.netns, far_ip),
            through_service(
                "pod to ClusterIP, endpoint on its node",
                near,
                near_ip,
                LOCAL,
            ),
            through_service(
                "pod to ClusterIP, endpoint on the other node",
                far,
                far_ip,
                REMOTE,
            ),
        ])
    }
}
