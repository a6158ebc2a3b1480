//! Somebody's own translation on a node, a rule of netfilter that leads one of the node's ports to a pod there and keeps
//! the client's address: the pod's answers go back through it, and what the pod begins itself is masqueraded as ever.

use std::{
    io::{BufRead as _, BufReader},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::{
    socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt},
    time::{TimeVal, TimeValLike as _},
};
use weir_tests::{
    Pod, TestResult,
    load::Load,
    process, rounds,
    traffic::{self, Connection, Protocol},
    wait_until, witness,
};

use crate::support::{Bed, TARGET, WIDE};

/// Port of the node that the rule leads to the pod; of no Service.
const TRANSLATED: u16 = 7000;
/// Datagram that has to be sent in pieces, bytes.
const LARGE: usize = 8000;
/// Bytes of a transfer in each direction.
const BULK: u64 = 4 << 20;

/// Leads the port of the pod's node to the pod, over TCP and UDP and in both families.
fn translate_to(bed: &Bed, pod: &Pod) -> Result<()> {
    let (v4, v6) = (pod.address(false)?, pod.address(true)?);
    let rules = format!(
        "table inet others {{\n\
         chain prerouting {{\n\
         type nat hook prerouting priority dstnat; policy accept;\n\
         meta nfproto ipv4 meta l4proto {{ tcp, udp }} th dport {TRANSLATED} dnat ip to {v4}:{TARGET}\n\
         meta nfproto ipv6 meta l4proto {{ tcp, udp }} th dport {TRANSLATED} dnat ip6 to [{v6}]:{TARGET}\n\
         }}\n}}\n"
    );
    let mut nft = bed.cluster.node(&pod.node).netns.command("nft")?;
    process::run(nft.args(["-f", "-"]), rules.as_bytes(), traffic::TIMEOUT)?;
    Ok(())
}

/// The client is served through the rule, and the pod sees the client's own address and port.
fn is_served(bed: &Bed, to: SocketAddr) -> Result<()> {
    let client = &bed.outside.client;
    for protocol in Protocol::ALL {
        let seen = client
            .run(|| witness::ask(protocol, to, traffic::TIMEOUT))
            .with_context(|| format!("{} {to}", protocol.name()))?;
        ensure!(
            seen.server == "near" && seen.client == seen.own,
            "{} {to}: {seen:?}",
            protocol.name()
        );
    }
    Ok(())
}

/// What the pod begins itself has its node's address outside.
fn is_masqueraded(bed: &Bed) -> Result<()> {
    for to in bed.at_outside() {
        for protocol in Protocol::ALL {
            let seen = bed
                .near
                .run(|| witness::ask(protocol, to, traffic::TIMEOUT))
                .with_context(|| format!("{} {to}", protocol.name()))?;
            ensure!(
                seen.client.ip() == bed.node().address(to.is_ipv6())?,
                "{} {to}: {seen:?}",
                protocol.name()
            );
        }
    }
    Ok(())
}

#[test]
fn a_rule_of_the_node_leads_clients_outside_to_a_pod() -> TestResult {
    let bed = Bed::start("somebody's translation", WIDE, &[])?;
    translate_to(&bed, &bed.near)?;
    for to in bed.at_node(TRANSLATED) {
        is_served(&bed, to)?;
        let client = &bed.outside.client;
        client
            .run(|| Connection::open(to)?.transfer(BULK, BULK))
            .with_context(|| format!("transfer with {to}"))?;
        // Pieces that the node's stack has put together, translated and cut again.
        let name = client.run(|| traffic::udp_name(to, LARGE))?;
        assert_eq!(name, "near");
    }
    is_masqueraded(&bed)?;
    // The pod and the client have spoken both ways by now, and neither is taken for the other.
    for to in bed.at_node(TRANSLATED) {
        is_served(&bed, to)?;
    }
    Ok(())
}

#[test]
fn a_rule_of_the_node_works_without_offloads() -> TestResult {
    let bed = Bed::start("translation plain", WIDE, &[])?;
    bed.cluster.set_offloads(false)?;
    bed.outside.set_offloads(false)?;
    bed.near.netns.set_offloads(false)?;
    translate_to(&bed, &bed.near)?;
    for to in bed.at_node(TRANSLATED) {
        is_served(&bed, to)?;
        bed.outside
            .client
            .run(|| Connection::open(to)?.transfer(BULK, BULK))
            .with_context(|| format!("transfer with {to}"))?;
    }
    Ok(())
}

/// Connects from an address and port of one's own, from the calling thread's namespace, and gives the server's name. The
/// connection ends with a reset, so that the port is free again.
fn greet_from(own: SocketAddr, to: SocketAddr) -> Result<String> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let stream = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let at_once = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    let patience = TimeVal::milliseconds(i64::try_from(traffic::TIMEOUT.as_millis())?);
    socket::setsockopt(&stream, sockopt::Linger, &at_once)?;
    socket::setsockopt(&stream, sockopt::ReuseAddr, &true)?;
    // The time for the connection, too.
    socket::setsockopt(&stream, sockopt::SendTimeout, &patience)?;
    socket::setsockopt(&stream, sockopt::ReceiveTimeout, &patience)?;
    socket::bind(stream.as_raw_fd(), &SockaddrStorage::from(own))
        .with_context(|| format!("bind {own}"))?;
    socket::connect(stream.as_raw_fd(), &SockaddrStorage::from(to))
        .with_context(|| format!("connect {own} to {to}"))?;
    let mut name = String::new();
    BufReader::new(TcpStream::from(stream))
        .read_line(&mut name)
        .with_context(|| format!("read the greeting of {to}"))?;
    Ok(name.trim_end().to_owned())
}

/// A new connection of the same addresses and ports takes the place of one that is over, in both directions.
#[test]
fn a_client_s_port_is_used_again_through_a_rule_of_the_node() -> TestResult {
    /// What is more than two processors need to enter one connection at once: until then it is one to the data path.
    const LATER: Duration = Duration::from_millis(50);
    let bed = Bed::start("translation again", WIDE, &[])?;
    translate_to(&bed, &bed.near)?;
    for to in bed.at_node(TRANSLATED) {
        let own = SocketAddr::new(bed.outside.address(to.is_ipv6())?, 40_000);
        for number in 0..3 {
            let name = bed
                .outside
                .client
                .run(|| greet_from(own, to))
                .with_context(|| format!("connection {number}"))?;
            assert_eq!(name, "near");
            let over = Instant::now();
            wait_until("another moment", traffic::TIMEOUT, || {
                Ok(over.elapsed() > LATER)
            })?;
        }
    }
    Ok(())
}

#[test]
fn connections_through_a_rule_of_the_node_outlive_the_agent() -> TestResult {
    let bed = Bed::start("translation kills", WIDE, &[])?;
    translate_to(&bed, &bed.near)?;
    let client = &bed.outside.client;
    let mut load = Load::default();
    for to in bed.at_node(TRANSLATED) {
        load = load
            .connections(client, to)?
            .long_connection(client, to)?
            .datagrams(client, to)?;
    }
    load.wait_for(50, traffic::TIMEOUT)?;
    for round in 0..rounds(2, 20) {
        bed.node().kill9_agent()?;
        load.wait_for(50, traffic::TIMEOUT)
            .with_context(|| format!("agent dead, round {round}"))?;
        bed.node().start_agent()?;
        bed.cluster.wait_applied()?;
        load.wait_for(50, traffic::TIMEOUT)
            .with_context(|| format!("agent back, round {round}"))?;
    }
    Ok(load.stop().check(100)?)
}
