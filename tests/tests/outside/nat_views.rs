//! What operators see of translated connections: `weir bpf nat list`, the ports in use in `weir status`, and the
//! metrics of the search for ports.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use weir_tests::{
    Node, TestResult,
    netns::NetNs,
    node::number,
    traffic::{self, Protocol, UdpClient},
    wait_until, witness,
};

use crate::support::{Bed, FAR, NEAR, TARGET, WIDE};

/// As few as the setting takes.
const PORTS: usize = 16;
const ARGUMENTS: [&str; 2] = ["--nat-ports", "61000-61015"];

/// A connection that must be listed.
#[derive(Debug)]
struct Expected {
    protocol: Protocol,
    /// The client's own address, and what takes its place.
    source: SocketAddr,
    translated: SocketAddr,
    /// What the client asks for, and who answers.
    asked: SocketAddr,
    reached: SocketAddr,
}

impl Expected {
    /// Asks, and tells how that must be listed.
    fn ask(
        client: &NetNs,
        protocol: Protocol,
        asked: SocketAddr,
        reached: SocketAddr,
    ) -> Result<Self> {
        let seen = client
            .run(|| witness::ask(protocol, asked, traffic::TIMEOUT))
            .with_context(|| format!("{} {asked}", protocol.name()))?;
        Ok(Self {
            protocol,
            source: seen.own,
            translated: seen.client,
            asked,
            reached,
        })
    }

    fn is(&self, row: &Value) -> bool {
        let is_at = |address: &str, port: &str, wanted: SocketAddr| {
            row[address] == wanted.ip().to_string() && row[port] == wanted.port()
        };
        row["protocol"] == self.protocol.name()
            && row["family"] == family(self.asked)
            && is_at("source", "source_port", self.source)
            && is_at(
                "translated_source",
                "translated_source_port",
                self.translated,
            )
            && is_at("destination", "destination_port", self.asked)
            && is_at("reached", "reached_port", self.reached)
    }
}

fn family(address: SocketAddr) -> &'static str {
    if address.is_ipv6() { "IPv6" } else { "IPv4" }
}

fn rows(node: &Node) -> Result<Vec<Value>> {
    let rows = node.weir_json(&["bpf", "nat", "list"])?;
    rows.as_array()
        .cloned()
        .context("`weir bpf nat list -o json` is no list")
}

