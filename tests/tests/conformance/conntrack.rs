//! Upstream's `test/e2e/network/conntrack.go`: a client that sends from one port all the time is
//! never stuck with an endpoint that has gone. Upstream allows one minute, because of the
//! time-out of UDP in conntrack; here the next datagram must arrive.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::Result;
use serde_json::{Value, json};
use weir_tests::{
    Cluster, TestResult,
    cluster::cluster_ips,
    netns::NetNs,
    outside::{Outside, VIRTUAL_NETWORKS},
    traffic::{self, UdpClient},
};

use super::support::{Backends, PORT, apply_slices};

/// How long an answer that must not come is waited for.
const SILENCE: Duration = Duration::from_millis(300);

/// A socket in a namespace for each frontend, used for the whole test.
fn sockets(client: &NetNs, frontends: &[SocketAddr]) -> Result<Vec<UdpClient>> {
    frontends
        .iter()
        .map(|to| client.run(|| UdpClient::new(*to)))
        .collect()
}

/// One datagram from each socket; all must be answered by the server.
fn all_reach(sockets: &[UdpClient], server: &str) -> Result<()> {
    for socket in sockets {
        let name = socket.ask(b"hostname", traffic::TIMEOUT)?;
        anyhow::ensure!(name == server, "{name} answered instead of {server}");
    }
    Ok(())
}

/// One datagram from each socket; none may be answered.
fn none_reaches_anybody(sockets: &[UdpClient]) {
    for socket in sockets {
        let answer = socket.ask(b"too early", SILENCE);
        assert!(answer.is_err(), "{answer:?}");
    }
}

fn at(addresses: &[IpAddr], port: u16) -> Vec<SocketAddr> {
    let addresses = addresses.iter();
    addresses.map(|ip| SocketAddr::new(*ip, port)).collect()
}

/// First no endpoint, then one, then another, while the client goes on sending.
fn server_pod_cycles(
    cluster: &Cluster,
    client: &NetNs,
    frontends: &[SocketAddr],
    change: impl Fn(&mut Value),
) -> Result<()> {
    cycle(cluster, client, frontends, ["node2", "node2"], change)
}

/// As [`server_pod_cycles`], with the endpoints on the named nodes.
fn cycle(
    cluster: &Cluster,
    client: &NetNs,
    frontends: &[SocketAddr],
    on: [&str; 2],
    change: impl Fn(&mut Value),
) -> Result<()> {
    let vips = cluster_ips(10);
    let backends = Backends::start(cluster, "pod-server-", &on)?;
    let [first, second] = [&backends.pods[0], &backends.pods[1]];
    backends.serve(cluster, "svc-udp", &vips, &change)?;
    apply_slices(cluster, "svc-udp", &[], |_, _| {})?;
    let sockets = sockets(client, frontends)?;
    none_reaches_anybody(&sockets);
    for pod in [first, second, first] {
        apply_slices(cluster, "svc-udp", &pod.endpoints(), |_, _| {})?;
        all_reach(&sockets, &pod.name)?;
    }
    Ok(())
}

/// "should be able to preserve UDP traffic when server pod cycles for a ClusterIP service".
#[test]
fn udp_follows_the_server_of_a_cluster_ip() -> TestResult {
    let cluster = Cluster::builder("udp cycles").start()?;
    let client = cluster.pod("node1", "pod-client")?;
    let frontends = at(&cluster_ips(10), PORT);
    Ok(server_pod_cycles(
        &cluster,
        &client.netns,
        &frontends,
        |_| {},
    )?)
}

/// "should be able to preserve UDP traffic when server pod cycles for a ClusterIP service and
/// client is hostNetwork".
#[test]
fn udp_of_the_node_follows_the_server_of_a_cluster_ip() -> TestResult {
    let cluster = Cluster::builder("udp cycles, node").start()?;
    let client = cluster.node("node1").netns.clone();
    let frontends = at(&cluster_ips(10), PORT);
    Ok(server_pod_cycles(&cluster, &client, &frontends, |_| {})?)
}

/// "should be able to preserve UDP traffic when server pod cycles for a NodePort service", at the
/// client's own node (upstream's client uses the other node's, which is outside).
#[test]
fn udp_follows_the_server_of_a_node_port() -> TestResult {
    const NODE_PORT: u16 = 30_080;
    let cluster = Cluster::builder("udp cycles, node port").start()?;
    let client = cluster.pod("node1", "pod-client")?;
    let frontends = at(&cluster.node("node1").addresses, NODE_PORT);
    Ok(server_pod_cycles(
        &cluster,
        &client.netns,
        &frontends,
        |service| {
            service["spec"]["type"] = "NodePort".into();
            for port in 0..2 {
                service["spec"]["ports"][port]["nodePort"] = NODE_PORT.into();
            }
        },
    )?)
}

