//! ICMP errors that the programs send themselves: too big, time exceeded.

use std::net::IpAddr;

use weir_agent::objects::Protocol;
use weir_common::DropReason;

use crate::{
    bed::{Bed, CLIENT, Case, HOP_MTU, POD_MTU, SERVER, Verdict, for_both_families},
    packet::{ACK, Fragment, Icmp, L4, Packet, echo, tcp, udp},
};

/// Bytes of a packet that an error quotes at most.
const QUOTE_MAX: usize = 128;

pub fn error(bed: &Bed, about: &Packet, kind: u8, code: u8, rest: u32) -> Packet {
    let mut quote = about.datagram();
    quote.truncate((quote.len() & !3).min(QUOTE_MAX));
    let l4 = L4::Icmp(Icmp {
        kind,
        code,
        rest: rest.to_be_bytes(),
        payload: quote,
    });
    let mut packet = Packet::new(about.macs.turned(), bed.node(), about.source, l4);
    packet.dont_fragment = false;
    packet.flow_label = 0;
    if bed.is_v4() {
        packet.tos = 0xc0;
    }
    packet
}

/// RFC 1191 and RFC 8201.
pub fn too_big(bed: &Bed, about: &Packet, mtu: u32) -> Packet {
    if bed.is_v4() {
        error(bed, about, 3, 4, mtu)
    } else {
        error(bed, about, 2, 0, mtu)
    }
}

fn time_exceeded(bed: &Bed, about: &Packet) -> Packet {
    let kind = if bed.is_v4() { 11 } else { 3 };
    error(bed, about, kind, 0, 0)
}

/// UDP of which the whole packet has `length` bytes from the network header on.
pub fn sized(bed: &Bed, packet: Packet, length: u32) -> Packet {
    let headers = if bed.is_v4() { 20 } else { 40 } + 8;
    let payload = (0..length - headers).map(|i| i as u8).collect();
    packet.with_payload(payload)
}

#[test]
fn what_is_too_big_is_told_so() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Udp, 53, &[(bed.remote_pod(9), 5353)]);
        bed.service(2, Protocol::Udp, 53, &[(bed.pod(SERVER), 5353)]);
        let rows: [(&str, IpAddr, u32); 4] = [
            ("pod of another node", bed.remote_pod(9), HOP_MTU),
            ("Service elsewhere", bed.cluster_ip(1), HOP_MTU),
            ("pod of this node", bed.pod(SERVER), POD_MTU),
            ("Service here", bed.cluster_ip(2), POD_MTU),
        ];
        for (name, address, mtu) in rows {
            for excess in [1, 2, 3, 4, 500] {
                let packet = bed.leaving(CLIENT, address, udp(4000, 53));
                let packet = sized(bed, packet, mtu + excess);
                let answer = too_big(bed, &packet, mtu);
                bed.check(
                    Case::from_pod(name, CLIENT, &packet, Verdict::Answered)
                        .out(&answer)
                        .sum_may_change(),
                );
            }
            let packet = bed.leaving(CLIENT, address, udp(4000, 53));
            let seen = bed.pod_sends(CLIENT, &sized(bed, packet, mtu));
            assert!(
                matches!(seen.verdict, Verdict::Local | Verdict::Remote),
                "{seen:?}"
            );
        }
        for source in [bed.remote_pod(9), bed.outside()] {
            let packet = bed.incoming(source, bed.pod(CLIENT), udp(4000, 53));
            let packet = sized(bed, packet, POD_MTU + 77);
            let answer = too_big(bed, &packet, POD_MTU);
            bed.check(
                Case::from_netdev("from outside", &packet, Verdict::Answered)
                    .out(&answer)
                    .sum_may_change(),
            );
        }
        if bed.is_v4() {
            // What may be cut is cut by the stack.
            let mut packet = bed.leaving(CLIENT, bed.remote_pod(9), udp(4000, 53));
            packet.dont_fragment = false;
            let packet = sized(bed, packet, HOP_MTU + 1);
            bed.check(Case::from_pod(
                "may be cut",
                CLIENT,
                &packet,
                Verdict::Stack,
            ));
        }
    });
}

