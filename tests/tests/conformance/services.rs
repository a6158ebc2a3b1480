//! Upstream's `test/e2e/network/service.go`, without what has a file of its own here.

use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use weir_tests::{
    Cluster, Pod, TestResult,
    cluster::cluster_ips,
    objects::{self, Port},
    traffic::{self, Protocol, Server},
};

use super::support::{
    Backends, PORT, TARGET, is_down, is_refused, is_served_by, is_up, name, service,
};

/// "should serve a basic endpoint from pods". Limit: 3 min (`ServiceStartTimeout`).
#[test]
fn serves_a_basic_endpoint_from_pods() -> TestResult {
    let cluster = Cluster::builder("basic endpoint").start()?;
    let client = cluster.pod("node1", "execpod")?;
    let backends = Backends::start(&cluster, "pod", &["node1", "node2"])?;
    let vips = cluster_ips(10);
    cluster.service("endpoint-test2", &vips, TARGET, &[])?;
    is_down(&client.netns, &vips)?;
    let [first, second] = [&backends.pods[0], &backends.pods[1]];
    for present in [vec![first], vec![first, second], vec![second]] {
        cluster.service_of_pods("endpoint-test2", &vips, TARGET, &present)?;
        let names: Vec<&str> = present.iter().map(|pod| pod.name.as_str()).collect();
        is_up(&client.netns, &vips, &names)?;
    }
    cluster.service_of_pods("endpoint-test2", &vips, TARGET, &[])?;
    Ok(is_down(&client.netns, &vips)?)
}

/// A TCP port of a Service whose endpoints have each their own number for it.
const fn tcp(name: &'static str, port: u16, target: u16) -> Port {
    Port {
        name,
        protocol: Protocol::Tcp,
        port,
        target,
    }
}

/// The slices of a pod that has only one of the Service's ports, as the controller makes them.
fn slices_of_port(service: &str, pod: &Pod, port: Port) -> Vec<Value> {
    let slice = |v6: bool| {
        let mut endpoints = pod.endpoints();
        endpoints.retain(|endpoint| endpoint.address.is_ipv6() == v6);
        let mut slice = objects::endpoint_slice(service, v6, &endpoints, &[port]);
        slice["metadata"]["name"] = format!("{service}-{}-v6-{v6}", port.name).into();
        slice
    };
    vec![slice(false), slice(true)]
}

/// Pods that listen on ports of their own.
fn serve_own_ports(pods: &[(&Pod, u16)]) -> Result<Vec<Server>> {
    let mut servers = Vec::new();
    for (pod, port) in pods {
        servers.extend(pod.serve(*port)?);
    }
    Ok(servers)
}

/// "should serve multiport endpoints from pods". Limit: 3 min.
#[test]
fn serves_multiport_endpoints_from_pods() -> TestResult {
    let cluster = Cluster::builder("multiport").start()?;
    let client = cluster.pod("node1", "execpod")?;
    let (first, second) = (cluster.pod("node1", "pod1")?, cluster.pod("node2", "pod2")?);
    let _servers = serve_own_ports(&[(&first, 100), (&second, 101)])?;
    let ports = [tcp("portname1", 80, 100), tcp("portname2", 81, 101)];
    let vips = cluster_ips(10);
    cluster.apply(&objects::service("multi-endpoint-test", &vips, &ports))?;
    let slices = [
        slices_of_port("multi-endpoint-test", &first, ports[0]),
        slices_of_port("multi-endpoint-test", &second, ports[1]),
    ];
    for slice in slices.iter().flatten() {
        cluster.apply(slice)?;
    }
    cluster.wait_applied()?;
    for vip in vips {
        for (port, pod) in [(80, &first), (81, &second)] {
            let to = SocketAddr::new(vip, port);
            is_served_by(&client.netns, Protocol::Tcp, to, &name(pod))?;
        }
    }
    for slice in &slices[0] {
        cluster.objects().delete(slice)?;
    }
    cluster.wait_applied()?;
    for vip in vips {
        is_refused(&client.netns, Protocol::Tcp, SocketAddr::new(vip, 80))?;
        let to = SocketAddr::new(vip, 81);
        is_served_by(&client.netns, Protocol::Tcp, to, &name(&second))?;
    }
    Ok(())
}

