//! A node with two devices and one default route by way of both (equal-cost multipath): whatever a pod sends outside
//! leaves by a device with that device's address, and is answered.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, UdpSocket},
};

use anyhow::{Context as _, Result, ensure};
use weir_tests::{
    Cluster, Node, TestResult,
    capture::{Capture, Packet},
    outside::{Outside, SECOND_DEVICE},
    traffic::{self, Connection, Server},
    witness,
};

use crate::support::TARGET;

/// Connections of the pod over each protocol and family.
const FLOWS: usize = 40;
/// The router's devices: behind the first are the nodes' first devices, behind the other the second.
const OF_ROUTER: [&str; 2] = ["eth0", "second"];
/// Its addresses there, IPv4 before IPv6.
const GATEWAYS: [[&str; 2]; 2] = [
    ["192.168.77.254", "192.168.78.254"],
    ["fd00:77::fe", "fd00:78::fe"],
];

/// Replaces the default routes of a node by one by way of both devices, in both families. What chooses between them is
/// `policy` (`fib_multipath_hash_policy`).
fn balance(node: &Node, policy: &str) -> Result<()> {
    for (family, [first, second]) in GATEWAYS.into_iter().enumerate() {
        let version = ["4", "6"][family];
        let setting = format!("net/ipv{version}/fib_multipath_hash_policy");
        node.netns.sysctl(&setting, policy)?;
        for route in [
            format!("-{version} route del default dev {SECOND_DEVICE}"),
            format!(
                "-{version} route replace default nexthop via {first} dev eth0 nexthop via {second} dev {SECOND_DEVICE}"
            ),
        ] {
            let arguments: Vec<&str> = route.split(' ').collect();
            node.netns.tool("ip", &arguments)?;
        }
    }
    Ok(())
}

/// Servers outside, each at an address of its own.
fn serve(outside: &Outside, v6: bool, count: usize) -> Result<(Vec<SocketAddr>, Vec<Server>)> {
    let mut targets = Vec::new();
    let mut servers = Vec::new();
    for number in 0..count {
        let address = if v6 {
            format!("2001:db8:100::a:{number:x}")
        } else {
            format!("198.51.100.{}", 100 + number)
        };
        let length = ["24", "64 nodad"][usize::from(v6)];
        outside
            .client
            .ip(&format!("address add {address}/{length} dev eth0\n"))?;
        let address = SocketAddr::new(address.parse().context("an address")?, TARGET);
        servers.push(Server::start(&outside.client, address, "outside")?);
        targets.push(address);
    }
    Ok((targets, servers))
}

/// A connection over each protocol from the calling thread's namespace, kept so that the next has other ports.
struct Flow {
    udp: UdpSocket,
    tcp: Connection,
}

impl Flow {
    fn open(to: SocketAddr) -> Result<Self> {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        };
        let udp = UdpSocket::bind((any, 0))?;
        udp.set_read_timeout(Some(traffic::TIMEOUT))?;
        udp.connect(to)?;
        let tcp = Connection::open(to)?;
        Ok(Self { udp, tcp })
    }

    /// The addresses that the server sees, over UDP and TCP.
    fn seen(&mut self) -> Result<[SocketAddr; 2]> {
        Ok([witness::ask_by(&self.udp)?.client, self.tcp.who_am_i()?])
    }
}

/// Every packet to one of the addresses must have come from one of the node's.
fn are_all_from(own: IpAddr, targets: &[SocketAddr], packets: &[Packet]) -> Result<usize> {
    let mut count = 0;
    for packet in packets {
        if targets.iter().any(|to| to.ip() == packet.destination) {
            ensure!(packet.source == own, "{packet:?} by the device of {own}");
            count += 1;
        }
    }
    Ok(count)
}

/// A pod talks to servers outside at so many addresses.
fn check(name: &str, policy: &str, servers: usize) -> Result<()> {
    let cluster = Cluster::builder(name).nodes(1).wire()?;
    let outside = Outside::join(&cluster)?;
    let node = cluster.node("node1");
    let second = outside.add_second_device(&cluster, node)?;
    balance(node, policy)?;
    cluster.start_agents()?;
    let pod = cluster.pod("node1", "pod")?;
    cluster.wait_applied()?;
    for v6 in [false, true] {
        let (targets, _servers) = serve(&outside, v6, servers)?;
        let own = [node.address(v6)?, second[usize::from(v6)]];
        let [by_first, by_second] = OF_ROUTER.map(|device| Capture::start(&outside.router, device));
        let captures = [by_first?, by_second?];
        let mut flows = Vec::new();
        let mut met = BTreeSet::new();
        for number in 0..FLOWS {
            let to = targets[number % targets.len()];
            let mut flow = pod
                .run(|| Flow::open(to))
                .with_context(|| format!("flow {number}"))?;
            let seen = flow.seen().with_context(|| format!("flow {number}"))?;
            for client in seen {
                ensure!(own.contains(&client.ip()), "{client} of flow {number}");
                met.insert(client.ip());
            }
            flows.push((flow, seen));
        }
        for (number, (flow, before)) in flows.iter_mut().enumerate() {
            let seen = flow
                .seen()
                .with_context(|| format!("flow {number} later"))?;
            ensure!(seen == *before, "flow {number}: {before:?}, then {seen:?}");
        }
        ensure!(met.len() == 2, "all by one device, {met:?}");
        drop(flows);
        for (capture, own) in captures.into_iter().zip(own) {
            let count = are_all_from(own, &targets, &capture.stop()?)?;
            ensure!(count > 0, "nothing by the device of {own}");
        }
    }
    Ok(())
}

#[test]
fn each_uplink_carries_its_own_address_when_ports_choose_it() -> TestResult {
    Ok(check("uplinks by port", "1", 1)?)
}

#[test]
fn each_uplink_carries_its_own_address_when_addresses_choose_it() -> TestResult {
    Ok(check("uplinks by address", "0", 20)?)
}
