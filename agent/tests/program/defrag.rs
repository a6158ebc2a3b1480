//! Datagrams whose pieces come out of order: away to be put together, and on when they come back.

use weir_agent::objects::Protocol;
use weir_common::{DropReason, config::HOST_DEVICE_MAC, mark, metrics::Hook};

use crate::{
    bed::{
        Bed, CLIENT, ETH0, OTHER, SERVER, Verdict, delivered_macs, device, for_both_families, hex,
        leaving_macs, on,
    },
    fragments::pieces,
    packet::{Macs, Packet, udp},
    run::{self, Input},
};

/// The device behind which they are put together.
const DEVICE: u32 = 92;
const MARKED: u32 = mark::DONE << 20;
const UNKNOWN: Verdict = Verdict::Dropped(DropReason::FragmentNotFound);
const OWN: Macs = Macs {
    destination: HOST_DEVICE_MAC,
    source: HOST_DEVICE_MAC,
};

/// Runs a program, and expects what comes out of it and the mark on it.
fn expect(
    bed: &mut Bed,
    what: &str,
    (hook, ifindex, mark): (Hook, u32, u32),
    packet: &Packet,
    (verdict, out, out_mark): (Verdict, &Packet, u32),
) {
    let input = Input {
        mark,
        ..on(ifindex)
    };
    let seen = bed.run_with(hook, &packet.frame(), input);
    // A piece that is translated is not summed up by itself: nobody asks for the device's sum.
    let is_translated = packet.source != out.source || packet.destination != out.destination;
    let what = format!("{what}: {:?}", packet.fragment);
    assert_eq!(seen.verdict, verdict, "{what}");
    assert_eq!(hex(&seen.output.frame), hex(&out.frame()), "{what}");
    assert_eq!(seen.output.mark, out_mark, "{what}");
    if is_translated {
        return;
    }
    let flags = run::CHECKSUM_COMPLETE;
    match bed.run_raw(hook, &packet.frame(), Input { flags, ..input }) {
        // Kernels before 6.11 have no such flag.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        again => assert_eq!(again.expect(&what).frame, seen.output.frame, "{what}"),
    }
}

fn add_device(bed: &mut Bed) {
    crate::bed::tool(&format!(
        "ip link add weir-defrag index {DEVICE} type veth peer name beyond"
    ));
    bed.datapath.set_defrag_device(DEVICE).unwrap();
}

/// All pieces go away, the last first, and come back in order by `back`, where they become `out`.
fn detour(
    bed: &mut Bed,
    (hook, ifindex): (Hook, u32),
    sent: &[Packet],
    back: Macs,
    (verdict, out, out_mark): (Verdict, &[Packet], u32),
) {
    for piece in sent.iter().rev() {
        let away = piece.clone().with_macs(OWN);
        let wanted = (Verdict::Defrag, &away, 0);
        expect(bed, "away", (hook, ifindex, 0), piece, wanted);
    }
    for (piece, out) in sent.iter().zip(out) {
        // As the kernel routes it.
        let routed = piece.clone().with_macs(OWN).forwarded();
        let returned = piece.clone().with_macs(back);
        let wanted = (Verdict::Defrag, &returned, MARKED);
        expect(bed, "back", (Hook::FromDefrag, DEVICE, 0), &routed, wanted);
        let wanted = (verdict, out, out_mark);
        expect(bed, "on", (hook, ifindex, MARKED), &returned, wanted);
    }
}

#[test]
fn what_pods_send_is_put_together() {
    for_both_families(|bed| {
        add_device(bed);
        bed.service(1, Protocol::Udp, 80, &[(bed.remote_pod(9), 8080)]);
        bed.service(2, Protocol::Udp, 80, &[(bed.pod(SERVER), 8080)]);
        for (index, backend) in [(1, bed.remote_pod(9)), (2, bed.pod(SERVER))] {
            let request = bed.leaving(CLIENT, bed.cluster_ip(index), udp(40000, 80));
            let out = request
                .clone()
                .to(backend)
                .destination_port(8080)
                .forwarded();
            let (verdict, out, out_mark) = if index == 1 {
                (Verdict::Remote, out, MARKED)
            } else {
                (Verdict::Local, out.with_macs(delivered_macs(SERVER)), 0)
            };
            let at = (Hook::FromPod, device(CLIENT));
            let out = pieces(&out, 77, 3000);
            let wanted = (verdict, out.as_slice(), out_mark);
            detour(
                bed,
                at,
                &pieces(&request, 77, 3000),
                leaving_macs(CLIENT),
                wanted,
            );
        }

        // The endpoint's answer, to be translated back.
        let answer = bed.leaving(SERVER, bed.pod(CLIENT), udp(8080, 40000));
        let out = answer.clone().from(bed.cluster_ip(2)).source_port(80);
        let out = pieces(&out.forwarded().with_macs(delivered_macs(CLIENT)), 78, 3000);
        let at = (Hook::FromPod, device(SERVER));
        let wanted = (Verdict::Local, out.as_slice(), 0);
        detour(
            bed,
            at,
            &pieces(&answer, 78, 3000),
            leaving_macs(SERVER),
            wanted,
        );
    });
}

