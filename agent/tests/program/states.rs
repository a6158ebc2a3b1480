//! States of connections: how long each is kept, by the agent's sweep and by the programs alone, and
//! what ends one state and begins another.

use weir_agent::objects::{Family, Protocol};
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    flow::{FlowEntry, FlowKey, TICKS_PER_SECOND, flag},
    metrics::outcome,
};

use crate::{
    bed::{Bed, CLIENT, Verdict, for_both_families, with_beds},
    packet::{ACK, FIN, L4, RST, SYN, tcp, udp},
};

const PORT: u16 = 40000;
/// Port of the Service, and of its endpoint.
const FRONT: u16 = 80;
const BACK: u16 = 8080;

/// Who sends: the client through the Service, or its endpoint.
#[derive(Clone, Copy)]
enum Side {
    Client,
    Server,
}
use Side::{Client, Server};

/// TCP packets by sender and flags.
type Steps = &'static [(Side, u8)];

/// Name, packets, and the seconds that the connection may be idle then.
const STATES: &[(&str, Steps, u32)] = &[
    ("no answer", &[(Client, SYN)], 120),
    ("answered", &[(Client, SYN), (Server, SYN | ACK)], 60),
    (
        "opened by both at once",
        &[(Client, SYN), (Server, SYN)],
        120,
    ),
    (
        "opened by both at once, one acknowledged",
        &[(Client, SYN), (Server, SYN), (Client, SYN | ACK)],
        60,
    ),
    (
        "opened by both at once, both acknowledged",
        &[
            (Client, SYN),
            (Server, SYN),
            (Client, SYN | ACK),
            (Server, SYN | ACK),
        ],
        86_400,
    ),
    ("open", OPEN, 86_400),
    (
        "closed by the client",
        &[
            (Client, SYN),
            (Server, SYN | ACK),
            (Client, ACK),
            (Client, FIN | ACK),
            (Server, ACK),
        ],
        3600,
    ),
    (
        "closed by the server",
        &[
            (Client, SYN),
            (Server, SYN | ACK),
            (Client, ACK),
            (Server, FIN | ACK),
            (Client, ACK),
        ],
        3600,
    ),
    (
        "closed by both",
        &[
            (Client, SYN),
            (Server, SYN | ACK),
            (Client, FIN | ACK),
            (Server, FIN | ACK),
            (Client, ACK),
        ],
        120,
    ),
    ("refused", &[(Client, SYN), (Server, RST | ACK)], 10),
    (
        "reset by the client",
        &[
            (Client, SYN),
            (Server, SYN | ACK),
            (Client, ACK),
            (Client, RST),
        ],
        10,
    ),
];

const OPEN: Steps = &[(Client, SYN), (Server, SYN | ACK), (Client, ACK)];

fn send(bed: &mut Bed, steps: &[(Side, u8)]) {
    for (from, flags) in steps {
        let seen = match from {
            Client => {
                let packet = bed.leaving(CLIENT, bed.cluster_ip(1), tcp(PORT, FRONT, *flags));
                bed.pod_sends(CLIENT, &packet)
            }
            Server => {
                let l4 = tcp(BACK, PORT, *flags);
                let packet = bed.incoming(bed.remote_pod(9), bed.pod(CLIENT), l4);
                bed.wire_brings(&packet)
            }
        };
        let expected = match from {
            Client => Verdict::Remote,
            Server => Verdict::Local,
        };
        assert_eq!(seen.verdict, expected);
    }
}

fn service(bed: &mut Bed) {
    let backend = (bed.remote_pod(9), BACK);
    bed.service(1, Protocol::Tcp, FRONT, &[backend]);
}

