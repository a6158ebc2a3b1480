//! What is refused: packets to Services without endpoints and to ports that no Service has are
//! answered at once, within a limit; and what is never refused.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use weir_agent::{datapath::NodeConfig, objects::Protocol};
use weir_common::{DropReason, metrics::outcome};

use crate::{
    answers,
    bed::{Bed, CLIENT, Case, OTHER, POD_MTU, Verdict, for_both_families},
    packet::{ACK, FIN, Fragment, L4, Packet, RST, SYN, sctp, tcp, udp},
};

/// What the sender of a packet that is refused gets: a reset (RFC 9293 section 3.10.7.1), or port
/// unreachable (RFC 792, RFC 4443).
pub fn refusal(bed: &Bed, about: &Packet) -> Packet {
    let L4::Tcp(tcp) = &about.l4 else {
        let (kind, code) = if bed.is_v4() { (3, 3) } else { (1, 4) };
        return answers::error(bed, about, kind, code, 0);
    };
    let mut reset = tcp.clone();
    let control = u32::from(tcp.flags & SYN != 0) + u32::from(tcp.flags & FIN != 0);
    reset.source = tcp.destination;
    reset.destination = tcp.source;
    reset.window = 0;
    reset.options = Vec::new();
    reset.payload = Vec::new();
    if tcp.flags & ACK != 0 {
        (reset.sequence, reset.acknowledgement) = (tcp.acknowledgement, 0);
        reset.flags = RST;
    } else {
        let length = tcp.payload.len() as u32 + control;
        (reset.sequence, reset.acknowledgement) = (0, tcp.sequence.wrapping_add(length));
        reset.flags = RST | ACK;
    }
    let mut answer = Packet::new(
        about.macs.turned(),
        about.destination,
        about.source,
        L4::Tcp(reset),
    );
    answer.dont_fragment = false;
    answer.flow_label = 0;
    if bed.is_v4() {
        answer.tos = 0xc0;
    }
    answer
}

fn no_endpoints(bed: &mut Bed) {
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        bed.service(1, protocol, 80, &[]);
    }
    bed.service(2, Protocol::Tcp, 80, &[(bed.remote_pod(9), 8080)]);
}

fn check(bed: &mut Bed, name: &str, packet: &Packet, reason: DropReason) {
    let answer = refusal(bed, packet);
    bed.check(
        Case::from_pod(name, CLIENT, packet, Verdict::Refused(reason))
            .out(&answer)
            .sum_may_change(),
    );
}

#[test]
fn services_without_endpoints_and_unknown_ports_are_refused() {
    for_both_families(|bed| {
        no_endpoints(bed);
        let with_options = |flags| match tcp(4000, 80, flags) {
            L4::Tcp(mut h) => {
                h.sequence = u32::MAX - 3;
                h.acknowledgement = 0x8000_0001;
                h.options = vec![2, 4, 5, 0xb4, 1, 1, 4, 2];
                L4::Tcp(h)
            }
            _ => unreachable!(),
        };
        let rows = [
            ("SYN", tcp(4000, 80, SYN)),
            ("SYN with options", with_options(SYN)),
            ("ACK with data", tcp(4000, 80, ACK)),
            ("FIN", tcp(4000, 80, FIN | ACK)),
            ("data without ACK", tcp(4000, 80, 0)),
            ("UDP", udp(4000, 80)),
            ("SCTP", sctp(4000, 80)),
        ];
        for (name, l4) in rows {
            let packet = bed.leaving(CLIENT, bed.cluster_ip(1), l4);
            check(bed, name, &packet, DropReason::NoBackend);
        }
        for (name, l4) in [
            ("unknown port", tcp(4000, 81, SYN)),
            ("another protocol", udp(4000, 80)),
            ("SCTP where TCP is", sctp(4000, 80)),
        ] {
            let packet = bed.leaving(CLIENT, bed.cluster_ip(2), l4);
            check(bed, name, &packet, DropReason::NoServicePort);
        }
        assert_eq!(bed.flows().len(), 0);
    });
}

