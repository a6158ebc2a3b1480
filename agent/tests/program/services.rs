//! Connections to Services: there and back, at every hook that translates.

use std::net::IpAddr;

use weir_agent::objects::Protocol;
use weir_common::{
    DropReason,
    metrics::{Hook, outcome},
};

use crate::{
    bed::{
        Bed, CLIENT, Case, ESTABLISHED, Lookups, OTHER, SERVER, Seen, Verdict, delivered_macs,
        for_both_families, leaving_macs,
    },
    packet::{ACK, Icmp, L4, Packet, RST, SYN, echo, sctp, tcp, udp},
};

/// Layer 4 of both directions of a connection, with the ports of the Service.
pub fn conversations(backend_port: u16) -> Vec<(&'static str, Protocol, L4, L4)> {
    let port = backend_port;
    let mut kinds = vec![
        (
            "TCP",
            Protocol::Tcp,
            tcp(40000, 80, ACK),
            tcp(port, 40000, ACK),
        ),
        ("UDP", Protocol::Udp, udp(40000, 80), udp(port, 40000)),
    ];
    if port == 80 {
        kinds.push(("SCTP", Protocol::Sctp, sctp(40000, 80), sctp(80, 40000)));
    }
    kinds
}

/// Where a backend is and how its replies come.
enum Place {
    Here,
    Elsewhere,
    ThisNode,
}

/// The request as it comes out, and its verdict.
fn forward(place: &Place, backend: IpAddr, port: u16, request: &Packet) -> (Packet, Verdict) {
    let out = request.clone().to(backend).destination_port(port);
    match place {
        Place::Here => (
            out.forwarded().with_macs(delivered_macs(SERVER)),
            Verdict::Local,
        ),
        Place::Elsewhere => (out.forwarded(), Verdict::Remote),
        Place::ThisNode => (out, Verdict::Stack),
    }
}

#[test]
fn connections_go_there_and_back_with_one_lookup() {
    for_both_families(|bed| {
        let mut index = 0;
        for port in [8080, 80] {
            for (place, backend) in [
                (Place::Here, bed.pod(SERVER)),
                (Place::Elsewhere, bed.remote_pod(9)),
                (Place::ThisNode, bed.node()),
            ] {
                for (kind, protocol, there, back) in conversations(port) {
                    index += 1;
                    let name = format!("{kind} to {backend} port {port}");
                    let vip = bed.cluster_ip(index);
                    bed.service(index, protocol, 80, &[(backend, port)]);
                    let mut request = bed.leaving(CLIENT, vip, there.clone());
                    if let (L4::Tcp(header), true) = (&mut request.l4, kind == "TCP") {
                        header.flags = SYN;
                    }
                    // Another client port for each, as they share backends.
                    let own_port = 40000 + index as u16;
                    let request = request.source_port(own_port);
                    let (out, verdict) = forward(&place, backend, port, &request);
                    // In IPv6 nothing makes up for addresses in a packet whose checksum does not
                    // cover them; SCTP never asks for the device's sum.
                    let kept = kind != "SCTP" || bed.is_v4();
                    let case = |name: &str, packet: &Packet, verdict, out: &Packet| {
                        let case = Case::from_pod(name, CLIENT, packet, verdict).out(out);
                        if kept { case } else { case.sum_may_change() }
                    };
                    let seen = bed.check(case(&format!("{name}: first"), &request, verdict, &out));
                    assert_eq!(seen.flow_counter(outcome::FLOW_CREATED), 1, "{name}");
                    let beyond = u64::from(backend != bed.pod(SERVER));
                    assert_eq!(
                        (seen.lookups.frontend, seen.lookups.ipcache),
                        (1, 1 + beyond),
                        "{name}"
                    );

                    let request = bed.leaving(CLIENT, vip, there).source_port(own_port);
                    let (out, verdict) = forward(&place, backend, port, &request);
                    let case = case(&format!("{name}: next"), &request, verdict, &out);
                    let seen = bed.check(case.lookups(ESTABLISHED));
                    assert!(seen.flow_counters.is_empty(), "{name}: {seen:?}");

                    let (reply, case): (Packet, fn(&str, &Packet) -> Case) = match place {
                        Place::Here => (
                            Packet::new(leaving_macs(SERVER), backend, bed.pod(CLIENT), back),
                            |name, packet| Case::from_pod(name, SERVER, packet, Verdict::Local),
                        ),
                        Place::Elsewhere => (
                            bed.incoming(backend, bed.pod(CLIENT), back),
                            |name, packet| Case::from_netdev(name, packet, Verdict::Local),
                        ),
                        Place::ThisNode => {
                            (bed.host_sends(backend, CLIENT, back), |name, packet| {
                                Case::to_pod(name, CLIENT, packet, Verdict::Stack)
                            })
                        }
                    };
                    let reply = reply.destination_port(own_port);
                    let mut translated = reply.clone().from(vip).source_port(80);
                    if !matches!(place, Place::ThisNode) {
                        translated = translated.forwarded().with_macs(delivered_macs(CLIENT));
                    }
                    let mut case = case(&format!("{name}: reply"), &reply)
                        .out(&translated)
                        .lookups(ESTABLISHED);
                    if !kept {
                        case = case.sum_may_change();
                    }
                    let seen = bed.check(case);
                    assert!(seen.flow_counters.is_empty(), "{name}: {seen:?}");
                }
            }
        }
    });
}