/// Lets time pass: every packet was seen that much earlier.
fn age(bed: &mut Bed, seconds: u32) {
    fn of_family<A>(bed: &Bed, map: &str, seconds: u32)
    where
        A: Address,
        FlowKey<A>: aya::Pod,
        FlowEntry<A>: aya::Pod,
    {
        let mut flows = bed.fs.hash::<FlowKey<A>, FlowEntry<A>>(map);
        let all: Vec<_> = flows.iter().flatten().collect();
        for (key, mut entry) in all {
            let ticks = seconds * TICKS_PER_SECOND;
            entry.last_seen = entry.last_seen.wrapping_sub(ticks);
            flows.insert(key, entry, 0).unwrap();
        }
    }
    match bed.family {
        Family::V4 => of_family::<Ipv4>(bed, "FLOWS_V4", seconds),
        Family::V6 => of_family::<Ipv6>(bed, "FLOWS_V6", seconds),
    }
}

/// Has the agent walk the tables; gives the number of connections removed.
fn sweep(bed: &mut Bed) -> u32 {
    let mut removed = 0;
    loop {
        let report = bed.datapath.sweep_flows(1000).unwrap();
        removed += report.removed;
        if report.finished {
            return removed;
        }
    }
}

#[test]
fn the_agent_forgets_each_state_in_its_time() {
    for_both_families(|bed| {
        service(bed);
        for (name, steps, seconds) in STATES {
            send(bed, steps);
            age(bed, seconds - 1);
            assert_eq!(sweep(bed), 0, "{name}: too early");
            age(bed, 2);
            assert_eq!(sweep(bed), 1, "{name}: too late");
            assert_eq!(bed.flows().len(), 0, "{name}");
        }
    });
}

/// The ring has one place: whoever comes next finds the connection, which is idle for too long or has
/// to give way.
#[test]
fn the_programs_forget_each_state_in_its_time() {
    with_beds(
        |options| options.connections = 1,
        |bed| {
            service(bed);
            let resolver = (bed.remote_pod(9), BACK);
            bed.service(2, Protocol::Udp, FRONT, &[resolver]);
            for (name, steps, seconds) in STATES {
                for (idle, expected) in [
                    (seconds - 1, outcome::FLOW_EVICTED),
                    (seconds + 1, outcome::FLOW_EXPIRED),
                ] {
                    send(bed, steps);
                    age(bed, idle);
                    let packet = bed.leaving(CLIENT, bed.cluster_ip(2), udp(PORT, FRONT));
                    let seen = bed.pod_sends(CLIENT, &packet);
                    assert_eq!(seen.flow_counter(expected), 1, "{name}, idle for {idle} s");
                    assert_eq!(bed.flows().len(), 2, "{name}");
                }
            }
        },
    );
}

#[test]
fn a_half_closed_connection_lives_while_the_other_half_sends() {
    for_both_families(|bed| {
        service(bed);
        for closes in [Client, Server] {
            send(bed, OPEN);
            send(bed, &[(closes, FIN | ACK)]);
            for _ in 0..5 {
                age(bed, 100);
                let other = match closes {
                    Client => Server,
                    Server => Client,
                };
                send(bed, &[(other, ACK)]);
                assert_eq!(sweep(bed), 0);
            }
            // Nor does a connection that wants its tuple get it: the answers would be mixed up.
            let direct = bed.leaving(CLIENT, bed.remote_pod(9), tcp(PORT, BACK, SYN));
            let seen = bed.pod_sends(CLIENT, &direct);
            assert_eq!(seen.verdict, Verdict::Remote);
            assert_eq!(seen.flow_counter(outcome::FLOW_PORT_CHANGED), 1);
            assert_eq!(bed.flows().len(), 4);
            send(bed, &[(Client, FIN | ACK), (Server, FIN | ACK)]);
            age(bed, 1000);
            assert_eq!(sweep(bed), 2);
        }
    });
}

#[test]
fn a_connection_that_is_over_leaves_its_tuple_to_another() {
    for_both_families(|bed| {
        service(bed);
        for end in [
            &[(Client, FIN | ACK), (Server, FIN | ACK)][..],
            &[(Server, RST)],
        ] {
            send(bed, OPEN);
            send(bed, end);
            let direct = bed.leaving(CLIENT, bed.remote_pod(9), tcp(PORT, BACK, SYN));
            let seen = bed.pod_sends(CLIENT, &direct);
            assert_eq!(seen.verdict, Verdict::Remote);
            assert_eq!(seen.output.frame, direct.clone().forwarded().frame());
            assert_eq!(bed.flows().len(), 0);
        }
    });
}