/// "should be updated after adding or deleting ports". Limit: 3 min.
#[test]
fn is_updated_after_adding_or_deleting_ports() -> TestResult {
    let cluster = Cluster::builder("edit ports").start()?;
    let client = cluster.pod("node1", "execpod")?;
    let (first, second) = (cluster.pod("node1", "pod1")?, cluster.pod("node2", "pod2")?);
    let _servers = serve_own_ports(&[(&first, 100), (&second, 101)])?;
    let ports = [tcp("portname1", 80, 100), tcp("portname2", 81, 101)];
    let vips = cluster_ips(10);
    let apply = |ports: &[Port]| {
        cluster.apply(&objects::service("edit-port-test", &vips, ports))?;
        cluster.wait_applied()
    };
    for slice in slices_of_port("edit-port-test", &first, ports[0]) {
        cluster.apply(&slice)?;
    }
    apply(&ports[..1])?;
    let check = |second_port: bool| -> Result<()> {
        for vip in vips {
            let (to, other) = (SocketAddr::new(vip, 80), SocketAddr::new(vip, 81));
            is_served_by(&client.netns, Protocol::Tcp, to, &name(&first))?;
            if second_port {
                is_served_by(&client.netns, Protocol::Tcp, other, &name(&second))?;
            } else {
                is_refused(&client.netns, Protocol::Tcp, other)?;
            }
        }
        Ok(())
    };
    check(false)?;
    for slice in slices_of_port("edit-port-test", &second, ports[1]) {
        cluster.apply(&slice)?;
    }
    apply(&ports)?;
    check(true)?;
    apply(&ports[..1])?;
    Ok(check(false)?)
}

/// "should preserve source pod IP for traffic thru service cluster IP [LinuxOnly]". Limit: 2 min
/// (`execSourceIPTest` polls).
#[test]
fn keeps_the_address_of_a_pod_through_a_cluster_ip() -> TestResult {
    let cluster = Cluster::builder("source address").start()?;
    let server = cluster.pod("node1", "echo-sourceip")?;
    let clients = [
        cluster.pod("node1", "pause1")?,
        cluster.pod("node2", "pause2")?,
    ];
    let vips = cluster_ips(10);
    cluster.service_of_pods("sourceip-test", &vips, TARGET, &[&server])?;
    for (vip, address) in vips.iter().zip(&server.addresses) {
        let listener = server
            .run(|| TcpListener::bind(SocketAddr::new(*address, TARGET)))
            .context("listen")?;
        for client in &clients {
            let to = SocketAddr::new(*vip, PORT);
            let stream = client.run(|| TcpStream::connect_timeout(&to, traffic::TIMEOUT));
            let stream = stream.context("connect")?;
            let (_, seen) = listener.accept().context("accept")?;
            assert_eq!(seen.ip(), client.address(vip.is_ipv6())?);
            let own = stream.local_addr().context("local address")?;
            assert_eq!(seen, own);
        }
    }
    Ok(())
}

/// "should allow pods to hairpin back to themselves through services". Limit: 2 min.
#[test]
fn lets_pods_reach_themselves_through_services() -> TestResult {
    let cluster = Cluster::builder("hairpin").nodes(1).start()?;
    let backends = Backends::start(&cluster, "hairpin", &["node1"])?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "hairpin-test", &vips, |_| {})?;
    Ok(is_up(
        &backends.pods[0].netns,
        &vips,
        &name(&backends.pods[0]),
    )?)
}

