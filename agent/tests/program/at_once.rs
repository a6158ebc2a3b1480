//! Two processors that handle the first packets of one connection at the same time: it has one translation, and both
//! of its halves.

use std::{
    collections::HashMap,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use weir_agent::objects::Protocol;
use weir_common::metrics::{Hook, outcome};

use crate::{
    bed::{Bed, CLIENT, ETH0, device, for_both_families, on},
    nat_ports,
    outside::{NODE_PORT, add_device, add_routes, node_port, port_of},
    packet::{RST, SYN, tcp, udp},
    run::{self, Input},
};

/// Connections of each test. Of a hundred, some dozen meet.
const CONNECTIONS: u16 = 1000;

fn fd(bed: &mut Bed, hook: Hook) -> RawFd {
    let program = bed.datapath.program(hook).unwrap();
    program.fd().unwrap().as_fd().as_raw_fd()
}

/// Two threads run each frame through a program, as nearly at once as they can. Gives what came out for each.
fn twice(program: RawFd, frames: &[Vec<u8>], input: Input) -> [Vec<Vec<u8>>; 2] {
    let barrier = Barrier::new(2);
    let one = || {
        // SAFETY: the program stays loaded as long as the bed.
        let program = unsafe { BorrowedFd::borrow_raw(program) };
        let mut out = Vec::new();
        for frame in frames {
            barrier.wait();
            out.push(run::run(program, frame, input).unwrap().frame);
        }
        out
    };
    thread::scope(|scope| {
        let threads = [scope.spawn(one), scope.spawn(one)];
        threads.map(|thread| thread.join().unwrap())
    })
}

/// Every connection has two entries that know each other, and both threads have sent by it.
fn agree(bed: &Bed, [first, second]: [Vec<Vec<u8>>; 2]) {
    for (number, (first, second)) in first.iter().zip(&second).enumerate() {
        assert_eq!(first, second, "packet {number}");
    }
    let flows: HashMap<_, _> = bed.flows().into_iter().collect();
    assert_eq!(flows.len(), 2 * usize::from(CONNECTIONS));
    for (key, entry) in &flows {
        let partner = flows.get(&entry.partner_key(key.protocol));
        assert!(partner.is_some_and(|partner| partner.has_partner(key)));
    }
    let counter = bed.datapath.counters().outcome(outcome::FLOW_CREATED);
    assert_eq!(counter.unwrap().packets, u64::from(CONNECTIONS));
}

#[test]
fn clients_outside_keep_the_port_that_the_first_packet_got() {
    for_both_families(|bed| {
        add_routes(bed);
        node_port(bed, Protocol::Udp, (bed.remote_pod(9), 8080));
        let frames: Vec<_> = (1..=CONNECTIONS)
            .map(|port| bed.incoming(bed.outside(), bed.node(), udp(port, NODE_PORT)))
            .map(|packet| packet.frame())
            .collect();
        let seen = twice(fd(bed, Hook::FromNetdev), &frames, on(ETH0));
        agree(bed, seen);
    });
}

#[test]
fn the_first_connection_of_a_pod_is_one_too() {
    for_both_families(|bed| {
        bed.service(1, Protocol::Udp, 80, &[(bed.remote_pod(9), 8080)]);
        let frames: Vec<_> = (1..=CONNECTIONS)
            .map(|port| bed.leaving(CLIENT, bed.cluster_ip(1), udp(port, 80)))
            .map(|packet| packet.frame())
            .collect();
        let seen = twice(fd(bed, Hook::FromPod), &frames, on(device(CLIENT)));
        agree(bed, seen);
    });
}

#[test]
fn what_comes_by_the_stack_is_entered_once() {
    for_both_families(|bed| {
        add_device(bed);
        let frames: Vec<_> = (1..=CONNECTIONS)
            .map(|port| bed.host_sends(bed.outside(), CLIENT, udp(port, 53)))
            .map(|packet| packet.frame())
            .collect();
        let seen = twice(fd(bed, Hook::ToPod), &frames, on(device(CLIENT)));
        agree(bed, seen);
    });
}

/// Nobody in the whole range is served, and one connection is over: two clients want its port. One of them gets it, with
/// both halves; nobody removes what the other has just entered.
#[test]
fn a_port_that_makes_way_is_that_of_one_connection() {
    const MEETINGS: u16 = 30;
    const PATIENCE: Duration = Duration::from_mins(1);
    const COUNT: u16 = 256;
    for_both_families(|bed| {
        nat_ports::range(bed, COUNT);
        let opens = |bed: &Bed, port| {
            let packet = bed.incoming(bed.outside(), bed.node(), tcp(port, NODE_PORT, SYN));
            packet.frame()
        };
        let program = fd(bed, Hook::FromNetdev);
        let send = |frame: &[u8]| {
            // SAFETY: as in `twice`.
            let program = unsafe { BorrowedFd::borrow_raw(program) };
            run::run(program, frame, on(ETH0)).unwrap().frame
        };
        for client in 0..COUNT {
            send(&opens(bed, 40_000 + client));
        }
        let deadline = Instant::now() + PATIENCE;
        let (mut met, mut rounds) = (0, 0..14_000);
        while met < MEETINGS {
            let round = rounds.next().unwrap();
            assert!(
                Instant::now() < deadline,
                "{met} meetings in {round} rounds"
            );
            nat_ports::answers(bed, nat_ports::FIRST, Some(RST));
            let frames = [0, 1].map(|client| opens(bed, 10_000 + 2 * round + client));
            let barrier = Barrier::new(2);
            let ports = thread::scope(|scope| {
                let threads = frames.each_ref().map(|frame| {
                    scope.spawn(|| {
                        barrier.wait();
                        send(frame)
                    })
                });
                threads.map(|thread| port_of(bed, &thread.join().unwrap(), 0))
            });
            let winners = ports.iter().filter(|port| **port == nat_ports::FIRST);
            let winners = winners.count();
            // None, if there was no time to search.
            assert!(winners <= 1, "round {round}: {ports:?}");
            let range = nat_ports::FIRST..nat_ports::FIRST + COUNT;
            let served = ports.iter().filter(|port| range.contains(port)).count();
            // Who comes second, after the first is done, takes the port of another that nobody has answered.
            met += u16::from((winners, served) == (1, 1));
            let flows: HashMap<_, _> = bed.flows().into_iter().collect();
            assert_eq!(flows.len(), 2 * usize::from(COUNT));
            for (key, entry) in &flows {
                let partner = flows.get(&entry.partner_key(key.protocol));
                assert!(
                    partner.is_some_and(|partner| partner.has_partner(key)),
                    "round {round}: {key:?}"
                );
            }
        }
    });
}
