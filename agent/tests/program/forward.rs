//! Packets that no Service is concerned with.

use weir_common::{DropReason, MacAddress, metrics::Hook};

use crate::{
    bed::{
        CLIENT, Case, ESTABLISHED, ETH0, HOP_MTU, Lookups, SERVER, Verdict, delivered_macs, device,
        for_both_families, on,
    },
    packet::{ACK, L4, Macs, Packet, SYN, echo, sctp, tcp, udp},
    run::Input,
};

const NONE: Lookups = Lookups {
    flow: 0,
    ..ESTABLISHED
};
const DESTINATION: Lookups = Lookups { ipcache: 1, ..NONE };
/// What comes from outside must not claim to be inside, and may be for a Service.
const SOURCE_AND_DESTINATION: Lookups = Lookups { ipcache: 2, ..NONE };

#[test]
fn one_lookup_of_the_destination_at_most() {
    for_both_families(|bed| {
        // Without it nothing here needs an entry.
        bed.without_masquerade();
        let kinds: [(&str, L4); 6] = [
            ("TCP SYN", tcp(40000, 80, SYN)),
            ("TCP", tcp(40000, 80, ACK)),
            ("UDP", udp(40000, 53)),
            ("SCTP", sctp(40000, 53)),
            ("echo", echo(bed.is_v4(), 7)),
            (
                "another protocol",
                L4::Raw {
                    protocol: 47,
                    bytes: vec![7; 40],
                },
            ),
        ];
        for (kind, l4) in kinds {
            let packet = bed.leaving(CLIENT, bed.pod(SERVER), l4.clone());
            let delivered = packet.clone().with_macs(delivered_macs(SERVER)).forwarded();
            bed.check(
                Case::from_pod(
                    &format!("{kind}: pod of this node"),
                    CLIENT,
                    &packet,
                    Verdict::Local,
                )
                .out(&delivered)
                .lookups(NONE),
            );
            for (place, address) in [
                ("pod of another node", bed.remote_pod(9)),
                ("another node", bed.remote_node()),
            ] {
                let packet = bed.leaving(CLIENT, address, l4.clone());
                bed.check(
                    Case::from_pod(
                        &format!("{kind}: {place}"),
                        CLIENT,
                        &packet,
                        Verdict::Remote,
                    )
                    .out(&packet.clone().forwarded())
                    .lookups(DESTINATION),
                );
            }
            for (place, address, lookups) in [
                ("this node", bed.node(), DESTINATION),
                ("outside", bed.outside(), DESTINATION),
                ("address of the pod range without a pod", bed.pod(99), NONE),
                ("gateway", bed.gateway(), DESTINATION),
            ] {
                let packet = bed.leaving(CLIENT, address, l4.clone());
                bed.check(
                    Case::from_pod(&format!("{kind}: {place}"), CLIENT, &packet, Verdict::Stack)
                        .lookups(lookups),
                );
            }
            for (place, source) in [
                ("pod of another node", bed.remote_pod(9)),
                ("another node", bed.remote_node()),
                ("outside", bed.outside()),
            ] {
                let packet = bed.incoming(source, bed.pod(CLIENT), l4.clone());
                let delivered = packet.clone().with_macs(delivered_macs(CLIENT)).forwarded();
                bed.check(
                    Case::from_netdev(
                        &format!("{kind}: from {place} to a pod"),
                        &packet,
                        Verdict::Local,
                    )
                    .out(&delivered)
                    .lookups(DESTINATION),
                );
                let packet = bed.incoming(source, bed.node(), l4.clone());
                bed.check(
                    Case::from_netdev(
                        &format!("{kind}: from {place} to the node"),
                        &packet,
                        Verdict::Stack,
                    )
                    .lookups(SOURCE_AND_DESTINATION),
                );
            }
            let packet = bed.host_sends(bed.node(), CLIENT, l4.clone());
            bed.check(
                Case::to_pod(
                    &format!("{kind}: from the node"),
                    CLIENT,
                    &packet,
                    Verdict::Stack,
                )
                .lookups(NONE),
            );
        }
    });
}

