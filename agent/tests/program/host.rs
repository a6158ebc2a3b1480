//! Connections of the node's own processes to Services: by the node's own device, and by the
//! loopback device to the node's own addresses. And NodePorts and external addresses for pods.

use std::net::IpAddr;

use weir_agent::{
    datapath::{HopRef, NodeConfig},
    model::{EndpointSet, Frontend, FrontendKind, Scope},
    objects::Protocol,
};
use weir_common::{
    DropReason, MacAddress,
    config::HOST_DEVICE_MAC,
    ipcache::{class, flag},
    metrics::outcome,
};

use crate::{
    bed::{
        Bed, CLIENT, Case, ESTABLISHED, Lookups, SERVER, Verdict, delivered_macs,
        for_both_families, leaving_macs, service_port, tool,
    },
    packet::{ACK, L4, Macs, Packet, RST, SYN, echo, sctp, tcp, udp},
    refusals::refusal,
};

/// The ends of the node's own device.
pub const HOST_DEVICE: u32 = 91;
pub const NET_DEVICE: u32 = 92;
pub const LOOPBACK: u32 = 1;

pub const NODE_PORT: u16 = 30_080;
pub const TARGET: u16 = 8080;

const UNTOUCHED: Lookups = Lookups {
    flow: 0,
    ..ESTABLISHED
};

/// Makes the node's own device, and tells the programs if `known`.
pub fn own_device(bed: &mut Bed, known: bool) {
    tool(&format!(
        "ip link add weir-host index {HOST_DEVICE} type veth peer name weir-net index {NET_DEVICE}"
    ));
    let config = NodeConfig {
        host_ifindex: if known { HOST_DEVICE } else { 0 },
        ..bed.node_config()
    };
    bed.datapath.config_mut().apply(&config).unwrap();
    serve_node_ports(bed);
}

/// NodePorts are served at the node's address.
fn serve_node_ports(bed: &mut Bed) {
    let own = bed.node().into();
    bed.datapath
        .set_ipcache(own, class::THIS_NODE, flag::NODE_PORTS, HopRef::Host)
        .unwrap();
}

/// Ethernet addresses of what the node sends to `device`, and of what its own device gives it.
pub fn host_macs(device: u32) -> Macs {
    let mac = if device == LOOPBACK {
        MacAddress::default()
    } else {
        HOST_DEVICE_MAC
    };
    Macs {
        destination: mac,
        source: mac,
    }
}

/// A packet of the node as a program sees it on `device`.
pub fn node_sends(bed: &Bed, device: u32, destination: IpAddr, l4: L4) -> Packet {
    Packet::new(host_macs(device), bed.node(), destination, l4)
}

pub fn node_port(port: u16) -> Frontend {
    Frontend {
        address: None,
        port,
        kind: FrontendKind::NodePort,
        scope: Scope::Inside,
        set: EndpointSet::Cluster,
    }
}

/// Where an endpoint is, as a connection of the node or of `CLIENT` sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    Here,
    Elsewhere,
    ThisNode,
}

impl Place {
    pub const ALL: [Self; 3] = [Self::Here, Self::Elsewhere, Self::ThisNode];

    pub fn address(self, bed: &Bed) -> IpAddr {
        match self {
            Self::Here => bed.pod(SERVER),
            Self::Elsewhere => bed.remote_pod(9),
            Self::ThisNode => bed.node(),
        }
    }

    /// The request as it comes out of the program.
    pub fn request(self, bed: &Bed, request: &Packet, port: u16) -> (Packet, Verdict) {
        let out = request.clone().to(self.address(bed));
        let out = match out.l4 {
            L4::Raw { .. } => out,
            _ => out.destination_port(port),
        };
        match self {
            Self::Here => (
                out.forwarded().with_macs(delivered_macs(SERVER)),
                Verdict::Local,
            ),
            Self::Elsewhere => (out.forwarded(), Verdict::Remote),
            Self::ThisNode => (out, Verdict::Stack),
        }
    }

    /// The same for a request that comes by `device`. By the loopback device it is on its way to the node: the stack
    /// is given it anew for another one, if the node's own device is `known`.
    pub fn request_by(
        self,
        bed: &Bed,
        (device, known): (u32, bool),
        request: &Packet,
        port: u16,
    ) -> (Packet, Verdict) {
        if device != LOOPBACK || self != Self::Elsewhere {
            return self.request(bed, request, port);
        }
        let out = request.clone().to(self.address(bed));
        let out = match out.l4 {
            L4::Raw { .. } => out,
            _ => out.destination_port(port),
        };
        if known {
            (out.with_macs(host_macs(HOST_DEVICE)), Verdict::HostDevice)
        } else {
            (out, Verdict::Stack)
        }
    }

