//! The flow table when it is full: new connections go on, and the ones that matter stay.

use std::collections::{BTreeMap, BTreeSet};

use weir_agent::objects::Protocol;
use weir_common::{
    flow::{FlowKey, flag},
    metrics::{Hook, outcome},
};

use crate::{
    bed::{Bed, CLIENT, ETH0, Verdict, delivered_macs, device, on, with_beds},
    nat_ports,
    packet::{ACK, L4, RST, SYN, tcp, udp},
};

const CONNECTIONS: usize = 64;

fn with_small_tables(test: fn(&mut Bed)) {
    with_beds(|options| options.connections = CONNECTIONS as u32, test);
}

fn services(bed: &mut Bed) {
    let backend = (bed.remote_pod(9), 8080);
    bed.service(1, Protocol::Tcp, 80, &[backend]);
    bed.service(2, Protocol::Udp, 80, &[backend]);
}

fn send(bed: &mut Bed, l4: L4) {
    let index = if matches!(l4, L4::Tcp(_)) { 1 } else { 2 };
    let packet = bed.leaving(CLIENT, bed.cluster_ip(index), l4);
    let out = packet
        .clone()
        .to(bed.remote_pod(9))
        .destination_port(8080)
        .forwarded();
    let seen = bed
        .run_raw(Hook::FromPod, &packet.frame(), on(device(CLIENT)))
        .unwrap();
    assert_eq!(seen.frame, out.frame());
}

fn reply(bed: &mut Bed, l4: L4) {
    let index = if matches!(l4, L4::Tcp(_)) { 1 } else { 2 };
    let packet = bed.incoming(bed.remote_pod(9), bed.pod(CLIENT), l4);
    let out = packet
        .clone()
        .from(bed.cluster_ip(index))
        .source_port(80)
        .with_macs(delivered_macs(CLIENT))
        .forwarded();
    let seen = bed
        .run_raw(Hook::FromNetdev, &packet.frame(), on(ETH0))
        .unwrap();
    assert_eq!(seen.frame, out.frame());
}

/// Source ports of the connections in the table, by protocol. Every entry must have its partner.
fn connections(bed: &Bed) -> BTreeSet<(u8, u16)> {
    let flows = bed.flows();
    let by_key: BTreeMap<String, _> = flows
        .iter()
        .map(|(key, entry)| (format!("{key:?}"), entry))
        .collect();
    assert!(flows.len() <= 2 * CONNECTIONS, "{}", flows.len());
    let mut found = BTreeSet::new();
    for (key, entry) in &flows {
        let partner: FlowKey<_> = entry.partner_key(key.protocol);
        let other = by_key
            .get(&format!("{partner:?}"))
            .unwrap_or_else(|| panic!("an orphan: {key:?} {entry:?}"));
        assert_eq!(other.partner_key(key.protocol), *key);
        assert_eq!(other.ring, entry.ring);
        if entry.flags & flag::REPLY == 0 {
            found.insert((key.protocol, key.source_port.get()));
        }
    }
    assert_eq!(2 * found.len(), flows.len());
    found
}

#[test]
fn new_connections_go_on_and_none_is_left_in_half() {
    with_small_tables(|bed| {
        services(bed);
        let count = 10 * CONNECTIONS as u16;
        for port in 1..=count {
            match port % 3 {
                0 => {
                    send(bed, tcp(port, 80, SYN));
                    reply(bed, tcp(8080, port, SYN | ACK));
                    send(bed, tcp(port, 80, ACK));
                }
                1 => {
                    send(bed, udp(port, 80));
                    reply(bed, udp(8080, port));
                }
                _ => send(bed, udp(port, 80)),
            }
            if port % 16 == 0 {
                let wanted = CONNECTIONS.min(port.into());
                assert_eq!(connections(bed).len(), wanted);
            }
        }
        let counter = |outcome| bed.datapath.counters().outcome(outcome).unwrap().packets;
        assert_eq!(counter(outcome::FLOW_CREATED), u64::from(count));
        let gave_way = counter(outcome::FLOW_EVICTED) + counter(outcome::FLOW_EXPIRED);
        assert_eq!(gave_way, u64::from(count) - CONNECTIONS as u64);
    });
}