#[test]
fn untranslated_connections_make_no_entry() {
    for_both_families(|bed| {
        for packet in [
            bed.leaving(CLIENT, bed.pod(SERVER), tcp(40000, 80, SYN)),
            bed.leaving(CLIENT, bed.remote_pod(9), udp(40000, 80)),
            bed.leaving(CLIENT, bed.node(), udp(40000, 80)),
        ] {
            let seen = bed.pod_sends(CLIENT, &packet);
            assert!(seen.flow_counters.is_empty(), "{seen:?}");
        }
        assert_eq!(bed.flows().len(), 0);
    });
}

#[test]
fn headers_that_are_longer_than_usual() {
    for_both_families(|bed| {
        let mut packets: Vec<(String, Packet)> = Vec::new();
        let plain = bed.leaving(CLIENT, bed.pod(SERVER), tcp(40000, 80, ACK));
        if bed.is_v4() {
            for words in 1..=10usize {
                let mut packet = plain.clone();
                packet.options = vec![1; words * 4];
                packets.push((format!("{words} words of options"), packet));
            }
        } else {
            let option = |size: usize| {
                let mut content = vec![(size / 8 - 1) as u8, 1, (size - 4) as u8];
                content.resize(size - 1, 0);
                content
            };
            for (name, chain) in [
                ("hop by hop", vec![(0, option(8))]),
                ("destination options", vec![(60, option(64))]),
                ("routing", vec![(43, vec![0, 4, 0, 0, 0, 0, 0])]),
                (
                    "authentication",
                    vec![(51, [vec![4], vec![0; 22]].concat())],
                ),
                (
                    "all that are followed",
                    vec![
                        (0, option(8)),
                        (60, option(16)),
                        (43, vec![0, 4, 0, 0, 0, 0, 0]),
                        (51, [vec![4], vec![0; 22]].concat()),
                        (60, option(8)),
                        (135, option(8)),
                        (60, option(8)),
                    ],
                ),
            ] {
                let mut packet = plain.clone();
                packet.extensions = chain;
                packets.push((name.into(), packet));
            }
        }
        for (name, packet) in packets {
            let delivered = packet.clone().with_macs(delivered_macs(SERVER)).forwarded();
            bed.check(
                Case::from_pod(&name, CLIENT, &packet, Verdict::Local)
                    .out(&delivered)
                    .lookups(NONE),
            );
        }
    });
}

#[test]
fn a_pod_is_found_by_its_device_where_the_frame_does_not_name_it() {
    for_both_families(|bed| {
        let mut packet = bed.leaving(CLIENT, bed.pod(SERVER), udp(1, 2));
        packet.macs.destination = delivered_macs(SERVER).destination;
        let delivered = packet.clone().with_macs(delivered_macs(SERVER)).forwarded();
        bed.check(
            Case::from_pod("another's address", CLIENT, &packet, Verdict::Local)
                .out(&delivered)
                .lookups(Lookups {
                    by_ifindex: 1,
                    ..NONE
                }),
        );
        // The number of another pod, on this one's device.
        let packet = bed.leaving(SERVER, bed.pod(CLIENT), udp(1, 2));
        bed.check(
            Case::new(
                "another's number",
                Hook::FromPod,
                device(CLIENT),
                packet.frame(),
                Verdict::Dropped(DropReason::InvalidSourceMac),
            )
            .lookups(NONE),
        );
        let packet = packet.with_macs(crate::bed::wire_macs());
        bed.check(Case::new(
            "a device without a pod",
            Hook::FromPod,
            ETH0,
            packet.frame(),
            Verdict::Dropped(DropReason::StaleEndpoint),
        ));
    });
}

