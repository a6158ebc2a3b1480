//! Packets larger than the MTU of a device on their way: the node's own (the kernel asks no MTU of what a
//! program hands over as received, since 5.12), and that of the way from the loopback device, which has a large one.

use anyhow::{Context as _, Result};
use serde_json::Value;
use std::net::SocketAddr;
use weir_tests::{
    Node, Pod, TestResult, cluster::cluster_ips, objects::Endpoint, traffic, traffic::Server,
};

use super::support::{NODE_PORT, PORT, Setup, TARGET};

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

/// What the node sends to its own NodePort is on its way to itself, until it is translated.
#[test]
fn the_nodes_own_port_leads_to_endpoints_everywhere() -> TestResult {
    let setup = Setup::start("own node port", |_| {})?;
    let (node, fabric) = (setup.node(), setup.cluster.fabric());
    let mut servers = Vec::new();
    let mut outside = Vec::new();
    for address in ["192.168.77.1", "fd00:77::1"] {
        let to = SocketAddr::new(address.parse().context("an address")?, TARGET);
        servers.push(Server::start(fabric, to, "outside")?);
        outside.push(Endpoint::ready(to.ip(), "", ""));
    }
    let [here, far] = [0, 1].map(|at| setup.endpoints[at].endpoints());
    for (name, endpoints) in [("far", far), ("here", here), ("outside", outside)] {
        setup.cluster.endpoints("web", TARGET, &endpoints)?;
        setup.cluster.wait_applied()?;
        for v6 in [false, true] {
            let to = SocketAddr::new(node.address(v6)?, NODE_PORT);
            // IPv6 routers do not cut, and nobody tells the node of an MTU on the way to itself.
            let lengths: &[usize] = if v6 {
                &[32, 1300]
            } else {
                &[32, 1300, 2000, 9000]
            };
            for length in lengths {
                let answered = node.netns.run(|| traffic::udp_name(to, *length));
                assert_eq!(answered.with_context(|| format!("endpoint {name}"))?, name);
            }
        }
    }
    Ok(())
}
