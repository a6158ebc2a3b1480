//! NodePorts, external and load-balancer addresses, as clients of the node itself see them,
//! and those of other nodes and beyond: upstream's `test/e2e/network/service.go`.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};

use anyhow::Result;
use serde_json::{Value, json};
use weir_tests::{
    Cluster, TestResult,
    cluster::cluster_ips,
    objects::{self, Port},
    outside::Outside,
    traffic::Protocol,
};

use super::support::{
    Backends, PORT, TARGET, is_refused, is_served_by, is_unreachable, is_up, service,
};

const NODE_PORT: u16 = 30_080;

fn node_port(service: &mut Value) {
    service["spec"]["type"] = "NodePort".into();
    if let Some(ports) = service["spec"]["ports"].as_array_mut() {
        for port in ports {
            port["nodePort"] = NODE_PORT.into();
        }
    }
}

/// The NodePort at every address of every node.
fn at_nodes(cluster: &Cluster) -> Vec<SocketAddr> {
    let addresses = cluster.nodes().iter().flat_map(|node| &node.addresses);
    addresses
        .map(|address| SocketAddr::new(*address, NODE_PORT))
        .collect()
}

/// Addresses of documentation, RFC 5737 and RFC 3849, as upstream uses them.
fn addresses_of_nobody() -> Result<[IpAddr; 2]> {
    Ok(["203.0.113.250".parse()?, "2001:db8::cb00:71fa".parse()?])
}

/// "should be able to create a functioning NodePort service", "should be able to change the type
/// from ExternalName to NodePort" and "… from NodePort to ExternalName". Limit: 2 min.
#[test]
fn a_node_port_functions() -> TestResult {
    let (cluster, outside) = Outside::start(Cluster::builder("functioning NodePort"))?;
    let backends = Backends::start(&cluster, "pod", &["node1", "node2"])?;
    let client = cluster.pod("node1", "execpod")?;
    let node = cluster.node("node1");
    let vips = cluster_ips(10);
    let external_name = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "nodeport-test", "namespace": "default"},
        "spec": {"type": "ExternalName", "externalName": "example.com"},
    });
    cluster.apply(&external_name)?;
    cluster.wait_applied()?;
    backends.serve(&cluster, "nodeport-test", &vips, node_port)?;
    is_up(&client.netns, &vips, &backends.names())?;
    let clients = [&client.netns, &*node.netns, &outside.client];
    for from in clients {
        for to in at_nodes(&cluster) {
            for protocol in Protocol::ALL {
                is_served_by(from, protocol, to, &backends.names())?;
            }
        }
    }
    // Loopback serves processes of the node alone.
    for address in ["127.0.0.1", "::1"] {
        let to = SocketAddr::new(address.parse::<IpAddr>().expect("an address"), NODE_PORT);
        is_served_by(&node.netns, Protocol::Tcp, to, &backends.names())?;
    }
    // As an ExternalName it has neither.
    cluster.apply(&external_name)?;
    cluster.wait_applied()?;
    for from in clients {
        for protocol in Protocol::ALL {
            for to in at_nodes(&cluster) {
                is_refused(from, protocol, to)?;
            }
            for vip in vips {
                is_unreachable(from, protocol, SocketAddr::new(vip, PORT))?;
            }
        }
    }
    Ok(())
}