#[test]
fn what_may_not_be_answered_is_dropped() {
    for_both_families(|bed| {
        no_endpoints(bed);
        let mut fragment = bed.leaving(CLIENT, bed.cluster_ip(1), udp(4000, 80));
        fragment.fragment = Some(Fragment {
            identification: 7,
            offset: 64,
            more: false,
        });
        let rows = [
            (
                "reset",
                bed.leaving(CLIENT, bed.cluster_ip(1), tcp(4000, 80, RST)),
                DropReason::NoBackend,
            ),
            (
                "reset with ACK",
                bed.leaving(CLIENT, bed.cluster_ip(1), tcp(4000, 80, RST | ACK)),
                DropReason::NoBackend,
            ),
            ("later fragment", fragment, DropReason::FragmentNotFound),
        ];
        for (name, packet, reason) in rows {
            bed.check(Case::from_pod(
                name,
                CLIENT,
                &packet,
                Verdict::Dropped(reason),
            ));
        }
    });
}

#[test]
fn refusals_are_limited() {
    for_both_families(|bed| {
        no_endpoints(bed);
        let config = NodeConfig {
            // One in eight seconds would be none: the burst of a quarter of a second lets one pass.
            refusals_per_second: 1,
            ..bed.node_config()
        };
        bed.datapath.config_mut().apply(&config).unwrap();
        let packet = bed.leaving(CLIENT, bed.cluster_ip(1), tcp(4000, 80, SYN));
        let first = bed.pod_sends(CLIENT, &packet);
        assert_eq!(first.verdict, Verdict::Refused(DropReason::NoBackend));
        let second = bed.pod_sends(CLIENT, &packet);
        assert_eq!(second.verdict, Verdict::Dropped(DropReason::NoBackend));
        assert_eq!(second.flow_counter(outcome::REFUSAL_LIMITED), 1);
        // Others have refusals of their own.
        let of_other = bed.leaving(OTHER, bed.cluster_ip(1), tcp(4000, 80, SYN));
        let other = bed.pod_sends(OTHER, &of_other);
        assert_eq!(other.verdict, Verdict::Refused(DropReason::NoBackend));
        let config = NodeConfig {
            refusals_per_second: 0,
            ..bed.node_config()
        };
        bed.datapath.config_mut().apply(&config).unwrap();
        for _ in 0..100 {
            let seen = bed.pod_sends(CLIENT, &packet);
            assert_eq!(seen.verdict, Verdict::Refused(DropReason::NoBackend));
        }
    });
}

/// Another address of the same network.
fn beside(address: IpAddr, number: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() ^ u32::from(number)).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() ^ u128::from(number)).into(),
    }
}

#[test]
fn errors_to_the_outside_are_limited() {
    for_both_families(|bed| {
        bed.without_masquerade();
        let config = NodeConfig {
            refusals_per_second: 1,
            ..bed.node_config()
        };
        bed.datapath.config_mut().apply(&config).unwrap();
        let l4 = tcp(4000, 80, SYN);
        let packet = bed.incoming(bed.outside(), bed.pod(CLIENT), l4).with_ttl(1);
        assert_eq!(bed.wire_brings(&packet).verdict, Verdict::Answered);
        let second = bed.wire_brings(&packet);
        assert_eq!(second.verdict, Verdict::Dropped(DropReason::TtlExceeded));
        assert_eq!(second.flow_counter(outcome::REFUSAL_LIMITED), 1);
        // How large packets may be is told all the same, and to others when one asks too often.
        let large = bed.incoming(bed.outside(), bed.pod(CLIENT), udp(4000, 53));
        let large = answers::sized(bed, large, POD_MTU + 1);
        assert_eq!(bed.wire_brings(&large).verdict, Verdict::Answered);
        let second = bed.wire_brings(&large);
        assert_eq!(second.verdict, Verdict::Dropped(DropReason::TooBig));
        assert_eq!(second.flow_counter(outcome::REFUSAL_LIMITED), 1);
        let others = (1..=8).filter(|number| {
            let large = large.clone().from(beside(bed.outside(), *number));
            bed.wire_brings(&large).verdict == Verdict::Answered
        });
        assert!(
            others.count() >= 4,
            "those of few others are counted with it"
        );
        // What pods provoke comes back to them alone.
        let own = bed
            .leaving(CLIENT, bed.remote_pod(9), tcp(4000, 80, SYN))
            .with_ttl(1);
        for _ in 0..3 {
            assert_eq!(bed.pod_sends(CLIENT, &own).verdict, Verdict::Answered);
        }
    });
}
