//! What is not for everybody: ClusterIPs from outside, and load-balancer addresses with source ranges.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use serde_json::json;
use weir_tests::{
    TestResult,
    cluster::{Way, cluster_ips},
    netns::NetNs,
    refusal::{is_dropped, is_refused},
    traffic::{self, Protocol},
    wait_until, witness,
};

use crate::support::{
    Bed, FAR, NAT_PORTS, NEAR, PORT, WIDE, apply, node_port_service, virtual_address,
};

const INVALID_DESTINATION: &str = "INVALID_DESTINATION";
const NOT_IN_SRC_RANGE: &str = "NOT_IN_SRC_RANGE";
/// Where ClusterIPs are.
const CLUSTER_NETWORKS: [&str; 2] = ["10.96.0.0/16", "fd00:96::/112"];

#[test]
fn a_cluster_ip_is_refused_outside() -> TestResult {
    let bed = Bed::start("cluster IP outside", WIDE, &[])?;
    bed.outside.route_via(bed.node(), &CLUSTER_NETWORKS)?;
    for vip in [cluster_ips(10), cluster_ips(11)].concat() {
        for protocol in Protocol::ALL {
            let before = bed.node().drops(INVALID_DESTINATION)?;
            is_refused(&bed.outside.client, protocol, SocketAddr::new(vip, PORT))?;
            let what = format!("the refusal of {vip} to be counted");
            wait_until(&what, traffic::TIMEOUT, || {
                Ok(bed.node().drops(INVALID_DESTINATION)? > before)
            })?;
        }
    }
    Ok(())
}

#[test]
fn a_cluster_ip_is_served_outside_when_asked_for() -> TestResult {
    let bed = Bed::start(
        "cluster IP served",
        WIDE,
        &["--cluster-ips-outside", "true"],
    )?;
    bed.outside.route_via(bed.node(), &CLUSTER_NETWORKS)?;
    let ask = |vip, protocol| {
        let to = SocketAddr::new(vip, PORT);
        bed.outside
            .client
            .run(|| witness::ask(protocol, to, traffic::TIMEOUT))
    };
    for protocol in Protocol::ALL {
        for vip in cluster_ips(10) {
            let seen = ask(vip, protocol)?;
            assert_eq!((&*seen.server, seen.client), ("near", seen.own));
        }
        for vip in cluster_ips(11) {
            let seen = ask(vip, protocol)?;
            let node = bed.node().address(vip.is_ipv6())?;
            assert_eq!((&*seen.server, seen.client.ip()), ("far", node));
            assert!(NAT_PORTS.contains(&seen.client.port()), "{seen:?}");
        }
    }
    Ok(())
}

/// A Service with load-balancer addresses, source ranges, and the NodePorts and pods of the bed.
fn restrict(bed: &Bed, ranges: &[String]) -> Result<()> {
    let all = [("near", 10_u8, NEAR, &bed.near), ("far", 11, FAR, &bed.far)];
    for (number, (name, cluster_ips, node_port, pod)) in all.into_iter().enumerate() {
        let mut service = node_port_service(name, cluster_ips, node_port);
        service["spec"]["type"] = "LoadBalancer".into();
        service["spec"]["loadBalancerSourceRanges"] = json!(ranges);
        let ingress = [
            virtual_address(number, false)?,
            virtual_address(number, true)?,
        ];
        let ingress = ingress.map(|ip| json!({"ip": ip, "ipMode": "VIP"}));
        service["status"]["loadBalancer"]["ingress"] = json!(ingress);
        apply(&bed.cluster, name, &service, &[pod])?;
    }
    Ok(())
}

/// Addresses of [`restrict`]'s Services.
fn load_balancers() -> Result<Vec<IpAddr>> {
    [(0, false), (0, true), (1, false), (1, true)]
        .into_iter()
        .map(|(number, v6)| virtual_address(number, v6))
        .collect()
}