/// "should be able to update service type to NodePort listening on same port number but different
/// protocols". Limit: 2 min.
#[test]
fn a_node_port_gets_a_second_protocol() -> TestResult {
    let (cluster, outside) = Outside::start(Cluster::builder("NodePort protocols"))?;
    let backends = Backends::start(&cluster, "pod", &["node1", "node2"])?;
    let client = cluster.pod("node1", "execpod")?;
    let vips = cluster_ips(10);
    cluster.endpoints("nodeport-update-service", TARGET, &backends.endpoints())?;
    let ports = Port::both(PORT, TARGET);
    let serve = |count: usize, has_node_port: bool| -> Result<()> {
        let mut object = objects::service("nodeport-update-service", &vips, &ports[..count]);
        if has_node_port {
            node_port(&mut object);
        }
        cluster.apply(&object)?;
        cluster.wait_applied()
    };
    let clients = [&client.netns, &outside.client];
    serve(1, false)?;
    for vip in vips {
        let to = SocketAddr::new(vip, PORT);
        is_served_by(&client.netns, Protocol::Tcp, to, &backends.names())?;
    }
    for to in at_nodes(&cluster) {
        for from in clients {
            is_refused(from, Protocol::Tcp, to)?;
        }
    }
    for count in [1, 2] {
        serve(count, true)?;
        for (number, protocol) in Protocol::ALL.into_iter().enumerate() {
            for vip in vips {
                let to = SocketAddr::new(vip, PORT);
                if number < count {
                    is_served_by(&client.netns, protocol, to, &backends.names())?;
                } else {
                    is_refused(&client.netns, protocol, to)?;
                }
            }
            for to in at_nodes(&cluster) {
                for from in clients {
                    if number < count {
                        is_served_by(from, protocol, to, &backends.names())?;
                    } else {
                        is_refused(from, protocol, to)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// "should release NodePorts on delete": no process of the node can have the port meanwhile, and
/// one can afterwards. Limit: 5 min (`KubeProxyLagTimeout`).
#[test]
fn a_node_port_is_released() -> TestResult {
    let cluster = Cluster::builder("NodePort released").start()?;
    let backends = Backends::start(&cluster, "pod", &["node1"])?;
    let node = cluster.node("node1");
    let vips = cluster_ips(10);
    let bind = || {
        // One after the other: a socket of `::` wants the port of IPv4 too.
        node.run(|| {
            let all = |address: &str| {
                let tcp = TcpListener::bind((address, NODE_PORT)).is_ok();
                [tcp, UdpSocket::bind((address, NODE_PORT)).is_ok()]
            };
            let ([tcp, udp], [tcp6, udp6]) = (all("0.0.0.0"), all("::"));
            [tcp, udp, tcp6, udp6]
        })
    };
    for _ in 0..2 {
        backends.serve(&cluster, "nodeport-reuse", &vips, node_port)?;
        assert_eq!(bind(), [false; 4], "taken by the NodePort");
        cluster
            .objects()
            .delete(&service("nodeport-reuse", &vips))?;
        cluster.wait_applied()?;
        assert_eq!(bind(), [true; 4], "free again");
    }
    Ok(())
}

/// "should be possible to connect to a service via ExternalIP when the external IP is not assigned
/// to a node". Limit: 2 min.
#[test]
fn an_external_ip_is_served_though_no_device_has_it() -> TestResult {
    let (cluster, outside) = Outside::start(Cluster::builder("external IP"))?;
    let backends = Backends::start(&cluster, "pod", &["node1", "node2"])?;
    let client = cluster.pod("node1", "execpod")?;
    let external = addresses_of_nobody()?;
    backends.serve(&cluster, "externalip-test", &cluster_ips(10), |service| {
        service["spec"]["externalIPs"] = json!(external);
    })?;
    let node = cluster.node("node1");
    let networks = external.map(|address| address.to_string());
    outside.route_via(node, &networks.each_ref().map(String::as_str))?;
    for from in [&client.netns, &*node.netns, &outside.client] {
        is_up(from, &external, &backends.names())?;
    }
    Ok(())
}

/// "should serve endpoints on same port and different protocol for internal traffic on Type
/// LoadBalancer", and KEP-1860's `ipMode`: with `VIP` the address is served inside the cluster,
/// with `Proxy` it is left alone. Limit: 2 min.
#[test]
fn a_load_balancer_address_is_served_inside_the_cluster() -> TestResult {
    let cluster = Cluster::builder("load balancer").start()?;
    let backends = Backends::start(&cluster, "pod", &["node1", "node2"])?;
    let client = cluster.pod("node1", "execpod")?;
    let vips = cluster_ips(10);
    let ingress = addresses_of_nobody()?;
    let load_balancer = |mode: &'static str| {
        move |service: &mut Value| {
            service["spec"]["type"] = "LoadBalancer".into();
            service["spec"]["allocateLoadBalancerNodePorts"] = false.into();
            let ingress = ingress.map(|ip| json!({"ip": ip, "ipMode": mode}));
            service["status"]["loadBalancer"]["ingress"] = json!(ingress);
        }
    };
    for _ in 0..2 {
        backends.serve(
            &cluster,
            "multiprotocol-lb-test",
            &vips,
            load_balancer("VIP"),
        )?;
        is_up(&client.netns, &vips, &backends.names())?;
        is_up(&client.netns, &ingress, &backends.names())?;
        for address in ingress {
            is_refused(&client.netns, Protocol::Tcp, SocketAddr::new(address, 81))?;
        }
        backends.serve(
            &cluster,
            "multiprotocol-lb-test",
            &vips,
            load_balancer("Proxy"),
        )?;
        is_up(&client.netns, &vips, &backends.names())?;
        for address in ingress {
            is_unreachable(&client.netns, Protocol::Tcp, SocketAddr::new(address, PORT))?;
        }
    }
    Ok(())
}
