//! Fragments of what the node itself sends to Services and gets from them, and those that nobody
//! can tell whose they are.

use weir_agent::objects::Protocol;
use weir_common::DropReason;

use crate::{
    bed::{CLIENT, Case, ESTABLISHED, Lookups, Verdict, for_both_families, service_port},
    fragments::pieces,
    host::{LOOPBACK, NET_DEVICE, NODE_PORT, Place, TARGET, node_port, node_sends, own_device},
    packet::{Packet, udp},
};

#[test]
fn fragments_in_order_go_the_way_of_the_first() {
    const IN_ORDER: Lookups = Lookups {
        fragment: 1,
        ..ESTABLISHED
    };
    for_both_families(|bed| {
        own_device(bed, true);
        for (index, place) in (1..).zip(Place::ALL) {
            let backend = place.address(bed);
            bed.service(index, Protocol::Udp, 80, &[(backend, TARGET)]);
            let own = 40000 + index as u16;
            let vip = bed.cluster_ip(index);
            let request = node_sends(bed, NET_DEVICE, vip, udp(own, 80));
            let (out, verdict) = place.request(bed, &request, TARGET);
            let both = pieces(&request, 77, 3000)
                .into_iter()
                .zip(pieces(&out, 77, 3000));
            for (at, (piece, out)) in both.enumerate() {
                let name = format!("to {place:?}: piece {at}");
                let case = Case::from_host(&name, NET_DEVICE, &piece, verdict).out(&out);
                let case = if at > 0 { case.lookups(IN_ORDER) } else { case };
                bed.check(case.sum_may_change());
            }
            let reply = place.answer(bed, udp(TARGET, own));
            let translated = reply.clone().from(vip).source_port(80);
            let (out, verdict) = place.reply(translated, true);
            let both = pieces(&reply, 78, 3000)
                .into_iter()
                .zip(pieces(&out, 78, 3000));
            for (at, (piece, out)) in both.enumerate() {
                let name = format!("from {place:?}: piece {at}");
                let case = place.case(&name, &piece, verdict).out(&out);
                bed.check(case.lookups(IN_ORDER).sum_may_change());
            }
        }
    });
}

#[test]
fn stray_fragments_for_the_node_pass() {
    for_both_families(|bed| {
        own_device(bed, true);
        bed.service(1, Protocol::Udp, 80, &[(bed.remote_pod(9), TARGET)]);
        let desired = service_port([node_port(NODE_PORT)], &[(bed.remote_pod(9), TARGET)]);
        bed.apply(2, Protocol::Udp, NODE_PORT, desired);
        let stray = |packet: Packet| pieces(&packet, 5, 3000).remove(1);
        for round in ["no connections", "connections"] {
            let node = bed.node();
            let pass = Verdict::Stack;
            let packet = stray(bed.incoming(bed.outside(), node, udp(1, NODE_PORT)));
            bed.check(Case::from_netdev(
                &format!("outside, {round}"),
                &packet,
                pass,
            ));
            let packet = stray(bed.leaving(CLIENT, node, udp(1, NODE_PORT)));
            bed.check(Case::from_pod(
                &format!("pod, {round}"),
                CLIENT,
                &packet,
                pass,
            ));
            let packet = stray(node_sends(bed, LOOPBACK, node, udp(1, NODE_PORT)));
            bed.check(Case::from_host(
                &format!("itself, {round}"),
                LOOPBACK,
                &packet,
                pass,
            ));
            // Of a Service's address nobody knows whose it is.
            let packet = stray(node_sends(bed, NET_DEVICE, bed.cluster_ip(1), udp(1, 80)));
            let unknown = Verdict::Dropped(DropReason::FragmentNotFound);
            let name = format!("to a Service, {round}");
            bed.check(Case::from_host(&name, NET_DEVICE, &packet, unknown));
            let packet = node_sends(bed, NET_DEVICE, bed.cluster_ip(1), udp(40000, 80));
            let (out, verdict) = Place::Elsewhere.request(bed, &packet, TARGET);
            bed.check(Case::from_host("whole", NET_DEVICE, &packet, verdict).out(&out));
        }
    });
}
