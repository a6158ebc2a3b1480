//! A port scan and a SYN flood beside connections that are established: none of those breaks, and new ones come
//! through afterwards.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use weir_tests::{
    TestResult,
    load::Load,
    packet,
    traffic::{self, Connection},
    wait_for,
};

use crate::support::{Bed, FAR, NEAR, WIDE};

/// TCP flag of the first segment of a connection.
const SYN: u8 = 2;
/// Segments of a scan: one for each port.
const SCANNED: u32 = 65_535;
/// Segments of a flood: several times as many as the range has ports.
const FLOODED: u32 = 20_000;
/// Frames sent at once, and the pause after them: what is tested is what becomes of the state, not how much fits.
const BURST: usize = 64;
const PAUSE: Duration = Duration::from_millis(1);
/// Fewer NAT ports than the flood asks for.
const ARGUMENTS: [&str; 2] = ["--nat-ports", "61000-61999"];
/// How long it may take until what the flood left makes way: much less than its time-outs, a minute and more.
const RECOVERY: Duration = Duration::from_secs(20);

/// Sends SYNs from the client's device: `of` gives source and destination of the next, by number.
fn send(
    bed: &Bed,
    count: u32,
    of: impl Fn(u32) -> ((IpAddr, u16), (IpAddr, u16)) + Sync,
) -> Result<()> {
    let to_mac = packet::mac_of(&bed.outside.edge, "eth1")?;
    let from_mac = packet::mac_of(&bed.outside.client, "eth0")?;
    let frames: Vec<_> = (0..count)
        .map(|number| {
            let (source, destination) = of(number);
            packet::tcp_frame(to_mac, from_mac, source, destination, SYN)
        })
        .collect::<Result<_>>()?;
    bed.outside.client.run(|| {
        for burst in frames.chunks(BURST) {
            packet::send_all("eth0", burst)?;
            std::thread::sleep(PAUSE);
        }
        Ok(())
    })
}

/// An address of the client's network that nobody has, so that nobody resets what the servers answer.
fn nobody(number: u32, v6: bool) -> Result<IpAddr> {
    let host = 20 + number % 200;
    let text = if v6 {
        format!("2001:db8:100::{host}")
    } else {
        format!("198.51.100.{host}")
    };
    Ok(text.parse()?)
}

#[test]
fn established_connections_outlive_a_scan_and_a_flood_under_load() -> TestResult {
    let bed = Bed::start("floods", WIDE, &ARGUMENTS)?;
    let client = &bed.outside.client;
    let mut load = Load::default();
    for to in [bed.at_node(NEAR), bed.at_node(FAR)].concat() {
        load = load.long_connection(client, to)?;
    }
    for to in bed.at_outside() {
        load = load.long_connection(&bed.near.netns, to)?;
    }
    load.wait_for(50, traffic::TIMEOUT)?;
    for v6 in [false, true] {
        let (own, node) = (bed.outside.address(v6)?, bed.node().address(v6)?);
        send(&bed, SCANNED, |number| {
            let port = u16::try_from(number + 1).unwrap_or(0);
            ((own, 40_000), (node, port))
        })?;
        load.wait_for(50, traffic::TIMEOUT)
            .context("after the scan")?;

        let sources: Vec<IpAddr> = (0..200)
            .map(|number| nobody(number, v6))
            .collect::<Result<_>>()?;
        send(&bed, FLOODED, |number| {
            let source = sources[number as usize % sources.len()];
            let port = 1024 + u16::try_from(number / 200 % 60_000).unwrap_or(0);
            ((source, port), (node, [NEAR, FAR][number as usize % 2]))
        })?;
        load.wait_for(50, traffic::TIMEOUT)
            .context("after the flood")?;
        for port in [NEAR, FAR] {
            wait_for("a new connection", RECOVERY, || {
                let to = SocketAddr::new(node, port);
                client
                    .run(|| Connection::open_within(to, traffic::TIMEOUT / 5))
                    .map(Some)
            })?;
        }
    }
    Ok(load.stop().check(100)?)
}