#[test]
fn udp_without_a_checksum_stays_without() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Udp, 80, &[(bed.remote_pod(9), 8080)]);
        let request = bed
            .leaving(CLIENT, bed.cluster_ip(1), udp(40000, 80))
            .unsummed();
        let out = request
            .clone()
            .to(bed.remote_pod(9))
            .destination_port(8080)
            .forwarded();
        // Its receiver does not ask for the sum that the device has made.
        let case = Case::from_pod("request", CLIENT, &request, Verdict::Remote);
        bed.check(case.out(&out).sum_may_change());
        let reply = bed
            .incoming(bed.remote_pod(9), bed.pod(CLIENT), udp(8080, 40000))
            .unsummed();
        let translated = reply
            .clone()
            .from(bed.cluster_ip(1))
            .source_port(80)
            .with_macs(delivered_macs(CLIENT))
            .forwarded();
        let case = Case::from_netdev("reply", &reply, Verdict::Local);
        bed.check(case.out(&translated).sum_may_change());
    });
}

#[test]
fn a_udp_checksum_never_becomes_zero() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Udp, 80, &[(bed.remote_pod(9), 8080)]);
        // Among all values of two bytes of payload one makes the translated checksum zero.
        let mut met = 0;
        for word in 0..=u16::MAX {
            let request = bed
                .leaving(CLIENT, bed.cluster_ip(1), udp(40000, 80))
                .with_payload(word.to_be_bytes().to_vec());
            let out = request
                .clone()
                .to(bed.remote_pod(9))
                .destination_port(8080)
                .forwarded();
            let (_, bytes) = out.l4_bytes();
            if bytes[6..8] != [0xff, 0xff] {
                continue;
            }
            met += 1;
            bed.check(Case::from_pod("request", CLIENT, &request, Verdict::Remote).out(&out));
        }
        assert!(met > 0);
    });
}

