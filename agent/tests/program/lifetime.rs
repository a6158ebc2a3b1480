//! What becomes of connections when endpoints come and go.

use weir_agent::objects::Protocol;
use weir_common::{DropReason, metrics::outcome};

use crate::{
    bed::{Bed, CLIENT, Case, OTHER, SERVER, Verdict, delivered_macs, for_both_families},
    packet::{ACK, FIN, L4, Packet, RST, SYN, tcp, udp},
    refusals::refusal,
};

fn request(bed: &Bed, l4: L4) -> Packet {
    bed.leaving(CLIENT, bed.cluster_ip(1), l4)
}

/// The request as the pod `number` of the other node gets it.
fn at(bed: &Bed, number: u32, l4: L4) -> Packet {
    bed.leaving(CLIENT, bed.remote_pod(number), l4)
        .destination_port(8080)
        .forwarded()
}

fn set(bed: &mut Bed, protocol: Protocol, numbers: &[u32]) {
    let backends: Vec<_> = numbers.iter().map(|&n| (bed.remote_pod(n), 8080)).collect();
    bed.service(1, protocol, 80, &backends);
}

/// Sends a packet and expects it at the pod `number` of the other node.
fn reaches(bed: &mut Bed, name: &str, l4: L4, number: u32) {
    let packet = request(bed, l4.clone());
    let out = at(bed, number, l4);
    bed.check(Case::from_pod(name, CLIENT, &packet, Verdict::Remote).out(&out));
}

fn refused(bed: &mut Bed, name: &str, l4: L4, reason: DropReason) {
    let packet = request(bed, l4);
    if reason != DropReason::NoBackend {
        let dropped = Verdict::Dropped(reason);
        bed.check(Case::from_pod(name, CLIENT, &packet, dropped));
        return;
    }
    let answer = refusal(bed, &packet);
    bed.check(
        Case::from_pod(name, CLIENT, &packet, Verdict::Refused(reason))
            .out(&answer)
            .sum_may_change(),
    );
}

const NEW: fn() -> L4 = || tcp(40000, 80, SYN);
const MORE: fn() -> L4 = || tcp(40000, 80, ACK);
const LAST: fn() -> L4 = || tcp(40000, 80, FIN | ACK);
const RESET: fn() -> L4 = || tcp(40000, 80, RST);

#[test]
fn udp_moves_at_its_next_packet() {
    for_both_families(|bed| {
        let question = || udp(40000, 80);
        set(bed, Protocol::Udp, &[1]);
        reaches(bed, "first", question(), 1);
        reaches(bed, "next", question(), 1);
        set(bed, Protocol::Udp, &[2]);
        let packet = request(bed, question());
        let seen = bed.pod_sends(CLIENT, &packet);
        assert_eq!(seen.output.frame, at(bed, 2, question()).frame());
        assert_eq!(seen.flow_counter(outcome::FLOW_STALE), 1);
        reaches(bed, "after the change", question(), 2);
        assert_eq!(
            bed.flows().len(),
            2,
            "nothing is left of the first endpoint"
        );
        // What the first still says is no answer of the Service.
        let late = bed.incoming(bed.remote_pod(1), bed.pod(CLIENT), udp(8080, 40000));
        let out = late.clone().with_macs(delivered_macs(CLIENT)).forwarded();
        bed.check(Case::from_netdev("late", &late, Verdict::Local).out(&out));
        set(bed, Protocol::Udp, &[]);
        refused(bed, "none left", question(), DropReason::NoBackend);
        set(bed, Protocol::Udp, &[3]);
        reaches(bed, "another", question(), 3);
    });
}

#[test]
fn tcp_stays_to_its_end() {
    for_both_families(|bed| {
        set(bed, Protocol::Tcp, &[1]);
        reaches(bed, "opens", NEW(), 1);
        let answer = bed.incoming(
            bed.remote_pod(1),
            bed.pod(CLIENT),
            tcp(8080, 40000, SYN | ACK),
        );
        let out = answer
            .clone()
            .from(bed.cluster_ip(1))
            .source_port(80)
            .with_macs(delivered_macs(CLIENT))
            .forwarded();
        bed.check(Case::from_netdev("answer", &answer, Verdict::Local).out(&out));
        set(bed, Protocol::Tcp, &[2]);
        reaches(bed, "goes on", MORE(), 1);
        bed.check(Case::from_netdev("answers go on", &answer, Verdict::Local).out(&out));
        set(bed, Protocol::Tcp, &[]);
        reaches(bed, "goes on without any endpoint", MORE(), 1);
        refused(
            bed,
            "opens without any endpoint",
            NEW(),
            DropReason::NoBackend,
        );
        set(bed, Protocol::Tcp, &[2]);
        reaches(bed, "opens anew", NEW(), 2);
        reaches(bed, "goes on there", MORE(), 2);
        assert_eq!(bed.flows().len(), 2);
    });
}

#[test]
fn a_port_that_is_used_again_meets_a_live_endpoint() {
    for_both_families(|bed| {
        for (name, end) in [("FIN", LAST), ("RST", RESET)] {
            set(bed, Protocol::Tcp, &[1]);
            reaches(bed, "opens", NEW(), 1);
            reaches(bed, name, end(), 1);
            reaches(bed, "the last acknowledgement", MORE(), 1);
            set(bed, Protocol::Tcp, &[2]);
            let packet = request(bed, NEW());
            let seen = bed.pod_sends(CLIENT, &packet);
            assert_eq!(seen.output.frame, at(bed, 2, NEW()).frame(), "{name}");
            assert_eq!(seen.flow_counter(outcome::FLOW_STALE), 1, "{name}");
            assert_eq!(bed.flows().len(), 2, "{name}");
            // Closed and opened again while nothing has changed.
            reaches(bed, name, end(), 2);
            let packet = request(bed, NEW());
            let seen = bed.pod_sends(CLIENT, &packet);
            assert_eq!(seen.output.frame, at(bed, 2, NEW()).frame(), "{name}");
            assert_eq!(seen.flow_counter(outcome::FLOW_CREATED), 1, "{name}");
            reaches(bed, name, end(), 2);
        }
    });
}

