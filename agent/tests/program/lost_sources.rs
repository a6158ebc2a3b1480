//! An address of the node goes: connections that are translated to it end, flows of UDP go on from another one.

use std::{collections::BTreeSet, net::IpAddr, ops::Range};

use weir_agent::{
    datapath::{Hop, flows},
    objects::Protocol,
};
use weir_common::{
    config::{DeviceAddresses, device_flag},
    flow::TICKS_PER_SECOND,
    metrics::outcome,
};

use crate::{
    bed::{Bed, CLIENT, ETH0, HOP_MTU, Verdict, for_both_families, tool},
    outside::{NODE_PORT, add_device, node_port},
    packet::{ACK, Packet, SYN, tcp, udp},
};

const PORT: u16 = 40000;

fn other_address(bed: &Bed) -> IpAddr {
    let text = if bed.is_v4() {
        "192.168.7.77"
    } else {
        "fd77::77"
    };
    text.parse().unwrap()
}

/// The node's device has another address, and the programs are told of it.
fn move_to(bed: &mut Bed, address: IpAddr) {
    let (family, bits, any, nodad) = if bed.is_v4() {
        ("-4", 24, "0.0.0.0/0", "")
    } else {
        ("-6", 64, "::/0", " nodad")
    };
    let gateway = bed.remote_node();
    tool(&format!("ip {family} addr flush dev eth0 scope global"));
    tool(&format!("ip addr add {address}/{bits} dev eth0{nodad}"));
    tool(&format!(
        "ip {family} route replace {any} via {gateway} dev eth0"
    ));
    let mut row = DeviceAddresses {
        flags: device_flag::ATTACHED,
        ..DeviceAddresses::default()
    };
    match address {
        IpAddr::V4(v4) => row.v4 = v4.into(),
        IpAddr::V6(v6) => row.v6 = v6.into(),
    }
    let mut devices = bed.fs.hash::<u32, DeviceAddresses>("DEVICE_ADDRESSES");
    devices.insert(ETH0, row, 0).unwrap();
    let hop = Hop {
        ifindex: ETH0,
        gateway,
        mtu: HOP_MTU,
        source: Some(address),
    };
    let family = bed.family;
    bed.datapath
        .set_hop("node2", family, &[], Some(hop))
        .unwrap();
}

/// A walk through the tables, so many seconds from now: connections removed, and those whose address is lost.
fn sweep(bed: &mut Bed, seconds: u32) -> (u32, u32) {
    let now = flows::now().unwrap() + seconds * TICKS_PER_SECOND;
    let (mut removed, mut without_source) = (0, 0);
    loop {
        let report = bed.datapath.sweep_flows_at(now, 1).unwrap();
        removed += report.removed;
        without_source += report.without_source;
        if report.finished {
            return (removed, without_source);
        }
    }
}

fn source_of(bed: &Bed, frame: &[u8]) -> IpAddr {
    if bed.is_v4() {
        IpAddr::from(<[u8; 4]>::try_from(&frame[26..30]).unwrap())
    } else {
        IpAddr::from(<[u8; 16]>::try_from(&frame[22..38]).unwrap())
    }
}

/// What a pod sends to the outside, and what a client outside sends to an endpoint elsewhere, of UDP and of TCP.
fn packets(bed: &Bed, flags: u8) -> [(Packet, bool); 4] {
    let from_pod = |l4| (bed.leaving(CLIENT, bed.outside(), l4), true);
    let from_wire = |l4| (bed.incoming(bed.outside(), bed.node(), l4), false);
    [
        from_pod(udp(PORT, 443)),
        from_wire(udp(PORT, NODE_PORT)),
        from_pod(tcp(PORT, 443, flags)),
        from_wire(tcp(PORT, NODE_PORT, flags)),
    ]
}

const UDP: Range<usize> = 0..2;
const TCP: Range<usize> = 2..4;

/// Sends some of them; each must leave from this address, in a connection that begins or goes on.
fn send(bed: &mut Bed, which: Range<usize>, flags: u8, from: IpAddr, begins: bool) {
    for at in which {
        let (packet, is_of_pod) = packets(bed, flags)[at].clone();
        let seen = if is_of_pod {
            bed.pod_sends(CLIENT, &packet)
        } else {
            bed.wire_brings(&packet)
        };
        let way = if is_of_pod {
            Verdict::Routed
        } else {
            Verdict::Remote
        };
        assert_eq!(seen.verdict, way, "{at}");
        assert_eq!(source_of(bed, &seen.output.frame), from, "{at}");
        let created = seen.flow_counter(outcome::FLOW_CREATED);
        assert_eq!(created, u64::from(begins), "{at}");
    }
}

#[test]
fn connections_do_not_outlive_the_address_that_they_have() {
    for_both_families(|bed| {
        add_device(bed);
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            node_port(bed, protocol, (bed.remote_pod(9), 8080));
        }
        let (old, new) = (bed.node(), other_address(bed));
        bed.datapath.set_node_addresses(BTreeSet::from([old]));
        send(bed, 0..4, SYN, old, true);
        assert_eq!(bed.flows().len(), 8);
        assert_eq!(sweep(bed, 1), (0, 0));
        assert!(bed.datapath.node_sources().doubtful().is_empty());

        move_to(bed, new);
        bed.datapath.set_node_addresses(BTreeSet::from([new]));
        assert_eq!(sweep(bed, 0), (0, 0), "the kernel is asked first");
        assert_eq!(
            bed.datapath.node_sources().doubtful(),
            BTreeSet::from([old])
        );
        bed.datapath.settle_source(old, false).unwrap();
        assert_eq!(sweep(bed, 2), (0, 0), "it may come back");
        send(bed, 0..4, ACK, old, false);
        assert_eq!(sweep(bed, 4), (2, 2), "UDP, both entries of each");
        assert_eq!(bed.flows().len(), 4);
        send(bed, UDP, ACK, new, true);
        assert_eq!(sweep(bed, 5), (0, 0), "the new ones stay");
        send(bed, UDP, ACK, new, false);
        send(bed, TCP, ACK, old, false);
        assert_eq!(
            sweep(bed, 61),
            (4, 2),
            "UDP was idle, TCP has waited long enough"
        );
        assert_eq!(bed.flows().len(), 0);
    });
}
