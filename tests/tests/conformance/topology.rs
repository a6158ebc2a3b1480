//! Upstream's `test/e2e/network/traffic_distribution.go` and `topology_hints.go`. The hints are
//! the controller's work; here they are written as it would. Limit: 5 min (`KubeProxyLagTimeout`),
//! ten requests in a row.

use anyhow::Result;
use serde_json::{Value, json};
use weir_tests::{Cluster, Pod, TestResult, cluster::cluster_ips, objects};

use super::support::{Backends, apply_slices, is_up};

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

fn prefer(distribution: &str) -> impl FnOnce(&mut Value) {
    move |service| service["spec"]["trafficDistribution"] = distribution.into()
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
