//! What changes while it runs: the traffic policy, the node's addresses and devices, the agent.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use weir_tests::{
    Cluster, Node, Pod, TestResult,
    load::Load,
    netns::NetNs,
    outside::{CLIENT_NETWORKS, SECOND_DEVICE},
    refusal::is_refused,
    rounds,
    traffic::{self, Protocol},
    wait_until, witness,
};

use crate::support::{Bed, FAR, NEAR, TARGET, WIDE, apply, node_port_service};

/// How long a change of devices or addresses may take to be noticed.
const NOTICE: Duration = Duration::from_secs(10);
/// How long is waited for an answer that need not come yet.
const GLANCE: Duration = Duration::from_millis(300);

/// The load of the client on both NodePorts, and of a pod on the server outside.
fn load(bed: &Bed) -> Result<Load> {
    let client = &bed.outside.client;
    let mut load = Load::default();
    for to in [bed.at_node(NEAR), bed.at_node(FAR)].concat() {
        load = load
            .connections(client, to)?
            .long_connection(client, to)?
            .datagrams(client, to)?;
    }
    for to in bed.at_outside() {
        let pod = &bed.near.netns;
        load = load
            .connections(pod, to)?
            .long_connection(pod, to)?
            .datagrams(pod, to)?;
    }
    load.wait_for(100, traffic::TIMEOUT)?;
    Ok(load)
}

#[test]
fn the_agent_dies_under_load_from_outside() -> TestResult {
    let bed = Bed::start("outside kills", WIDE, &[])?;
    let load = load(&bed)?;
    for round in 0..rounds(4, 100) {
        for node in bed.cluster.nodes() {
            node.kill9_agent()?;
        }
        load.wait_for(50, traffic::TIMEOUT)
            .with_context(|| format!("agents dead, round {round}"))?;
        for node in bed.cluster.nodes() {
            node.start_agent()?;
        }
        bed.cluster.wait_applied()?;
        load.wait_for(50, traffic::TIMEOUT)
            .with_context(|| format!("agents back, round {round}"))?;
    }
    Ok(load.stop().check(1000)?)
}

/// `externalTrafficPolicy` of the Service with a pod here and one elsewhere.
struct Switched {
    bed: Bed,
}

const BOTH: u16 = 30_082;

impl Switched {
    fn set(&self, policy: &str, pods: &[&Pod]) -> Result<()> {
        let mut service = node_port_service("both", 12, BOTH);
        service["spec"]["externalTrafficPolicy"] = policy.into();
        apply(&self.bed.cluster, "both", &service, pods)
    }
}

#[test]
fn the_traffic_policy_is_switched_under_load() -> TestResult {
    let switched = Switched {
        bed: Bed::start("policy switched", WIDE, &[])?,
    };
    let bed = &switched.bed;
    let both = [&bed.near, &bed.far];
    switched.set("Cluster", &both)?;
    let client = &bed.outside.client;
    let mut load = Load::default();
    for to in bed.at_node(BOTH) {
        load = load.connections(client, to)?.datagrams(client, to)?;
        // Some of them to the endpoint elsewhere: they go on to their end.
        for _ in 0..4 {
            load = load.long_connection(client, to)?;
        }
    }
    load.wait_for(100, traffic::TIMEOUT)?;
    for _ in 0..rounds(10, 100) {
        switched.set("Local", &both)?;
        for to in bed.at_node(BOTH) {
            for protocol in Protocol::ALL {
                for _ in 0..20 {
                    let seen = client.run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
                    assert_eq!((&*seen.server, seen.client), ("near", seen.own));
                }
            }
        }
        load.wait_for(50, traffic::TIMEOUT).context("with Local")?;
        switched.set("Cluster", &both)?;
        for to in bed.at_node(BOTH) {
            wait_until("the endpoint elsewhere", traffic::TIMEOUT, || {
                let seen = client.run(|| witness::ask(Protocol::Tcp, to, traffic::TIMEOUT))?;
                Ok(seen.server == "far")
            })?;
        }
        load.wait_for(50, traffic::TIMEOUT)
            .context("with Cluster")?;
    }
    load.stop().check(1000)?;

    // Without endpoints here it refuses at once, and serves again with the other policy.
    switched.set("Local", &[&bed.far])?;
    for to in bed.at_node(BOTH) {
        for protocol in Protocol::ALL {
            is_refused(client, protocol, to)?;
        }
    }
    switched.set("Cluster", &[&bed.far])?;
    for to in bed.at_node(BOTH) {
        let seen = client.run(|| witness::ask(Protocol::Udp, to, traffic::TIMEOUT))?;
        assert_eq!(seen.client.ip(), bed.node().address(to.is_ipv6())?);
    }
    Ok(())
}