#[test]
fn a_repeated_syn_stays_with_its_endpoint() {
    for_both_families(|bed| {
        set(bed, Protocol::Tcp, &[1]);
        reaches(bed, "opens", NEW(), 1);
        // The endpoint stays, another comes.
        set(bed, Protocol::Tcp, &[1, 2, 3, 4]);
        reaches(bed, "again", NEW(), 1);
        assert_eq!(bed.flows().len(), 2);
    });
}

#[test]
fn the_number_of_an_endpoint_is_given_to_another_pod() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Tcp, 80, &[(bed.pod(SERVER), 8080)]);
        let packet = request(bed, NEW());
        assert_eq!(bed.pod_sends(CLIENT, &packet).verdict, Verdict::Local);

        // The server goes, its number is another's: no packet of the connection reaches that one.
        let gone = bed.pod(SERVER);
        bed.datapath.remove_endpoint(SERVER).unwrap();
        bed.add_pod(SERVER, 8);
        let packet = request(bed, MORE());
        let seen = bed.pod_sends(CLIENT, &packet);
        assert_eq!(seen.verdict, Verdict::Stack);
        assert_eq!(seen.flow_counter(outcome::FLOW_STALE), 1);
        let out = packet.clone().to(gone).destination_port(8080);
        assert_eq!(seen.output.frame, out.frame());

        // The new pod may not answer in the old one's name.
        let reply = bed
            .leaving(SERVER, bed.pod(CLIENT), tcp(8080, 40000, ACK))
            .from(gone);
        let verdict = Verdict::Dropped(DropReason::InvalidSource);
        bed.check(Case::from_pod("old name", SERVER, &reply, verdict));
    });
}

#[test]
fn the_number_of_a_client_is_given_to_another_pod() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Tcp, 80, &[(bed.pod(SERVER), 8080)]);
        bed.service(2, Protocol::Tcp, 80, &[(bed.remote_pod(9), 8080)]);
        for index in [1, 2] {
            let packet = bed.leaving(CLIENT, bed.cluster_ip(index), NEW());
            bed.pod_sends(CLIENT, &packet);
        }
        bed.datapath.remove_endpoint(CLIENT).unwrap();
        bed.add_pod(CLIENT, 8);
        let reply = bed.leaving(SERVER, bed.pod(CLIENT), tcp(8080, 40000, ACK));
        bed.check(Case::from_pod(
            "reply of a pod",
            SERVER,
            &reply,
            Verdict::Stack,
        ));
        let reply = bed.incoming(bed.remote_pod(9), bed.pod(CLIENT), tcp(8080, 40000, ACK));
        bed.check(Case::from_netdev(
            "reply from another node",
            &reply,
            Verdict::Stack,
        ));

        // The same address again, in another pod: its packets are no part of the old connection.
        bed.datapath.remove_endpoint(CLIENT).unwrap();
        bed.add_pod(CLIENT, CLIENT);
        bed.service(2, Protocol::Tcp, 80, &[(bed.remote_pod(7), 8080)]);
        let packet = bed.leaving(CLIENT, bed.cluster_ip(2), NEW());
        let out = at(bed, 7, NEW());
        bed.check(Case::from_pod("new pod", CLIENT, &packet, Verdict::Remote).out(&out));
    });
}

#[test]
fn a_way_that_changes_takes_its_connections_along() {
    for_both_families(|bed| {
        set(bed, Protocol::Tcp, &[1]);
        reaches(bed, "opens", NEW(), 1);
        let (gateway, family) = (bed.remote_node(), bed.family);
        let mut hop = weir_agent::datapath::Hop {
            ifindex: crate::bed::ETH0,
            gateway,
            mtu: 50,
            source: None,
        };
        bed.datapath
            .set_hop("node2", family, &[], Some(hop))
            .unwrap();
        let packet = request(bed, MORE());
        let answer = crate::answers::too_big(bed, &packet, 50);
        bed.check(
            Case::from_pod("a narrow way", CLIENT, &packet, Verdict::Answered)
                .out(&answer)
                .sum_may_change(),
        );
        bed.datapath.set_hop("node2", family, &[], None).unwrap();
        refused(bed, "no way", MORE(), DropReason::NoNextHop);
        hop.mtu = 1500;
        bed.datapath
            .set_hop("node2", family, &[], Some(hop))
            .unwrap();
        reaches(bed, "the way is back", MORE(), 1);
    });
}

#[test]
fn pods_that_are_gone_are_sent_nothing() {
    for_both_families(|bed| {
        let packet = bed.leaving(CLIENT, bed.pod(OTHER), udp(1, 2));
        assert_eq!(bed.pod_sends(CLIENT, &packet).verdict, Verdict::Local);
        bed.datapath.remove_endpoint(OTHER).unwrap();
        bed.check(Case::from_pod(
            "from a pod",
            CLIENT,
            &packet,
            Verdict::Stack,
        ));
        let packet = bed.leaving(OTHER, bed.pod(CLIENT), udp(1, 2));
        let verdict = Verdict::Dropped(DropReason::InvalidSourceMac);
        bed.check(Case::from_pod("from itself", OTHER, &packet, verdict));
    });
}