#[test]
fn offloaded_packets_are_measured_by_their_segments() {
    for_both_families(|bed| {
        let header = if bed.is_v4() { 20 } else { 40 };
        let fits = u32::from(HOP_MTU as u16) - header - 20;
        let packet = bed
            .leaving(CLIENT, bed.remote_pod(9), tcp(40000, 80, ACK))
            .with_payload(vec![7; 2800]);
        bed.check(
            Case::from_pod("segments that fit", CLIENT, &packet, Verdict::Remote)
                .gso(fits)
                .out(&packet.clone().forwarded()),
        );
        let seen = bed.check(
            Case::from_pod(
                "segments one byte too large",
                CLIENT,
                &packet,
                Verdict::Answered,
            )
            .gso(fits + 1)
            .out_frame(crate::answers::too_big(bed, &packet, HOP_MTU).frame())
            .sum_may_change(),
        );
        assert_eq!(seen.lookups, DESTINATION);
    });
}

#[test]
fn the_jumbo_option_of_an_offloaded_packet_is_not_measured() {
    /// Next header, length and type of the option (RFC 2675), and the length of the payload.
    const JUMBO: (u8, [u8; 7]) = (0, [0, 0xc2, 4, 0, 1, 0x12, 0x34]);
    for_both_families(|bed| {
        if bed.is_v4() {
            return;
        }
        let mut packet = bed
            .leaving(CLIENT, bed.remote_pod(9), tcp(40000, 80, ACK))
            .with_payload(vec![7; 2800]);
        packet.extensions = vec![(JUMBO.0, JUMBO.1.to_vec())];
        let frame = |packet: &Packet| {
            let mut frame = packet.frame();
            frame[18..20].fill(0);
            frame
        };
        let fits = HOP_MTU - 40 - 20;
        let case = Case::new(
            "segments that fit",
            Hook::FromPod,
            device(CLIENT),
            frame(&packet),
            Verdict::Remote,
        );
        bed.check(case.gso(fits).out_frame(frame(&packet.clone().forwarded())));
        let input = Input {
            gso_size: fits + 1,
            ..on(device(CLIENT))
        };
        let seen = bed.run_with(Hook::FromPod, &frame(&packet), input);
        assert_eq!(seen.verdict, Verdict::Answered, "one byte too large");
    });
}

#[test]
fn frames_for_another_host_are_left_to_the_stack() {
    for_both_families(|bed| {
        let to_pod = bed.incoming(bed.outside(), bed.pod(CLIENT), udp(1, 2));
        let forged = bed.incoming(bed.pod(SERVER), bed.pod(CLIENT), udp(1, 2));
        for (name, packet) in [("to a pod", to_pod), ("forged", forged)] {
            let macs = Macs {
                destination: MacAddress([2, 0, 0, 0, 0, 9]),
                ..packet.macs
            };
            let packet = packet.with_macs(macs);
            bed.check(Case::from_netdev(name, &packet, Verdict::Stack).lookups(NONE));
        }
    });
}

#[test]
fn the_mark_ends_where_the_packet_leaves_the_node() {
    for_both_families(|bed| {
        let packet = bed.leaving(CLIENT, bed.remote_pod(9), udp(1, 2));
        for (before, after) in [(0x10_0000, 0), (0x1234_5678, 0x1204_5678), (0x4000, 0x4000)] {
            let input = Input {
                mark: before,
                ..on(ETH0)
            };
            let seen = bed.run_with(Hook::ToNetdev, &packet.frame(), input);
            assert_eq!(seen.verdict, Verdict::Stack);
            assert_eq!(seen.output.mark, after, "{before:#x}");
            assert_eq!(seen.output.frame, packet.frame());
        }
    });
}

#[test]
fn other_protocols_of_layer_3() {
    for_both_families(|bed| {
        let mut frame = bed.leaving(CLIENT, bed.pod(SERVER), udp(1, 2)).frame();
        frame[12..14].copy_from_slice(&0x88ccu16.to_be_bytes());
        bed.check(Case::new(
            "LLDP from a pod",
            Hook::FromPod,
            device(CLIENT),
            frame.clone(),
            Verdict::Dropped(DropReason::UnsupportedL3),
        ));
        for (name, hook, ifindex) in [
            ("LLDP from outside", Hook::FromNetdev, ETH0),
            ("LLDP to outside", Hook::ToNetdev, ETH0),
        ] {
            bed.check(Case::new(
                name,
                hook,
                ifindex,
                frame.clone(),
                Verdict::Stack,
            ));
        }
    });
}