/// "should be able to up and down services". Limit: 2 min each.
#[test]
fn services_come_up_and_go_down() -> TestResult {
    let cluster = Cluster::builder("up and down").start()?;
    let client = cluster.pod("node1", "execpod")?;
    let on = ["node1", "node2", "node1"];
    let (first, second) = (
        Backends::start(&cluster, "up-down-1-", &on)?,
        Backends::start(&cluster, "up-down-2-", &on)?,
    );
    let vips = [cluster_ips(10), cluster_ips(11), cluster_ips(12)];
    first.serve(&cluster, "up-down-1", &vips[0], |_| {})?;
    second.serve(&cluster, "up-down-2", &vips[1], |_| {})?;
    for from in [&client.netns, &*cluster.node("node1").netns] {
        is_up(from, &vips[0], &first.names())?;
        is_up(from, &vips[1], &second.names())?;
    }
    delete_service(&cluster, "up-down-1", &vips[0])?;
    // Nobody has the address any more: it need not be refused.
    for vip in vips[0] {
        super::support::is_unreachable(&client.netns, Protocol::Tcp, SocketAddr::new(vip, PORT))?;
    }
    is_up(&client.netns, &vips[1], &second.names())?;
    first.serve(&cluster, "up-down-3", &vips[2], |_| {})?;
    is_up(&client.netns, &vips[1], &second.names())?;
    Ok(is_up(&client.netns, &vips[2], &first.names())?)
}

fn delete_service(cluster: &Cluster, name: &str, vips: &[std::net::IpAddr]) -> Result<()> {
    cluster.objects().delete(&service(name, vips))?;
    for v6 in [false, true] {
        let slice = super::support::slice(name, v6, &[], |_, _| {});
        cluster.objects().delete(&slice)?;
    }
    cluster.wait_applied()
}

/// "should work after the service has been recreated". Limit: 2 min (`RespondingTimeout`).
#[test]
fn works_after_the_service_was_recreated() -> TestResult {
    let cluster = Cluster::builder("recreated").start()?;
    let client = cluster.pod("node1", "execpod")?;
    let backends = Backends::start(&cluster, "pod", &["node2"])?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "service-deletion", &vips, |_| {})?;
    is_up(&client.netns, &vips, &backends.names())?;
    // Only the Service goes; its slices stay for a while.
    cluster
        .objects()
        .delete(&service("service-deletion", &vips))?;
    cluster.wait_applied()?;
    for vips in [vips, cluster_ips(11)] {
        cluster.apply(&service("service-deletion", &vips))?;
        cluster.wait_applied()?;
        is_up(&client.netns, &vips, &backends.names())?;
    }
    Ok(())
}

/// "should work after restarting kube-proxy [Disruptive]". Limit: 2 min.
#[test]
fn works_after_a_restart_of_the_agent() -> TestResult {
    let cluster = Cluster::builder("restart").start()?;
    let client = cluster.pod("node1", "execpod")?;
    let on = ["node1", "node2", "node2"];
    let backends = Backends::start(&cluster, "restart-proxy-", &on)?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "restart-proxy-1", &vips, |_| {})?;
    is_up(&client.netns, &vips, &backends.names())?;
    for node in cluster.nodes() {
        node.kill9_agent()?;
    }
    is_up(&client.netns, &vips, &backends.names())?;
    for node in cluster.nodes() {
        node.start_agent()?;
    }
    is_up(&client.netns, &vips, &backends.names())?;
    let more = cluster_ips(11);
    backends.serve(&cluster, "restart-proxy-2", &more, |_| {})?;
    Ok(is_up(&client.netns, &more, &backends.names())?)
}

/// "should serve endpoints on same port and different protocols". Limit: 30 s.
#[test]
fn serves_one_port_number_with_different_protocols() -> TestResult {
    let cluster = Cluster::builder("protocols").start()?;
    let client = cluster.pod("node1", "execpod")?;
    let backends = Backends::start(&cluster, "pod", &["node2"])?;
    let vips = cluster_ips(10);
    backends.serve(&cluster, "multiprotocol-test", &vips, |_| {})?;
    is_up(&client.netns, &vips, &backends.names())?;
    for (kept, port) in Protocol::ALL.into_iter().zip(Port::both(PORT, TARGET)) {
        cluster.apply(&objects::service("multiprotocol-test", &vips, &[port]))?;
        cluster.wait_applied()?;
        for vip in vips {
            for protocol in Protocol::ALL {
                let to = SocketAddr::new(vip, PORT);
                if protocol == kept {
                    is_served_by(&client.netns, protocol, to, &backends.names())?;
                } else {
                    is_refused(&client.netns, protocol, to)?;
                }
            }
        }
    }
    Ok(())
}

