//! Pods that talk to the outside: their node's address takes the place of theirs.

use std::{
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use weir_tests::{
    Pod, TestResult,
    capture::Capture,
    outside::CLIENT_NETWORKS,
    sctp,
    traffic::{self, Protocol},
    wait_until, witness,
};

use crate::support::{Bed, FAR, NAT_PORTS, PROTOCOLS, TARGET, WIDE};

/// Servers for SCTP outside.
fn serve_sctp(bed: &Bed) -> Result<Vec<sctp::Server>> {
    bed.at_outside()
        .into_iter()
        .map(|address| sctp::Server::start(&bed.outside.client, address, "outside"))
        .collect()
}

/// Asks the server outside from a pod over every protocol; the pod's own address must be seen of the families in
/// `own`, else that of its node.
fn check(bed: &Bed, pod: &Pod, own: [bool; 2]) -> Result<()> {
    let node = bed.cluster.node(&pod.node);
    for to in bed.at_outside() {
        let is_own = own[usize::from(to.is_ipv6())];
        for protocol in PROTOCOLS {
            let seen = pod
                .run(|| witness::ask(protocol, to, traffic::TIMEOUT))
                .with_context(|| format!("{} {to}", protocol.name()))?;
            let is_right = if is_own {
                seen.client == seen.own
            } else {
                let has_port = match protocol {
                    Protocol::Sctp => seen.client.port() == seen.own.port(),
                    Protocol::Tcp | Protocol::Udp => NAT_PORTS.contains(&seen.client.port()),
                };
                has_port && seen.client.ip() == node.address(to.is_ipv6())?
            };
            ensure!(is_right, "{} {to}: {seen:?}", protocol.name());
        }
        ping(bed, pod, to, is_own)?;
    }
    Ok(())
}

/// An echo that is answered, from the address that must be seen.
fn ping(bed: &Bed, pod: &Pod, to: SocketAddr, is_own: bool) -> Result<()> {
    let v6 = to.is_ipv6();
    let capture = Capture::start(&bed.outside.client, "eth0")?;
    let address = to.ip().to_string();
    pod.netns
        .tool("ping", &["-c", "3", "-i", "0.2", "-W", "3", &address])?;
    let wanted = if is_own {
        pod.address(v6)?
    } else {
        bed.cluster.node(&pod.node).address(v6)?
    };
    let protocol = if v6 {
        libc::IPPROTO_ICMPV6
    } else {
        libc::IPPROTO_ICMP
    };
    let packets = capture.stop()?;
    let echoes: Vec<_> = packets
        .iter()
        .filter(|packet| packet.source == wanted && i32::from(packet.protocol) == protocol)
        .collect();
    ensure!(echoes.len() >= 3, "echoes of {wanted}: {packets:?}");
    Ok(())
}

/// Networks of pods of both nodes are routed outside, so that what is not masqueraded is answered.
fn route_pods(bed: &Bed) -> Result<()> {
    for node in bed.cluster.nodes() {
        let networks: Vec<&str> = node.pod_cidrs.iter().map(String::as_str).collect();
        bed.outside.route_via(node, &networks)?;
    }
    Ok(())
}

#[test]
fn the_outside_sees_the_node_of_a_pod() -> TestResult {
    let bed = Bed::start("masquerade", WIDE, &[])?;
    route_pods(&bed)?;
    let _servers = serve_sctp(&bed)?;
    for pod in [&bed.near, &bed.far] {
        check(&bed, pod, [false, false])?;
    }
    // Not the outside: other pods, and nodes.
    let _node_servers = bed.node().serve(TARGET + 1)?;
    for v6 in [false, true] {
        let targets = [
            SocketAddr::new(bed.near.address(v6)?, TARGET),
            SocketAddr::new(bed.node().address(v6)?, TARGET + 1),
        ];
        for to in targets {
            for protocol in Protocol::ALL {
                let seen = bed
                    .far
                    .run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
                assert_eq!(seen.client, seen.own, "{to}");
            }
        }
    }
    Ok(())
}

#[test]
fn without_offloads_too() -> TestResult {
    let bed = Bed::start("masquerade plain", WIDE, &[])?;
    let _servers = serve_sctp(&bed)?;
    bed.cluster.set_offloads(false)?;
    bed.outside.set_offloads(false)?;
    bed.near.netns.set_offloads(false)?;
    Ok(check(&bed, &bed.near, [false, false])?)
}

#[test]
fn each_family_can_be_switched_off() -> TestResult {
    for (setting, own) in [
        ("--masquerade-ipv4", [true, false]),
        ("--masquerade-ipv6", [false, true]),
    ] {
        let bed = Bed::start("masquerade off", WIDE, &[setting, "false"])?;
        route_pods(&bed)?;
        let _servers = serve_sctp(&bed)?;
        check(&bed, &bed.near, own)?;
    }
    Ok(())
}

#[test]
fn chosen_networks_see_the_pod() -> TestResult {
    let networks = CLIENT_NETWORKS.join(",");
    let bed = Bed::start(
        "no masquerade",
        WIDE,
        &["--non-masquerade-cidrs", &networks],
    )?;
    route_pods(&bed)?;
    let _servers = serve_sctp(&bed)?;
    check(&bed, &bed.near, [true, true])?;
    // The router's address is in no such network.
    for (to, v6) in [("192.0.2.1:8080", false), ("[2001:db8:2::1]:8080", true)] {
        let to: SocketAddr = to.parse().context("an address")?;
        let _server = traffic::Server::start(&bed.outside.router, to, "router")?;
        let seen = bed
            .near
            .run(|| witness::ask(Protocol::Udp, to, traffic::TIMEOUT))?;
        assert_eq!(seen.client.ip(), bed.node().address(v6)?);
    }
    Ok(())
}

/// The FORWARD chain sees what pods send with their own address, in that direction only, and nothing else of pods: as the
/// operator's guide says.
#[test]
fn forward_rules_stop_only_what_is_not_masqueraded() -> TestResult {
    let networks = CLIENT_NETWORKS.join(",");
    let bed = Bed::start(
        "forward rules",
        WIDE,
        &["--non-masquerade-cidrs", &networks],
    )?;
    route_pods(&bed)?;
    let filter = |rule: &str| {
        let rules = format!(
            "add table inet weir-test\n\
             delete table inet weir-test\n\
             add table inet weir-test\n\
             add chain inet weir-test forward {{ type filter hook forward priority 0; policy drop; }}\n\
             {rule}"
        );
        bed.node().netns.tool("nft", &[&rules])
    };
    let ask = |to| {
        bed.near
            .run(|| witness::ask(Protocol::Tcp, to, Duration::from_secs(1)))
    };
    filter("")?;
    for to in bed.at_outside() {
        assert!(
            ask(to).is_err(),
            "{to} is reached with the address of the pod"
        );
    }
    // Masqueraded, pods on both nodes, and a client outside of an endpoint elsewhere.
    for (to, v6) in [("192.0.2.1:8080", false), ("[2001:db8:2::1]:8080", true)] {
        let to: SocketAddr = to.parse().context("an address")?;
        let _server = traffic::Server::start(&bed.outside.router, to, "router")?;
        assert_eq!(ask(to)?.server, "router");
        let far = SocketAddr::new(bed.far.address(v6)?, TARGET);
        assert_eq!(ask(far)?.server, "far");
    }
    for to in bed.at_node(FAR) {
        let client = &bed.outside.client;
        let seen = client.run(|| witness::ask(Protocol::Tcp, to, traffic::TIMEOUT))?;
        assert_eq!(seen.server, "far");
    }
    // Answers are never seen, and the state of a connection does not tell what it is.
    filter("add rule inet weir-test forward ct state { new, established, related } accept")?;
    for to in bed.at_outside() {
        assert!(
            ask(to).is_err(),
            "{to} is reached by the state of the connection"
        );
    }
    let near = [bed.near.address(false)?, bed.near.address(true)?];
    filter(&format!(
        "add rule inet weir-test forward ip saddr {} accept\n\
         add rule inet weir-test forward ip6 saddr {} accept",
        near[0], near[1]
    ))?;
    for to in bed.at_outside() {
        let seen = ask(to)?;
        assert_eq!(seen.server, "outside");
        assert!(near.contains(&seen.client.ip()), "{seen:?}");
    }
    Ok(())
}

/// The pod's own ICMP error about what the outside answers is translated, header within and all, so that the outside
/// knows what it is about.
#[test]
fn errors_of_a_pod_reach_the_outside() -> TestResult {
    let bed = Bed::start("masquerade errors", WIDE, &[])?;
    for to in bed.at_outside() {
        let to = SocketAddr::new(to.ip(), TARGET + 1);
        let server = bed
            .outside
            .client
            .run(|| UdpSocket::bind(to))
            .context("listen")?;
        server
            .set_read_timeout(Some(traffic::TIMEOUT))
            .context("time-out")?;
        let socket = bed
            .near
            .run(|| traffic::UdpClient::new(to))
            .context("a pod's socket")?;
        // Nobody answers.
        let _ = socket.ask(b"question", traffic::TIMEOUT / 50);
        let (_, seen) = server.recv_from(&mut [0; 64]).context("the question")?;
        assert_eq!(seen.ip(), bed.node().address(to.is_ipv6())?);
        drop(socket);
        server.connect(seen).context("connect")?;
        wait_until("the error", traffic::TIMEOUT, || {
            Ok(server
                .send(b"answer")
                .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused))
        })?;
    }
    Ok(())
}
