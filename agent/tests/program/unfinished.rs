//! Answers to packets whose checksum the sender has left to the device, as it is with virtual
//! machines and namespaces of the same host. The answer is made of such a packet, and must not be
//! taken for one. `BPF_PROG_TEST_RUN` has no such packets: a neighbour sends them here.

use std::{
    fs::File,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
    sys::{
        socket::{
            AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, recv,
            setsockopt, socket, sockopt,
        },
        time::TimeVal,
    },
};

use weir_agent::node::devices::SourceAddresses;

use crate::{
    bed::{Bed, CLIENT, ETH0, OTHER, POD_MTU, SERVER, for_both_families, hex, tool},
    packet::sum,
};

/// Of the cable between node and neighbour: it takes what is too big for pods.
const MTU: u32 = 9000;

#[test]
fn answers_have_checksums_of_their_own() {
    for_both_families(|bed| {
        let wire = become_neighbour(bed);
        let (unreachable, exceeded) = if bed.is_v4() { (3, 11) } else { (2, 3) };

        opens_connection(bed.pod(CLIENT), 1);
        expect_error(bed, &wire, exceeded);
        sends(bed.pod(SERVER), POD_MTU as usize + 100, 0);
        expect_error(bed, &wire, unreachable);
        // Cut by the device, into pieces that are too big.
        sends(bed.pod(OTHER), 2 * POD_MTU as usize + 200, POD_MTU + 100);
        expect_error(bed, &wire, unreachable);
    });
}

/// Attaches the programs to the node's device, and puts the calling thread and the other end of
/// the cable into a namespace of their own. Returns a socket that sees what is on the cable.
///
/// The neighbour's device computes no checksum, that of the node must.
fn become_neighbour(bed: &mut Bed) -> OwnedFd {
    bed.datapath
        .attach_device(ETH0, "eth0", SourceAddresses::default())
        .unwrap();
    tool(&format!("ip link set eth0 mtu {MTU} up"));
    tool("ethtool -K eth0 tx off");
    let namespace = |path: &str| File::open(path).unwrap();
    let node = namespace("/proc/thread-self/ns/net");
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let neighbour = namespace("/proc/thread-self/ns/net");
    setns(&node, CloneFlags::CLONE_NEWNET).unwrap();
    tool(&format!(
        "ip link set wire netns /proc/{}/fd/{}",
        std::process::id(),
        neighbour.as_raw_fd()
    ));
    setns(&neighbour, CloneFlags::CLONE_NEWNET).unwrap();

    let (family, bits, pods) = match bed.node() {
        IpAddr::V4(_) => ("-4", 24, "10.1.0.0/24"),
        IpAddr::V6(_) => ("-6", 64, "fd01::/64"),
    };
    let (node, own) = (bed.node(), bed.remote_node());
    tool(&format!("ip link set wire mtu {MTU} up"));
    let nodad = if bed.is_v4() { "" } else { " nodad" };
    tool(&format!(
        "ip {family} addr add {own}/{bits} dev wire{nodad}"
    ));
    let mac = crate::bed::wire_macs().destination;
    tool(&format!("ip neigh add {node} lladdr {mac} dev wire"));
    tool(&format!("ip {family} route add {pods} via {node}"));

    let wire = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )
    .unwrap();
    setsockopt(&wire, sockopt::ReceiveTimeout, &TimeVal::new(1, 0)).unwrap();
    wire
}

/// Sends a SYN.
fn opens_connection(address: IpAddr, ttl: u8) {
    let family = match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let client = socket(family, SockType::Stream, flags, None).unwrap();
    match address {
        IpAddr::V4(_) => setsockopt(&client, sockopt::Ipv4Ttl, &ttl.into()).unwrap(),
        IpAddr::V6(_) => setsockopt(&client, sockopt::Ipv6Ttl, &ttl.into()).unwrap(),
    }
    let server = SockaddrStorage::from(SocketAddr::new(address, 80));
    assert_eq!(
        connect(client.as_raw_fd(), &server),
        Err(Errno::EINPROGRESS)
    );
}

/// Sends a UDP payload, in segments if `segment` is not 0.
fn sends(address: IpAddr, length: usize, segment: u32) {
    let any: IpAddr = match address {
        IpAddr::V4(_) => [0; 4].into(),
        IpAddr::V6(_) => [0; 16].into(),
    };
    let client = UdpSocket::bind((any, 0)).unwrap();
    if segment != 0 {
        setsockopt(&client, sockopt::UdpGsoSegment, &segment.cast_signed()).unwrap();
    }
    let payload: Vec<u8> = (0..length).map(|i| i as u8).collect();
    client.send_to(&payload, (address, 53)).unwrap();
}

/// Waits for an error from the node and checks every checksum of it.
fn expect_error(bed: &Bed, wire: &OwnedFd, kind: u8) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut frame = vec![0; 1 << 16];
    while Instant::now() < deadline {
        let length = match recv(
            wire.as_raw_fd(),
            &mut frame,
            nix::sys::socket::MsgFlags::empty(),
        ) {
            Ok(length) => length,
            Err(Errno::EAGAIN) => continue,
            Err(error) => panic!("receive: {error}"),
        };
        let packet = &frame[14..length];
        let (source, icmp, pseudo) = if bed.is_v4() {
            (12..16, 20, Vec::new())
        } else {
            let length = ((packet.len() - 40) as u32).to_be_bytes();
            (
                8..24,
                40,
                [&packet[8..40], &length, &[0, 0, 0, 58]].concat(),
            )
        };
        let from_node = match bed.node() {
            IpAddr::V4(node) => packet[source] == node.octets(),
            IpAddr::V6(node) => packet[source] == node.octets(),
        };
        if !from_node || packet[icmp] != kind {
            continue;
        }
        if bed.is_v4() {
            assert_eq!(sum(&[&packet[..20]]), 0xffff, "IPv4: {}", hex(packet));
        }
        let total = sum(&[&pseudo, &packet[icmp..]]);
        assert_eq!(total, 0xffff, "ICMP {kind}: {}", hex(packet));
        return;
    }
    panic!("no ICMP of type {kind} from {}", bed.node());
}
