//! "Granular Checks" of upstream's `test/e2e/common/network/networking.go` and
//! `test/e2e/network/networking.go`. Each goes over both families, which makes them the tests of
//! `test/e2e/network/dual_stack.go` ("Granular Checks: Services Secondary IP Family") too. Limit:
//! `MaxTries` requests of 2 s each, all endpoints seen.

use std::net::SocketAddr;

use anyhow::Result;
use weir_tests::{
    Cluster, TestResult,
    cluster::cluster_ips,
    objects::Endpoint,
    outside::Outside,
    traffic::{self, Connection, Protocol},
};

use super::support::{
    Backends, PORT, TARGET, is_down, is_refused, is_served_by, is_unreachable, is_up, name, service,
};

const NODE_PORT: u16 = 30_080;

/// "Granular Checks: Pods should function for intra-pod communication: http [NodeConformance]",
/// "… udp"; "should function for node-pod communication: http [LinuxOnly]", "… udp".
#[test]
fn pods_and_nodes_reach_pods() -> TestResult {
    let cluster = Cluster::builder("granular pods").start()?;
    let backends = Backends::start(&cluster, "netserver-", &["node1", "node2"])?;
    let client = cluster.pod("node1", "test-container-pod")?;
    for from in [&client.netns, &*cluster.node("node1").netns] {
        for pod in &backends.pods {
            for address in &pod.addresses {
                for protocol in Protocol::ALL {
                    let to = SocketAddr::new(*address, TARGET);
                    is_served_by(from, protocol, to, &name(pod))?;
                }
            }
        }
    }
    Ok(())
}

/// A Service that also has NodePorts.
fn node_port(service: &mut serde_json::Value, port: u16) {
    service["spec"]["type"] = "NodePort".into();
    for number in 0..2 {
        service["spec"]["ports"][number]["nodePort"] = port.into();
    }
}

/// "should function for pod-Service: http" and "… udp", their part with the ClusterIP.
#[test]
fn pods_reach_services() -> TestResult {
    let cluster = Cluster::builder("pod-Service").start()?;
    let backends = Backends::start(&cluster, "netserver-", &["node1", "node2"])?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "node-port-service", &vips, |_| {})?;
    for node in ["node1", "node2"] {
        let client = cluster.pod(node, &format!("client-{node}"))?;
        is_up(&client.netns, &vips, &backends.names())?;
    }
    Ok(())
}

/// "should function for node-Service: http" and "… udp", their part with the ClusterIP.
#[test]
fn nodes_reach_services() -> TestResult {
    let cluster = Cluster::builder("node-Service").start()?;
    let backends = Backends::start(&cluster, "netserver-", &["node1", "node2"])?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "node-port-service", &vips, |_| {})?;
    for node in cluster.nodes() {
        is_up(&node.netns, &vips, &backends.names())?;
    }
    Ok(())
}

/// "should function for endpoint-Service: http" and "… udp": each endpoint reaches all, itself
/// included.
#[test]
fn endpoints_reach_their_own_service() -> TestResult {
    let cluster = Cluster::builder("endpoint-Service").start()?;
    let backends = Backends::start(&cluster, "netserver-", &["node1", "node2"])?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "node-port-service", &vips, |_| {})?;
    for pod in &backends.pods {
        is_up(&pod.netns, &vips, &backends.names())?;
    }
    Ok(())
}

/// The parts of "should function for pod-Service", "node-Service" and "endpoint-Service" with a
/// node's address, "should support basic nodePort: udp functionality", and "should update
/// nodePort: http [Slow]" and "… udp [Slow]": at the client's own node, at another, and from
/// beyond. Limit: ten tries after the removal.
#[test]
fn node_ports_function_and_are_removed() -> TestResult {
    let (cluster, outside) = Outside::start(Cluster::builder("nodePort"))?;
    let backends = Backends::start(&cluster, "netserver-", &["node1", "node2"])?;
    let client = cluster.pod("node1", "test-container-pod")?;
    let node = cluster.node("node1");
    let vips = cluster_ips(10);
    backends.serve(&cluster, "node-port-service", &vips, |service| {
        node_port(service, NODE_PORT);
    })?;
    let clients = [
        &client.netns,
        &*node.netns,
        &backends.pods[0].netns,
        &outside.client,
    ];
    let addresses = || cluster.nodes().iter().flat_map(|node| &node.addresses);
    for from in clients {
        for address in addresses() {
            for protocol in Protocol::ALL {
                let to = SocketAddr::new(*address, NODE_PORT);
                is_served_by(from, protocol, to, &backends.names())?;
            }
        }
    }
    cluster
        .objects()
        .delete(&service("node-port-service", &vips))?;
    cluster.wait_applied()?;
    for from in clients {
        for address in addresses() {
            for protocol in Protocol::ALL {
                is_refused(from, protocol, SocketAddr::new(*address, NODE_PORT))?;
            }
        }
    }
    Ok(())
}