/// Who was never answered and is idle for long has no claim on the tuple either.
#[test]
fn a_connection_without_an_answer_keeps_its_tuple_for_its_time_only() {
    for_both_families(|bed| {
        service(bed);
        let resolver = (bed.remote_pod(9), BACK);
        bed.service(1, Protocol::Udp, FRONT, &[resolver]);
        let syn: fn(u16) -> L4 = |to| tcp(PORT, to, SYN);
        let question: fn(u16) -> L4 = |to| udp(PORT, to);
        for (l4, idle, changed, flows) in [
            (syn, 119, 1, 4),
            (syn, 121, 0, 0),
            (question, 29, 1, 4),
            (question, 31, 0, 0),
        ] {
            let packet = bed.leaving(CLIENT, bed.cluster_ip(1), l4(FRONT));
            assert_eq!(bed.pod_sends(CLIENT, &packet).verdict, Verdict::Remote);
            age(bed, idle);
            let direct = bed.leaving(CLIENT, bed.remote_pod(9), l4(BACK));
            let seen = bed.pod_sends(CLIENT, &direct);
            assert_eq!(seen.flow_counter(outcome::FLOW_PORT_CHANGED), changed);
            assert_eq!(bed.flows().len(), flows, "idle for {idle} s");
            age(bed, 1000);
            sweep(bed);
        }
    });
}

/// Flags of both directions of the connection that `is_it` knows by its forward key and entry.
fn flags_of(bed: &Bed, is_it: fn(u16) -> bool) -> [u8; 2] {
    let flows = bed.flows();
    let (key, forward) = flows
        .iter()
        .find(|(key, entry)| entry.flags & flag::REPLY == 0 && is_it(key.destination_port.get()))
        .expect("a connection");
    let partner = forward.partner_key(key.protocol);
    let reply = flows.iter().find(|(key, _)| *key == partner);
    [forward.tcp_flags, reply.expect("its reply").1.tcp_flags]
}

#[test]
fn a_syn_in_time_wait_begins_a_connection_without_a_past() {
    for_both_families(|bed| {
        service(bed);
        let ends: [Steps; 3] = [
            &[(Client, FIN | ACK), (Server, FIN | ACK), (Client, ACK)],
            &[(Server, RST)],
            &[(Server, FIN | ACK)],
        ];
        for end in ends {
            send(bed, OPEN);
            send(bed, end);
            send(bed, &[(Client, SYN)]);
            assert_eq!(flags_of(bed, |port| port == FRONT), [SYN, 0]);
            send(bed, &[(Server, SYN | ACK), (Client, ACK)]);
            assert_eq!(flags_of(bed, |port| port == FRONT), [SYN | ACK, SYN | ACK]);
            age(bed, 80_000);
            assert_eq!(sweep(bed), 0, "established, not closed");
        }
    });
}

/// The same for a connection that is known for its changed port only, and has no Service.
#[test]
fn a_port_that_was_changed_is_used_again_without_a_past() {
    for_both_families(|bed| {
        service(bed);
        send(bed, OPEN);
        let sends = |bed: &mut Bed, flags: u8| {
            let packet = bed.leaving(CLIENT, bed.remote_pod(9), tcp(PORT, BACK, flags));
            assert_eq!(bed.pod_sends(CLIENT, &packet).verdict, Verdict::Remote);
        };
        for flags in [SYN, ACK, FIN | ACK, ACK] {
            sends(bed, flags);
        }
        let is_direct = |port| port == BACK;
        assert_eq!(flags_of(bed, is_direct), [SYN | ACK | FIN, 0]);
        sends(bed, SYN);
        assert_eq!(flags_of(bed, is_direct), [SYN, 0]);
        assert_eq!(bed.flows().len(), 4, "nothing is left of its former life");
    });
}
