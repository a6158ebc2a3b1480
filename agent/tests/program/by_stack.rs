//! What comes from outside to a pod by way of the node's stack, which somebody else has translated: the pod's answers
//! go back the same way.

use weir_common::{
    flow::flag,
    metrics::{Hook, outcome},
};

use crate::{
    bed::{Bed, CLIENT, Case, Verdict, device, for_both_families, on},
    outside::{NODE_PORT, add_device, node_port, port_of},
    packet::{ACK, FIN, L4, SYN, sctp, tcp, udp},
};

/// The stack sends a packet of the outside to the pod, which gets it as it is.
fn stack_sends(bed: &mut Bed, l4: L4) {
    let packet = bed.host_sends(bed.outside(), CLIENT, l4);
    let case = Case::to_pod("by the stack", CLIENT, &packet, Verdict::Stack).out(&packet);
    bed.check(case);
}

/// What the pod answers to it goes to the stack as it is.
fn pod_answers(bed: &mut Bed, l4: L4) {
    let packet = bed.leaving(CLIENT, bed.outside(), l4);
    let case = Case::from_pod("answer", CLIENT, &packet, Verdict::Stack).out(&packet);
    bed.check(case);
}

#[test]
fn answers_to_the_outside_go_back_by_the_stack() {
    for_both_families(|bed| {
        add_device(bed);
        let kinds = [
            (
                "TCP",
                tcp(4000, 80, SYN),
                tcp(4000, 80, ACK),
                tcp(80, 4000, SYN | ACK),
            ),
            ("UDP", udp(4000, 80), udp(4000, 80), udp(80, 4000)),
        ];
        for (name, question, later, answer) in kinds {
            let question = bed.host_sends(bed.outside(), CLIENT, question);
            let seen = bed.run_with(Hook::ToPod, &question.frame(), on(device(CLIENT)));
            assert_eq!(seen.verdict, Verdict::Stack, "{name}");
            assert_eq!(seen.output.frame, question.frame(), "{name}");
            assert_eq!(seen.flow_counter(outcome::FLOW_CREATED), 1, "{name}");
            // The second packet finds it.
            let later = bed.host_sends(bed.outside(), CLIENT, later);
            let case = Case::to_pod(name, CLIENT, &later, Verdict::Stack).out(&later);
            assert_eq!(bed.check(case).lookups.flow, 1, "{name}");

            let answer = bed.leaving(CLIENT, bed.outside(), answer);
            let case = Case::from_pod(name, CLIENT, &answer, Verdict::Stack).out(&answer);
            bed.check(case);
        }
        let flows = bed.flows();
        assert_eq!(flows.len(), 4);
        assert!(flows.iter().all(|(_, e)| e.flags & flag::SOURCE_NAT == 0));
        // What the pod begins itself is masqueraded all the same.
        let own = bed.leaving(CLIENT, bed.outside(), tcp(5000, 443, SYN));
        let seen = bed.pod_sends(CLIENT, &own);
        assert_eq!(seen.verdict, Verdict::Routed);
    });
}

#[test]
fn what_the_node_and_its_pods_send_makes_no_entry() {
    for_both_families(|bed| {
        add_device(bed);
        for source in [bed.node(), bed.remote_node(), bed.remote_pod(9)] {
            let packet = bed.host_sends(source, CLIENT, tcp(4000, 80, SYN));
            let seen = bed.run_with(Hook::ToPod, &packet.frame(), on(device(CLIENT)));
            assert_eq!(seen.verdict, Verdict::Stack, "{source}");
        }
        assert_eq!(bed.flows().len(), 0);
        bed.without_masquerade();
        let packet = bed.host_sends(bed.outside(), CLIENT, tcp(4000, 80, SYN));
        bed.run_with(Hook::ToPod, &packet.frame(), on(device(CLIENT)));
        assert_eq!(bed.flows().len(), 0);
    });
}

/// A client takes the port of a connection of its own that is over.
#[test]
fn a_port_that_is_used_again_is_answered_again() {
    for_both_families(|bed| {
        add_device(bed);
        for _ in 0..3 {
            stack_sends(bed, tcp(4000, 80, SYN));
            pod_answers(bed, tcp(80, 4000, SYN | ACK));
            stack_sends(bed, tcp(4000, 80, ACK));
            pod_answers(bed, tcp(80, 4000, FIN | ACK));
            stack_sends(bed, tcp(4000, 80, FIN | ACK));
        }
        assert_eq!(bed.flows().len(), 2);
    });
}

/// What the node's programs have left to the stack to be cut comes by here: it is somebody's already.
#[test]
fn packets_of_our_own_connections_pass_unchanged() {
    for_both_families(|bed| {
        add_device(bed);
        for (number, l4) in [udp as fn(u16, u16) -> L4, sctp].into_iter().enumerate() {
            let port = 5000 + number as u16;
            // An answer to a pod that has asked the outside.
            let question = bed.leaving(CLIENT, bed.outside(), l4(port, 53));
            assert_eq!(bed.pod_sends(CLIENT, &question).verdict, Verdict::Routed);
            stack_sends(bed, l4(53, port));
        }
        // A question of a client outside to a NodePort whose endpoint is here.
        let endpoint = (bed.pod(CLIENT), 8080);
        node_port(bed, weir_agent::objects::Protocol::Udp, endpoint);
        let question = bed.incoming(bed.outside(), bed.node(), udp(6000, NODE_PORT));
        let seen = bed.wire_brings(&question);
        assert_eq!(seen.verdict, Verdict::Local);
        assert_eq!(port_of(bed, &seen.output.frame, 0), 6000);
        let flows = bed.flows().len();
        stack_sends(bed, udp(6000, 8080));
        assert_eq!(bed.flows().len(), flows);
        // Its answer comes from the NodePort.
        let answer = bed.leaving(CLIENT, bed.outside(), udp(8080, 6000));
        let seen = bed.pod_sends(CLIENT, &answer);
        assert_eq!(seen.verdict, Verdict::Routed);
        assert_eq!(port_of(bed, &seen.output.frame, 0), NODE_PORT);
    });
}
