//! The range of NAT ports used up: all of it is used, nobody who is served loses a port, and those who are not
//! make way.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use weir_agent::{datapath::NodeConfig, objects::Protocol};
use weir_common::{DropReason, flow::Timeouts, metrics::outcome};

use crate::{
    bed::{Bed, Seen, Verdict, for_both_families},
    outside::{NODE_PORT, add_routes, node_port, port_of},
    packet::{ACK, RST, SYN, tcp, udp},
};

pub const FIRST: u16 = 61_000;
const COUNT: u16 = 16;
const BACK: u16 = 8080;
const EXHAUSTED: Verdict = Verdict::Dropped(DropReason::NatPortsExhausted);

fn small_range(bed: &mut Bed) {
    range(bed, COUNT);
}

/// Node ports for TCP and UDP, and a range of so many ports.
pub fn range(bed: &mut Bed, count: u16) {
    add_routes(bed);
    let config = NodeConfig {
        nat_port_first: FIRST,
        nat_port_count: count,
        ..bed.node_config()
    };
    bed.datapath.config_mut().apply(&config).unwrap();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        node_port(bed, protocol, (bed.remote_pod(9), BACK));
    }
}

/// Client `number` sends a TCP packet, or a question.
fn asks(bed: &mut Bed, number: u16, flags: Option<u8>) -> Seen {
    let port = 40_000 + number;
    let l4 = flags.map_or_else(|| udp(port, NODE_PORT), |flags| tcp(port, NODE_PORT, flags));
    let packet = bed.incoming(bed.outside(), bed.node(), l4);
    bed.wire_brings(&packet)
}

/// The endpoint sends a TCP packet, or an answer, to a port of the range.
pub fn answers(bed: &mut Bed, port: u16, flags: Option<u8>) {
    let l4 = flags.map_or_else(|| udp(BACK, port), |flags| tcp(BACK, port, flags));
    let packet = bed.incoming(bed.remote_pod(9), bed.node(), l4);
    assert_eq!(bed.wire_brings(&packet).verdict, Verdict::Routed);
}

/// All ports are taken, in the order of the clients.
fn fill(bed: &mut Bed, flags: Option<u8>) -> Vec<u16> {
    let mut ports = Vec::new();
    for number in 0..COUNT {
        let seen = asks(bed, number, flags);
        assert_eq!(seen.verdict, Verdict::Remote, "client {number}");
        ports.push(port_of(bed, &seen.output.frame, 0));
    }
    let distinct: BTreeSet<u16> = ports.iter().copied().collect();
    assert_eq!(distinct, (FIRST..FIRST + COUNT).collect());
    ports
}

/// How long a search of the whole range may be put off.
const PATIENCE: Duration = Duration::from_secs(10);

/// Client `number` gets a port, which is this.
fn takes(bed: &mut Bed, number: u16, flags: Option<u8>, port: u16) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = asks(bed, number, flags);
        if seen.verdict == Verdict::Remote {
            assert_eq!(port_of(bed, &seen.output.frame, 0), port);
            assert_eq!(seen.flow_counter(outcome::FLOW_EVICTED), 1);
            return;
        }
        assert_eq!(seen.verdict, EXHAUSTED);
        assert!(Instant::now() < deadline, "nobody makes way");
    }
}

/// Every port of a small range belongs to a connection that is served. Gives how many they are.
pub fn all_taken(bed: &mut Bed) -> usize {
    small_range(bed);
    for (number, port) in (0..).zip(fill(bed, Some(SYN))) {
        answers(bed, port, Some(SYN | ACK));
        assert_eq!(asks(bed, number, Some(ACK)).verdict, Verdict::Remote);
    }
    usize::from(COUNT)
}

/// Client `number` opens a connection for which there is no port.
pub fn asks_in_vain(bed: &mut Bed, number: u16) -> Seen {
    let seen = asks(bed, number, Some(SYN));
    assert_eq!(seen.verdict, EXHAUSTED);
    seen
}