/// Served at every load-balancer address.
fn is_let_in(client: &NetNs) -> Result<()> {
    for address in load_balancers()? {
        for protocol in Protocol::ALL {
            let to = SocketAddr::new(address, PORT);
            client
                .run(|| witness::ask(protocol, to, traffic::TIMEOUT))
                .with_context(|| format!("{} {to}", protocol.name()))?;
        }
    }
    Ok(())
}

/// Where a client is kept out.
#[derive(Clone, Copy)]
enum Keeper {
    /// At a device: dropped silently.
    Device,
    /// TCP at the socket: refused by `connect()`.
    Socket,
}

/// Served nowhere but at NodePorts and, inside, ClusterIPs; counted at `node`.
fn is_kept_out(bed: &Bed, node: &str, client: &NetNs, tcp: Keeper) -> Result<()> {
    let node = bed.cluster.node(node);
    for address in load_balancers()? {
        let to = SocketAddr::new(address, PORT);
        for protocol in Protocol::ALL {
            let before = node.drops(NOT_IN_SRC_RANGE)?;
            match (protocol, tcp) {
                (Protocol::Tcp, Keeper::Socket) => is_refused(client, protocol, to)?,
                _ => is_dropped(client, protocol, to)?,
            }
            wait_until("it to be counted", traffic::TIMEOUT, || {
                Ok(node.drops(NOT_IN_SRC_RANGE)? > before)
            })
            .with_context(|| format!("{} {to} on {}", protocol.name(), node.name))?;
        }
    }
    for to in [bed.at_node(NEAR), bed.at_node(FAR)].concat() {
        for protocol in Protocol::ALL {
            client.run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
        }
    }
    Ok(())
}

fn source_ranges(name: &str, way: Way) -> Result<()> {
    let arguments: &[&str] = match way {
        Way::BySocket => &[],
        Way::ByPacket => &["--socket-translation", "false"],
    };
    let tcp = match way {
        Way::BySocket => Keeper::Socket,
        Way::ByPacket => Keeper::Device,
    };
    let bed = Bed::start(name, WIDE, arguments)?;
    let pod = bed.cluster.pod("node1", "client")?;
    let [outside, node] = [&bed.outside.client, &*bed.node().netns];
    let hosts = |addresses: &[IpAddr]| -> Vec<String> {
        addresses
            .iter()
            .map(|address| format!("{address}/{}", if address.is_ipv6() { 128 } else { 32 }))
            .collect()
    };

    restrict(&bed, &hosts(&bed.outside.addresses))?;
    is_let_in(outside).context("the client outside alone")?;
    is_kept_out(&bed, "node1", &pod.netns, tcp).context("a pod")?;
    is_kept_out(&bed, "node1", node, tcp).context("a process of the node")?;
    for vip in [cluster_ips(10), cluster_ips(11)].concat() {
        let to = SocketAddr::new(vip, PORT);
        for client in [&pod.netns, node] {
            for protocol in Protocol::ALL {
                client.run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
            }
        }
    }

    // Changed while it runs; networks, and several.
    let ranges = ["10.244.1.0/24", "fd00:244:0:1::/64", "192.0.2.0/24"].map(str::to_owned);
    restrict(&bed, &ranges)?;
    is_kept_out(&bed, "node1", outside, Keeper::Device).context("the client, pods alone")?;
    is_let_in(&pod.netns).context("a pod among them")?;

    restrict(&bed, &hosts(&bed.node().addresses))?;
    is_let_in(node).context("a process, the node alone")?;
    is_kept_out(&bed, "node1", outside, Keeper::Device).context("the client, node alone")?;
    is_kept_out(&bed, "node1", &pod.netns, tcp).context("a pod, node alone")?;

    restrict(&bed, &[])?;
    for client in [outside, &pod.netns, node] {
        is_let_in(client).context("no ranges")?;
    }
    Ok(())
}

#[test]
fn source_ranges_hold_for_everybody() -> TestResult {
    Ok(source_ranges("source ranges", Way::BySocket)?)
}

#[test]
fn source_ranges_hold_packet_by_packet() -> TestResult {
    Ok(source_ranges("source ranges packets", Way::ByPacket)?)
}
