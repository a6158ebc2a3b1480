//! Datagrams in pieces: the first has the ports, the others follow it.

use weir_agent::objects::Protocol;
use weir_common::DropReason;

use crate::{
    bed::{CLIENT, Case, Lookups, OTHER, SERVER, Verdict, delivered_macs, for_both_families},
    packet::{Fragment, L4, Packet, Udp, udp},
};

const FIRST: usize = 1200;
const UNKNOWN: Verdict = Verdict::Dropped(DropReason::FragmentNotFound);

/// The pieces of a UDP datagram.
pub fn pieces(packet: &Packet, identification: u16, payload: usize) -> Vec<Packet> {
    let payload: Vec<u8> = (0..payload).map(|i| (i * 7) as u8).collect();
    let L4::Udp(header) = &packet.l4 else {
        panic!("not UDP")
    };
    let mut pieces = Vec::new();
    let mut offset = 0;
    while offset < 8 + payload.len() {
        let from = offset.max(8) - 8;
        let to = (offset + FIRST - 8).min(payload.len());
        let bytes = payload[from..to].to_vec();
        let l4 = if offset == 0 {
            L4::Udp(Udp {
                whole: Some(payload.clone()),
                payload: bytes,
                ..header.clone()
            })
        } else {
            L4::Raw {
                protocol: 17,
                bytes,
            }
        };
        let fragment = Some(Fragment {
            identification,
            offset: offset as u16,
            more: offset + FIRST < 8 + payload.len(),
        });
        pieces.push(Packet {
            l4,
            fragment,
            ..packet.clone()
        });
        offset += FIRST;
    }
    pieces
}

#[test]
fn all_pieces_go_the_way_of_the_first() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Udp, 80, &[(bed.remote_pod(9), 8080)]);
        bed.service(2, Protocol::Udp, 80, &[(bed.pod(SERVER), 8080)]);
        bed.service(3, Protocol::Udp, 80, &[(bed.node(), 8080)]);
        let remote = bed.remote_pod(9);
        for (index, backend, verdict) in [
            (1, remote, Verdict::Remote),
            (2, bed.pod(SERVER), Verdict::Local),
            (3, bed.node(), Verdict::Stack),
        ] {
            let vip = bed.cluster_ip(index);
            let port = 40000 + index as u16;
            let request = bed.leaving(CLIENT, vip, udp(port, 80));
            let translated = request.clone().to(backend).destination_port(8080);
            let out = match verdict {
                Verdict::Stack => translated,
                Verdict::Local => translated.forwarded().with_macs(delivered_macs(SERVER)),
                _ => translated.forwarded(),
            };
            for (at, (piece, out)) in pieces(&request, 77, 3000)
                .iter()
                .zip(pieces(&out, 77, 3000))
                .enumerate()
            {
                let name = format!("to {backend}: piece {at}");
                let mut case = Case::from_pod(&name, CLIENT, piece, verdict).out(&out);
                if at > 0 {
                    case = case.lookups(Lookups {
                        flow: 1,
                        fragment: 1,
                        ..Lookups::default()
                    });
                }
                // A piece is not summed up by itself: nobody asks for the device's sum.
                bed.check(case.sum_may_change());
            }

            let l4 = udp(8080, port);
            let (reply, how): (Packet, fn(&str, &Packet) -> Case) = match verdict {
                Verdict::Remote => (bed.incoming(remote, bed.pod(CLIENT), l4), |name, packet| {
                    Case::from_netdev(name, packet, Verdict::Local)
                }),
                Verdict::Local => (bed.leaving(SERVER, bed.pod(CLIENT), l4), |name, packet| {
                    Case::from_pod(name, SERVER, packet, Verdict::Local)
                }),
                _ => (bed.host_sends(bed.node(), CLIENT, l4), |name, packet| {
                    Case::to_pod(name, CLIENT, packet, Verdict::Stack)
                }),
            };
            let mut out = reply.clone().from(vip).source_port(80);
            if verdict != Verdict::Stack {
                out = out.forwarded().with_macs(delivered_macs(CLIENT));
            }
            for (at, (piece, out)) in pieces(&reply, 78, 3000)
                .iter()
                .zip(pieces(&out, 78, 3000))
                .enumerate()
            {
                let case = how(&format!("from {backend}: piece {at}"), piece).out(&out);
                let lookups = Lookups {
                    flow: 1,
                    fragment: 1,
                    ..Lookups::default()
                };
                bed.check(case.lookups(lookups).sum_may_change());
            }
        }
    });
}

