//! NodePorts: at the loopback addresses, which only sockets can be served at, and as ports that no
//! process of the node can have.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use anyhow::{Context as _, Result, ensure};
use weir_tests::{TestResult, traffic};

use crate::support::{NODE_PORT, Setup, connect_bound, greeted, mapped};

/// The loopback addresses, the first in IPv6 form too.
fn loopbacks() -> Result<[IpAddr; 3]> {
    let v4: IpAddr = "127.0.0.1".parse()?;
    Ok([v4, "::1".parse()?, mapped(v4)])
}

fn any(to: SocketAddr) -> &'static str {
    if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }
}

/// The name in an answer.
fn name_of(answer: &[u8]) -> String {
    let name = answer.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

#[test]
fn the_node_reaches_them_at_its_loopback_addresses() -> TestResult {
    let setup = Setup::start("loopback node ports", |_| {})?;
    let node = setup.node();
    for address in loopbacks()? {
        let to = SocketAddr::new(address, NODE_PORT);
        let tcp = || greeted(TcpStream::connect_timeout(&to, traffic::TIMEOUT)?);
        let (peer, name, _stream) = node.run(tcp).with_context(|| format!("TCP {to}"))?;
        assert_eq!(peer, to);
        setup.is_endpoint(&name);
        let (peer, name, _stream) = node
            .run(|| greeted(connect_bound(to)?))
            .with_context(|| format!("TCP {to} with a port of its own"))?;
        assert_eq!(peer, to);
        setup.is_endpoint(&name);

        let connected = node.run(|| -> Result<_> {
            let socket = UdpSocket::bind(any(to))?;
            socket.set_read_timeout(Some(traffic::TIMEOUT))?;
            socket.connect(to)?;
            let mut answer = [0; 100];
            socket.send(b"one")?;
            let length = socket.recv(&mut answer)?;
            Ok((socket.peer_addr()?, name_of(&answer[..length])))
        });
        let (peer, name) = connected.with_context(|| format!("connected UDP {to}"))?;
        assert_eq!(peer, to);
        setup.is_endpoint(&name);

        let unconnected = node.run(|| -> Result<()> {
            let socket = UdpSocket::bind(any(to))?;
            socket.set_read_timeout(Some(traffic::TIMEOUT))?;
            let mut answer = [0; 100];
            for _ in 0..10 {
                socket.send_to(b"one", to)?;
                let (length, from) = socket.recv_from(&mut answer)?;
                ensure!(from == to, "{from} has answered");
                setup.is_endpoint(&name_of(&answer[..length]));
            }
            Ok(())
        });
        unconnected.with_context(|| format!("unconnected UDP {to}"))?;
    }
    // In a pod these are the pod's own.
    for address in loopbacks()? {
        let to = SocketAddr::new(address, NODE_PORT);
        let result = setup.client.run(|| TcpStream::connect(to));
        assert!(result.is_err(), "{to} in a pod");
    }
    Ok(())
}

#[test]
fn no_process_of_the_node_can_have_the_port() -> TestResult {
    let setup = Setup::start("bind", |_| {})?;
    let node = setup.node();
    let mut addresses = vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    addresses.extend(loopbacks()?);
    addresses.extend(node.addresses.iter().copied());
    for address in addresses {
        let (to, other) = (
            SocketAddr::new(address, NODE_PORT),
            SocketAddr::new(address, NODE_PORT + 1),
        );
        let in_use = |result: std::io::Result<()>| matches!(result, Err(error) if error.kind() == std::io::ErrorKind::AddrInUse);
        node.run(|| {
            assert!(in_use(TcpListener::bind(to).map(drop)), "TCP {to}");
            assert!(in_use(UdpSocket::bind(to).map(drop)), "UDP {to}");
            TcpListener::bind(other)?;
            UdpSocket::bind(other)
        })
        .with_context(|| format!("bind to {other}"))?;
    }
    for address in setup.client.addresses.iter().copied() {
        let to = SocketAddr::new(address, NODE_PORT);
        setup
            .client
            .run(|| (TcpListener::bind(to)?, UdpSocket::bind(to)).1)
            .context("a pod may have it")?;
    }
    Ok(())
}
