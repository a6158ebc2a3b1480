//! `connect()` and `getpeername()` to ClusterIPs and external addresses.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsFd as _,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{SockFlag, getsockopt, sockopt::SocketError},
};
use serde_json::json;
use weir_tests::{
    TestResult,
    cluster::cluster_ips,
    netns::NetNs,
    objects::{self, Port},
    traffic::{self, Server},
};

use crate::support::{
    NODE_PORT, PORT, Setup, TARGET, addresses, connect_bound, connect_socket, counted, flows,
    greeted, is_refused_at_once, tcp_socket,
};

/// An external address of each family (RFC 5737, RFC 3849).
const EXTERNAL: [&str; 2] = ["203.0.113.250", "2001:db8::cb00:71fa"];

fn open(from: &NetNs, to: SocketAddr) -> Result<(SocketAddr, String, TcpStream)> {
    from.run(|| greeted(TcpStream::connect_timeout(&to, traffic::TIMEOUT)?))
        .with_context(|| format!("connect to {to}"))
}

#[test]
fn connections_go_to_an_endpoint_and_the_peer_is_the_service() -> TestResult {
    let setup = Setup::start("sockets connect", |_| {})?;
    let node = setup.node();
    for (who, from) in setup.clients() {
        for address in addresses(10) {
            let to = SocketAddr::new(address, PORT);
            let before = counted(node, "TRANSLATED")?;
            let (peer, name, _stream) = open(from, to)?;
            assert_eq!(peer, to, "{who}");
            setup.is_endpoint(&name);
            assert_eq!(counted(node, "TRANSLATED")?, before + 1, "{who} to {to}");
        }
    }
    assert_eq!(flows(node)?, 0, "the packets are ordinary ones");
    Ok(())
}

#[test]
fn a_socket_with_a_port_of_its_own_is_left_to_the_devices() -> TestResult {
    let setup = Setup::start("sockets bound", |_| {})?;
    let node = setup.node();
    let mut expected = 0;
    for (who, from) in setup.clients() {
        for address in addresses(10) {
            let to = SocketAddr::new(address, PORT);
            let (peer, name, _stream) = from
                .run(|| greeted(connect_bound(to)?))
                .with_context(|| format!("{who} to {to}"))?;
            assert_eq!(peer, to, "{who}");
            setup.is_endpoint(&name);
            // An entry for each direction.
            expected += 2;
            assert_eq!(flows(node)?, expected, "{who} to {to}");
        }
    }
    assert_eq!(counted(node, "TRANSLATED")?, 0);
    Ok(())
}

#[test]
fn a_pod_that_opted_out_is_left_to_the_devices() -> TestResult {
    let setup = Setup::start("sockets opted out", |_| {})?;
    let pod = &setup.client;
    let mut object = objects::pod(&pod.name, "uid", &pod.node, &pod.addresses);
    object["metadata"]["annotations"] = json!({"weir.sh/socket-translation": "disabled"});
    setup.cluster.apply(&object)?;
    setup.cluster.wait_applied()?;
    for (at, address) in (1..).zip(addresses(10)) {
        let to = SocketAddr::new(address, PORT);
        let (peer, name, _stream) = open(&pod.netns, to)?;
        assert_eq!(peer, to);
        setup.is_endpoint(&name);
        assert_eq!(flows(setup.node())?, 2 * at);
    }
    assert_eq!(counted(setup.node(), "TRANSLATED")?, 0);
    Ok(())
}

#[test]
fn what_has_no_endpoint_is_refused_at_once() -> TestResult {
    let setup = Setup::start("sockets refused", |_| {})?;
    let ports = Port::both(PORT, TARGET);
    let dead = objects::service("dead", &cluster_ips(11), &ports);
    setup.cluster.apply(&dead)?;
    setup.cluster.wait_applied()?;
    let node = setup.node();
    for (who, from) in setup.clients() {
        for (service, port, reason) in [
            (11, PORT, "SERVICE_BACKEND_NOT_FOUND"),
            (10, PORT + 1, "SERVICE_PORT_NOT_FOUND"),
        ] {
            for address in addresses(service) {
                let to = SocketAddr::new(address, port);
                let before = node.drops(reason)?;
                is_refused_at_once(from, to).context(who)?;
                assert_eq!(node.drops(reason)?, before + 1, "{who} to {to}");
            }
        }
    }
    // By the call itself: nothing was sent that had to be answered.
    assert_eq!(counted(node, "REFUSED")?, 0);
    Ok(())
}