/// Waits until the NodePorts answer at an address, or until nothing does.
pub fn wait_for_node_ports(client: &NetNs, address: IpAddr, is_served: bool) -> Result<()> {
    for port in [NEAR, FAR] {
        for protocol in Protocol::ALL {
            let to = SocketAddr::new(address, port);
            let what = format!("{} {to} served: {is_served}", protocol.name());
            wait_until(&what, NOTICE, || {
                let answer = client.run(|| witness::ask(protocol, to, GLANCE));
                Ok(answer.is_ok() == is_served)
            })?;
        }
    }
    Ok(())
}

#[test]
fn node_ports_follow_the_addresses_of_a_node() -> TestResult {
    let bed = Bed::start("addresses live", WIDE, &[])?;
    let client = &bed.outside.client;
    for (address, length) in [("192.168.77.111", 24), ("fd00:77::6f", 64)] {
        let added: IpAddr = address.parse().context("an address")?;
        // The router knows the way also when nobody answers for the address.
        bed.outside.route_via(bed.node(), &[address])?;
        wait_for_node_ports(client, added, false)?;
        for _ in 0..3 {
            bed.node()
                .netns
                .ip(&format!("address add {address}/{length} dev eth0\n"))?;
            wait_for_node_ports(client, added, true)?;
            bed.node()
                .netns
                .ip(&format!("address del {address}/{length} dev eth0\n"))?;
            wait_for_node_ports(client, added, false)?;
        }
        // The others are served all the time.
        wait_for_node_ports(client, bed.node().address(added.is_ipv6())?, true)?;
    }
    Ok(())
}

#[test]
fn node_ports_follow_the_devices_of_a_node() -> TestResult {
    let bed = Bed::start("devices live", WIDE, &[])?;
    let client = &bed.outside.client;
    let mut load = Load::default();
    for to in [bed.at_node(NEAR), bed.at_node(FAR)].concat() {
        load = load.long_connection(client, to)?;
    }
    for _ in 0..3 {
        let addresses = bed.outside.add_second_device(&bed.cluster, bed.node())?;
        for address in &addresses {
            wait_for_node_ports(client, *address, true)?;
        }
        // What comes in by the second device for an address of the first is served, too.
        bed.node()
            .netns
            .ip(&format!("link del {SECOND_DEVICE}\n"))?;
        for address in &addresses {
            wait_for_node_ports(client, *address, false)?;
        }
    }
    Ok(load.stop().check(10)?)
}

/// What pods send to the outside leaves by the second device of the node, with one of its addresses.
fn lead_out_by_second_device(node: &Node, address: &str, network: &str) -> Result<()> {
    let (length, gateway, nodad) = if address.contains(':') {
        (64, "fd00:78::fe", " nodad")
    } else {
        (24, "192.168.78.254", "")
    };
    node.netns.ip(&format!(
        "address replace {address}/{length} dev {SECOND_DEVICE}{nodad}
         route replace {network} via {gateway} dev {SECOND_DEVICE}
"
    ))
}

