//! A device of a node without a link layer (tun): clients come in by it and are answered by it, and pods leave by it.
//! Small packets and large ones, in pieces, too big for what lies behind, refused, and for the node itself.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use weir_tests::{
    Cluster, Node, TestResult,
    capture::Capture,
    objects::{Endpoint, Port},
    outside::CLIENT_NETWORKS,
    refusal::is_refused,
    traffic::{self, Connection, Protocol, Server},
    tun::TunLink,
    witness,
};

use crate::{
    live::wait_for_node_ports,
    narrow::passes,
    support::{Bed, FAR, NEAR, WIDE, node_port_service},
};

const DEVICE: &str = "tunnel";
/// Addresses of the device, IPv4 first, and of the router at its other end.
const OWN: [&str; 2] = ["192.168.79.11", "fd00:79::11"];
const OF_ROUTER: [&str; 2] = ["192.168.79.254", "fd00:79::fe"];
const LENGTHS: [u8; 2] = [24, 64];
/// Datagram that has to be sent in pieces, bytes.
const LARGE: usize = 8000;
/// MTU of the nodes' underlay where the tun device is wider, bytes.
const NARROW_UNDERLAY: u32 = 1400;
/// NodePorts that lead to the asked node's own network, to the other node's, and to nobody.
const HOST_NEAR: u16 = 30_090;
const HOST_FAR: u16 = 30_091;
const NOBODY: u16 = 30_092;
/// Where servers of the nodes listen.
const HOST_TARGET: u16 = 8081;

/// A bed whose asked node and client talk by the device alone.
struct Bare {
    bed: Bed,
    own: [IpAddr; 2],
    _link: TunLink,
}

impl Bare {
    fn start(name: &str, underlay: u32) -> Result<Self> {
        let bed = Bed::build(Cluster::builder(name).mtu(underlay), WIDE, |_, _| Ok(()))?;
        let (node, router) = (bed.node(), &bed.outside.router);
        let link = TunLink::new(&node.netns, router, DEVICE)?;
        for family in 0..2 {
            let (nodad, default) = [("", "default"), (" nodad", "::/0")][family];
            let (own, of_router) = (OWN[family], OF_ROUTER[family]);
            let (length, network) = (LENGTHS[family], CLIENT_NETWORKS[family]);
            router.ip(&format!(
                "address add {of_router}/{length} dev {DEVICE}{nodad}\n"
            ))?;
            node.netns.ip(&format!(
                "address add {own}/{length} dev {DEVICE}{nodad}\n\
                 route add {default} dev {DEVICE} metric 4096\nroute add {network} dev {DEVICE}\n"
            ))?;
        }
        let [v4, v6] = OWN.map(str::parse);
        let own = [v4.context("an address")?, v6.context("an address")?];
        for address in own {
            wait_for_node_ports(&bed.outside.client, address, true)?;
        }
        Ok(Self {
            bed,
            own,
            _link: link,
        })
    }

    /// A NodePort at the device, in both families.
    fn at(&self, port: u16) -> [SocketAddr; 2] {
        self.own.map(|address| SocketAddr::new(address, port))
    }

    /// A Service whose only endpoints are a node's own addresses, or none.
    fn lead_to_host(&self, name: &str, number: u8, port: u16, node: Option<&Node>) -> Result<()> {
        let cluster = &self.bed.cluster;
        let mut service = node_port_service(name, number, port);
        for at in 0..Port::both(0, 0).len() {
            service["spec"]["ports"][at]["targetPort"] = HOST_TARGET.into();
        }
        cluster.apply(&service)?;
        let endpoints: Vec<_> = node
            .into_iter()
            .flat_map(|node| {
                let addresses = node.addresses.iter();
                addresses.map(|address| Endpoint::ready(*address, &node.name, ""))
            })
            .collect();
        cluster.endpoints(name, HOST_TARGET, &endpoints)?;
        cluster.wait_applied()
    }
}

/// Clients come in by it, are answered by it, and pods leave by it, with its addresses.
#[test]
fn a_node_s_device_may_have_no_link_layer() -> TestResult {
    let bare = Bare::start("outside tun", WIDE)?;
    let bed = &bare.bed;
    for (port, server) in [(NEAR, "near"), (FAR, "far")] {
        for to in bare.at(port) {
            bed.outside.client.run(|| -> Result<()> {
                let seen = witness::ask(Protocol::Tcp, to, traffic::TIMEOUT)?;
                assert_eq!(seen.server, server);
                Connection::open(to)?.transfer(1 << 20, 1 << 20)
            })?;
        }
    }
    for (to, own) in bed.at_outside().into_iter().zip(bare.own) {
        for protocol in Protocol::ALL {
            let seen = bed
                .near
                .run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
            assert_eq!(seen.client.ip(), own);
        }
    }
    Ok(())
}

