//! Load balancers as clients beyond the nodes see them, from upstream's
//! `test/e2e/network/loadbalancer.go`, with what `test/e2e/network/kube_proxy.go` and `networking.go` ask of such
//! clients. The router outside stands for the cloud: it leads the load balancer's addresses to the
//! node that the test names. Health check node ports are not asked here.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use weir_tests::{
    TestResult,
    cluster::cluster_ips,
    load::Load,
    netns::NetNs,
    objects,
    traffic::{self, Protocol, Server},
    wait_until, witness,
};

use super::{
    beyond::{
        Bed, CONFIRMATIONS, NODE_PORT, SERVICE, at, ingress, load_balancer, node_port, node_ports,
    },
    support::{
        Backends, PORT, TARGET, answers, apply_slices, is_dropped, is_served_by, is_unreachable,
        is_up, service, terminating,
    },
};

/// "should be able to change the type and ports of a TCP service [Slow]" and "… of a UDP service [Slow]". Limit:
/// 15 min for the cloud, 2 min for the node.
#[test]
fn changes_type_and_ports() -> TestResult {
    let bed = Bed::start("LB type and ports", 2)?;
    let backends = Backends::start(&bed.cluster, "pod", &["node1", "node2"])?;
    let (client, names, vips) = (bed.client(), backends.names(), cluster_ips(10));
    let nodes = bed.cluster.nodes();
    let every_node = |port: u16| -> Vec<SocketAddr> {
        nodes.iter().flat_map(|n| at(&n.addresses, port)).collect()
    };
    let serves = |to: &[SocketAddr]| -> Result<()> {
        for to in to {
            for protocol in Protocol::ALL {
                is_served_by(client, protocol, *to, &names)?;
            }
        }
        Ok(())
    };
    let apply = |change: &dyn Fn(&mut Value)| backends.serve(&bed.cluster, SERVICE, &vips, change);

    apply(&|_| {})?;
    bed.is_refused(&every_node(NODE_PORT))?;
    apply(&node_port)?;
    serves(&every_node(NODE_PORT))?;
    let balanced = load_balancer("Cluster")?;
    apply(&balanced)?;
    serves(&every_node(NODE_PORT))?;
    serves(&at(&ingress()?, PORT))?;
    // Another NodePort.
    apply(&|service| {
        balanced(service);
        for port in 0..2 {
            service["spec"]["ports"][port]["nodePort"] = (NODE_PORT + 1).into();
        }
    })?;
    serves(&every_node(NODE_PORT + 1))?;
    bed.is_refused(&every_node(NODE_PORT))?;
    serves(&at(&ingress()?, PORT))?;
    // Another port.
    let other_port = |service: &mut Value| {
        balanced(service);
        for port in 0..2 {
            service["spec"]["ports"][port]["port"] = (PORT + 1).into();
        }
    };
    apply(&other_port)?;
    serves(&every_node(NODE_PORT))?;
    serves(&at(&ingress()?, PORT + 1))?;
    bed.is_refused(&at(&ingress()?, PORT))?;
    // Without endpoints it refuses, with endpoints it serves again.
    apply_slices(&bed.cluster, SERVICE, &[], |_, _| {})?;
    bed.is_refused(&every_node(NODE_PORT))?;
    bed.is_refused(&at(&ingress()?, PORT + 1))?;
    apply(&other_port)?;
    serves(&every_node(NODE_PORT))?;
    serves(&at(&ingress()?, PORT + 1))?;
    // A ClusterIP again.
    apply(&|_| {})?;
    bed.is_refused(&every_node(NODE_PORT))?;
    for to in at(&ingress()?, PORT + 1) {
        for protocol in Protocol::ALL {
            is_unreachable(client, protocol, to)?;
        }
    }
    Ok(())
}

/// "should be able to create LoadBalancer Service without NodePort and change it [Slow]".
#[test]
fn a_load_balancer_works_without_node_port() -> TestResult {
    let bed = Bed::start("LB without NodePort", 2)?;
    let backends = Backends::start(&bed.cluster, "pod", &["node1", "node2"])?;
    let vips = cluster_ips(10);
    let balanced = load_balancer("Cluster")?;
    backends.serve(&bed.cluster, SERVICE, &vips, |service| {
        balanced(service);
        service["spec"]["allocateLoadBalancerNodePorts"] = false.into();
        for port in 0..2 {
            service["spec"]["ports"][port]["nodePort"] = Value::Null;
        }
    })?;
    is_up(bed.client(), &ingress()?, &backends.names())?;
    for node in bed.cluster.nodes() {
        bed.is_refused(&node_ports(node))?;
    }
    backends.serve(&bed.cluster, SERVICE, &vips, &balanced)?;
    is_up(bed.client(), &ingress()?, &backends.names())?;
    for node in bed.cluster.nodes() {
        for to in node_ports(node) {
            is_served_by(bed.client(), Protocol::Udp, to, &backends.names())?;
        }
    }
    Ok(())
}