#[test]
fn a_pod_reaches_itself_through_a_service() {
    for_both_families(|bed| {
        for (index, (kind, protocol, there, back)) in (1..).zip(conversations(8080)) {
            bed.service(index, protocol, 80, &[(bed.pod(CLIENT), 8080)]);
            let request = bed.leaving(CLIENT, bed.cluster_ip(index), there);
            let out = request
                .clone()
                .from(bed.loopback())
                .to(bed.pod(CLIENT))
                .destination_port(8080)
                .with_macs(delivered_macs(CLIENT))
                .forwarded();
            bed.check(Case::from_pod(kind, CLIENT, &request, Verdict::Local).out(&out));
            bed.check(
                Case::from_pod(&format!("{kind}: next"), CLIENT, &request, Verdict::Local)
                    .out(&out)
                    .lookups(ESTABLISHED),
            );
            let reply = bed.leaving(CLIENT, bed.loopback(), back);
            let translated = reply
                .clone()
                .from(bed.cluster_ip(index))
                .to(bed.pod(CLIENT))
                .source_port(80)
                .with_macs(delivered_macs(CLIENT))
                .forwarded();
            bed.check(
                Case::from_pod(&format!("{kind}: reply"), CLIENT, &reply, Verdict::Local)
                    .out(&translated)
                    .lookups(ESTABLISHED),
            );
        }
    });
}

#[test]
fn ports_and_protocols_that_no_service_has() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Tcp, 80, &[(bed.remote_pod(9), 8080)]);
        bed.service(2, Protocol::Tcp, 80, &[]);
        bed.service(3, Protocol::Sctp, 80, &[(bed.remote_pod(9), 8080)]);
        let no_port = Verdict::Refused(DropReason::NoServicePort);
        let unanswered = Verdict::Dropped(DropReason::NoServicePort);
        let vip = |number| bed.cluster_ip(number);
        let rows = [
            ("unknown port", vip(1), tcp(1, 81, SYN), no_port),
            ("another protocol", vip(1), udp(1, 80), no_port),
            ("ping", vip(1), echo(bed.is_v4(), 1), unanswered),
            (
                "no port at all",
                vip(1),
                L4::Raw {
                    protocol: 47,
                    bytes: vec![0; 8],
                },
                unanswered,
            ),
            (
                "no endpoints",
                vip(2),
                tcp(1, 80, SYN),
                Verdict::Refused(DropReason::NoBackend),
            ),
            (
                "SCTP with another port",
                vip(3),
                sctp(1, 80),
                Verdict::Dropped(DropReason::UnsupportedProtocol),
            ),
        ];
        for (name, address, l4, verdict) in rows {
            let packet = bed.leaving(CLIENT, address, l4);
            assert_eq!(bed.pod_sends(CLIENT, &packet).verdict, verdict, "{name}");
        }
        assert_eq!(bed.flows().len(), 0);
        // The Service goes, and its address with it.
        let key = bed.service_key(1, Protocol::Tcp, 80);
        bed.datapath.apply_service(&key, None).unwrap();
        let packet = bed.leaving(CLIENT, bed.cluster_ip(1), tcp(1, 80, SYN));
        bed.check(Case::from_pod("gone", CLIENT, &packet, Verdict::Stack));
    });
}

#[test]
fn two_frontends_of_one_endpoint_and_one_client_port() {
    for_both_families(|bed| {
        for (protocol, l4) in [
            (Protocol::Tcp, tcp(40000, 80, SYN)),
            (Protocol::Udp, udp(40000, 80)),
        ] {
            let (first, second) = match protocol {
                Protocol::Tcp => (1, 2),
                _ => (3, 4),
            };
            for index in [first, second] {
                bed.service(index, protocol, 80, &[(bed.remote_pod(9), 8080)]);
            }
            let mut ports = Vec::new();
            for index in [first, second] {
                let request = bed.leaving(CLIENT, bed.cluster_ip(index), l4.clone());
                let seen = bed.pod_sends(CLIENT, &request);
                assert_eq!(seen.verdict, Verdict::Remote);
                let changed = u64::from(index == second);
                assert_eq!(seen.flow_counter(outcome::FLOW_PORT_CHANGED), changed);
                let port = source_port(bed, &seen);
                let out = request
                    .clone()
                    .to(bed.remote_pod(9))
                    .source_port(port)
                    .destination_port(8080)
                    .forwarded();
                assert_eq!(seen.output.frame, out.frame());
                // A SYN looks at both directions: is the connection over?
                let lookups = Lookups {
                    flow: if protocol == Protocol::Tcp { 3 } else { 1 },
                    ..Lookups::default()
                };
                bed.check(
                    Case::from_pod("the next keeps its port", CLIENT, &request, Verdict::Remote)
                        .out(&out)
                        .lookups(lookups),
                );
                ports.push(port);
            }
            assert_eq!(ports[0], 40000);
            assert!((61000..=65534).contains(&ports[1]), "{ports:?}");
            for (index, port) in [first, second].into_iter().zip(ports) {
                let back = match protocol {
                    Protocol::Tcp => tcp(8080, port, ACK),
                    _ => udp(8080, port),
                };
                let reply = bed.incoming(bed.remote_pod(9), bed.pod(CLIENT), back);
                let translated = reply
                    .clone()
                    .from(bed.cluster_ip(index))
                    .source_port(80)
                    .destination_port(40000)
                    .with_macs(delivered_macs(CLIENT))
                    .forwarded();
                bed.check(
                    Case::from_netdev("reply", &reply, Verdict::Local)
                        .out(&translated)
                        .lookups(ESTABLISHED),
                );
            }
        }
    });
}

