//! Clients outside: NodePorts and their endpoints here, elsewhere and on the node itself, what comes back, and who
//! is refused. The beds of these tests have a device with an address and routes.

use std::{collections::BTreeSet, net::IpAddr};

use weir_agent::{
    datapath::{HopRef, NodeConfig},
    model::{EndpointSet, Frontend, FrontendKind, Scope, ServicePort},
    objects::Protocol,
};
use weir_common::{
    DropReason,
    config::{DeviceAddresses, NAT_PORT_COUNT, NAT_PORT_FIRST, device_flag},
    ipcache::{class, flag},
    metrics::{Hook, outcome},
};

use crate::{
    bed::{
        Bed, CLIENT, Case, ESTABLISHED, ETH0, Lookups, SERVER, Verdict, delivered_macs,
        for_both_families, service_port, tool,
    },
    errors::{error, put_back},
    packet::{ACK, L4, Packet, SYN, sctp, tcp, udp},
    refusals::refusal,
    services::source_port,
    support::FAMILIES,
};

const PORT: u16 = 40000;
pub const NODE_PORT: u16 = 30080;
/// A packet of a connection that the node's routes lead on: one lookup of the flow, and the routes.
pub const ROUTED: Lookups = Lookups {
    route: 1,
    ..ESTABLISHED
};

/// Gives the node's device an address and a way to the outside, in both families.
pub fn add_routes(bed: &Bed) {
    for device in ["eth0", "wire"] {
        tool(&format!("ip link set {device} up"));
    }
    let (family, bits, any, nodad) = if bed.is_v4() {
        ("-4", 24, "0.0.0.0/0", "")
    } else {
        ("-6", 64, "::/0", " nodad")
    };
    let (node, gateway) = (bed.node(), bed.remote_node());
    tool(&format!("ip addr add {node}/{bits} dev eth0{nodad}"));
    tool(&format!(
        "ip neigh add {gateway} lladdr 02:00:00:00:00:02 dev eth0"
    ));
    tool(&format!(
        "ip {family} route add {any} via {gateway} dev eth0"
    ));
    let name = if bed.is_v4() { "ipv4" } else { "ipv6" };
    std::fs::write(format!("/proc/sys/net/{name}/conf/all/forwarding"), "1").unwrap();
}

/// The programs know what the device sends from, too. None is attached: what the kernel itself sends would be
/// counted with what tests send.
pub fn add_device(bed: &Bed) {
    add_routes(bed);
    add_device_row(bed);
}

/// As [`add_device`], with both families at once.
pub fn add_device_of_both_families(bed: &mut Bed) {
    let nodes = FAMILIES.map(|family| {
        bed.family = family;
        add_routes(bed);
        bed.node()
    });
    write_device_row(bed, &nodes);
}

/// Of [`add_device`] what the programs know.
pub fn add_device_row(bed: &Bed) {
    write_device_row(bed, &[bed.node()]);
}

fn write_device_row(bed: &Bed, addresses: &[IpAddr]) {
    let mut row = DeviceAddresses {
        flags: device_flag::ATTACHED,
        ..DeviceAddresses::default()
    };
    for address in addresses {
        match *address {
            IpAddr::V4(v4) => row.v4 = v4.into(),
            IpAddr::V6(v6) => row.v6 = v6.into(),
        }
    }
    let mut devices = bed.fs.hash::<u32, DeviceAddresses>("DEVICE_ADDRESSES");
    devices.insert(ETH0, row, 0).unwrap();
}

fn frontend(address: Option<IpAddr>, port: u16, kind: FrontendKind) -> Frontend {
    Frontend {
        address,
        port,
        kind,
        scope: Scope::Outside,
        set: EndpointSet::Cluster,
    }
}

/// A Service whose NodePort leads to one endpoint.
pub fn node_port(bed: &mut Bed, protocol: Protocol, backend: (IpAddr, u16)) {
    let frontends = [frontend(None, NODE_PORT, FrontendKind::NodePort)];
    apply(bed, protocol, service_port(frontends, &[backend]));
}