    /// A packet of the endpoint to the node, as a program sees it.
    pub fn answer(self, bed: &Bed, l4: L4) -> Packet {
        let (source, node) = (self.address(bed), bed.node());
        match self {
            Self::Here => Packet::new(leaving_macs(SERVER), source, node, l4),
            Self::Elsewhere => bed.incoming(source, node, l4),
            Self::ThisNode => Packet::new(host_macs(LOOPBACK), source, node, l4),
        }
    }

    /// The program that sees it.
    pub fn case(self, name: &str, packet: &Packet, verdict: Verdict) -> Case {
        match self {
            Self::Here => Case::from_pod(name, SERVER, packet, verdict),
            Self::Elsewhere => Case::from_netdev(name, packet, verdict),
            Self::ThisNode => Case::from_host(name, LOOPBACK, packet, verdict),
        }
    }

    /// A reply that was translated back, as the stack gets it.
    pub fn reply(self, translated: Packet, known: bool) -> (Packet, Verdict) {
        if known && self != Self::ThisNode {
            (
                translated.with_macs(host_macs(HOST_DEVICE)),
                Verdict::HostDevice,
            )
        } else {
            (translated, Verdict::Stack)
        }
    }
}

/// Layer 4 of requests to port `to` and of the replies of port `target`. SCTP wants the same port.
fn conversations(to: u16, own: u16) -> [(&'static str, Protocol, u16, L4, L4); 3] {
    [
        (
            "TCP",
            Protocol::Tcp,
            TARGET,
            tcp(own, to, ACK),
            tcp(TARGET, own, ACK),
        ),
        ("UDP", Protocol::Udp, TARGET, udp(own, to), udp(TARGET, own)),
        ("SCTP", Protocol::Sctp, to, sctp(own, to), sctp(to, own)),
    ]
}

fn first(l4: &L4) -> L4 {
    match l4 {
        L4::Tcp(header) => tcp(header.source, header.destination, SYN),
        other => other.clone(),
    }
}

/// A case whose sum is not asked for where nothing makes up for changed addresses.
fn summed(case: Case, bed: &Bed, kind: &str) -> Case {
    if kind == "SCTP" && !bed.is_v4() {
        case.sum_may_change()
    } else {
        case
    }
}

fn there_and_back(bed: &mut Bed, known: bool) {
    own_device(bed, known);
    let mut index = 0;
    for (way, device) in [("ClusterIP", NET_DEVICE), ("NodePort", LOOPBACK)] {
        for place in Place::ALL {
            for at in 0..3 {
                index += 1;
                let own = 40000 + index as u16;
                let (address, to) = if device == LOOPBACK {
                    (bed.node(), NODE_PORT + index as u16)
                } else {
                    (bed.cluster_ip(index), 80)
                };
                let (kind, protocol, target, there, back) = conversations(to, own)[at].clone();
                let name = format!("{way}, {place:?}, {kind}");
                let frontend = if device == LOOPBACK {
                    node_port(to)
                } else {
                    Frontend::cluster_ip(address, to)
                };
                let desired = service_port([frontend], &[(place.address(bed), target)]);
                bed.apply(index, protocol, to, desired);

                let request = node_sends(bed, device, address, first(&there));
                let (out, verdict) = place.request_by(bed, (device, known), &request, target);
                let case = Case::from_host(&format!("{name}: first"), device, &request, verdict);
                let seen = bed.check(summed(case.out(&out), bed, kind));
                assert_eq!(seen.flow_counter(outcome::FLOW_CREATED), 1, "{name}");
                let beyond = u64::from(place != Place::Here);
                assert_eq!(
                    (seen.lookups.frontend, seen.lookups.ipcache),
                    (1, 1 + beyond),
                    "{name}"
                );

                let request = node_sends(bed, device, address, there);
                let (out, verdict) = place.request_by(bed, (device, known), &request, target);
                let case = Case::from_host(&format!("{name}: next"), device, &request, verdict);
                let seen = bed.check(summed(case.out(&out), bed, kind).lookups(ESTABLISHED));
                assert!(seen.flow_counters.is_empty(), "{name}: {seen:?}");

                let reply = place.answer(bed, back);
                let translated = reply.clone().from(address).source_port(to);
                let (translated, verdict) = place.reply(translated, known);
                let case = place.case(&format!("{name}: reply"), &reply, verdict);
                let case = summed(case.out(&translated), bed, kind);
                let seen = bed.check(case.lookups(ESTABLISHED));
                assert!(seen.flow_counters.is_empty(), "{name}: {seen:?}");
            }
        }
    }
}

#[test]
fn connections_of_the_node_go_there_and_back_with_one_lookup() {
    for_both_families(|bed| there_and_back(bed, true));
}

#[test]
fn without_the_nodes_own_device_replies_go_to_the_stack() {
    for_both_families(|bed| there_and_back(bed, false));
}

#[test]
fn pods_reach_node_ports_and_external_addresses() {
    for_both_families(|bed| {
        own_device(bed, true);
        let external = bed.outside();
        let mut index = 0;
        for (way, address, kind_of) in [
            ("NodePort", bed.node(), FrontendKind::NodePort),
            ("external address", external, FrontendKind::ExternalIp),
        ] {
            for place in Place::ALL {
                for at in 0..3 {
                    index += 1;
                    let (own, to) = (40000 + index as u16, NODE_PORT + index as u16);
                    let (kind, protocol, target, there, back) = conversations(to, own)[at].clone();
                    let name = format!("{way}, {place:?}, {kind}");
                    let frontend = Frontend {
                        address: (kind_of == FrontendKind::ExternalIp).then_some(external),
                        kind: kind_of,
                        ..node_port(to)
                    };
                    let desired = service_port([frontend], &[(place.address(bed), target)]);
                    bed.apply(index, protocol, to, desired);
                    for (step, l4) in [("first", first(&there)), ("next", there.clone())] {
                        let request = bed.leaving(CLIENT, address, l4);
                        let (out, verdict) = place.request(bed, &request, target);
                        let name = format!("{name}: {step}");
                        let case = Case::from_pod(&name, CLIENT, &request, verdict);
                        let mut case = summed(case.out(&out), bed, kind);
                        if step == "next" {
                            case = case.lookups(ESTABLISHED);
                        }
                        bed.check(case);
                    }
                    let source = place.address(bed);
                    let name = format!("{name}: reply");
                    let (reply, case): (_, fn(&str, &Packet) -> Case) = match place {
                        Place::Here => (
                            Packet::new(leaving_macs(SERVER), source, bed.pod(CLIENT), back),
                            |name, packet| Case::from_pod(name, SERVER, packet, Verdict::Local),
                        ),
                        Place::Elsewhere => (
                            bed.incoming(source, bed.pod(CLIENT), back),
                            |name, packet| Case::from_netdev(name, packet, Verdict::Local),
                        ),
                        Place::ThisNode => {
                            (bed.host_sends(source, CLIENT, back), |name, packet| {
                                Case::to_pod(name, CLIENT, packet, Verdict::Stack)
                            })
                        }
                    };
                    let mut out = reply.clone().from(address).source_port(to);
                    if place != Place::ThisNode {
                        out = out.forwarded().with_macs(delivered_macs(CLIENT));
                    }
                    let case = summed(case(&name, &reply).out(&out), bed, kind);
                    bed.check(case.lookups(ESTABLISHED));
                }
            }
        }
        // Whoever has the external address answers at its other ports.
        for destination in [bed.pod(CLIENT), bed.node()] {
            let packet = bed.incoming(external, destination, tcp(99, 30000, ACK));
            let (out, verdict) = if destination == bed.node() {
                (packet.clone(), Verdict::Stack)
            } else {
                let out = packet.clone().forwarded();
                (out.with_macs(delivered_macs(CLIENT)), Verdict::Local)
            };
            bed.check(Case::from_netdev("other answers", &packet, verdict).out(&out));
        }
        // Other ports of both are nobody's business here, and NodePorts of others are theirs.
        for (name, address, verdict) in [
            ("unknown port of the node", bed.node(), Verdict::Stack),
            ("unknown external port", external, Verdict::Stack),
            (
                "NodePort of another node",
                bed.remote_node(),
                Verdict::Remote,
            ),
        ] {
            let to = if verdict == Verdict::Remote {
                NODE_PORT + 1
            } else {
                99
            };
            for l4 in [tcp(40000, to, SYN), udp(40000, to)] {
                let packet = bed.leaving(CLIENT, address, l4);
                let mut case = Case::from_pod(name, CLIENT, &packet, verdict);
                if verdict == Verdict::Remote {
                    case = case.out(&packet.clone().forwarded());
                }
                bed.check(case);
            }
        }
    });
}

#[test]
fn what_the_node_says_to_itself_is_let_alone() {
    for_both_families(|bed| {
        own_device(bed, true);
        let loopback: IpAddr = if bed.is_v4() {
            "127.0.0.1".parse().unwrap()
        } else {
            "::1".parse().unwrap()
        };
        let multicast: IpAddr = if bed.is_v4() {
            "224.0.0.251".parse().unwrap()
        } else {
            "ff02::fb".parse().unwrap()
        };
        let desired = service_port([node_port(NODE_PORT)], &[(bed.remote_pod(9), TARGET)]);
        bed.apply(1, Protocol::Tcp, NODE_PORT, desired);
        for round in ["no connections", "connections"] {
            let asked = u64::from(round == "connections");
            let known = Lookups {
                flow: asked,
                ..UNTOUCHED
            };
            let searched = Lookups {
                ipcache: 1,
                frontend: 1,
                ..known
            };
            let rows = [
                ("SYN", bed.node(), tcp(1, 22, SYN), searched),
                ("UDP", bed.node(), udp(1, NODE_PORT), searched),
                ("SCTP", bed.node(), sctp(1, 22), searched),
                ("TCP", bed.node(), tcp(1, 22, ACK), known),
                ("answer", bed.node(), tcp(22, 1, SYN | ACK), known),
                ("reset", bed.node(), tcp(22, 1, RST), known),
                (
                    "an old connection to the NodePort",
                    bed.node(),
                    tcp(7, NODE_PORT, ACK),
                    known,
                ),
                ("ping", bed.node(), echo(bed.is_v4(), 1), known),
                (
                    "loopback address",
                    loopback,
                    tcp(1, NODE_PORT, SYN),
                    UNTOUCHED,
                ),
                ("multicast", multicast, udp(1, NODE_PORT), UNTOUCHED),
            ];
            for (name, address, l4, lookups) in rows {
                let packet = node_sends(bed, LOOPBACK, address, l4);
                let name = format!("{name}, {round}");
                let case = Case::from_host(&name, LOOPBACK, &packet, Verdict::Stack);
                let seen = bed.check(case.lookups(lookups));
                assert!(seen.flow_counters.is_empty(), "{name}: {seen:?}");
            }
            let packet = node_sends(bed, LOOPBACK, bed.node(), tcp(1, NODE_PORT, SYN));
            let by = (LOOPBACK, true);
            let (out, verdict) = Place::Elsewhere.request_by(bed, by, &packet, TARGET);
            let case = Case::from_host("the NodePort", LOOPBACK, &packet, verdict);
            bed.check(case.out(&out));
        }
    });
}

#[test]
fn the_node_is_refused_like_everybody() {
    for_both_families(|bed| {
        own_device(bed, true);
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            bed.service(1, protocol, 80, &[]);
            let desired = service_port([node_port(NODE_PORT)], &[]);
            bed.apply(2, protocol, NODE_PORT, desired);
        }
        let no_backend = DropReason::NoBackend;
        let no_port = DropReason::NoServicePort;
        let vip = bed.cluster_ip(1);
        let gone = bed.cluster_ip(200);
        let node = bed.node();
        let rows = [
            ("no endpoints", NET_DEVICE, vip, 80, no_backend),
            ("unknown port", NET_DEVICE, vip, 81, no_port),
            ("a Service that is gone", NET_DEVICE, gone, 80, no_port),
            ("NodePort", LOOPBACK, node, NODE_PORT, no_backend),
        ];
        for (name, device, address, port, reason) in rows {
            for (kind, l4) in [
                ("SYN", tcp(40000, port, SYN)),
                ("UDP", udp(40000, port)),
                ("SCTP", sctp(40000, port)),
            ] {
                let packet = node_sends(bed, device, address, l4);
                let answer = refusal(bed, &packet);
                let name = format!("{name}, {kind}");
                let verdict = Verdict::Refused(reason);
                let case = Case::from_host(&name, device, &packet, verdict).out(&answer);
                bed.check(case.sum_may_change());
            }
        }
        // An old connection to a Service that is gone ends, and what cannot be answered is dropped.
        let packet = node_sends(bed, NET_DEVICE, gone, tcp(40000, 80, ACK));
        let answer = refusal(bed, &packet);
        let case = Case::from_host("old", NET_DEVICE, &packet, Verdict::Refused(no_port));
        bed.check(case.out(&answer).sum_may_change());
        for (name, l4) in [
            ("reset", tcp(40000, 80, RST)),
            ("ping", echo(bed.is_v4(), 1)),
        ] {
            let packet = node_sends(bed, NET_DEVICE, gone, l4);
            let verdict = Verdict::Dropped(no_port);
            bed.check(Case::from_host(name, NET_DEVICE, &packet, verdict));
        }
        assert!(bed.flows().is_empty());
    });
}