fn text(node: &Node, arguments: &[&str]) -> Result<String> {
    let output = node.agent().weir(arguments)?;
    ensure!(output.status.success(), "{arguments:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Connections from outside to the other node's endpoint and from a pod to the outside, over TCP and UDP.
fn connect(bed: &Bed) -> Result<Vec<Expected>> {
    let mut expected = Vec::new();
    for protocol in Protocol::ALL {
        for to in bed.at_node(FAR) {
            let reached = SocketAddr::new(bed.far.address(to.is_ipv6())?, TARGET);
            let client = &bed.outside.client;
            expected.push(Expected::ask(client, protocol, to, reached)?);
        }
        for to in bed.at_outside() {
            expected.push(Expected::ask(&bed.near.netns, protocol, to, to)?);
        }
        // Not translated: the endpoint is on the asked node.
        for to in bed.at_node(NEAR) {
            let client = &bed.outside.client;
            let seen = client.run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
            ensure!(seen.client == seen.own, "{seen:?}");
        }
    }
    Ok(expected)
}

fn check_list(node: &Node, expected: &[Expected]) -> Result<()> {
    let rows = rows(node)?;
    for connection in expected {
        let found: Vec<_> = rows.iter().filter(|row| connection.is(row)).collect();
        ensure!(found.len() == 1, "{connection:?} in {rows:#?}");
        let state = found[0]["state"].as_str().context("state")?;
        let is_right = match connection.protocol {
            Protocol::Tcp => ["established", "fin-wait", "time-wait", "closed"].contains(&state),
            _ => ["exchanged", "answered"].contains(&state),
        };
        ensure!(is_right, "{}", found[0]);
        let [age, idle] =
            ["created_seconds_ago", "idle_seconds"].map(|name| number(&found[0][name]));
        ensure!(age.is_some() && idle <= age, "{}", found[0]);
    }
    let other = rows
        .iter()
        .find(|row| !expected.iter().any(|connection| connection.is(row)));
    ensure!(other.is_none(), "nobody has made {other:?}");
    let text = text(node, &["bpf", "nat", "list"])?;
    for connection in expected {
        let translated = connection.translated.to_string();
        ensure!(text.contains(&translated), "no {translated}:\n{text}");
    }
    Ok(())
}

#[test]
fn translated_connections_are_listed_and_counted() -> TestResult {
    let bed = Bed::start("NAT views", WIDE, &ARGUMENTS)?;
    let node = bed.node();
    let expected = connect(&bed)?;
    assert_eq!(expected.len(), 8, "{expected:?}");
    check_list(node, &expected)?;
    wait_until("the count of ports in use", traffic::TIMEOUT, || {
        let ports = &node.weir_json(&["status"])?["nat_ports"];
        let is_range =
            number(&ports["first"]) == Some(61_000) && number(&ports["last"]) == Some(61_015);
        ensure!(is_range, "{ports}");
        Ok(["in_use_ipv4", "in_use_ipv6"].map(|name| number(&ports[name])) == [Some(4); 2])
    })?;
    let status = text(node, &["status"])?;
    let line = "4 in use by IPv4, 4 by IPv6; 16 ports for each destination (61000-61015)";
    assert!(status.contains(line), "no {line:?}:\n{status}");
    for (hook, name) in [
        ("from_netdev", "NAT_PORT_TRIED"),
        ("from_pod", "NAT_PORT_TRIED"),
        ("from_pod", "ROUTED"),
    ] {
        let count = node.outcomes(hook, name)?;
        assert!(count >= 4, "{count} times {name} at {hook}");
    }
    // The list needs no agent.
    node.kill9_agent()?;
    check_list(node, &expected)?;
    Ok(())
}

#[test]
fn a_full_range_is_a_problem_of_the_status() -> TestResult {
    let bed = Bed::start("NAT problem", WIDE, &ARGUMENTS)?;
    let node = bed.node();
    for (index, to) in bed.at_node(FAR).into_iter().enumerate() {
        let before = node.weir_json(&["status"])?;
        let dropped = |status: &Value| number(&status["nat_ports"]["exhausted_in_last_minute"]);
        assert!(dropped(&before) == Some(0) || index > 0, "{before}");
        assert!(
            before["problems"] == serde_json::json!([]) || index > 0,
            "{before}"
        );
        let searches = node.outcomes("from_netdev", "NAT_PORT_SEARCH")?;
        let mut sockets = Vec::new();
        for _ in 0..PORTS {
            let socket = bed.outside.client.run(|| UdpClient::new(to))?;
            socket.ask(b"question", traffic::TIMEOUT)?;
            sockets.push(socket);
        }
        let beyond = bed.outside.client.run(|| UdpClient::new(to))?;
        let answer = beyond.ask(b"too many", traffic::TIMEOUT / 20);
        assert!(answer.is_err(), "one more than there are ports");
        let status = node.weir_json(&["status"])?;
        assert!(dropped(&status) > dropped(&before), "{status}");
        let problems = status["problems"].to_string();
        for part in [
            "NAT_PORTS_EXHAUSTED",
            "the 16 ports 61000-61015",
            "give the setting nat-ports a larger range",
        ] {
            assert!(problems.contains(part), "no {part:?} in {problems}");
        }
        let after = node.outcomes("from_netdev", "NAT_PORT_SEARCH")?;
        assert!(after > searches, "{searches}, then {after} searches");
        let of_family = rows(node)?;
        let of_family = of_family.iter().filter(|row| row["family"] == family(to));
        assert_eq!(of_family.count(), PORTS);
    }
    Ok(())
}