#[test]
fn what_the_wire_brings_is_put_together() {
    for_both_families(|bed| {
        add_device(bed);
        let remote = bed.remote_pod(9);
        bed.service(1, Protocol::Udp, 80, &[(remote, 8080)]);
        let request = bed.leaving(CLIENT, bed.cluster_ip(1), udp(40000, 80));
        assert_eq!(bed.pod_sends(CLIENT, &request).verdict, Verdict::Remote);
        let answer = bed.incoming(remote, bed.pod(CLIENT), udp(8080, 40000));
        let out = answer.clone().from(bed.cluster_ip(1)).source_port(80);
        let out = pieces(&out.forwarded().with_macs(delivered_macs(CLIENT)), 78, 3000);
        let at = (Hook::FromNetdev, ETH0);
        let wanted = (Verdict::Local, out.as_slice(), 0);
        detour(bed, at, &pieces(&answer, 78, 3000), OWN, wanted);

        // What a pod answers to the outside must be told from what it begins itself: that takes ports.
        let stray = |packet: Packet| pieces(&packet, 5, 3000).remove(1);
        let packet = stray(bed.incoming(bed.outside(), bed.pod(OTHER), udp(1, 2)));
        assert_eq!(bed.wire_brings(&packet).verdict, Verdict::Defrag);
        // Else a pod without connections needs none, and nobody inside is to be had for outside.
        let inside = stray(bed.incoming(remote, bed.pod(OTHER), udp(1, 2)));
        assert_eq!(bed.wire_brings(&inside).verdict, Verdict::Local);
        bed.without_masquerade();
        assert_eq!(bed.wire_brings(&packet).verdict, Verdict::Local);
        let packet = stray(bed.incoming(bed.pod(OTHER), bed.pod(CLIENT), udp(1, 2)));
        let forged = Verdict::Dropped(DropReason::InvalidSource);
        assert_eq!(bed.wire_brings(&packet).verdict, forged);
    });
}

#[test]
fn what_cannot_be_put_together_is_dropped_with_a_reason() {
    for_both_families(|bed| {
        add_device(bed);
        bed.service(1, Protocol::Udp, 80, &[(bed.remote_pod(9), 8080)]);
        let request = bed.leaving(CLIENT, bed.cluster_ip(1), udp(40000, 80));
        let cut = |packet: &Packet, id| pieces(packet, id, 3000);
        let run = |bed: &mut Bed, packet: &Packet, mark| {
            let input = Input {
                mark,
                ..on(device(CLIENT))
            };
            bed.run_with(Hook::FromPod, &packet.frame(), input).verdict
        };
        // It would never come back.
        let tired = cut(&request.clone().with_ttl(1), 1).remove(1);
        assert_eq!(run(bed, &tired, 0), UNKNOWN);
        // It has come back, and is not sent away again.
        let returned = cut(&request, 2).remove(1);
        assert_eq!(run(bed, &returned, MARKED), UNKNOWN);
        // Of a sender that nobody knows.
        let strange = bed.incoming(bed.outside(), bed.pod(CLIENT), udp(1, 2));
        let strange = cut(&strange.with_macs(OWN), 3).remove(0);
        let seen = bed.run_with(Hook::FromDefrag, &strange.frame(), on(DEVICE));
        assert_eq!(seen.verdict, UNKNOWN);
        // The device goes while a datagram is away: the next with its identification is whole again.
        let datagram = cut(&request, 4);
        assert_eq!(run(bed, &datagram[1], 0), Verdict::Defrag);
        bed.datapath.set_defrag_device(0).unwrap();
        for piece in &datagram {
            assert_eq!(run(bed, piece, 0), Verdict::Remote);
        }
    });
}