/// "should only allow access from service loadbalancer source ranges [Slow]". Limit: 10 min.
#[test]
fn source_ranges_are_respected() -> TestResult {
    let bed = Bed::start("LB source ranges", 2)?;
    let backends = Backends::start(&bed.cluster, "pod", &["node1"])?;
    let accepted = bed.cluster.pod("node1", "execpod-accept")?;
    let dropped = bed.cluster.pod("node2", "execpod-drop")?;
    let (vips, ingress) = (cluster_ips(10), ingress()?);
    let balanced = load_balancer("Cluster")?;
    let restrict = |addresses: &[IpAddr]| {
        let ranges: Vec<String> = addresses
            .iter()
            .map(|ip| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }))
            .collect();
        backends.serve(&bed.cluster, SERVICE, &vips, |service| {
            balanced(service);
            service["spec"]["loadBalancerSourceRanges"] = json!(ranges);
        })
    };
    let keeps_out = |client: &NetNs| -> Result<()> {
        for to in at(&ingress, PORT) {
            // A socket's `connect()` fails; what comes to a device is dropped.
            is_unreachable(client, Protocol::Tcp, to)?;
            is_dropped(client, Protocol::Udp, to)?;
        }
        Ok(())
    };
    restrict(&accepted.addresses)?;
    is_up(&accepted.netns, &ingress, &backends.names())?;
    keeps_out(&dropped.netns)?;
    keeps_out(bed.client())?;
    restrict(&dropped.addresses)?;
    is_up(&dropped.netns, &ingress, &backends.names())?;
    keeps_out(&accepted.netns)?;
    // Upstream asks this of pods alone.
    restrict(&bed.outside.addresses)?;
    is_up(bed.client(), &ingress, &backends.names())?;
    keeps_out(&accepted.netns)?;
    restrict(&[])?;
    for client in [&accepted.netns, &dropped.netns, bed.client()] {
        is_up(client, &ingress, &backends.names())?;
    }
    Ok(())
}

/// "should have session affinity work for LoadBalancer service with ESIPP on [Slow] [LinuxOnly]", "… with ESIPP off",
/// "should be able to switch session affinity for LoadBalancer service with ESIPP on [Slow] [LinuxOnly]" and "…
/// with ESIPP off". Limit: 15 min for the cloud, 2 min (`AffinityTimeout`) each way.
#[test]
fn session_affinity_works_with_both_policies() -> TestResult {
    let bed = Bed::start("LB affinity", 2)?;
    let backends = Backends::start(&bed.cluster, "affinity-", &["node1", "node1", "node2"])?;
    let vips = cluster_ips(10);
    for (policy, endpoints) in [("Local", 2), ("Cluster", 3)] {
        let balanced = load_balancer(policy)?;
        for affinity in [true, false, true] {
            backends.serve(&bed.cluster, SERVICE, &vips, |service| {
                balanced(service);
                if affinity {
                    service["spec"]["sessionAffinity"] = "ClientIP".into();
                }
            })?;
            for ip in ingress()? {
                let to = SocketAddr::new(ip, PORT);
                let tries = if affinity { CONFIRMATIONS } else { 100 };
                let counts = answers(bed.client(), Protocol::Tcp, to, tries)?;
                let wanted = if affinity { 1 } else { endpoints };
                assert_eq!(counts.len(), wanted, "{policy} {affinity}: {counts:?}");
            }
        }
    }
    Ok(())
}

/// "should not have connectivity disruption during rolling update with externalTrafficPolicy=Cluster [Slow]" and "…
/// =Local [Slow]": upstream lets one connection of a hundred fail, here none may. (A datagram has nobody to send it again
/// when its endpoint goes while it is under way; what becomes of the next is in `conntrack`.)
#[test]
fn a_rolling_update_disrupts_nothing() -> TestResult {
    let bed = Bed::start("LB rolling update", 2)?;
    let vips = cluster_ips(10);
    for policy in ["Cluster", "Local"] {
        let balanced = load_balancer(policy)?;
        let prefix = |round: usize| format!("{}-{round}-", policy.to_lowercase());
        let mut old = Backends::start(&bed.cluster, &prefix(0), &["node1", "node2"])?;
        old.serve(&bed.cluster, SERVICE, &vips, &balanced)?;
        let mut load = Load::default();
        for to in at(&ingress()?, PORT) {
            load = load.connections(bed.client(), to)?;
        }
        for round in 1..=5 {
            load.wait_for(20, traffic::TIMEOUT)
                .with_context(|| format!("{policy} round {round}"))?;
            let new = Backends::start(&bed.cluster, &prefix(round), &["node1", "node2"])?;
            let both = [new.endpoints(), old.endpoints()].concat();
            let count = new.endpoints().len() / 2;
            apply_slices(&bed.cluster, SERVICE, &both, |number, endpoint| {
                if number >= count {
                    terminating(endpoint);
                }
            })?;
            load.wait_for(20, traffic::TIMEOUT)?;
            apply_slices(&bed.cluster, SERVICE, &new.endpoints(), |_, _| {})?;
            load.wait_for(20, traffic::TIMEOUT)?;
            old = new;
        }
        load.stop().check(100)?;
    }
    Ok(())
}