/// A flow of UDP goes on when the node loses the address that it is translated to, and when it has lost it for a moment
/// only, it goes on as before.
#[test]
fn flows_of_pods_go_on_from_another_address() -> TestResult {
    let bed = Bed::start("address lost", WIDE, &[])?;
    let node = bed.node();
    let first = bed.outside.add_second_device(&bed.cluster, node)?;
    let others = ["192.168.78.111", "fd00:78::6f"];
    for ((first, other), network) in first.into_iter().zip(others).zip(CLIENT_NETWORKS) {
        lead_out_by_second_device(node, &first.to_string(), network)?;
        let to = SocketAddr::new(bed.outside.address(first.is_ipv6())?, TARGET);
        let socket = bed.near.run(|| {
            let any = if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
            let socket = UdpSocket::bind(any)?;
            socket.set_read_timeout(Some(GLANCE))?;
            socket.connect(to)?;
            anyhow::Ok(socket)
        })?;
        let mut translated = None;
        wait_until("the second device is served", NOTICE, || {
            translated = witness::ask_by(&socket).ok().map(|seen| seen.client);
            Ok(translated.is_some())
        })?;
        assert_eq!(translated.map(|client| client.ip()), Some(first));
        let length = if first.is_ipv6() { 64 } else { 24 };
        let lose = format!("address del {first}/{length} dev {SECOND_DEVICE}\n");
        node.netns.ip(&lose)?;
        lead_out_by_second_device(node, &first.to_string(), network)?;
        bed.cluster.wait_applied()?;
        wait_until("an answer", NOTICE, || Ok(witness::ask_by(&socket).is_ok()))?;
        assert_eq!(
            Some(witness::ask_by(&socket)?.client),
            translated,
            "it was back at once"
        );

        node.netns.ip(&lose)?;
        lead_out_by_second_device(node, other, network)?;
        let other: IpAddr = other.parse().context("an address")?;
        wait_until("an answer to the other address", NOTICE, || {
            let seen = witness::ask_by(&socket);
            Ok(seen.is_ok_and(|seen| seen.client.ip() == other))
        })?;
    }
    Ok(())
}

/// A node that is joined to the outside by another device than its `eth0`.
fn serves_through(name: &str, make: impl FnOnce(&Node) -> Result<()>) -> Result<()> {
    let bed = Bed::build(Cluster::builder(name), WIDE, |node, _| make(node))?;
    for (port, server) in [(NEAR, "near"), (FAR, "far")] {
        for to in bed.at_node(port) {
            for protocol in Protocol::ALL {
                let seen = bed
                    .outside
                    .client
                    .run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
                ensure!(seen.server == server, "{to}: {seen:?}");
            }
        }
    }
    for to in bed.at_outside() {
        for protocol in Protocol::ALL {
            let seen = bed
                .near
                .run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
            let node = bed.node().address(to.is_ipv6())?;
            ensure!(seen.client.ip() == node, "{seen:?}");
        }
    }
    Ok(())
}

/// Moves addresses and routes of a node from its `eth0` to another device.
fn move_network(node: &Node, device: &str) -> Result<()> {
    for address in &node.addresses {
        let (length, gateway, nodad) = if address.is_ipv6() {
            (64, "fd00:77::fe", " nodad")
        } else {
            (24, "192.168.77.254", "")
        };
        node.netns.ip(&format!(
            "address add {address}/{length} dev {device}{nodad}\nroute add default via {gateway}\n"
        ))?;
    }
    Ok(())
}

#[test]
fn a_node_s_device_may_be_a_bridge() -> TestResult {
    Ok(serves_through("outside bridge", |node| {
        for family in ["-4", "-6"] {
            node.netns
                .tool("ip", &[family, "route", "flush", "dev", "eth0"])?;
        }
        node.netns.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        node.netns.ip(
            "address flush dev eth0\nlink add uplink type bridge stp_state 0 mcast_snooping 0\n\
             link set eth0 master uplink\nlink set uplink up\n",
        )?;
        move_network(node, "uplink")
    })?)
}
