//! Upstream's `test/e2e/network/service.go`, without what has a file of its own here.

use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use weir_tests::{
    Cluster, TestResult,
    cluster::cluster_ips,
    traffic::{self, Protocol},
};

use super::support::{Backends, PORT, TARGET, is_up, name, service};

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