/// "should function for multiple endpoint-Services with same selector".
#[test]
fn services_with_the_same_endpoints_are_independent() -> TestResult {
    let cluster = Cluster::builder("same selector").start()?;
    let backends = Backends::start(&cluster, "netserver-", &["node1", "node2"])?;
    let (first, second) = (cluster_ips(10), cluster_ips(11));
    backends.serve(&cluster, "node-port-service", &first, |_| {})?;
    backends.serve(&cluster, "second-node-port-service", &second, |_| {})?;
    let client = &backends.pods[0].netns;
    is_up(client, &first, &backends.names())?;
    is_up(client, &second, &backends.names())?;
    cluster
        .objects()
        .delete(&service("node-port-service", &first))?;
    cluster.wait_applied()?;
    for vip in first {
        is_unreachable(client, Protocol::Tcp, SocketAddr::new(vip, PORT))?;
    }
    Ok(is_up(client, &second, &backends.names())?)
}

/// "should update endpoints: http" and "… udp".
#[test]
fn endpoints_are_updated() -> TestResult {
    let cluster = Cluster::builder("update endpoints").start()?;
    let on = ["node1", "node2", "node2"];
    let backends = Backends::start(&cluster, "netserver-", &on)?;
    let client = cluster.pod("node1", "test-container-pod")?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "node-port-service", &vips, |_| {})?;
    is_up(&client.netns, &vips, &backends.names())?;
    let left: Vec<Endpoint> = backends.pods[1..]
        .iter()
        .flat_map(weir_tests::Pod::endpoints)
        .collect();
    cluster.endpoints("node-port-service", TARGET, &left)?;
    cluster.wait_applied()?;
    is_up(&client.netns, &vips, &backends.names()[1..])?;
    cluster.endpoints("node-port-service", TARGET, &backends.endpoints())?;
    cluster.wait_applied()?;
    Ok(is_up(&client.netns, &vips, &backends.names())?)
}

/// "should be able to handle large requests: http" and "… udp": 2,000 bytes, larger than the MTU.
#[test]
fn large_requests_are_handled() -> TestResult {
    const LENGTH: usize = 2000;
    let cluster = Cluster::builder("large requests").start()?;
    let backends = Backends::start(&cluster, "netserver-", &["node1", "node2"])?;
    let client = cluster.pod("node1", "test-container-pod")?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "node-port-service", &vips, |_| {})?;
    for vip in vips {
        let to = SocketAddr::new(vip, PORT);
        client.run(|| -> Result<()> {
            for _ in 0..20 {
                traffic::udp_name(to, LENGTH)?;
                let mut connection = Connection::open(to)?;
                connection.start_echo()?;
                connection.echo(&[b'4'; LENGTH])?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// "should function for service endpoints using hostNetwork", with the ClusterIP and the NodePort.
#[test]
fn endpoints_on_nodes_are_reached() -> TestResult {
    let (cluster, outside) = Outside::start(Cluster::builder("hostNetwork endpoints"))?;
    let mut servers = Vec::new();
    for node in cluster.nodes() {
        servers.extend(node.serve(TARGET)?);
    }
    let client = cluster.pod("node1", "test-container-pod")?;
    let vips = cluster_ips(10);
    let endpoints: Vec<Endpoint> = cluster
        .nodes()
        .iter()
        .flat_map(|node| {
            let addresses = node.addresses.iter();
            addresses.map(|address| Endpoint::ready(*address, &node.name, ""))
        })
        .collect();
    cluster.service("node-port-service", &vips, TARGET, &endpoints)?;
    let clients = [&client.netns, &*cluster.node("node1").netns];
    for from in clients {
        is_up(from, &vips, &["node1", "node2"])?;
    }
    let mut object = service("node-port-service", &vips);
    node_port(&mut object, NODE_PORT);
    cluster.apply(&object)?;
    cluster.wait_applied()?;
    for from in clients.into_iter().chain([&outside.client]) {
        for address in cluster.nodes().iter().flat_map(|node| &node.addresses) {
            for protocol in Protocol::ALL {
                let to = SocketAddr::new(*address, NODE_PORT);
                is_served_by(from, protocol, to, &["node1", "node2"])?;
            }
        }
    }
    cluster.endpoints("node-port-service", TARGET, &[])?;
    cluster.wait_applied()?;
    Ok(is_down(&client.netns, &vips)?)
}