#[test]
fn a_piece_without_its_first_is_dropped_where_the_ports_matter() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Udp, 80, &[(bed.remote_pod(9), 8080)]);
        let later = |packet: Packet| pieces(&packet, 5, 3000).remove(1);
        let forwarded =
            |packet: &Packet, to| packet.clone().forwarded().with_macs(delivered_macs(to));
        for round in ["no connections", "connections"] {
            let packet = later(bed.leaving(CLIENT, bed.cluster_ip(1), udp(40000, 80)));
            bed.check(Case::from_pod(
                &format!("to a Service, {round}"),
                CLIENT,
                &packet,
                UNKNOWN,
            ));

            let packet = later(bed.leaving(CLIENT, bed.pod(SERVER), udp(40000, 80)));
            bed.check(
                Case::from_pod(
                    &format!("to a pod, {round}"),
                    CLIENT,
                    &packet,
                    Verdict::Local,
                )
                .out(&forwarded(&packet, SERVER)),
            );
            let packet = later(bed.leaving(CLIENT, bed.remote_pod(1), udp(40000, 80)));
            bed.check(
                Case::from_pod(
                    &format!("to another node, {round}"),
                    CLIENT,
                    &packet,
                    Verdict::Remote,
                )
                .out(&packet.clone().forwarded()),
            );
            // What a pod answers to the outside must be told from what it begins itself.
            let packet = later(bed.incoming(bed.outside(), bed.pod(OTHER), udp(1, 2)));
            let config = bed.node_config();
            bed.datapath.config_mut().apply(&config).unwrap();
            let name = format!("from outside, masqueraded there, {round}");
            bed.check(Case::from_netdev(&name, &packet, UNKNOWN));
            // Else a pod without connections gets what is sent to it.
            bed.without_masquerade();
            bed.check(
                Case::from_netdev(&format!("from outside, {round}"), &packet, Verdict::Local)
                    .out(&forwarded(&packet, OTHER)),
            );
            let packet = bed.leaving(CLIENT, bed.cluster_ip(1), udp(40000, 80));
            assert_eq!(bed.pod_sends(CLIENT, &packet).verdict, Verdict::Remote);
        }
        // It might belong to a reply that is to be translated back.
        let packet = later(bed.incoming(bed.remote_pod(9), bed.pod(CLIENT), udp(1, 2)));
        bed.check(Case::from_netdev("perhaps a reply", &packet, UNKNOWN));
        let packet = later(bed.host_sends(bed.node(), CLIENT, udp(1, 2)));
        bed.check(Case::to_pod(
            "perhaps a reply of the node",
            CLIENT,
            &packet,
            UNKNOWN,
        ));
    });
}

#[test]
fn datagrams_are_told_apart() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Udp, 80, &[(bed.remote_pod(9), 8080)]);
        bed.service(2, Protocol::Udp, 80, &[(bed.remote_pod(8), 8080)]);
        let request = |bed: &crate::bed::Bed, index| {
            bed.leaving(CLIENT, bed.cluster_ip(index), udp(40000, 80))
        };
        let one = pieces(&request(bed, 1), 1, 3000);
        let two = pieces(&request(bed, 2), 1, 3000);
        let other = pieces(&request(bed, 1), 2, 3000);
        assert_eq!(bed.pod_sends(CLIENT, &one[0]).verdict, Verdict::Remote);
        bed.check(Case::from_pod(
            "another destination",
            CLIENT,
            &two[1],
            UNKNOWN,
        ));
        bed.check(Case::from_pod(
            "another identification",
            CLIENT,
            &other[1],
            UNKNOWN,
        ));
        let mut tcp = one[1].clone();
        let L4::Raw { protocol, .. } = &mut tcp.l4 else {
            panic!()
        };
        *protocol = 6;
        bed.check(Case::from_pod("another protocol", CLIENT, &tcp, UNKNOWN));
        let out = one[2].clone().to(bed.remote_pod(9)).forwarded();
        bed.check(
            Case::from_pod("the right one", CLIENT, &one[2], Verdict::Remote)
                .out(&out)
                .sum_may_change(),
        );
    });
}

#[test]
fn an_atomic_fragment_is_a_whole_datagram() {
    for_both_families(|bed| {
        if bed.is_v4() {
            return;
        }
        bed.service(1, Protocol::Udp, 80, &[(bed.remote_pod(9), 8080)]);
        let mut request = bed.leaving(CLIENT, bed.cluster_ip(1), udp(40000, 80));
        request.fragment = Some(Fragment {
            identification: 3,
            offset: 0,
            more: false,
        });
        let out = request
            .clone()
            .to(bed.remote_pod(9))
            .destination_port(8080)
            .forwarded();
        for name in ["first", "next"] {
            let case = Case::from_pod(name, CLIENT, &request, Verdict::Remote).out(&out);
            let seen = bed.check(case);
            assert_eq!(seen.lookups.fragment, 0);
        }
    });
}