/// Of the packet that came out.
pub fn source_port(bed: &Bed, seen: &Seen) -> u16 {
    let l4 = if bed.is_v4() { 34 } else { 54 };
    u16::from_be_bytes([seen.output.frame[l4], seen.output.frame[l4 + 1]])
}

#[test]
fn the_direct_way_to_an_endpoint_stays_beside_the_service() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Tcp, 80, &[(bed.pod(SERVER), 8080)]);
        let request = bed.leaving(CLIENT, bed.cluster_ip(1), tcp(40000, 80, SYN));
        assert_eq!(bed.pod_sends(CLIENT, &request).verdict, Verdict::Local);
        // Both pods have entries now, of which these packets are none.
        for (name, from, to, l4) in [
            ("there", CLIENT, SERVER, tcp(40001, 8080, SYN)),
            ("back", SERVER, CLIENT, tcp(8080, 40001, ACK)),
            ("another pod", OTHER, SERVER, tcp(40000, 8080, SYN)),
            ("to another pod", SERVER, OTHER, tcp(8080, 40000, ACK)),
            ("ping", CLIENT, SERVER, echo(bed.is_v4(), 40000)),
        ] {
            let packet = bed.leaving(from, bed.pod(to), l4);
            let out = packet.clone().with_macs(delivered_macs(to)).forwarded();
            // A SYN also asks whether its reply tuple is free.
            let flow = u64::from(from != OTHER) + u64::from(name == "there");
            bed.check(
                Case::from_pod(name, from, &packet, Verdict::Local)
                    .out(&out)
                    .lookups(Lookups {
                        flow,
                        ..Lookups::default()
                    }),
            );
        }
        let reply = bed.incoming(bed.outside(), bed.pod(CLIENT), tcp(8080, 40000, ACK));
        let out = reply.clone().with_macs(delivered_macs(CLIENT)).forwarded();
        bed.check(
            Case::from_netdev("somebody else's reply", &reply, Verdict::Local)
                .out(&out)
                .lookups(Lookups {
                    flow: 1,
                    ipcache: 1,
                    ..Lookups::default()
                }),
        );
        let packet = bed.host_sends(bed.node(), CLIENT, tcp(8080, 40000, ACK));
        // It may be a reply to the node, or one that came by a device without our programs.
        bed.check(
            Case::to_pod("the node's own", CLIENT, &packet, Verdict::Stack).lookups(Lookups {
                flow: 2,
                // Is it from outside?
                ipcache: 1,
                ..Lookups::default()
            }),
        );
    });
}