/// "should provide Internet connection for containers" of `networking.go`: pods reach what is outside, and are
/// answered, though nobody there knows of pods.
#[test]
fn pods_reach_the_outside() -> TestResult {
    let bed = Bed::start("Internet", 2)?;
    for node in bed.cluster.nodes() {
        let pod = bed
            .cluster
            .pod(&node.name, &format!("connectivity-{}", node.name))?;
        for address in &bed.outside.addresses {
            let to = SocketAddr::new(*address, 53);
            let _server = Server::start(bed.client(), to, "public-dns")?;
            for protocol in Protocol::ALL {
                let seen = pod.run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
                assert_eq!(seen.server, "public-dns");
                assert_eq!(seen.client.ip(), node.address(to.is_ipv6())?);
            }
            let address = address.to_string();
            pod.netns.tool("ping", &["-c", "1", "-W", "3", &address])?;
        }
    }
    Ok(())
}

/// "should set TCP CLOSE_WAIT timeout [Privileged]" of `kube_proxy.go`: a connection that one side has closed lives as
/// long as the time-out of such connections says, not as long as another's; the other side's rest arrives.
#[test]
fn half_closed_connections_have_their_own_time_out() -> TestResult {
    const SHORT: &str = "2";
    let arguments = [
        "--timeout-tcp-established",
        SHORT,
        "--timeout-tcp-time-wait",
        SHORT,
        "--timeout-tcp-closed",
        SHORT,
        "--timeout-tcp-syn",
        SHORT,
        "--timeout-tcp-syn-received",
        SHORT,
    ];
    let bed = Bed::start_with("CLOSE_WAIT", 2, &arguments)?;
    let server = bed.cluster.pod("node2", "server")?;
    let vips = cluster_ips(10);
    let mut object = service(SERVICE, &vips);
    node_port(&mut object);
    bed.cluster.apply(&object)?;
    bed.cluster
        .endpoints(SERVICE, TARGET, &server.endpoints())?;
    bed.cluster.wait_applied()?;
    for to in node_ports(bed.cluster.node("node1")) {
        let address = SocketAddr::new(server.address(to.is_ipv6())?, TARGET);
        let listener = server
            .run(|| TcpListener::bind(address))
            .context("listen")?;
        let connect = || -> Result<[TcpStream; 2]> {
            let client = bed
                .client()
                .run(|| TcpStream::connect_timeout(&to, traffic::TIMEOUT))
                .context("connect")?;
            client.set_read_timeout(Some(traffic::TIMEOUT))?;
            Ok([client, listener.accept().context("accept")?.0])
        };
        let [mut client, mut accepted] = connect()?;
        client.shutdown(Shutdown::Write).context("close one side")?;
        let end = accepted.read(&mut [0; 8]).context("the end")?;
        assert_eq!(end, 0);
        // One that is open, and was used later, is forgotten by the time-out that it has.
        let [open, _open] = connect()?;
        let [half_closed_port, open_port] =
            [&client, &open].map(|socket| socket.local_addr().map(|own| own.port()));
        let open_port = open_port.context("the client's port")?;
        wait_until("the open one to be forgotten", 6 * traffic::TIMEOUT, || {
            Ok(state_at(&bed, open_port)?.is_none())
        })?;
        let state = state_at(&bed, half_closed_port.context("the client's port")?)?;
        assert_eq!(state.as_deref(), Some("fin-wait"));
        accepted.write_all(b"the rest").context("the rest")?;
        drop(accepted);
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).context("the rest")?;
        assert_eq!(rest, b"the rest");
    }
    Ok(())
}

/// The state of the client's translated connection from a port of its own, as the first node lists it.
fn state_at(bed: &Bed, port: u16) -> Result<Option<String>> {
    let rows = bed
        .cluster
        .node("node1")
        .weir_json(&["bpf", "nat", "list"])?;
    let rows = rows
        .as_array()
        .context("`weir bpf nat list -o json` is no list")?;
    let row = rows.iter().find(|row| row["source_port"] == port);
    Ok(row.map(|row| row["state"].as_str().unwrap_or_default().to_owned()))
}

/// A Service that is gone refuses nothing and serves nothing: what is asked is the node's own then.
#[test]
fn deleted_load_balancers_are_gone() -> TestResult {
    let bed = Bed::start("LB deleted", 2)?;
    let backends = Backends::start(&bed.cluster, "pod", &["node2"])?;
    let vips = cluster_ips(10);
    for _ in 0..2 {
        backends.serve(&bed.cluster, SERVICE, &vips, load_balancer("Cluster")?)?;
        is_up(bed.client(), &ingress()?, &backends.names())?;
        bed.cluster
            .objects()
            .delete(&objects::service(SERVICE, &vips, &[]))?;
        bed.cluster.wait_applied()?;
        for node in bed.cluster.nodes() {
            bed.is_refused(&node_ports(node))?;
        }
        for to in at(&ingress()?, PORT) {
            is_unreachable(bed.client(), Protocol::Tcp, to)?;
        }
    }
    Ok(())
}