#[test]
fn closed_ones_give_way_first_and_answered_ones_last() {
    with_small_tables(|bed| {
        services(bed);
        let (mut closed, mut unanswered, mut established) =
            (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for port in 1..=CONNECTIONS as u16 {
            match port % 4 {
                0 => {
                    send(bed, tcp(port, 80, SYN));
                    reply(bed, tcp(8080, port, RST | ACK));
                    closed.insert((6, port));
                }
                1 => {
                    send(bed, udp(port, 80));
                    unanswered.insert((17, port));
                }
                _ => {
                    send(bed, tcp(port, 80, SYN));
                    reply(bed, tcp(8080, port, SYN | ACK));
                    send(bed, tcp(port, 80, ACK));
                    established.insert((6, port));
                }
            }
        }
        let all: BTreeSet<_> = closed
            .iter()
            .chain(&unanswered)
            .chain(&established)
            .copied()
            .collect();
        assert_eq!(connections(bed), all);

        let new: BTreeSet<_> = (1000..1000 + closed.len() as u16)
            .map(|port| (17, port))
            .collect();
        for &(_, port) in &new {
            send(bed, udp(port, 80));
        }
        let now = connections(bed);
        assert!(now.is_disjoint(&closed), "the closed ones went");
        assert!(now.is_superset(&unanswered), "the unanswered ones stayed");
        assert!(now.is_superset(&established) && now.is_superset(&new));

        for port in 2000..3000 {
            send(bed, udp(port, 80));
        }
        let now = connections(bed);
        assert!(now.is_superset(&established), "answered ones stay");
        assert!(now.is_disjoint(&unanswered) && now.is_disjoint(&new));
    });
}

#[test]
fn connections_whose_ports_changed_leave_nothing_either() {
    with_small_tables(|bed| {
        let backend = (bed.remote_pod(9), 8080);
        bed.service(1, Protocol::Udp, 80, &[backend]);
        bed.service(2, Protocol::Udp, 80, &[backend]);
        for port in 1..=5 * CONNECTIONS as u16 {
            for index in [1, 2] {
                let packet = bed.leaving(CLIENT, bed.cluster_ip(index), udp(port, 80));
                let seen = bed.pod_sends(CLIENT, &packet);
                assert_eq!(seen.verdict, Verdict::Remote, "{port}");
            }
        }
        let flows = bed.flows();
        let forward = flows
            .iter()
            .filter(|(_, entry)| entry.flags & flag::REPLY == 0)
            .count();
        assert_eq!((forward, flows.len()), (CONNECTIONS, 2 * CONNECTIONS));
        for (key, entry) in &flows {
            let partner = entry.partner_key(key.protocol);
            assert!(flows.iter().any(|(key, _)| *key == partner), "{key:?}");
        }
    });
}

/// Who is refused for want of a NAT port takes nobody's place in the table.
#[test]
fn without_a_port_nobody_gives_way() {
    with_small_tables(|bed| {
        services(bed);
        let ports = nat_ports::all_taken(bed);
        for port in 1..=(CONNECTIONS - ports) as u16 {
            send(bed, tcp(port, 80, SYN));
            reply(bed, tcp(8080, port, SYN | ACK));
            send(bed, tcp(port, 80, ACK));
        }
        let full = connections(bed);
        assert_eq!(full.len(), CONNECTIONS);
        for number in 0..40 {
            let seen = nat_ports::asks_in_vain(bed, 100 + number);
            assert_eq!(seen.flow_counter(outcome::FLOW_EVICTED), 0);
        }
        assert_eq!(connections(bed), full);
    });
}