#[test]
fn who_is_served_keeps_a_port_and_who_is_not_makes_way() {
    for_both_families(|bed| {
        small_range(bed);
        let ports = fill(bed, Some(SYN));
        for (number, port) in (0..).zip(&ports) {
            answers(bed, *port, Some(SYN | ACK));
            assert_eq!(asks(bed, number, Some(ACK)).verdict, Verdict::Remote);
        }
        for _ in 0..20 {
            let seen = asks(bed, 100, Some(SYN));
            assert_eq!(seen.verdict, EXHAUSTED);
            assert_ne!(seen.flow_counter(outcome::NAT_PORT_TRIED), 0);
        }
        assert_eq!(bed.flows().len(), 2 * usize::from(COUNT));
        // One is closed, and the next is never answered: they make way in turn, and nobody else.
        answers(bed, ports[5], Some(RST));
        takes(bed, 101, Some(SYN), ports[5]);
        takes(bed, 102, Some(SYN), ports[5]);
        for number in (0..COUNT).filter(|number| *number != 5) {
            let seen = asks(bed, number, Some(ACK));
            assert_eq!(seen.verdict, Verdict::Remote);
            assert_eq!(
                port_of(bed, &seen.output.frame, 0),
                ports[usize::from(number)]
            );
            assert_eq!(seen.flow_counter(outcome::FLOW_CREATED), 0);
        }
    });
}

#[test]
fn questions_that_were_answered_keep_their_port() {
    for_both_families(|bed| {
        small_range(bed);
        let ports = fill(bed, None);
        for (number, port) in ports.iter().enumerate() {
            if number != 3 {
                answers(bed, *port, None);
            }
        }
        takes(bed, 100, None, ports[3]);
        answers(bed, ports[3], None);
        for _ in 0..20 {
            assert_eq!(asks(bed, 101, None).verdict, EXHAUSTED);
        }
    });
}

/// Connections that are served keep their port, however full the range is, until they have been idle for longer than
/// their time-out: then the port is a new connection's, and the others go on. Before, who is idle is not asked.
#[test]
fn an_idle_connection_gives_its_port_to_a_new_one() {
    const IDLE: usize = 3;
    for_both_families(|bed| {
        small_range(bed);
        let config = NodeConfig {
            nat_port_first: FIRST,
            nat_port_count: COUNT,
            timeouts: Timeouts {
                udp: 2,
                udp_stream: 2,
                ..Timeouts::DEFAULT
            },
            ..bed.node_config()
        };
        bed.datapath.config_mut().apply(&config).unwrap();
        let ports = fill(bed, None);
        for port in &ports {
            answers(bed, *port, None);
        }
        let deadline = Instant::now() + PATIENCE;
        let mut refused = 0;
        let seen = loop {
            for (number, port) in (0..).zip(&ports) {
                if usize::from(number) == IDLE {
                    continue;
                }
                let seen = asks(bed, number, None);
                assert_eq!(seen.verdict, Verdict::Remote, "client {number}");
                assert_eq!(port_of(bed, &seen.output.frame, 0), *port);
                assert_eq!(seen.flow_counter(outcome::FLOW_CREATED), 0);
            }
            let seen = asks(bed, 100, None);
            if seen.verdict == Verdict::Remote {
                break seen;
            }
            assert_eq!(seen.verdict, EXHAUSTED);
            refused += 1;
            assert!(Instant::now() < deadline, "the idle one keeps its port");
        };
        assert_ne!(refused, 0, "it was not idle for long enough");
        assert_eq!(port_of(bed, &seen.output.frame, 0), ports[IDLE]);
        assert_eq!(seen.flow_counter(outcome::FLOW_EVICTED), 0);
        assert_eq!(bed.flows().len(), 2 * usize::from(COUNT));
        // The port is the new one's, answers and all; the old one has none any more.
        answers(bed, ports[IDLE], None);
        let seen = asks(bed, IDLE as u16, None);
        assert_eq!(seen.verdict, EXHAUSTED);
        let seen = asks(bed, 100, None);
        assert_eq!(port_of(bed, &seen.output.frame, 0), ports[IDLE]);
    });
}
