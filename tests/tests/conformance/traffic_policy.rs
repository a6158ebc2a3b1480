//! `internalTrafficPolicy: Local`, and `externalTrafficPolicy` as clients inside see it, from upstream's `test/e2e/network/service.go`. Limit of all:
//! five times, each within 5 s (`curl --connect-timeout 5`). How it fails without an endpoint upstream
//! leaves open, and kube-proxy drops; Weir refuses at once.

use std::net::SocketAddr;

use weir_tests::{
    Cluster, Node, TestResult, cluster::cluster_ips, objects::Endpoint, traffic::Protocol,
};

use super::support::{Backends, TARGET, is_down, is_served_by, is_up, service};

fn local(service: &mut serde_json::Value) {
    service["spec"]["internalTrafficPolicy"] = "Local".into();
}

/// "should respect internalTrafficPolicy=Local Pod to Pod".
#[test]
fn internal_local_from_pod_to_pod() -> TestResult {
    let cluster = Cluster::builder("local pod to pod").start()?;
    let backends = Backends::start(&cluster, "echo-hostname-", &["node1"])?;
    let near = cluster.pod("node1", "pause1")?;
    let far = cluster.pod("node2", "pause2")?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "svc-itp", &vips, local)?;
    is_up(&near.netns, &vips, &backends.names())?;
    is_down(&far.netns, &vips)?;
    // Switched while it runs.
    backends.serve(&cluster, "svc-itp", &vips, |_| {})?;
    is_up(&far.netns, &vips, &backends.names())?;
    backends.serve(&cluster, "svc-itp", &vips, local)?;
    Ok(is_down(&far.netns, &vips)?)
}

/// "should respect internalTrafficPolicy=Local Pod (hostNetwork: true) to Pod".
#[test]
fn internal_local_from_node_to_pod() -> TestResult {
    let cluster = Cluster::builder("local node to pod").start()?;
    let backends = Backends::start(&cluster, "echo-hostname-", &["node1"])?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "svc-itp", &vips, local)?;
    is_up(&cluster.node("node1").netns, &vips, &backends.names())?;
    Ok(is_down(&cluster.node("node2").netns, &vips)?)
}

fn host_network_endpoints(node: &Node) -> Vec<Endpoint> {
    let addresses = node.addresses.iter();
    addresses
        .map(|address| Endpoint::ready(*address, &node.name, ""))
        .collect()
}

/// "should respect internalTrafficPolicy=Local Pod and Node, to Pod (hostNetwork: true)".
#[test]
fn internal_local_to_an_endpoint_on_the_node() -> TestResult {
    let cluster = Cluster::builder("local to host network").start()?;
    let (node1, node2) = (cluster.node("node1"), cluster.node("node2"));
    let _servers = node1.serve(TARGET)?;
    let near = cluster.pod("node1", "pause1")?;
    let far = cluster.pod("node2", "pause2")?;
    let vips = cluster_ips(10);
    let mut object = service("svc-itp", &vips);
    local(&mut object);
    cluster.apply(&object)?;
    cluster.endpoints("svc-itp", TARGET, &host_network_endpoints(node1))?;
    cluster.wait_applied()?;
    is_up(&near.netns, &vips, &["node1"])?;
    is_down(&far.netns, &vips)?;
    is_up(&node1.netns, &vips, &["node1"])?;
    Ok(is_down(&node2.netns, &vips)?)
}

/// "should implement NodePort and HealthCheckNodePort correctly when ExternalTrafficPolicy changes", of
/// `test/e2e/network/loadbalancer.go`, as far as clients of the node itself see it: whatever the policy,
/// they reach every endpoint, from a node without any too. Clients outside and the health check are
/// not asked. Limit: 5 min (`KubeProxyLagTimeout`).
#[test]
fn a_node_port_serves_the_inside_whatever_the_external_policy() -> TestResult {
    const NODE_PORT: u16 = 30_080;
    let cluster = Cluster::builder("external policy").nodes(3).start()?;
    let backends = Backends::start(&cluster, "echo-hostname-", &["node1", "node2"])?;
    let clients = [
        cluster.pod("node1", "pause1")?,
        cluster.pod("node3", "pause3")?,
    ];
    let vips = cluster_ips(10);
    for policy in ["Local", "Cluster", "Local"] {
        backends.serve(&cluster, "external-local", &vips, |service| {
            service["spec"]["type"] = "NodePort".into();
            service["spec"]["externalTrafficPolicy"] = policy.into();
            for port in 0..2 {
                service["spec"]["ports"][port]["nodePort"] = NODE_PORT.into();
            }
        })?;
        for client in &clients {
            let node = cluster.node(&client.node);
            for from in [&client.netns, &*node.netns] {
                is_up(from, &vips, &backends.names())?;
                for address in &node.addresses {
                    let to = SocketAddr::new(*address, NODE_PORT);
                    for protocol in Protocol::ALL {
                        is_served_by(from, protocol, to, &backends.names())?;
                    }
                }
            }
        }
    }
    Ok(())
}
