//! Frames with a VLAN tag (IEEE 802.1Q) that come in by a node's device. One with number 0 gives a priority only: it is
//! served as without, and stays behind. Any other belongs to a VLAN, which is not the device's own.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context as _, Result, ensure};
use weir_tests::{
    TestResult,
    capture::{Capture, Packet},
    packet, traffic, wait_until,
};

use crate::support::{Bed, FAR, NEAR, WIDE};

/// Priority 5, no VLAN.
const PRIORITY: u16 = 5 << 13;
/// Priority 5 in a VLAN.
const VLAN: u16 = PRIORITY | 7;
const DEVICE: &str = "eth0";

/// Questions of the client that the last router sends on, with a tag or without.
struct Asker<'a> {
    bed: &'a Bed,
    to_mac: [u8; 6],
    from_mac: [u8; 6],
}

impl<'a> Asker<'a> {
    fn new(bed: &'a Bed) -> Result<Self> {
        Ok(Self {
            bed,
            to_mac: packet::mac_of(&bed.node().netns, DEVICE)?,
            from_mac: packet::mac_of(&bed.outside.router, DEVICE)?,
        })
    }

    /// A socket of the client that takes nothing but answers of `to`.
    fn socket(&self, to: SocketAddr) -> Result<UdpSocket> {
        let own = self.bed.outside.address(to.is_ipv6())?;
        let socket = self
            .bed
            .outside
            .client
            .run(|| {
                UdpSocket::bind((own, 0)).and_then(|socket| socket.connect(to).map(|()| socket))
            })
            .with_context(|| format!("connect UDP to {to}"))?;
        socket.set_read_timeout(Some(traffic::TIMEOUT))?;
        Ok(socket)
    }

    fn frame(&self, socket: &UdpSocket, question: &[u8]) -> Result<Vec<u8>> {
        let (own, to) = (socket.local_addr()?, socket.peer_addr()?);
        packet::udp_frame(
            self.to_mac,
            self.from_mac,
            (own.ip(), own.port()),
            (to.ip(), to.port()),
            question,
        )
    }

    fn send(&self, frames: &[Vec<u8>]) -> Result<()> {
        self.bed
            .outside
            .router
            .run(|| packet::send_all(DEVICE, frames))
    }
}

/// The answer to a question must be that of a server.
fn is_answered(socket: &UdpSocket, server: &str, question: &[u8]) -> Result<()> {
    let mut buffer = [0; 256];
    let length = socket
        .recv(&mut buffer)
        .with_context(|| format!("wait for {server}"))?;
    let wanted = [server.as_bytes(), &[0], question].concat();
    ensure!(
        buffer[..length] == wanted,
        "{server} answers {:?}",
        String::from_utf8_lossy(&buffer[..length])
    );
    Ok(())
}

/// Tags of the UDP packets to an address that a socket asks.
fn tags_to(packets: &[Packet], destination: std::net::IpAddr) -> Vec<Option<u16>> {
    packets
        .iter()
        .filter(|packet| {
            packet.destination == destination && i32::from(packet.protocol) == libc::IPPROTO_UDP
        })
        .map(|packet| packet.tag)
        .collect()
}