fn apply(bed: &mut Bed, protocol: Protocol, desired: ServicePort) {
    bed.apply(1, protocol, NODE_PORT, desired);
    let flags = flag::NODE_PORTS | flag::HOST_PORTS;
    let node = bed.node().into();
    bed.datapath
        .set_ipcache(node, class::THIS_NODE, flags, HopRef::Host)
        .unwrap();
}

/// Source port, or identifier of an echo, of a frame of the family.
pub fn port_of(bed: &Bed, frame: &[u8], at: usize) -> u16 {
    let at = at + if bed.is_v4() { 34 } else { 54 };
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

type MakeL4 = fn(u16, u16) -> L4;

/// Name, protocol, the first packet and a later one by ports, and the port of the endpoint.
fn kinds() -> [(Protocol, MakeL4, MakeL4, u16); 3] {
    [
        (
            Protocol::Tcp,
            |a, b| tcp(a, b, SYN),
            |a, b| tcp(a, b, ACK),
            8080,
        ),
        (Protocol::Udp, udp, udp, 8080),
        (Protocol::Sctp, sctp, sctp, NODE_PORT),
    ]
}

/// A row; the CRC of SCTP covers no addresses, nor does a device that sums up care for it.
fn row(case: Case, protocol: Protocol) -> Case {
    match protocol {
        Protocol::Sctp => case.sum_may_change(),
        _ => case,
    }
}

#[test]
fn an_endpoint_elsewhere_answers_by_way_of_the_node() {
    for_both_families(|bed| {
        add_device(bed);
        for (protocol, first, later, back) in kinds() {
            let name = protocol.name();
            let remote = bed.remote_pod(9);
            node_port(bed, protocol, (remote, back));
            let packet = |l4| bed.incoming(bed.outside(), bed.node(), l4);
            let (opening, request) = (
                packet(first(PORT, NODE_PORT)),
                packet(later(PORT, NODE_PORT)),
            );
            let seen = bed.wire_brings(&opening);
            assert_eq!(seen.verdict, Verdict::Remote, "{name}");
            let port = port_of(bed, &seen.output.frame, 0);
            let range = NAT_PORT_FIRST..NAT_PORT_FIRST + NAT_PORT_COUNT;
            let is_changed = protocol != Protocol::Sctp;
            assert_eq!(range.contains(&port), is_changed, "{name}: {port}");
            let translated = |packet: &Packet| {
                let packet = packet.clone().from(bed.node()).to(remote);
                packet.source_port(port).destination_port(back).forwarded()
            };
            assert_eq!(seen.output.frame, translated(&opening).frame(), "{name}");
            let sent = translated(&request);
            let case = Case::from_netdev(name, &request, Verdict::Remote).out(&sent);
            bed.check(row(case.lookups(ESTABLISHED), protocol));

            let answer = bed.incoming(remote, bed.node(), later(back, port));
            let out = answer.clone().from(bed.node()).to(bed.outside());
            let out = out
                .source_port(NODE_PORT)
                .destination_port(PORT)
                .forwarded();
            let case = Case::from_netdev(&format!("{name}: answer"), &answer, Verdict::Routed);
            bed.check(row(case.out(&out).lookups(ROUTED), protocol));
            if protocol == Protocol::Sctp {
                continue;
            }

            // Of a router between here and the endpoint, to the client.
            let router = bed.remote_node();
            let about = bed.incoming(router, bed.node(), error(bed.is_v4(), sent.datagram()));
            let quote = error(bed.is_v4(), put_back(&request, &sent));
            let told = bed.incoming(router, bed.outside(), quote).forwarded();
            let what = format!("{name}: error about the request");
            bed.check(Case::from_netdev(&what, &about, Verdict::Routed).out(&told));
            // And of one beyond, to the endpoint.
            let beyond: IpAddr = if bed.is_v4() {
                "198.51.100.7"
            } else {
                "2001:db8:7::7"
            }
            .parse()
            .unwrap();
            let about = bed.incoming(beyond, bed.node(), error(bed.is_v4(), out.datagram()));
            let quote = error(bed.is_v4(), put_back(&answer, &out));
            let told = bed.incoming(beyond, remote, quote).forwarded();
            let what = format!("{name}: error about the answer");
            bed.check(Case::from_netdev(&what, &about, Verdict::Remote).out(&told));
        }
    });
}

#[test]
fn a_pod_of_this_node_sees_the_client() {
    for_both_families(|bed| {
        add_device(bed);
        for (protocol, first, later, back) in kinds() {
            let name = protocol.name();
            node_port(bed, protocol, (bed.pod(SERVER), back));
            let opening = bed.incoming(bed.outside(), bed.node(), first(PORT, NODE_PORT));
            assert_eq!(bed.wire_brings(&opening).verdict, Verdict::Local, "{name}");
            let request = bed.incoming(bed.outside(), bed.node(), later(PORT, NODE_PORT));
            let out = request.clone().to(bed.pod(SERVER)).destination_port(back);
            let out = out.with_macs(delivered_macs(SERVER)).forwarded();
            let case = Case::from_netdev(name, &request, Verdict::Local).out(&out);
            bed.check(row(case.lookups(ESTABLISHED), protocol));
            let answer = bed.leaving(SERVER, bed.outside(), later(back, PORT));
            let out = answer
                .clone()
                .from(bed.node())
                .source_port(NODE_PORT)
                .forwarded();
            let what = format!("{name}: answer");
            let case = Case::from_pod(&what, SERVER, &answer, Verdict::Routed).out(&out);
            bed.check(row(case.lookups(ROUTED), protocol));
        }
    });
}

/// Its direct connections to the same endpoint have no entry here, and may come from the same port.
#[test]
fn a_pod_elsewhere_is_seen_with_a_port_of_the_nat_range() {
    for_both_families(|bed| {
        add_device(bed);
        let client = bed.remote_pod(9);
        for (protocol, first, later, back) in kinds() {
            if protocol == Protocol::Sctp {
                continue;
            }
            let name = protocol.name();
            node_port(bed, protocol, (bed.pod(SERVER), back));
            let opening = bed.incoming(client, bed.node(), first(PORT, NODE_PORT));
            let seen = bed.wire_brings(&opening);
            assert_eq!(seen.verdict, Verdict::Local, "{name}");
            let nat = source_port(bed, &seen);
            assert!((61_000..=65_534).contains(&nat), "{name}: {nat}");
            let request = bed.incoming(client, bed.node(), later(PORT, NODE_PORT));
            let out = request.clone().to(bed.pod(SERVER)).destination_port(back);
            let out = out
                .source_port(nat)
                .with_macs(delivered_macs(SERVER))
                .forwarded();
            let case = Case::from_netdev(name, &request, Verdict::Local).out(&out);
            bed.check(row(case.lookups(ESTABLISHED), protocol));
            let answer = bed.leaving(SERVER, client, later(back, nat));
            let out = answer.clone().from(bed.node()).source_port(NODE_PORT);
            let out = out.destination_port(PORT).forwarded();
            let what = format!("{name}: answer");
            let case = Case::from_pod(&what, SERVER, &answer, Verdict::Routed).out(&out);
            bed.check(row(case.lookups(ROUTED), protocol));
            // The same port, directly.
            let answer = bed.leaving(SERVER, client, later(back, PORT));
            let seen = bed.pod_sends(SERVER, &answer);
            assert_eq!(seen.verdict, Verdict::Remote, "{name}: a direct answer");
        }
    });
}

/// It translates clients of its own to the NAT range, towards the same endpoints: they come in without an entry.
#[test]
fn another_node_keeps_its_port() {
    for_both_families(|bed| {
        add_device(bed);
        for (protocol, first, _, back) in kinds() {
            node_port(bed, protocol, (bed.pod(SERVER), back));
            let opening = bed.incoming(bed.remote_node(), bed.node(), first(PORT, NODE_PORT));
            let seen = bed.wire_brings(&opening);
            let name = protocol.name();
            assert_eq!(seen.verdict, Verdict::Local, "{name}");
            assert_eq!(source_port(bed, &seen), PORT, "{name}");
        }
    });
}

#[test]
fn the_node_itself_answers_through_its_device() {
    for_both_families(|bed| {
        add_device(bed);
        for (protocol, first, later, back) in kinds() {
            let name = protocol.name();
            node_port(bed, protocol, (bed.node(), back));
            let opening = bed.incoming(bed.outside(), bed.node(), first(PORT, NODE_PORT));
            assert_eq!(bed.wire_brings(&opening).verdict, Verdict::Stack, "{name}");
            let request = bed.incoming(bed.outside(), bed.node(), later(PORT, NODE_PORT));
            let out = request.clone().destination_port(back);
            let case = Case::from_netdev(name, &request, Verdict::Stack).out(&out);
            bed.check(row(case.lookups(ESTABLISHED), protocol));
            let answer = bed.incoming(bed.node(), bed.outside(), later(back, PORT));
            let out = answer.clone().source_port(NODE_PORT);
            let what = format!("{name}: answer");
            let case = Case::new(&what, Hook::ToNetdev, ETH0, answer.frame(), Verdict::Stack);
            bed.check(row(case.out(&out).lookups(ESTABLISHED), protocol));
        }
    });
}

#[test]
fn who_is_refused() {
    for_both_families(|bed| {
        let config = NodeConfig {
            refusals_per_second: 1,
            ..bed.node_config()
        };
        bed.datapath.config_mut().apply(&config).unwrap();
        bed.service(2, Protocol::Tcp, 80, &[(bed.pod(SERVER), 8080)]);
        let packet = bed.incoming(bed.outside(), bed.cluster_ip(2), tcp(PORT, 80, SYN));
        let reason = DropReason::InvalidDestination;
        let out = refusal(bed, &packet);
        let case = Case::from_netdev("a ClusterIP", &packet, Verdict::Refused(reason));
        bed.check(case.out(&out).sum_may_change());
        // One in a second; those of pods are counted apart.
        let seen = bed.wire_brings(&packet);
        assert_eq!(seen.verdict, Verdict::Dropped(reason));
        assert_eq!(seen.flow_counter(outcome::REFUSAL_LIMITED), 1);
        let packet = bed.leaving(CLIENT, bed.cluster_ip(2), tcp(PORT, 81, SYN));
        let verdict = Verdict::Refused(DropReason::NoServicePort);
        assert_eq!(bed.pod_sends(CLIENT, &packet).verdict, verdict);
    });
}

#[test]
fn a_load_balancer_address_is_for_clients_in_its_ranges() {
    for_both_families(|bed| {
        let address = bed.cluster_ip(7);
        let frontends = [frontend(
            Some(address),
            NODE_PORT,
            FrontendKind::LoadBalancer,
        )];
        let mut desired = service_port(frontends, &[(bed.pod(SERVER), 8080)]);
        let client = bed.outside();
        let packet = bed.incoming(client, address, tcp(PORT, NODE_PORT, SYN));
        let other: IpAddr = if bed.is_v4() {
            "198.51.100.7"
        } else {
            "2001:db8:7::7"
        }
        .parse()
        .unwrap();
        let refused = Verdict::Dropped(DropReason::NotInSourceRange);
        for (ranges, expected) in [
            (None, Verdict::Local),
            (Some(BTreeSet::from([client.into()])), Verdict::Local),
            (Some(BTreeSet::from([other.into()])), refused),
            (Some(BTreeSet::new()), refused),
        ] {
            desired.source_ranges = ranges.clone();
            apply(bed, Protocol::Tcp, desired.clone());
            let packet = packet
                .clone()
                .source_port(PORT + u16::from(ranges.is_some()));
            let seen = bed.wire_brings(&packet);
            // The second is a connection that goes on: it is not asked again.
            let expected = match expected {
                Verdict::Dropped(_) => {
                    let packet = packet.source_port(PORT + 9);
                    assert_eq!(bed.wire_brings(&packet).verdict, refused);
                    Verdict::Local
                }
                other => other,
            };
            assert_eq!(seen.verdict, expected, "{ranges:?}");
        }
    });
}
