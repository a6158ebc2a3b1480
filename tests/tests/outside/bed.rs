//! The bed itself, without an agent: when this fails, look here first.

use std::net::SocketAddr;

use anyhow::Context as _;
use weir_tests::{
    Cluster, TestResult,
    capture::Capture,
    outside::Outside,
    sctp,
    traffic::{self, Connection, Protocol, Server},
    tun::TunLink,
    wait_for, witness,
};

const PORT: u16 = 8080;
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

#[test]
fn the_client_and_the_nodes_see_each_other_s_own_addresses() -> TestResult {
    let cluster = Cluster::builder("outside bed").wire()?;
    let outside = Outside::join(&cluster)?;
    let node = cluster.node("node1");
    let mut servers = node.serve(PORT)?;
    let mut sctp_servers = Vec::new();
    for address in &outside.addresses {
        let address = SocketAddr::new(*address, PORT);
        servers.push(Server::start(&outside.client, address, "client")?);
        sctp_servers.push(sctp::Server::start(&outside.client, address, "client")?);
    }
    for address in &node.addresses {
        let address = SocketAddr::new(*address, PORT);
        sctp_servers.push(sctp::Server::start(&node.netns, address, "node1")?);
    }
    let capture = Capture::start(&outside.router, "eth0")?;
    for v6 in [false, true] {
        let (inner, outer) = (node.address(v6)?, outside.address(v6)?);
        for protocol in PROTOCOLS {
            let ask = |to| witness::ask(protocol, SocketAddr::new(to, PORT), traffic::TIMEOUT);
            let seen = outside.client.run(|| ask(inner))?;
            assert_eq!(
                (&*seen.server, seen.client.ip(), seen.client),
                ("node1", outer, seen.own)
            );
            let seen = node.run(|| ask(outer))?;
            assert_eq!(
                (&*seen.server, seen.client.ip(), seen.client),
                ("client", inner, seen.own)
            );
        }
        node.run(|| traffic::udp_name(SocketAddr::new(outer, PORT), 5000))?;
    }
    let packets = capture.stop()?;
    for v6 in [false, true] {
        let (inner, outer) = (node.address(v6)?, outside.address(v6)?);
        for protocol in [libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_SCTP] {
            let found = packets.iter().any(|packet| {
                (packet.source, packet.destination) == (inner, outer)
                    && i32::from(packet.protocol) == protocol
            });
            assert!(found, "protocol {protocol} of {inner}");
        }
        let fragments = packets
            .iter()
            .filter(|packet| packet.source == inner && packet.is_fragment);
        assert!(fragments.count() >= 4);
    }
    // What the router sends is not among them.
    assert!(
        !packets
            .iter()
            .any(|packet| outside.addresses.contains(&packet.source))
    );
    Ok(())
}

#[test]
fn a_narrow_link_in_the_middle_is_noticed_by_its_icmp() -> TestResult {
    let cluster = Cluster::builder("outside narrow").nodes(1).wire()?;
    let outside = Outside::join_with_middle(&cluster, 1280)?;
    let node = cluster.node("node1");
    let _servers = node.serve(PORT)?;
    let capture = Capture::start(&outside.edge, "eth0")?;
    for address in &node.addresses {
        let to = SocketAddr::new(*address, PORT);
        outside
            .client
            .run(|| Connection::open(to)?.transfer(1 << 20, 1 << 20))?;
        // The first is too big and is lost to the word of the router, and so is the first answer.
        wait_for("a large datagram", traffic::TIMEOUT, || {
            let client = outside.client.run(|| traffic::UdpClient::new(to))?;
            client.ask(&[7; 1400], traffic::TIMEOUT / 10).map(Some)
        })?;
    }
    let packets = capture.stop()?;
    let longest = packets.iter().map(|packet| packet.length).max();
    // A segment may be one of many that the kernel hands over at once.
    assert!(longest.context("nothing came")? > 1000);
    for address in &node.addresses {
        let fragments = packets
            .iter()
            .filter(|packet| packet.source == *address && packet.is_fragment);
        assert!(fragments.count() > 0, "{address} sent no fragments");
    }
    Ok(())
}

#[test]
fn a_second_device_leads_to_the_node() -> TestResult {
    let cluster = Cluster::builder("outside second").nodes(1).wire()?;
    let outside = Outside::join(&cluster)?;
    let node = cluster.node("node1");
    for _ in 0..2 {
        let addresses = outside.add_second_device(&cluster, node)?;
        for address in addresses {
            let to = SocketAddr::new(address, PORT);
            let _server = Server::start(&node.netns, to, "second")?;
            for protocol in Protocol::ALL {
                let seen = outside
                    .client
                    .run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
                assert_eq!(seen.server, "second");
                assert_eq!(seen.client, seen.own);
            }
        }
        node.netns.ip("link del eth1")?;
    }
    Ok(())
}

#[test]
fn a_link_of_tun_devices_carries_packets() -> TestResult {
    let cluster = Cluster::builder("outside tun bed").nodes(1).wire()?;
    let outside = Outside::join(&cluster)?;
    let node = cluster.node("node1");
    let link = TunLink::new(&node.netns, &outside.router, "tunnel")?;
    for (own, of_router) in [
        ("192.168.79.11", "192.168.79.254"),
        ("fd00:79::11", "fd00:79::fe"),
    ] {
        let (length, nodad) = if own.contains(':') {
            (64, " nodad")
        } else {
            (24, "")
        };
        for (namespace, address) in [(&*node.netns, own), (&outside.router, of_router)] {
            namespace.ip(&format!(
                "address add {address}/{length} dev tunnel{nodad}\n"
            ))?;
        }
        let to = SocketAddr::new(own.parse().context("an address")?, PORT);
        let _server = Server::start(&node.netns, to, "tun")?;
        for protocol in Protocol::ALL {
            let seen = outside
                .client
                .run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
            assert_eq!((&*seen.server, seen.client), ("tun", seen.own));
        }
        outside
            .client
            .run(|| Connection::open(to)?.transfer(1 << 20, 1 << 20))?;
    }
    drop(link);
    assert!(node.netns.tool("ip", &["link", "show", "tunnel"]).is_err());
    Ok(())
}
