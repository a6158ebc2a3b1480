//! Packets that claim to be from somewhere else are dropped and counted by reason.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use weir_tests::{
    Cluster, Node, Pod, TestResult, cluster::cluster_ips, packet, traffic, wait_until,
};

const PORT: u16 = 8080;
const INVALID_SOURCE: &str = "INVALID_SOURCE";
/// Frames sent of each kind.
const FRAMES: u64 = 5;

/// A receiver in a pod that must see nothing of what is spoofed.
fn listen(pod: &Pod, address: IpAddr) -> Result<std::net::UdpSocket> {
    let socket = pod.run(|| std::net::UdpSocket::bind((address, PORT)))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Sends frames and expects as many drops for `reason`, and nothing received.
fn dropped(
    node: &Node,
    reason: &str,
    receiver: &std::net::UdpSocket,
    send: impl Fn() -> Result<()>,
) -> Result<()> {
    let before = node.drops(reason)?;
    for _ in 0..FRAMES {
        send()?;
    }
    let what = format!("{FRAMES} drops with {reason} on {}", node.name);
    wait_until(&what, traffic::TIMEOUT, || {
        Ok(node.drops(reason)? >= before + FRAMES)
    })?;
    let received = receiver.recv(&mut [0; 2048]);
    anyhow::ensure!(received.is_err(), "a spoofed packet arrived");
    Ok(())
}

#[test]
fn a_pod_sends_from_its_own_addresses_only() -> TestResult {
    let cluster = Cluster::builder("spoofing pod").start()?;
    let node = cluster.node("node1");
    let attacker = cluster.pod("node1", "attacker")?;
    let neighbour = cluster.pod("node1", "neighbour")?;
    let victim = cluster.pod("node1", "victim")?;
    let remote = cluster.pod("node2", "remote")?;
    let to_mac = packet::gateway_mac(&attacker.netns)?;
    let from_mac = packet::mac_of(&attacker.netns, "eth0")?;
    for v6 in [false, true] {
        let own = attacker.address(v6)?;
        let outside: IpAddr = if v6 { "2001:db8::1" } else { "198.51.100.1" }
            .parse()
            .context("an address")?;
        for target in [&victim, &remote] {
            let receiver = listen(target, target.address(v6)?)?;
            let send = |source: IpAddr| -> Result<()> {
                let to = (target.address(v6)?, PORT);
                let frame = packet::udp_frame(to_mac, from_mac, (source, 4000), to, b"spoofed")?;
                attacker.run(|| packet::send("eth0", &frame))
            };
            for source in [
                neighbour.address(v6)?,
                node.address(v6)?,
                cluster_ips(10)[usize::from(v6)],
                outside,
            ] {
                dropped(node, INVALID_SOURCE, &receiver, || send(source))
                    .with_context(|| format!("from {source}"))?;
            }
            // The same frame with the own address does arrive: the test's frames are right.
            send(own)?;
            wait_until("the honest packet", traffic::TIMEOUT, || {
                Ok(receiver.recv(&mut [0; 2048]).is_ok())
            })?;
        }
    }
    Ok(())
}

#[test]
fn nothing_from_outside_claims_to_be_inside() -> TestResult {
    let cluster = Cluster::builder("spoofing outside").start()?;
    let node = cluster.node("node1");
    let victim = cluster.pod("node1", "victim")?;
    let neighbour = cluster.pod("node1", "neighbour")?;
    let to_mac = packet::mac_of(&node.netns, "eth0")?;
    let from_mac = packet::mac_of(cluster.fabric(), "br0")?;
    cluster.service_of_pods("web", &cluster_ips(10), PORT, &[&victim])?;
    for v6 in [false, true] {
        let receiver = listen(&victim, victim.address(v6)?)?;
        let send = |source: IpAddr| -> Result<()> {
            let to = (victim.address(v6)?, PORT);
            let frame = packet::udp_frame(to_mac, from_mac, (source, 4000), to, b"spoofed")?;
            // The port of the bridge that leads to the node.
            cluster.fabric().run(|| packet::send("node1", &frame))
        };
        let parse = |v4: &str, text6: &str| if v6 { text6 } else { v4 }.parse::<IpAddr>();
        for source in [
            node.address(v6)?,
            neighbour.address(v6)?,
            cluster_ips(10)[usize::from(v6)],
            parse("127.0.0.1", "::1").context("an address")?,
            parse("224.0.0.1", "ff02::1").context("an address")?,
        ] {
            dropped(node, INVALID_SOURCE, &receiver, || send(source))
                .with_context(|| format!("from {source}"))?;
        }
        // A client outside may talk to a pod: the test's frames are right.
        send(parse("192.168.77.1", "fd00:77::1").context("an address")?)?;
        wait_until("the honest packet", traffic::TIMEOUT, || {
            Ok(receiver.recv(&mut [0; 2048]).is_ok())
        })?;
    }
    Ok(())
}

#[test]
fn a_pod_that_names_another_by_its_ethernet_address_is_dropped() -> TestResult {
    let cluster = Cluster::builder("spoofing mac").nodes(1).start()?;
    let node = cluster.node("node1");
    let attacker = cluster.pod("node1", "attacker")?;
    let victim = cluster.pod("node1", "victim")?;
    let receiver = listen(&victim, victim.address(false)?)?;
    // The gateway as the victim knows it, and the victim's own address: another endpoint's numbers.
    let to_mac = packet::gateway_mac(&victim.netns)?;
    let from_mac = packet::mac_of(&victim.netns, "eth0")?;
    let to = (victim.address(false)?, PORT);
    let from = (attacker.address(false)?, 4000);
    let frame = packet::udp_frame(to_mac, from_mac, from, to, b"spoofed")?;
    dropped(node, "INVALID_SOURCE_MAC", &receiver, || {
        attacker.run(|| packet::send("eth0", &frame))
    })?;
    Ok(())
}
