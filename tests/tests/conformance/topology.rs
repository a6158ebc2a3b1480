//! Upstream's `test/e2e/network/traffic_distribution.go` and `topology_hints.go`. The hints are
//! the controller's work; here they are written as it would. Limit: 5 min (`KubeProxyLagTimeout`),
//! ten requests in a row.

use std::{net::IpAddr, ops::Range};

use anyhow::Result;
use serde_json::{Value, json};
use weir_tests::{
    Cluster, Pod, TestResult,
    cluster::cluster_ips,
    objects::{self, Endpoint},
};

use super::support::{Backends, apply_slices, is_up, terminating};

const SERVICE: &str = "traffic-dist";

/// A cluster whose nodes are in zones, servers on some nodes, and a client on each.
struct Bed {
    cluster: Cluster,
    backends: Backends,
    clients: Vec<Pod>,
    vips: [IpAddr; 2],
}

impl Bed {
    /// `zones` are those of the nodes in their order; `servers` names the nodes with a server.
    fn start(name: &str, zones: &[&str], servers: &[&str]) -> Result<Self> {
        let cluster = Cluster::builder(name).nodes(zones.len()).start()?;
        for (node, zone) in cluster.nodes().iter().zip(zones) {
            let mut object = objects::node(&node.name, &node.addresses, &node.pod_cidrs);
            object["metadata"]["labels"]["topology.kubernetes.io/zone"] = (*zone).into();
            cluster.apply(&object)?;
        }
        cluster.wait_applied()?;
        let nodes = cluster.nodes().iter();
        let clients = nodes.map(|node| cluster.pod(&node.name, &format!("client-{}", node.name)));
        Ok(Self {
            backends: Backends::start(&cluster, "server-", servers)?,
            clients: clients.collect::<Result<_>>()?,
            cluster,
            vips: cluster_ips(10),
        })
    }

    /// All servers become the Service's endpoints, with what the controller writes for `distribution`.
    fn serve(&self, distribution: &str, hints: impl Fn(usize, &mut Value)) -> Result<()> {
        self.backends
            .serve(&self.cluster, SERVICE, &self.vips, |service| {
                service["spec"]["trafficDistribution"] = distribution.into();
            })?;
        self.change(&self.backends.endpoints(), hints)
    }

    fn change(&self, endpoints: &[Endpoint], hints: impl Fn(usize, &mut Value)) -> Result<()> {
        apply_slices(&self.cluster, SERVICE, endpoints, hints)
    }

    /// Requires that the client on each node (the first has number 0) is answered by just these servers.
    fn reach(&self, wanted: &[(usize, Range<usize>)]) -> Result<()> {
        for (client, servers) in wanted {
            let names = &self.backends.names()[servers.clone()];
            is_up(&self.clients[*client].netns, &self.vips, names)?;
        }
        Ok(())
    }
}

/// What the controller writes for `PreferSameZone`, `PreferClose` and topology mode `Auto`.
fn for_zone(endpoint: &mut Value, zone: &str) {
    endpoint["zone"] = zone.into();
    endpoint["hints"] = json!({"forZones": [{"name": zone}]});
}

/// What it writes for `PreferSameNode`.
fn for_node(endpoint: &mut Value, zone: &str) {
    for_zone(endpoint, zone);
    endpoint["hints"]["forNodes"] = json!([{"name": endpoint["nodeName"]}]);
}

/// "should route traffic to an endpoint in the same zone when using PreferClose" and "… when using
/// PreferSameZone"; "should distribute endpoints evenly" (keeping requests in the same zone).
#[test]
fn traffic_stays_in_its_zone() -> TestResult {
    const ZONES: [&str; 3] = ["a", "b", "c"];
    let bed = Bed::start("zones", &ZONES, &["node1", "node2"])?;
    for distribution in ["PreferClose", "PreferSameZone"] {
        bed.serve(distribution, |number, endpoint| {
            for_zone(endpoint, ZONES[number]);
        })?;
        // No endpoint in the third zone: all are used.
        bed.reach(&[(0, 0..1), (1, 1..2), (2, 0..2)])?;
    }
    Ok(())
}

/// Two zones of two nodes each, one of a single node; the servers are in the first two.
const FIVE_NODES: [&str; 5] = ["a", "a", "b", "b", "c"];
const THREE_SERVERS: [&str; 3] = ["node1", "node2", "node4"];
const THEIR_ZONES: [&str; 3] = ["a", "a", "b"];

/// "should route traffic correctly between pods on multiple nodes when using PreferClose" and "…
/// when using PreferSameZone".
#[test]
fn traffic_stays_in_a_zone_of_several_nodes() -> TestResult {
    let bed = Bed::start("zones of nodes", &FIVE_NODES, &THREE_SERVERS)?;
    for distribution in ["PreferClose", "PreferSameZone"] {
        bed.serve(distribution, |number, endpoint| {
            for_zone(endpoint, THEIR_ZONES[number]);
        })?;
        bed.reach(&[(0, 0..2), (1, 0..2), (2, 2..3), (3, 2..3), (4, 0..3)])?;
    }
    Ok(())
}

/// "should route traffic to an endpoint on the same node or fall back to same zone when using
/// PreferSameNode".
#[test]
fn traffic_stays_on_its_node_or_in_its_zone() -> TestResult {
    let bed = Bed::start("same node", &FIVE_NODES, &THREE_SERVERS)?;
    bed.serve("PreferSameNode", |number, endpoint| {
        for_node(endpoint, THEIR_ZONES[number]);
    })?;
    Ok(bed.reach(&[(0, 0..1), (1, 1..2), (2, 2..3), (3, 2..3), (4, 0..3)])?)
}

/// "should route traffic to an endpoint on the same node when using PreferSameNode and fall back
/// when the endpoint becomes unavailable".
#[test]
fn traffic_leaves_its_node_while_the_endpoint_is_away() -> TestResult {
    let bed = Bed::start("same node, away", &["a", "a"], &["node1", "node2"])?;
    let hints = |_: usize, endpoint: &mut Value| for_node(endpoint, "a");
    bed.serve("PreferSameNode", hints)?;
    let endpoints = bed.backends.endpoints();
    let first_address = &bed.backends.pods[0].addresses;
    let without_first: Vec<_> = endpoints
        .iter()
        .filter(|endpoint| !first_address.contains(&endpoint.address))
        .cloned()
        .collect();
    for _ in 0..2 {
        bed.reach(&[(0, 0..1), (1, 1..2)])?;
        bed.change(&without_first, hints)?;
        bed.reach(&[(0, 1..2), (1, 1..2)])?;
        bed.change(&endpoints, hints)?;
    }
    // One that terminates while another is ready is away too.
    bed.change(&endpoints, |number, endpoint| {
        for_node(endpoint, "a");
        if number == 0 {
            terminating(endpoint);
        }
    })?;
    Ok(bed.reach(&[(0, 1..2)])?)
}

/// Documented with topology aware routing: when one ready endpoint has no hint, none counts.
#[test]
fn a_missing_hint_turns_hints_off() -> TestResult {
    let bed = Bed::start("missing hint", &["a", "b"], &["node1", "node2"])?;
    bed.serve("PreferSameZone", |number, endpoint| {
        if number == 0 {
            for_zone(endpoint, "a");
        }
    })?;
    Ok(bed.reach(&[(0, 0..2), (1, 0..2)])?)
}
