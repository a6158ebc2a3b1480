//! No packet leaves a node for the outside with a pod's address: from the first second after the agent starts,
//! through kills of the agent, with fragments, large datagrams and what belongs to no connection.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use weir_tests::{
    Cluster, Pod, TestResult,
    capture::{Capture, Packet},
    load::Load,
    outside::Outside,
    packet, sctp,
    traffic::{self, Protocol, Server},
    wait_for,
};

const PORT: u16 = 8080;
/// Datagram that has to be sent in pieces, bytes.
const LARGE: usize = 8000;
/// Kills of the agent.
const KILLS: usize = 5;
/// What a sender can put into the flags of a TCP segment: SYN, ACK, ACK+FIN, ACK+PSH, RST, none.
const FLAGS: [u8; 6] = [2, 16, 17, 24, 4, 0];

/// What a pod can send to a server outside, answered or not.
fn say_everything(pod: &Pod, to: SocketAddr) -> Result<()> {
    for protocol in Protocol::ALL {
        pod.run(|| traffic::name(protocol, to))
            .with_context(|| format!("{} {to}", protocol.name()))?;
    }
    pod.run(|| sctp::name(to))?;
    pod.run(|| traffic::udp_name(to, LARGE))?;
    let address = to.ip().to_string();
    pod.netns
        .tool("ping", &["-c", "2", "-i", "0.2", "-s", "3000", &address])?;
    say_what_no_stack_says(pod, to)
}

/// Segments of no connection, and pieces in any order, some without the first.
fn say_what_no_stack_says(pod: &Pod, to: SocketAddr) -> Result<()> {
    let to_mac = packet::gateway_mac(&pod.netns)?;
    let from_mac = packet::mac_of(&pod.netns, "eth0")?;
    let own = pod.address(to.is_ipv6())?;
    let to = (to.ip(), to.port());
    let mut frames = Vec::new();
    for (port, flags) in (50_000..).zip(FLAGS) {
        frames.push(packet::tcp_frame(to_mac, from_mac, (own, port), to, flags)?);
    }
    let whole = packet::udp_frame(to_mac, from_mac, (own, 50_000), to, &[7; 4000])?;
    let in_order = packet::fragments(&whole, 0x1001, 1000)?;
    frames.extend(in_order);
    let mut reversed = packet::fragments(&whole, 0x1002, 1000)?;
    reversed.reverse();
    frames.extend(reversed);
    frames.extend(packet::fragments(&whole, 0x1003, 1000)?.into_iter().skip(1));
    pod.run(|| packet::send_all("eth0", &frames))
}

fn is_pods(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.octets()[..2] == [10, 244],
        IpAddr::V6(address) => address.segments()[..3] == [0xfd00, 0x244, 0],
    }
}

/// Nothing came from a pod's address, and what must have come came from the node's.
fn check(packets: &[Packet], node: &[IpAddr]) -> Result<()> {
    let leaked: Vec<_> = packets.iter().filter(|p| is_pods(p.source)).collect();
    ensure!(
        leaked.is_empty(),
        "{} packets with a pod's address left: {:?}",
        leaked.len(),
        &leaked[..leaked.len().min(10)]
    );
    for address in node {
        let own = || packets.iter().filter(|packet| packet.source == *address);
        ensure!(own().count() > 20, "{address} sent almost nothing");
        ensure!(
            own().any(|packet| packet.is_fragment),
            "{address} sent no fragments"
        );
    }
    Ok(())
}

/// A pod as soon as the agent takes one. A runtime tries again with another sandbox, too, while the agent has not read
/// the node's ranges yet.
fn first_pod(cluster: &Cluster, prefix: &str) -> Result<Pod> {
    let mut tries = 0;
    wait_for("the first pod", traffic::TIMEOUT, || {
        tries += 1;
        cluster.pod("node1", &format!("{prefix}{tries}")).map(Some)
    })
}

#[test]
fn no_pod_s_address_leaves_a_node() -> TestResult {
    let cluster = Cluster::builder("leaks").nodes(2).wire()?;
    let outside = Outside::join(&cluster)?;
    let mut servers = Vec::new();
    let mut sctp_servers = Vec::new();
    let targets: Vec<_> = outside
        .addresses
        .iter()
        .map(|address| SocketAddr::new(*address, PORT))
        .collect();
    for to in &targets {
        servers.push(Server::start(&outside.client, *to, "outside")?);
        sctp_servers.push(sctp::Server::start(&outside.client, *to, "outside")?);
    }
    let node = cluster.node("node1");
    let capture = Capture::start(&outside.router, "eth0")?;

    // The first pod of a new node, as soon as the agent takes it.
    node.start_agent()?;
    let first = first_pod(&cluster, "first")?;
    for to in &targets {
        say_what_no_stack_says(&first, *to)?;
        say_everything(&first, *to)?;
    }

    // Kills, and starts with pods that talk all the time.
    let mut load = Load::default();
    for to in &targets {
        load = load
            .connections(&first.netns, *to)?
            .long_connection(&first.netns, *to)?
            .datagrams(&first.netns, *to)?;
    }
    for round in 0..KILLS {
        node.kill9_agent()?;
        for to in &targets {
            say_everything(&first, *to).with_context(|| format!("agent dead, round {round}"))?;
        }
        node.agent().start(&node.netns)?;
        // While it starts.
        for to in &targets {
            say_everything(&first, *to).with_context(|| format!("it starts, round {round}"))?;
        }
        node.agent().wait_ready()?;
        let next = cluster.pod("node1", &format!("next{round}"))?;
        for to in &targets {
            say_everything(&next, *to).with_context(|| format!("new pod, round {round}"))?;
        }
        load.wait_for(20, traffic::TIMEOUT)?;
        next.delete()?;
    }
    load.stop().check(100)?;
    Ok(check(&capture.stop()?, &node.addresses)?)
}

/// With every object of the cluster there before the first agent, and pods on a node that was just rebooted.
#[test]
fn no_pod_s_address_leaves_a_node_after_a_reboot() -> TestResult {
    let cluster = Cluster::builder("leaks reboot").nodes(1).wire()?;
    let outside = Outside::join(&cluster)?;
    let targets: Vec<_> = outside
        .addresses
        .iter()
        .map(|address| SocketAddr::new(*address, PORT))
        .collect();
    let mut servers = Vec::new();
    let mut sctp_servers = Vec::new();
    for to in &targets {
        servers.push(Server::start(&outside.client, *to, "outside")?);
        sctp_servers.push(sctp::Server::start(&outside.client, *to, "outside")?);
    }
    let node = cluster.node("node1");
    let capture = Capture::start(&outside.router, "eth0")?;
    for boot in 0..3 {
        node.start_agent()?;
        let pod = first_pod(&cluster, &format!("boot{boot}-"))?;
        for to in &targets {
            say_everything(&pod, *to).with_context(|| format!("boot {boot}"))?;
        }
        node.reboot()?;
        pod.vanish()?;
    }
    Ok(check(&capture.stop()?, &node.addresses)?)
}
