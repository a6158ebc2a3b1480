//! The last test of upstream's `test/e2e/network/conntrack.go`: a segment that belongs to no
//! window must not end the connection that it seems to belong to.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail};
use weir_tests::{
    Cluster, Pod, TestResult,
    cluster::cluster_ips,
    packet::{self, IPV4, IPV6},
    traffic::Connection,
};

use super::support::{Backends, PORT, TARGET};

const TCP: u8 = 6;
const ACK: u8 = 0x10;

/// Ethernet address that `ip -j` shows under this name.
fn mac(pod: &Pod, arguments: &[&str], field: &str) -> Result<[u8; 6]> {
    let shown: serde_json::Value = serde_json::from_str(&pod.netns.tool("ip", arguments)?)?;
    packet::parse_mac(shown[0][field].as_str().context("no Ethernet address")?)
}

/// A frame from a pod to its gateway: a TCP segment with a sequence number out of the blue.
fn stray_segment(pod: &Pod, from: SocketAddr, to: SocketAddr) -> Result<Vec<u8>> {
    let mut tcp = Vec::new();
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend(0xdead_beef_u32.to_be_bytes());
    tcp.extend(0xcafe_babe_u32.to_be_bytes());
    tcp.extend([5 << 4, ACK, 0x10, 0, 0, 0, 0, 0]);
    tcp.extend(b"boom");
    let length = u16::try_from(tcp.len())?;
    let (kind, mut header, addresses) = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let addresses = [from.octets(), to.octets()].concat();
            let mut header = vec![0x45, 0];
            header.extend((20 + length).to_be_bytes());
            header.extend([0, 0, 0, 0, 64, TCP, 0, 0]);
            header.extend(&addresses);
            let sum = packet::checksum(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            (IPV4, header, addresses)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let addresses = [from.octets(), to.octets()].concat();
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(length.to_be_bytes());
            header.extend([TCP, 64]);
            header.extend(&addresses);
            (IPV6, header, addresses)
        }
        (from, to) => bail!("{from} and {to} are of different families"),
    };
    let mut summed = addresses;
    summed.extend([0, TCP]);
    summed.extend(length.to_be_bytes());
    summed.extend(&tcp);
    let sum = packet::checksum(&summed);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    let gateway = mac(pod, &["-j", "neigh", "show", "nud", "permanent"], "lladdr")?;
    let own = mac(pod, &["-j", "link", "show", "eth0"], "address")?;
    let mut frame = [gateway, own].concat();
    frame.extend(kind.to_be_bytes());
    frame.append(&mut header);
    frame.append(&mut tcp);
    Ok(frame)
}

/// "should drop INVALID conntrack entries [Privileged]": whether it is dropped or arrives
/// translated, the client must not answer the endpoint with a reset. Limit: 1 min without one.
#[test]
fn stray_segments_do_not_end_a_connection() -> TestResult {
    let cluster = Cluster::builder("stray segments").start()?;
    let client = cluster.pod("node1", "startup-script")?;
    let vips = cluster_ips(10);
    // On the client's node and on the other.
    let near = Backends::start(&cluster, "boom-near-", &["node1"])?;
    let far = Backends::start(&cluster, "boom-far-", &["node2"])?;
    for backends in [near, far] {
        backends.serve(&cluster, "boom-server", &vips, |_| {})?;
        let server = &backends.pods[0];
        for vip in vips {
            let mut connection = client.run(|| Connection::open(SocketAddr::new(vip, PORT)))?;
            connection.start_echo()?;
            connection.echo(b"before")?;
            let from = SocketAddr::new(server.address(vip.is_ipv6())?, TARGET);
            let frame = stray_segment(server, from, connection.local_address()?)?;
            for _ in 0..10 {
                server.run(|| packet::send("eth0", &frame))?;
                connection.echo(b"after")?;
            }
        }
    }
    Ok(())
}
