//! Upstream's `test/e2e/network/traffic_distribution.go` and `topology_hints.go`. The hints are
//! the controller's work; here they are written as it would. Limit: 5 min (`KubeProxyLagTimeout`),
//! ten requests in a row.

use anyhow::Result;
use serde_json::{Value, json};
use weir_tests::{Cluster, Pod, TestResult, cluster::cluster_ips, objects};

use super::support::{Backends, apply_slices, is_up, terminating};

/// A cluster whose nodes are in these zones, in their order.
fn cluster_in_zones(name: &str, zones: &[&str]) -> Result<Cluster> {
    let cluster = Cluster::builder(name).nodes(zones.len()).start()?;
    for (node, zone) in cluster.nodes().iter().zip(zones) {
        let mut object = objects::node(&node.name, &node.addresses, &node.pod_cidrs);
        object["metadata"]["labels"]["topology.kubernetes.io/zone"] = (*zone).into();
        cluster.apply(&object)?;
    }
    cluster.wait_applied()?;
    Ok(cluster)
}

fn clients(cluster: &Cluster) -> Result<Vec<Pod>> {
    cluster
        .nodes()
        .iter()
        .map(|node| cluster.pod(&node.name, &format!("client-{}", node.name)))
        .collect()
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

fn prefer(distribution: &str) -> impl FnOnce(&mut Value) {
    move |service| service["spec"]["trafficDistribution"] = distribution.into()
}

/// "should route traffic to an endpoint in the same zone when using PreferClose" and "… when using
/// PreferSameZone"; "should distribute endpoints evenly" (keeping requests in the same zone).
#[test]
fn traffic_stays_in_its_zone() -> TestResult {
    const ZONES: [&str; 3] = ["a", "b", "c"];
    let cluster = cluster_in_zones("zones", &ZONES)?;
    let backends = Backends::start(&cluster, "server-", &["node1", "node2"])?;
    let clients = clients(&cluster)?;
    let names = backends.names();
    let vips = cluster_ips(10);
    for distribution in ["PreferClose", "PreferSameZone"] {
        backends.serve(&cluster, "traffic-dist", &vips, prefer(distribution))?;
        apply_slices(
            &cluster,
            "traffic-dist",
            &backends.endpoints(),
            |number, endpoint| for_zone(endpoint, ZONES[number]),
        )?;
        is_up(&clients[0].netns, &vips, &names[..1])?;
        is_up(&clients[1].netns, &vips, &names[1..])?;
        // No endpoint in this zone: all are used.
        is_up(&clients[2].netns, &vips, &names)?;
    }
    Ok(())
}

/// "should route traffic correctly between pods on multiple nodes when using PreferClose" and "…
/// when using PreferSameZone".
#[test]
fn traffic_stays_in_a_zone_of_several_nodes() -> TestResult {
    const ZONES: [&str; 5] = ["a", "a", "b", "b", "c"];
    let cluster = cluster_in_zones("zones of nodes", &ZONES)?;
    let on = ["node1", "node2", "node4"];
    let backends = Backends::start(&cluster, "server-", &on)?;
    let clients = clients(&cluster)?;
    let names = backends.names();
    let vips = cluster_ips(10);
    backends.serve(&cluster, "traffic-dist", &vips, prefer("PreferSameZone"))?;
    apply_slices(
        &cluster,
        "traffic-dist",
        &backends.endpoints(),
        |number, endpoint| for_zone(endpoint, ["a", "a", "b"][number]),
    )?;
    is_up(&clients[0].netns, &vips, &names[..2])?;
    is_up(&clients[1].netns, &vips, &names[..2])?;
    is_up(&clients[2].netns, &vips, &names[2..])?;
    Ok(is_up(&clients[4].netns, &vips, &names)?)
}

/// "should route traffic to an endpoint on the same node or fall back to same zone when using
/// PreferSameNode".
#[test]
fn traffic_stays_on_its_node_or_in_its_zone() -> TestResult {
    const ZONES: [&str; 5] = ["a", "a", "b", "b", "c"];
    let cluster = cluster_in_zones("same node", &ZONES)?;
    let on = ["node1", "node2", "node4"];
    let backends = Backends::start(&cluster, "server-", &on)?;
    let clients = clients(&cluster)?;
    let names = backends.names();
    let vips = cluster_ips(10);
    backends.serve(&cluster, "traffic-dist", &vips, prefer("PreferSameNode"))?;
    apply_slices(
        &cluster,
        "traffic-dist",
        &backends.endpoints(),
        |number, endpoint| for_node(endpoint, ["a", "a", "b"][number]),
    )?;
    is_up(&clients[0].netns, &vips, &names[..1])?;
    is_up(&clients[1].netns, &vips, &names[1..2])?;
    is_up(&clients[2].netns, &vips, &names[2..])?;
    Ok(is_up(&clients[4].netns, &vips, &names)?)
}

/// "should route traffic to an endpoint on the same node when using PreferSameNode and fall back
/// when the endpoint becomes unavailable".
#[test]
fn traffic_leaves_its_node_while_the_endpoint_is_away() -> TestResult {
    let cluster = cluster_in_zones("same node, away", &["a", "a"])?;
    let backends = Backends::start(&cluster, "server-", &["node1", "node2"])?;
    let clients = clients(&cluster)?;
    let names = backends.names();
    let vips = cluster_ips(10);
    let endpoints = backends.endpoints();
    backends.serve(&cluster, "traffic-dist", &vips, prefer("PreferSameNode"))?;
    let hints = |_: usize, endpoint: &mut Value| for_node(endpoint, "a");
    let first_address = &backends.pods[0].addresses;
    let without_first: Vec<_> = endpoints
        .iter()
        .filter(|endpoint| !first_address.contains(&endpoint.address))
        .cloned()
        .collect();
    for _ in 0..2 {
        apply_slices(&cluster, "traffic-dist", &endpoints, hints)?;
        is_up(&clients[0].netns, &vips, &names[..1])?;
        is_up(&clients[1].netns, &vips, &names[1..])?;
        apply_slices(&cluster, "traffic-dist", &without_first, hints)?;
        is_up(&clients[0].netns, &vips, &names[1..])?;
        is_up(&clients[1].netns, &vips, &names[1..])?;
    }
    // One that terminates while another is ready is away too.
    apply_slices(&cluster, "traffic-dist", &endpoints, |number, endpoint| {
        for_node(endpoint, "a");
        if number == 0 {
            terminating(endpoint);
        }
    })?;
    Ok(is_up(&clients[0].netns, &vips, &names[1..])?)
}

/// Documented with topology aware routing: when one ready endpoint has no hint, none counts.
#[test]
fn a_missing_hint_turns_hints_off() -> TestResult {
    let cluster = cluster_in_zones("missing hint", &["a", "b"])?;
    let backends = Backends::start(&cluster, "server-", &["node1", "node2"])?;
    let clients = clients(&cluster)?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "traffic-dist", &vips, prefer("PreferSameZone"))?;
    apply_slices(
        &cluster,
        "traffic-dist",
        &backends.endpoints(),
        |number, endpoint| {
            if number == 0 {
                for_zone(endpoint, "a");
            }
        },
    )?;
    for client in &clients {
        is_up(&client.netns, &vips, &backends.names())?;
    }
    Ok(())
}
