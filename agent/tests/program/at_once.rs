//! Two processors that handle the first packets of one connection at the same time: it has one translation, and both
//! of its halves.

use std::{
    collections::HashMap,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd},
    sync::Barrier,
    thread,
};

use weir_agent::objects::Protocol;
use weir_common::metrics::{Hook, outcome};

use crate::{
    bed::{Bed, CLIENT, ETH0, device, for_both_families, on},
    nat_ports,
    outside::{NODE_PORT, add_device, add_routes, node_port},
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

/// Two clients want the one port of the range, of a connection that is over: whoever gets it has both halves of it.
/// Who comes second may take it over again, as nobody has answered yet.
#[test]
fn a_port_that_makes_way_is_that_of_one_connection() {
    const ROUNDS: u16 = 300;
    for_both_families(|bed| {
        nat_ports::range(bed, 1);
        let program = fd(bed, Hook::FromNetdev);
        let mut lost = 0;
        for round in 0..ROUNDS {
            let frames = [0, 1].map(|client| {
                let port = 10_000 + 2 * round + client;
                bed.incoming(bed.outside(), bed.node(), tcp(port, NODE_PORT, SYN))
                    .frame()
            });
            let barrier = Barrier::new(2);
            thread::scope(|scope| {
                for frame in &frames {
                    scope.spawn(|| {
                        // SAFETY: as in `twice`.
                        let program = unsafe { BorrowedFd::borrow_raw(program) };
                        barrier.wait();
                        run::run(program, frame, on(ETH0)).unwrap();
                    });
                }
            });
            let flows: HashMap<_, _> = bed.flows().into_iter().collect();
            lost += u16::from(flows.is_empty());
            for (key, entry) in &flows {
                let partner = flows.get(&entry.partner_key(key.protocol));
                assert!(
                    partner.is_some_and(|partner| partner.has_partner(key)),
                    "round {round}: {flows:#?}"
                );
            }
            if !flows.is_empty() {
                nat_ports::answers(bed, nat_ports::FIRST, Some(RST));
            }
        }
        assert_eq!(lost, 0, "rounds in which nobody got the port");
    });
}