#[test]
fn a_direct_connection_does_not_get_the_replies_of_a_service() {
    for_both_families(|bed| {
        for (index, protocol, service, direct) in [
            (1, Protocol::Tcp, tcp(40000, 80, SYN), tcp(40000, 8080, SYN)),
            (2, Protocol::Udp, udp(40000, 80), udp(40000, 8080)),
        ] {
            bed.service(index, protocol, 80, &[(bed.remote_pod(9), 8080)]);
            let request = bed.leaving(CLIENT, bed.cluster_ip(index), service);
            assert_eq!(bed.pod_sends(CLIENT, &request).verdict, Verdict::Remote);
            let request = bed.leaving(CLIENT, bed.remote_pod(9), direct);
            let seen = bed.pod_sends(CLIENT, &request);
            assert_eq!(seen.verdict, Verdict::Remote);
            let port = source_port(bed, &seen);
            assert!((61000..=65534).contains(&port), "{port}");
            let back = match protocol {
                Protocol::Tcp => tcp(8080, port, ACK),
                _ => udp(8080, port),
            };
            let reply = bed.incoming(bed.remote_pod(9), bed.pod(CLIENT), back);
            let translated = reply
                .clone()
                .destination_port(40000)
                .with_macs(delivered_macs(CLIENT))
                .forwarded();
            bed.check(
                Case::from_netdev("reply", &reply, Verdict::Local)
                    .out(&translated)
                    .lookups(ESTABLISHED),
            );
        }
    });
}

#[test]
fn a_connection_that_is_over_leaves_its_tuple() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Tcp, 80, &[(bed.remote_pod(9), 8080)]);
        let request = bed.leaving(CLIENT, bed.cluster_ip(1), tcp(40000, 80, SYN));
        let reset = bed.incoming(bed.remote_pod(9), bed.pod(CLIENT), tcp(8080, 40000, RST));
        // To the same Service: it begins anew and remembers nothing of the reset.
        assert_eq!(bed.pod_sends(CLIENT, &request).verdict, Verdict::Remote);
        assert_eq!(bed.wire_brings(&reset).verdict, Verdict::Local);
        assert_eq!(bed.pod_sends(CLIENT, &request).verdict, Verdict::Remote);
        let flows = bed.flows();
        assert_eq!(flows.len(), 2);
        assert!(flows.iter().all(|(_, entry)| entry.tcp_flags & RST == 0));
        // To the endpoint itself: it needs no entry and no other port.
        assert_eq!(bed.wire_brings(&reset).verdict, Verdict::Local);
        let direct = bed.leaving(CLIENT, bed.remote_pod(9), tcp(40000, 8080, SYN));
        bed.check(
            Case::from_pod("direct", CLIENT, &direct, Verdict::Remote)
                .out(&direct.clone().forwarded()),
        );
        assert!(bed.flows().is_empty());
    });
}

#[test]
fn an_entry_is_valid_on_its_device_only() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Tcp, 80, &[(bed.pod(SERVER), 8080)]);
        let request = bed.leaving(CLIENT, bed.cluster_ip(1), tcp(40000, 80, SYN));
        assert_eq!(bed.pod_sends(CLIENT, &request).verdict, Verdict::Local);
        // Another pod sends in the client's and in the server's name.
        for packet in [
            bed.leaving(CLIENT, bed.cluster_ip(1), tcp(40000, 80, ACK)),
            bed.leaving(SERVER, bed.pod(CLIENT), tcp(8080, 40000, ACK)),
        ] {
            let packet = packet.with_macs(leaving_macs(OTHER));
            let verdict = Verdict::Dropped(DropReason::InvalidSource);
            bed.check(Case::from_pod("in another's name", OTHER, &packet, verdict));
        }
        // And so does someone outside.
        let packet = bed.incoming(bed.pod(SERVER), bed.pod(CLIENT), tcp(8080, 40000, ACK));
        let verdict = Verdict::Dropped(DropReason::InvalidSource);
        bed.check(Case::from_netdev("from outside", &packet, verdict));
    });
}

