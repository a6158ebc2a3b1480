//! A link of MTU 1280 between the routers: what is translated learns of it by ICMP that is translated, too.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use weir_tests::{
    TestResult,
    capture::Capture,
    netns::NetNs,
    traffic::{self, Connection, UdpClient},
    wait_for,
};

use crate::support::{Bed, FAR, NEAR};

/// The smallest that IPv6 allows, bytes.
const NARROW: u32 = 1280;
/// Bytes of a transfer in each direction.
const BULK: u64 = 4 << 20;

/// Bulk both ways, and datagrams that fit the wide links alone, or none.
pub fn passes(client: &NetNs, to: SocketAddr) -> Result<()> {
    client
        .run(|| Connection::open(to)?.transfer(BULK, BULK))
        .with_context(|| format!("transfer with {to}"))?;
    for length in [1400, 8000] {
        // The first question and the first answer are lost to the word of the router.
        wait_for("a large datagram", 2 * traffic::TIMEOUT, || {
            let socket = client.run(|| UdpClient::new(to))?;
            socket
                .ask(&vec![7; length], traffic::TIMEOUT / 10)
                .map(Some)
        })
        .with_context(|| format!("{length} bytes to {to}"))?;
    }
    Ok(())
}

fn all_pass(bed: &Bed) -> Result<()> {
    let capture = Capture::start(&bed.outside.edge, "eth0")?;
    for to in [bed.at_node(NEAR), bed.at_node(FAR)].concat() {
        passes(&bed.outside.client, to)?;
    }
    for to in bed.at_outside() {
        passes(&bed.near.netns, to)?;
    }
    let packets = capture.stop()?;
    let fragmented = packets
        .iter()
        .find(|packet| packet.is_fragment && i32::from(packet.protocol) == libc::IPPROTO_TCP);
    ensure!(
        fragmented.is_none(),
        "TCP asks not to be fragmented: {fragmented:?}"
    );
    Ok(())
}

#[test]
fn a_narrow_link_is_found_through_translation() -> TestResult {
    let bed = Bed::start("narrow", NARROW, &[])?;
    Ok(all_pass(&bed)?)
}

#[test]
fn a_narrow_link_is_found_without_offloads() -> TestResult {
    let bed = Bed::start("narrow plain", NARROW, &[])?;
    bed.cluster.set_offloads(false)?;
    bed.outside.set_offloads(false)?;
    for pod in [&bed.near, &bed.far] {
        pod.netns.set_offloads(false)?;
    }
    Ok(all_pass(&bed)?)
}
