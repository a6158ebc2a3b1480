//! The NAT range filled with connections to one destination and beyond: right until it is full, then dropped with a
//! reason, then well again.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use weir_tests::{
    Node, TestResult,
    netns::NetNs,
    traffic::{self, Connection, UdpClient},
    wait_for,
};

use crate::support::{Bed, FAR, WIDE};

const EXHAUSTED: &str = "NAT_PORTS_EXHAUSTED";
/// Ports of the range.
const PORTS: usize = 64;
const FIRST: u16 = 61_000;
/// How long a connection that cannot be made is tried.
const IN_VAIN: Duration = Duration::from_secs(2);
/// How long it may take until ports of what has ended are free again.
const AGEING: Duration = Duration::from_secs(40);
const ARGUMENTS: [&str; 6] = [
    "--nat-ports",
    "61000-61063",
    "--timeout-udp",
    "5",
    "--timeout-udp-stream",
    "5",
];

/// Fills the range with TCP connections from `client` through `node`, and then with UDP.
fn fill(node: &Node, client: &NetNs, to: SocketAddr) -> Result<()> {
    fill_with_tcp(node, client, to).with_context(|| format!("TCP {to}"))?;
    fill_with_udp(node, client, to).with_context(|| format!("UDP {to}"))
}

fn fill_with_tcp(node: &Node, client: &NetNs, to: SocketAddr) -> Result<()> {
    let mut connections = Vec::new();
    let mut ports = BTreeSet::new();
    for number in 0..PORTS {
        let mut connection = client
            .run(|| Connection::open(to))
            .with_context(|| format!("connection {number}"))?;
        let seen = connection.who_am_i()?;
        ensure!(
            seen.ip() == node.address(to.is_ipv6())?,
            "{seen} is not the node"
        );
        ensure!(
            (FIRST..FIRST + 64).contains(&seen.port()),
            "{seen} is out of the range"
        );
        ports.insert(seen.port());
        connection.start_echo()?;
        connections.push(connection);
    }
    ensure!(ports.len() == PORTS, "ports were given twice: {ports:?}");
    let before = node.drops(EXHAUSTED)?;
    let beyond = client.run(|| Connection::open_within(to, IN_VAIN));
    ensure!(beyond.is_err(), "one more than there are ports");
    ensure!(node.drops(EXHAUSTED)? > before, "it is not counted");
    for connection in &mut connections {
        connection.echo(b"still there")?;
    }
    connections.truncate(PORTS / 2);
    let mut later = wait_for("a port after others have closed", AGEING, || {
        client
            .run(|| Connection::open_within(to, traffic::TIMEOUT / 5))
            .map(Some)
    })?;
    later.start_echo()?;
    later.echo(b"new")?;
    for connection in &mut connections {
        connection.echo(b"still there")?;
    }
    Ok(())
}

fn fill_with_udp(node: &Node, client: &NetNs, to: SocketAddr) -> Result<()> {
    let mut sockets = Vec::new();
    for number in 0..PORTS {
        let socket = client.run(|| UdpClient::new(to))?;
        socket
            .ask(b"first", traffic::TIMEOUT)
            .with_context(|| format!("socket {number}"))?;
        sockets.push(socket);
    }
    let before = node.drops(EXHAUSTED)?;
    let beyond = client.run(|| UdpClient::new(to))?;
    let answer = beyond.ask(b"too many", IN_VAIN / 4);
    ensure!(answer.is_err(), "one more than there are ports");
    ensure!(node.drops(EXHAUSTED)? > before, "it is not counted");
    for socket in &sockets {
        socket.ask(b"still there", traffic::TIMEOUT)?;
    }
    wait_for("a port after others were idle", AGEING, || {
        beyond.ask(b"at last", IN_VAIN / 4).map(Some)
    })?;
    Ok(())
}

#[test]
fn a_full_range_of_connections_from_outside() -> TestResult {
    let bed = Bed::start("NAT range", WIDE, &ARGUMENTS)?;
    for to in bed.at_node(FAR) {
        fill(bed.node(), &bed.outside.client, to)?;
    }
    Ok(())
}

#[test]
fn a_full_range_of_masqueraded_connections() -> TestResult {
    let bed = Bed::start("masquerade range", WIDE, &ARGUMENTS)?;
    for to in bed.at_outside() {
        fill(bed.node(), &bed.near.netns, to)?;
    }
    Ok(())
}