#[test]
fn the_number_of_services_makes_no_difference() {
    for_both_families(|bed| {
        let endpoint = (bed.remote_pod(9), 8080);
        let mut seen = Vec::new();
        bed.service(1, Protocol::Tcp, 80, &[endpoint]);
        let mut count = 1;
        for (services, port) in [(1, 40000), (1000, 40001)] {
            while count < services {
                count += 1;
                let address = match bed.cluster_ip(0) {
                    IpAddr::V4(v4) => (v4.to_bits() + 0x1000 + count).to_string(),
                    IpAddr::V6(_) => format!("fd96::1:{count:x}"),
                };
                let address = match address.parse::<u32>() {
                    Ok(bits) => IpAddr::V4(bits.into()),
                    Err(_) => address.parse().unwrap(),
                };
                let backends = [(bed.remote_pod(count % 250), 8080), (bed.pod(SERVER), 8080)];
                bed.service_at(1000 + count, &[address], Protocol::Tcp, 80, &backends);
            }
            let vip = bed.cluster_ip(1);
            let request = bed.leaving(CLIENT, vip, tcp(port, 80, SYN));
            let direct = bed.leaving(CLIENT, bed.remote_pod(9), tcp(port, 80, SYN));
            let reply = bed.incoming(bed.remote_pod(9), bed.pod(CLIENT), tcp(8080, port, ACK));
            let other = bed.incoming(bed.outside(), bed.pod(CLIENT), tcp(8080, port, ACK));
            let mut lookups = Vec::new();
            for packet in [&request, &request, &direct] {
                lookups.push(bed.pod_sends(CLIENT, packet).lookups);
            }
            for packet in [&reply, &other] {
                lookups.push(bed.wire_brings(packet).lookups);
            }
            // The very first connection of a pod does not ask for itself.
            lookups[0].flow = 0;
            seen.push(lookups);
        }
        assert_eq!(seen[0], seen[1]);
    });
}

#[test]
fn every_endpoint_gets_its_share_and_a_connection_stays_with_one() {
    for_both_families(|bed| {
        let backends: Vec<_> = (1..=4).map(|n| (bed.remote_pod(n), 8080)).collect();
        bed.service(1, Protocol::Udp, 80, &backends);
        let mut share = std::collections::BTreeMap::new();
        for port in 1..=400u16 {
            let request = bed.leaving(CLIENT, bed.cluster_ip(1), udp(port, 80));
            let frames: Vec<_> = (0..2)
                .map(|_| {
                    let input = crate::bed::on(crate::bed::device(CLIENT));
                    bed.run_raw(Hook::FromPod, &request.frame(), input)
                        .unwrap()
                        .frame
                })
                .collect();
            assert_eq!(frames[0], frames[1]);
            let last = if bed.is_v4() { 33 } else { 53 };
            *share.entry(frames[0][last]).or_insert(0) += 1;
        }
        assert_eq!(share.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4]);
        // 100 expected; six standard deviations are 52.
        assert!(share.values().all(|n| (48..152).contains(n)), "{share:?}");
    });
}

#[test]
fn errors_about_nothing_known_pass_as_they_are() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Tcp, 80, &[(bed.remote_pod(9), 8080)]);
        let request = bed.leaving(CLIENT, bed.cluster_ip(1), tcp(40000, 80, SYN));
        assert_eq!(bed.pod_sends(CLIENT, &request).verdict, Verdict::Remote);
        let about = bed.leaving(CLIENT, bed.outside(), tcp(40000, 8080, ACK));
        let l4 = L4::Icmp(Icmp {
            kind: if bed.is_v4() { 3 } else { 1 },
            code: 1,
            rest: [0; 4],
            payload: about.datagram(),
        });
        let packet = bed.incoming(bed.outside(), bed.pod(CLIENT), l4);
        let out = packet.clone().with_macs(delivered_macs(CLIENT)).forwarded();
        bed.check(Case::from_netdev("unknown", &packet, Verdict::Local).out(&out));
    });
}
