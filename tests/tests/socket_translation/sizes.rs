//! Packets larger than the MTU of the node's own device. The kernel asks no MTU of what a program hands
//! over as received (since 5.12).

use anyhow::{Context as _, Result};
use serde_json::Value;
use std::net::SocketAddr;
use weir_tests::{Node, Pod, TestResult, cluster::cluster_ips, traffic};

use super::support::{PORT, Setup};

/// Bytes of a datagram that needs fragments on the underlay, whose MTU is 1500, and none in [`WIDE`].
const DATAGRAM: usize = 4000;
/// MTU of a pod whose device somebody has widened.
const WIDE: u32 = 9000;

/// The host side of a pod's device.
fn host_side(node: &Node, pod: &Pod) -> Result<String> {
    let links: Value = serde_json::from_str(&node.netns.tool("ip", &["-j", "link"])?)?;
    let alias = format!("weir:{}/eth0", pod.container);
    links
        .as_array()
        .into_iter()
        .flatten()
        .find(|link| link["ifalias"] == alias)
        .and_then(|link| link["ifname"].as_str())
        .map(str::to_owned)
        .with_context(|| format!("no device has the alias {alias}"))
}

#[test]
fn a_reply_larger_than_the_nodes_mtu_reaches_the_node() -> TestResult {
    let setup = Setup::start("large replies", |service| {
        service["spec"]["internalTrafficPolicy"] = "Local".into();
    })?;
    let node = setup.node();
    let pod = &setup.endpoints[0];
    let device = host_side(node, pod)?;
    node.netns.ip(&format!("link set {device} mtu {WIDE}"))?;
    pod.netns.ip(&format!("link set eth0 mtu {WIDE}"))?;
    for address in cluster_ips(10) {
        let to = SocketAddr::new(address, PORT);
        let name = node.netns.run(|| traffic::udp_name(to, DATAGRAM))?;
        assert_eq!(name, pod.name);
    }
    Ok(())
}