/// "should be able to change the type from ExternalName to ClusterIP" and "… from ClusterIP to
/// ExternalName". Limit: 2 min.
#[test]
fn changes_between_external_name_and_cluster_ip() -> TestResult {
    let cluster = Cluster::builder("external name").start()?;
    let client = cluster.pod("node1", "execpod")?;
    let backends = Backends::start(&cluster, "pod", &["node1", "node2"])?;
    let vips = cluster_ips(10);
    let external = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "externalname-service", "namespace": "default"},
        "spec": {"type": "ExternalName", "externalName": "example.com"},
    });
    for _ in 0..2 {
        cluster.apply(&external)?;
        cluster.wait_applied()?;
        let listed = cluster.node("node1").weir_json(&["bpf", "lb", "list"])?;
        assert_eq!(listed, json!([]), "an ExternalName has no frontend");
        backends.serve(&cluster, "externalname-service", &vips, |_| {})?;
        is_up(&client.netns, &vips, &backends.names())?;
    }
    Ok(())
}

/// "should implement service.kubernetes.io/service-proxy-name" and "should implement
/// service.kubernetes.io/headless". Limit: 2 min each way.
#[test]
fn leaves_labelled_services_to_others() -> TestResult {
    let cluster = Cluster::builder("labels").start()?;
    let client = cluster.pod("node1", "execpod")?;
    let on = ["node1", "node2", "node1"];
    let backends = Backends::start(&cluster, "toggled-", &on)?;
    let (disabled, toggled) = (cluster_ips(10), cluster_ips(11));
    let labels = [
        ("service.kubernetes.io/service-proxy-name", "foo-bar"),
        ("service.kubernetes.io/headless", ""),
    ];
    let is_not_served = |vips: &[std::net::IpAddr]| -> Result<()> {
        vips.iter().try_for_each(|vip| {
            let to = SocketAddr::new(*vip, PORT);
            super::support::is_unreachable(&client.netns, Protocol::Tcp, to)
        })
    };
    for (label, value) in labels {
        let set = |service: &mut Value| service["metadata"]["labels"] = json!({label: value});
        backends.serve(&cluster, "disabled", &disabled, set)?;
        backends.serve(&cluster, "toggled", &toggled, |_| {})?;
        is_up(&client.netns, &toggled, &backends.names())?;
        is_not_served(&disabled)?;
        backends.serve(&cluster, "toggled", &toggled, set)?;
        is_not_served(&toggled)?;
        backends.serve(&cluster, "toggled", &toggled, |_| {})?;
        is_up(&client.netns, &toggled, &backends.names())?;
        is_not_served(&disabled)?;
    }
    Ok(())
}

/// "should be rejected when no endpoints exist" and "should be rejected for evicted pods (no
/// endpoints exist)". Limit: 30 s (`KubeProxyEndpointLagTimeout`), each answer within 3 s.
#[test]
fn refuses_when_no_endpoints_exist() -> TestResult {
    let cluster = Cluster::builder("no endpoints").start()?;
    let client = cluster.pod("node1", "execpod-noendpoints")?;
    let vips = cluster_ips(10);
    // Without any slice, and with empty ones.
    cluster.apply(&service("no-pods", &vips))?;
    cluster.wait_applied()?;
    let clients = [&client.netns, &*cluster.node("node1").netns];
    for from in clients {
        is_down(from, &vips)?;
    }
    let mut evicted = service("no-pods", &vips);
    evicted["spec"]["publishNotReadyAddresses"] = true.into();
    cluster.apply(&evicted)?;
    cluster.endpoints("no-pods", TARGET, &[])?;
    cluster.wait_applied()?;
    for from in clients {
        is_down(from, &vips)?;
    }
    Ok(())
}