/// What no Service has of an external address is somebody else's.
#[test]
fn other_ports_of_external_addresses_are_reached_as_before() -> TestResult {
    let setup = Setup::start("sockets external", |service| {
        service["spec"]["externalIPs"] = json!(EXTERNAL);
    })?;
    let fabric = setup.cluster.fabric();
    let node = setup.node();
    let mut servers = Vec::new();
    for (address, pods) in EXTERNAL.iter().zip(&node.pod_cidrs) {
        let address: IpAddr = address.parse().context("an address")?;
        let length = if address.is_ipv4() { 32 } else { 128 };
        let via = node.address(address.is_ipv6())?;
        fabric.ip(&format!(
            "address add {address}/{length} dev lo\nroute add {pods} via {via}\n"
        ))?;
        servers.push(Server::start(
            fabric,
            SocketAddr::new(address, 81),
            "outside",
        )?);
    }
    for (who, from) in setup.clients() {
        for address in EXTERNAL {
            let address: IpAddr = address.parse().context("an address")?;
            let to = SocketAddr::new(address, PORT);
            let (peer, name, _stream) = open(from, to)?;
            assert_eq!(peer, to, "{who}");
            setup.is_endpoint(&name);
            let to = SocketAddr::new(address, 81);
            for protocol in traffic::Protocol::ALL {
                let name = from.run(|| traffic::name(protocol, to)).context(who)?;
                assert_eq!(name, "outside", "{who}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_connection_that_is_waited_for_later() -> TestResult {
    let setup = Setup::start("sockets nonblocking", |_| {})?;
    for (who, from) in setup.clients() {
        for address in addresses(10) {
            let to = SocketAddr::new(address, PORT);
            let result: Result<_> = from.run(|| {
                let socket = tcp_socket(to, SockFlag::SOCK_NONBLOCK)?;
                match connect_socket(&socket, to) {
                    Ok(()) | Err(Errno::EINPROGRESS) => {}
                    Err(error) => return Err(error.into()),
                }
                let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
                anyhow::ensure!(poll(&mut waiting, PollTimeout::from(5000_u16))? == 1);
                anyhow::ensure!(getsockopt(&socket, SocketError)? == 0);
                let stream = TcpStream::from(socket);
                stream.set_nonblocking(false)?;
                greeted(stream)
            });
            let (peer, name, _stream) = result.with_context(|| format!("{who} to {to}"))?;
            assert_eq!(peer, to, "{who}");
            setup.is_endpoint(&name);
        }
    }
    assert_eq!(flows(setup.node())?, 0);
    Ok(())
}

#[test]
fn a_socket_that_was_refused_can_connect_again() -> TestResult {
    let setup = Setup::start("sockets again", |_| {})?;
    for (who, from) in setup.clients() {
        for address in addresses(10) {
            let result: Result<_> = from.run(|| {
                let (good, bad) = (SocketAddr::new(address, PORT), SocketAddr::new(address, 9));
                let socket = tcp_socket(good, SockFlag::empty())?;
                for _ in 0..2 {
                    anyhow::ensure!(connect_socket(&socket, bad) == Err(Errno::ECONNREFUSED));
                }
                connect_socket(&socket, good)?;
                greeted(TcpStream::from(socket))
            });
            let (peer, name, _stream) = result.context(who)?;
            assert_eq!(peer, SocketAddr::new(address, PORT), "{who}");
            setup.is_endpoint(&name);
        }
    }
    Ok(())
}

/// A UDP socket may be connected to one after another.
#[test]
fn a_socket_forgets_the_service_it_was_connected_to() -> TestResult {
    let setup = Setup::start("sockets forget", |_| {})?;
    let names = setup.cluster.node("node1").run(|| -> Result<()> {
        for loopback in ["127.0.0.1", "::1"] {
            let service = SocketAddr::new(loopback.parse()?, NODE_PORT);
            let other = SocketAddr::new(loopback.parse()?, 9);
            let socket = UdpSocket::bind(SocketAddr::new(
                if service.is_ipv4() { "0.0.0.0" } else { "::" }.parse()?,
                0,
            ))?;
            for to in [service, other, service] {
                socket.connect(to)?;
                anyhow::ensure!(socket.peer_addr()? == to, "{:?}", socket.peer_addr());
            }
        }
        Ok(())
    });
    names?;
    Ok(())
}

/// TCP at the socket and TCP at the device ask one table.
#[test]
fn affinity_is_one_at_sockets_and_at_devices() -> TestResult {
    let setup = Setup::start("sockets affinity", |service| {
        service["spec"]["sessionAffinity"] = "ClientIP".into();
    })?;
    for (who, from) in setup.clients() {
        for address in cluster_ips(10) {
            let to = SocketAddr::new(address, PORT);
            let mut seen = BTreeSet::new();
            for _ in 0..10 {
                seen.insert(open(from, to)?.1);
                seen.insert(from.run(|| greeted(connect_bound(to)?))?.1);
            }
            assert_eq!(seen.len(), 1, "{who} to {to}: {seen:?}");
        }
    }
    // Ten of each, from two clients and to two addresses.
    assert_eq!(counted(setup.node(), "TRANSLATED")?, 40);
    assert_eq!(flows(setup.node())?, 80);
    Ok(())
}
