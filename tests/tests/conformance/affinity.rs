//! `sessionAffinity: ClientIP`, from upstream's `test/e2e/network/{service,networking}.go`.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use weir_tests::{
    Cluster, Pod, TestResult, cluster::cluster_ips, netns::NetNs, outside::Outside,
    traffic::Protocol,
};

use super::support::{Backends, PORT, answers, is_up};

/// Requests in a row that must go to one endpoint: upstream's `AffinityConfirmCount` is 15.
const CONFIRMATIONS: usize = 15;
/// Seconds; upstream's is 125.
const TIMEOUT: u64 = 3;
const NODE_PORT: u16 = 30_080;

struct Bed {
    cluster: Cluster,
    outside: Outside,
    backends: Backends,
    client: Pod,
    vips: [IpAddr; 2],
}

impl Bed {
    fn start(name: &str) -> Result<Self> {
        let (cluster, outside) = Outside::start(Cluster::builder(name))?;
        let backends = Backends::start(&cluster, "affinity-", &["node1", "node2", "node2"])?;
        Ok(Self {
            client: cluster.pod("node1", "execpod-affinity")?,
            backends,
            cluster,
            outside,
            vips: cluster_ips(10),
        })
    }

    /// Sets the affinity: `None`, or its time-out in seconds.
    fn set(&self, timeout: Option<u64>, node_port: bool) -> Result<()> {
        self.backends
            .serve(&self.cluster, "affinity", &self.vips, |service| {
                let spec = &mut service["spec"];
                if let Some(seconds) = timeout {
                    spec["sessionAffinity"] = "ClientIP".into();
                    spec["sessionAffinityConfig"] =
                        json!({"clientIP": {"timeoutSeconds": seconds}});
                }
                if node_port {
                    as_node_port(spec);
                }
            })
    }

    fn frontends(&self, node_port: bool) -> Result<Vec<SocketAddr>> {
        if !node_port {
            return Ok(self.vips.map(|vip| SocketAddr::new(vip, PORT)).to_vec());
        }
        let nodes = self.cluster.nodes().iter();
        let addresses = nodes.flat_map(|node| &node.addresses);
        Ok(addresses
            .map(|address| SocketAddr::new(*address, NODE_PORT))
            .collect())
    }

    /// Processes of the node have an affinity too. NodePorts are for clients beyond, too.
    fn clients(&self, node_port: bool) -> Vec<&NetNs> {
        let mut clients = vec![&self.client.netns, &*self.cluster.node("node1").netns];
        if node_port {
            clients.push(&self.outside.client);
        }
        clients
    }
}

fn as_node_port(spec: &mut Value) {
    spec["type"] = "NodePort".into();
    for port in 0..2 {
        spec["ports"][port]["nodePort"] = NODE_PORT.into();
    }
}

/// The one endpoint that answers every time.
fn the_one(client: &NetNs, protocol: Protocol, to: SocketAddr) -> Result<String> {
    let counts = answers(client, protocol, to, CONFIRMATIONS)?;
    ensure!(counts.len() == 1, "{} {to}: {counts:?}", protocol.name());
    Ok(counts.into_keys().next().unwrap_or_default())
}

/// "should have session affinity work for service with type clusterIP [LinuxOnly]" and "… for
/// NodePort service [LinuxOnly]"; "should function for client IP based session affinity: http
/// [LinuxOnly]" and "… udp [LinuxOnly]". Limit: 2 min (`AffinityTimeout`).
#[test]
fn holds_a_client_to_its_endpoint() -> TestResult {
    let bed = Bed::start("affinity")?;
    bed.set(Some(10_800), true)?;
    for node_port in [false, true] {
        for client in bed.clients(node_port) {
            for to in bed.frontends(node_port)? {
                for protocol in Protocol::ALL {
                    the_one(client, protocol, to)?;
                }
            }
        }
    }
    Ok(())
}

/// "should have session affinity timeout work for service with type clusterIP [LinuxOnly]" and "…
/// for NodePort service [LinuxOnly]". Limit: ten times the time-out and 5 s.
#[test]
fn lets_a_client_go_after_the_timeout() -> TestResult {
    let bed = Bed::start("affinity time-out")?;
    bed.set(Some(TIMEOUT), true)?;
    let frontends = [bed.frontends(false)?, bed.frontends(true)?].concat();
    let first: Vec<String> = frontends
        .iter()
        .map(|to| the_one(&bed.client.netns, Protocol::Tcp, *to))
        .collect::<Result<_>>()?;
    // Each new choice is another endpoint with a chance of two in three.
    let mut left: Vec<(SocketAddr, String)> = frontends.into_iter().zip(first).collect();
    for _ in 0..10 {
        // Time itself is what is tested; a connection would begin it anew.
        thread::sleep(Duration::from_secs(TIMEOUT + 1));
        let mut still = Vec::new();
        for (to, first) in left {
            if the_one(&bed.client.netns, Protocol::Tcp, to)? == first {
                still.push((to, first));
            }
        }
        left = still;
        if left.is_empty() {
            return Ok(());
        }
    }
    panic!("held to the same endpoint after ten time-outs: {left:?}");
}

/// "should be able to switch session affinity for service with type clusterIP [LinuxOnly]" and "…
/// for NodePort service [LinuxOnly]". Limit: 2 min each way.
#[test]
fn affinity_is_switched_while_the_service_runs() -> TestResult {
    let bed = Bed::start("affinity switched")?;
    for node_port in [false, true] {
        for _ in 0..2 {
            bed.set(None, node_port)?;
            is_up(&bed.client.netns, &bed.vips, &bed.backends.names())?;
            for client in bed.clients(node_port) {
                for to in bed.frontends(node_port)? {
                    let counts = answers(client, Protocol::Tcp, to, 60)?;
                    assert!(counts.len() > 1, "{to} without affinity: {counts:?}");
                }
            }
            bed.set(Some(10_800), node_port)?;
            for client in bed.clients(node_port) {
                for to in bed.frontends(node_port)? {
                    the_one(client, Protocol::Tcp, to)?;
                }
            }
        }
    }
    Ok(())
}