#[test]
fn pieces_of_datagrams_pass_it() -> TestResult {
    let bare = Bare::start("tun pieces", WIDE)?;
    let bed = &bare.bed;
    let by_device = Capture::start(&bed.outside.router, DEVICE)?;
    for (port, server) in [(NEAR, "near"), (FAR, "far")] {
        for to in bare.at(port) {
            for _ in 0..5 {
                let name = bed
                    .outside
                    .client
                    .run(|| traffic::udp_name(to, LARGE))
                    .with_context(|| format!("{server} at {to}"))?;
                assert_eq!(name, server);
            }
        }
    }
    for to in bed.at_outside() {
        for _ in 0..5 {
            let name = bed
                .near
                .run(|| traffic::udp_name(to, LARGE))
                .with_context(|| to.to_string())?;
            assert_eq!(name, "outside");
        }
    }
    // They were pieces when they left by it.
    let packets = by_device.stop()?;
    for own in bare.own {
        let pieces = packets.iter().filter(|p| p.source == own && p.is_fragment);
        assert!(pieces.count() >= 4 * 5, "{own}");
    }
    Ok(())
}

/// What comes in by it and is too big for the way to the endpoint is answered by it.
#[test]
fn it_answers_what_is_too_big() -> TestResult {
    let bare = Bare::start("tun too big", NARROW_UNDERLAY)?;
    let answered = || bare.bed.node().outcomes("from_netdev", "ANSWERED");
    let before = answered()?;
    for to in [bare.at(NEAR), bare.at(FAR)].concat() {
        let client = &bare.bed.outside.client;
        // What it has learnt of the other endpoint, at the same address.
        for family in ["-4", "-6"] {
            client.tool("ip", &[family, "route", "flush", "cache"])?;
        }
        passes(client, to)?;
    }
    let after = answered()?;
    // The way to each of them is too narrow in both families.
    assert!(after >= before + 4, "{before}, then {after} answers");
    for to in bare.bed.at_outside() {
        passes(&bare.bed.near.netns, to)?;
    }
    Ok(())
}

#[test]
fn it_refuses_for_whom_nobody_answers() -> TestResult {
    let bare = Bare::start("tun refusals", WIDE)?;
    let client = &bare.bed.outside.client;
    bare.lead_to_host("nobody", 20, NOBODY, None)?;
    let before = bare.bed.node().drops("SERVICE_BACKEND_NOT_FOUND")?;
    let mut asked = 0;
    for to in bare.at(NOBODY) {
        for protocol in Protocol::ALL {
            is_refused(client, protocol, to)?;
            asked += 1;
        }
    }
    let after = bare.bed.node().drops("SERVICE_BACKEND_NOT_FOUND")?;
    assert!(after >= before + asked, "{before}, then {after}");
    Ok(())
}

#[test]
fn the_nodes_own_network_is_reached_through_it() -> TestResult {
    let bare = Bare::start("tun hosts", WIDE)?;
    let nodes = bare.bed.cluster.nodes();
    for (node, (number, port)) in nodes.iter().zip([(20, HOST_NEAR), (21, HOST_FAR)]) {
        let _servers: Vec<Server> = node.serve(HOST_TARGET)?;
        bare.lead_to_host(&format!("host-{number}"), number, port, Some(node))?;
        for to in bare.at(port) {
            let client = &bare.bed.outside.client;
            for protocol in Protocol::ALL {
                let seen = client
                    .run(|| witness::ask(protocol, to, traffic::TIMEOUT))
                    .with_context(|| format!("{} {to}", protocol.name()))?;
                assert_eq!(seen.server, node.name);
                assert_eq!(seen.client == seen.own, port == HOST_NEAR, "{seen:?}");
            }
            client.run(|| Connection::open(to)?.transfer(1 << 20, 1 << 20))?;
            let name = client.run(|| traffic::udp_name(to, LARGE))?;
            assert_eq!(name, node.name);
        }
    }
    Ok(())
}
