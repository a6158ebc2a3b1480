//! Slices that somebody writes by hand, from upstream's `test/e2e/network/endpointslice.go`: they
//! say no more than the API demands.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use serde_json::{Value, json};
use weir_tests::{
    Cluster, Pod, TestResult,
    cluster::cluster_ips,
    objects::{self, Port},
    traffic::Protocol,
};

use super::support::{is_served_by, name};

const PORTS: [Port; 2] = [
    Port {
        name: "port80",
        protocol: Protocol::Tcp,
        port: 80,
        target: 8090,
    },
    Port {
        name: "port81",
        protocol: Protocol::Tcp,
        port: 81,
        target: 9090,
    },
];

/// One address and one port, without node, target or any condition but `ready`.
fn bare_slice(number: usize, address: IpAddr, port: &str, target: u16) -> Value {
    let family = if address.is_ipv6() { "IPv6" } else { "IPv4" };
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("e2e-custom-slice{number}-{}", family.to_lowercase()),
            "namespace": "default",
            "labels": {
                "kubernetes.io/service-name": "example-custom-endpoints",
                "endpointslice.kubernetes.io/managed-by": "e2e-test",
            },
        },
        "addressType": family,
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        "ports": [{"name": port, "port": target, "protocol": "TCP"}],
    })
}

/// A Service without selector, and slices that lead its ports to these pods and their ports.
fn ports_lead_to(cluster: &Cluster, pods: [&Pod; 2], targets: [u16; 2]) -> Result<()> {
    let mut servers = Vec::new();
    for (pod, target) in pods.iter().zip(targets) {
        servers.extend(pod.serve(target)?);
    }
    let client = cluster.pod("node1", "pause-pod-0")?;
    let vips = cluster_ips(10);
    cluster.apply(&objects::service("example-custom-endpoints", &vips, &PORTS))?;
    for (number, ((pod, target), port)) in pods.iter().zip(targets).zip(PORTS).enumerate() {
        for address in &pod.addresses {
            cluster.apply(&bare_slice(number, *address, port.name, target))?;
        }
    }
    cluster.wait_applied()?;
    for vip in vips {
        for (pod, port) in pods.iter().zip(PORTS) {
            let to = SocketAddr::new(vip, port.port);
            is_served_by(&client.netns, Protocol::Tcp, to, &name(pod))?;
        }
    }
    Ok(())
}

/// "should support a Service with multiple ports specified in multiple EndpointSlices". Limit:
/// 2 min. "should mirror a custom Endpoint with multiple subsets and same IP address" makes the
/// same slices.
#[test]
fn ports_of_one_endpoint_stand_in_several_slices() -> TestResult {
    let cluster = Cluster::builder("slices of ports").start()?;
    let pod = cluster.pod("node2", "pod-handle-http-request")?;
    Ok(ports_lead_to(&cluster, [&pod, &pod], [8090, 9090])?)
}

/// "should support a Service with multiple endpoint IPs specified in multiple EndpointSlices".
/// Limit: 2 min.
#[test]
fn endpoints_of_several_ports_stand_in_several_slices() -> TestResult {
    let cluster = Cluster::builder("slices of endpoints").start()?;
    let first = cluster.pod("node1", "pod1-handle-http-request")?;
    let second = cluster.pod("node2", "pod2-handle-http-request")?;
    Ok(ports_lead_to(&cluster, [&first, &second], [8090, 8090])?)
}