#[test]
fn a_tag_that_gives_a_priority_only_is_served_and_stays_behind() -> TestResult {
    let bed = Bed::start("priority tags", WIDE, &[])?;
    let asker = Asker::new(&bed)?;
    let at_node = Capture::start(&bed.node().netns, DEVICE)?;
    let at_other = Capture::start(&bed.cluster.node("node2").netns, DEVICE)?;
    let in_near = Capture::start(&bed.near.netns, DEVICE)?;
    let in_far = Capture::start(&bed.far.netns, DEVICE)?;
    for (port, server) in [(NEAR, "near"), (FAR, "far")] {
        for to in bed.at_node(port) {
            let socket = asker.socket(to)?;
            // The first of a connection, and one that belongs to it.
            for question in [b"first ", b"second"] {
                let frame = asker.frame(&socket, question)?;
                asker.send(&[packet::tagged(&frame, PRIORITY)])?;
                is_answered(&socket, server, question).with_context(|| to.to_string())?;
            }
        }
    }
    let (at_node, at_other) = (at_node.stop()?, at_other.stop()?);
    let (in_near, in_far) = (in_near.stop()?, in_far.stop()?);
    for v6 in [false, true] {
        // Two to each NodePort; nothing on the way has taken the tag off.
        let came = tags_to(&at_node, bed.node().address(v6)?);
        let tagged = came.iter().filter(|tag| **tag == Some(PRIORITY)).count();
        assert_eq!(tagged, 4, "{came:?}");
        let far = bed.far.address(v6)?;
        assert_eq!(tags_to(&at_other, far), [None, None], "to the other node");
        assert_eq!(tags_to(&in_far, far), [None, None], "in the pod there");
        let near = tags_to(&in_near, bed.near.address(v6)?);
        assert_eq!(near, [None, None], "in the pod here");
    }
    Ok(())
}

/// The node's device would take what a pod tags into a VLAN of the node's.
#[test]
fn no_tag_of_a_pod_leaves_the_node() -> TestResult {
    let bed = Bed::start("tags of pods", WIDE, &[])?;
    let own_mac = packet::mac_of(&bed.near.netns, DEVICE)?;
    let gateway = packet::gateway_mac(&bed.near.netns)?;
    for v6 in [false, true] {
        let (own, far) = (bed.near.address(v6)?, bed.far.address(v6)?);
        let at_other = Capture::start(&bed.cluster.node("node2").netns, DEVICE)?;
        let frame =
            |port| packet::udp_frame(gateway, own_mac, (own, 4000), (far, port), b"question");
        let double = packet::tagged(&packet::tagged(&frame(5001)?, VLAN), PRIORITY);
        let frames = [
            packet::tagged(&frame(5000)?, VLAN),
            double,
            packet::tagged(&frame(5002)?, PRIORITY),
        ];
        bed.near.netns.run(|| packet::send_all(DEVICE, &frames))?;
        wait_until("the frame with a priority", traffic::TIMEOUT, || {
            Ok(!tags_to(&at_other.so_far(), far).is_empty())
        })?;
        assert_eq!(tags_to(&at_other.stop()?, far), [None], "IPv6: {v6}");
    }
    Ok(())
}

#[test]
fn a_tag_of_a_vlan_is_left_alone() -> TestResult {
    let bed = Bed::start("VLAN tags", WIDE, &[])?;
    let asker = Asker::new(&bed)?;
    for (port, pod) in [(NEAR, &bed.near), (FAR, &bed.far)] {
        for to in bed.at_node(port) {
            let at_node = Capture::start(&bed.node().netns, DEVICE)?;
            let in_pod = Capture::start(&pod.netns, DEVICE)?;
            let (in_vlan, untagged) = (asker.socket(to)?, asker.socket(to)?);
            // Whatever the first leads to has happened when the second is answered.
            let question = asker.frame(&in_vlan, b"tagged")?;
            let tagged = packet::tagged(&question, VLAN);
            let plain = asker.frame(&untagged, b"plain")?;
            // The tag of the VLAN alone, and behind one that gives a priority only.
            asker.send(&[packet::tagged(&tagged, PRIORITY), tagged])?;
            wait_until("the tagged frame", traffic::TIMEOUT, || {
                Ok(tags_to(&at_node.so_far(), to.ip()) == [Some(VLAN)])
            })?;
            asker.send(&[plain])?;
            is_answered(&untagged, &pod.name, b"plain").with_context(|| to.to_string())?;
            let came = tags_to(&in_pod.stop()?, pod.address(to.is_ipv6())?);
            assert_eq!(came, [None], "{to}");
            in_vlan
                .set_nonblocking(true)
                .context("make a socket non-blocking")?;
            let answer = in_vlan.recv(&mut [0; 64]);
            assert!(
                answer
                    .as_ref()
                    .is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock),
                "{answer:?}"
            );
        }
    }
    Ok(())
}