#[test]
fn a_reply_that_is_too_big_quotes_what_its_sender_sent() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Udp, 53, &[(bed.remote_pod(9), 5353)]);
        let question = bed.leaving(CLIENT, bed.cluster_ip(1), udp(4000, 53));
        assert_eq!(bed.pod_sends(CLIENT, &question).verdict, Verdict::Remote);
        let reply = bed.incoming(bed.remote_pod(9), bed.pod(CLIENT), udp(5353, 4000));
        let reply = sized(bed, reply, POD_MTU + 20);
        let answer = too_big(bed, &reply, POD_MTU);
        bed.check(
            Case::from_netdev("reply", &reply, Verdict::Answered)
                .out(&answer)
                .sum_may_change(),
        );
    });
}

#[test]
fn hops_that_are_used_up_are_told_so() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Udp, 53, &[(bed.remote_pod(9), 5353)]);
        for address in [bed.pod(SERVER), bed.remote_pod(9), bed.cluster_ip(1)] {
            for l4 in [udp(4000, 53), udp(4000, 53), echo(bed.is_v4(), 9)] {
                if address == bed.cluster_ip(1) && matches!(l4, L4::Icmp(_)) {
                    continue;
                }
                for ttl in [0, 1] {
                    let packet = bed.leaving(CLIENT, address, l4.clone()).with_ttl(ttl);
                    let answer = time_exceeded(bed, &packet);
                    bed.check(
                        Case::from_pod("from a pod", CLIENT, &packet, Verdict::Answered)
                            .out(&answer)
                            .sum_may_change(),
                    );
                }
            }
        }
        let packet = bed
            .incoming(bed.remote_pod(9), bed.pod(CLIENT), tcp(1, 2, ACK))
            .with_ttl(1);
        let answer = time_exceeded(bed, &packet);
        bed.check(
            Case::from_netdev("from outside", &packet, Verdict::Answered)
                .out(&answer)
                .sum_may_change(),
        );
        // The stack looks after its own.
        for address in [bed.node(), bed.outside()] {
            let packet = bed.leaving(CLIENT, address, udp(1, 2)).with_ttl(1);
            bed.check(Case::from_pod(
                "to the stack",
                CLIENT,
                &packet,
                Verdict::Stack,
            ));
        }
    });
}

#[test]
fn the_smallest_and_the_largest_quote() {
    for_both_families(|bed| {
        for payload in [0, 1, 3, 4, 60, 79, 80, 81, 99, 100, 101, 400] {
            let packet = bed
                .leaving(CLIENT, bed.remote_pod(9), udp(4000, 53))
                .with_payload(vec![0xa5; payload])
                .with_ttl(1);
            let answer = time_exceeded(bed, &packet);
            bed.check(
                Case::from_pod(
                    &format!("{payload} bytes"),
                    CLIENT,
                    &packet,
                    Verdict::Answered,
                )
                .out(&answer)
                .sum_may_change(),
            );
        }
    });
}

#[test]
fn errors_and_later_fragments_are_not_answered() {
    for_both_families(|bed| {
        let quoted = bed.leaving(CLIENT, bed.remote_pod(9), udp(1, 2)).datagram();
        let kinds: &[u8] = if bed.is_v4() {
            &[3, 11, 12]
        } else {
            &[1, 2, 3, 4]
        };
        for &kind in kinds {
            let l4 = L4::Icmp(Icmp {
                kind,
                code: 0,
                rest: [0; 4],
                payload: quoted.clone(),
            });
            let packet = bed.leaving(CLIENT, bed.remote_pod(9), l4).with_ttl(1);
            let verdict = Verdict::Dropped(DropReason::TtlExceeded);
            bed.check(Case::from_pod("an error", CLIENT, &packet, verdict));
        }
        let l4 = L4::Raw {
            protocol: 17,
            bytes: vec![1; 64],
        };
        let mut packet = bed.leaving(CLIENT, bed.remote_pod(9), l4).with_ttl(1);
        packet.fragment = Some(Fragment {
            identification: 77,
            offset: 1280,
            more: false,
        });
        let verdict = Verdict::Dropped(DropReason::TtlExceeded);
        bed.check(Case::from_pod("a later fragment", CLIENT, &packet, verdict));
    });
}