/// Load-balancer addresses and NodePorts, with servers on the named nodes and the client beyond the nodes.
fn server_pod_cycles_outside(name: &str, on: [&str; 2]) -> Result<()> {
    const NODE_PORT: u16 = 30_080;
    let cluster = Cluster::builder(name).wire()?;
    let outside = Outside::join(&cluster)?;
    cluster.start_agents()?;
    outside.route_via(cluster.node("node1"), &VIRTUAL_NETWORKS)?;
    let ingress: [IpAddr; 2] = ["203.0.113.250".parse()?, "2001:db8:203::250".parse()?];
    let mut frontends = at(&ingress, PORT);
    for node in cluster.nodes() {
        frontends.extend(at(&node.addresses, NODE_PORT));
    }
    cycle(&cluster, &outside.client, &frontends, on, |service| {
        service["spec"]["type"] = "LoadBalancer".into();
        for port in 0..2 {
            service["spec"]["ports"][port]["nodePort"] = NODE_PORT.into();
        }
        let ingress = ingress.map(|ip| json!({"ip": ip, "ipMode": "VIP"}));
        service["status"]["loadBalancer"]["ingress"] = json!(ingress);
    })
}

/// "should be able to preserve UDP traffic when server pod cycles for a LoadBalancer service on different nodes [Slow]",
/// and its NodePorts, which is the outside of "… for a NodePort service".
#[test]
fn udp_from_outside_follows_the_server_to_another_node() -> TestResult {
    let on = ["node1", "node2"];
    Ok(server_pod_cycles_outside("udp outside, nodes", on)?)
}

/// "should be able to preserve UDP traffic when server pod cycles for a LoadBalancer service on the same nodes [Slow]".
#[test]
fn udp_from_outside_follows_the_server_on_a_node() -> TestResult {
    for on in ["node1", "node2"] {
        server_pod_cycles_outside("udp outside, node", [on, on])?;
    }
    Ok(())
}

/// "should be able to preserve UDP traffic when server pod cycles for a ClusterIP service with
/// InternalTrafficPolicy set to Local".
#[test]
fn udp_follows_the_local_server() -> TestResult {
    let cluster = Cluster::builder("udp cycles, local").start()?;
    let client = cluster.pod("node1", "pod-client")?;
    let vips = cluster_ips(10);
    let on = ["node1", "node2", "node1"];
    let backends = Backends::start(&cluster, "pod-server-", &on)?;
    let [first, elsewhere, third] = [0, 1, 2].map(|number| &backends.pods[number]);
    backends.serve(&cluster, "svc-udp", &vips, |service| {
        service["spec"]["internalTrafficPolicy"] = "Local".into();
    })?;
    let endpoints = |pods: &[&weir_tests::Pod]| {
        let all: Vec<_> = pods.iter().flat_map(|pod| pod.endpoints()).collect();
        apply_slices(&cluster, "svc-udp", &all, |_, _| {})
    };
    endpoints(&[first])?;
    let sockets = sockets(&client.netns, &at(&vips, PORT))?;
    all_reach(&sockets, &first.name)?;
    endpoints(&[first, elsewhere])?;
    all_reach(&sockets, &first.name)?;
    // Traffic without a local endpoint must not leave anything behind that blackholes the next.
    endpoints(&[elsewhere])?;
    none_reaches_anybody(&sockets);
    endpoints(&[third, elsewhere])?;
    Ok(all_reach(&sockets, &third.name)?)
}

/// "should be able to preserve UDP traffic when initial unready endpoints get ready".
#[test]
fn udp_reaches_endpoints_that_get_ready() -> TestResult {
    let cluster = Cluster::builder("udp unready").start()?;
    let client = cluster.pod("node1", "pod-client")?;
    let vips = cluster_ips(10);
    let backends = Backends::start(&cluster, "pod-server-", &["node2"])?;
    backends.serve(&cluster, "svc-udp", &vips, |_| {})?;
    let sockets = sockets(&client.netns, &at(&vips, PORT))?;
    for ready in [false, true, false, true] {
        apply_slices(&cluster, "svc-udp", &backends.endpoints(), |_, endpoint| {
            endpoint["conditions"]["ready"] = ready.into();
            endpoint["conditions"]["serving"] = ready.into();
        })?;
        if ready {
            all_reach(&sockets, &backends.pods[0].name)?;
        } else {
            none_reaches_anybody(&sockets);
        }
    }
    Ok(())
}
