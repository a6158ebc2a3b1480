//! The device behind which the kernel puts datagrams together: one end of a veth pair, `weir-defrag`,
//! in the node's network namespace, the other in a namespace of its own that has nothing else. There
//! everything is routed back to where it came from, and is put together and cut again on the way.
//!
//! Nobody has that namespace open: it lives as long as the links attached in it are pinned, and with it
//! goes the device.

use std::{
    fs::{self, File},
    io,
    net::IpAddr,
    os::fd::AsRawFd as _,
    path::Path,
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::LinkAttribute,
    route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType},
};
use nix::sched::{CloneFlags, unshare};
use weir_common::config::{GATEWAY_V4, GATEWAY_V6, HOST_DEVICE_MAC};

use super::{
    Change, Link, NetlinkError, ROUTE_PROTOCOL,
    connection::{Connection, Request},
    convert, veth,
};

/// Name of both ends.
pub const DEFRAG_DEVICE: &str = "weir-defrag";
/// The largest that a veth takes: what is cut again is cut as it was.
const MTU: u32 = 65535;
/// Interface index of the loopback device, in every network namespace.
const LOOPBACK: u32 = 1;
/// How long a datagram waits for its missing fragments, seconds. They come after milliseconds or not
/// at all; a flood of single fragments holds the memory no longer than this.
const SECONDS: &str = "2";
/// Bytes of fragments that may wait, of one family, and those that are left when there were more.
const MEMORY: [&str; 2] = ["4194304", "3145728"];

/// Switches of the namespace, below `/proc/sys/net`, before its device is up.
const NAMESPACE: [(&str, &str); 18] = [
    ("ipv4/conf/all/forwarding", "1"),
    ("ipv4/conf/default/forwarding", "1"),
    ("ipv4/conf/DEV/forwarding", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/DEV/rp_filter", "0"),
    // What came from there goes back there, which is no mistake.
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/DEV/send_redirects", "0"),
    ("ipv4/ipfrag_high_thresh", MEMORY[0]),
    ("ipv4/ipfrag_low_thresh", MEMORY[1]),
    ("ipv4/ipfrag_time", SECONDS),
    // However many others of the same sender come between two fragments of a datagram.
    ("ipv4/ipfrag_max_dist", "0"),
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/DEV/disable_ipv6", "0"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv6/conf/DEV/accept_dad", "0"),
    ("ipv6/conf/DEV/accept_ra", "0"),
    // No link-local address: nobody is to be found there.
    ("ipv6/conf/DEV/addr_gen_mode", "1"),
];
/// Those that are there only once something in the namespace puts IPv6 together.
const NAMESPACE_V6: [(&str, &str); 3] = [
    ("netfilter/nf_conntrack_frag6_high_thresh", MEMORY[0]),
    ("netfilter/nf_conntrack_frag6_low_thresh", MEMORY[1]),
    ("netfilter/nf_conntrack_frag6_timeout", SECONDS),
];
/// Switches of the node's end: what comes back is the program's, and never the stack's.
const NODE: [(&str, &str); 2] = [
    ("ipv4/conf/DEV/forwarding", "0"),
    ("ipv6/conf/DEV/disable_ipv6", "1"),
];

/// Interface index of the node's end among all links, if it is there and ours.
pub fn find(links: &[Link]) -> Option<u32> {
    links
        .iter()
        .find(|link| {
            link.name == DEFRAG_DEVICE && link.kind == "veth" && link.mac == Some(HOST_DEVICE_MAC.0)
        })
        .map(|link| link.ifindex)
}

/// Makes the namespace and the pair, with the node's end, down, in the namespace of the calling
/// thread. `attach` is called inside, and must leave behind what keeps the namespace alive.
///
/// # Errors
///
/// The first failure, `attach`'s too; nothing is left behind then.
pub(super) fn make(attach: impl FnOnce() -> io::Result<()> + Send) -> Result<(), NetlinkError> {
    let node = File::open("/proc/thread-self/ns/net")?;
    // A thread that has left its namespace is of no use to anybody else.
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
                furnish(&node, attach)
            })
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("its thread panicked").into()))
    })
}

fn furnish(node: &File, attach: impl FnOnce() -> io::Result<()>) -> Result<(), NetlinkError> {
    let mut connection = Connection::open()?;
    run(&mut connection, vec![creation(node), up(LOOPBACK)])?;
    let device = nix::net::if_::if_nametoindex(DEFRAG_DEVICE).map_err(io::Error::from)?;
    set(&NAMESPACE)?;
    run(
        &mut connection,
        vec![up(device), way_back(device, GATEWAY_V4.0.into())],
    )?;
    if Path::new("/proc/sys/net/ipv6").exists() {
        run(&mut connection, vec![way_back(device, GATEWAY_V6.0.into())])?;
    }
    attach()?;
    set(&NAMESPACE_V6)?;
    Ok(())
}

fn run(connection: &mut Connection, requests: Vec<Request>) -> Result<(), NetlinkError> {
    match connection
        .exchange(requests)?
        .into_iter()
        .find_map(Result::err)
    {
        Some(refusal) => Err(NetlinkError::DefragDevice(refusal.to_string())),
        None => Ok(()),
    }
}

/// The request that makes the pair, down, one end in `node`.
fn creation(node: &File) -> Request {
    let mut peer = veth::end(DEFRAG_DEVICE, MTU);
    peer.attributes
        .push(LinkAttribute::NetNsFd(node.as_raw_fd()));
    veth::creation(veth::end(DEFRAG_DEVICE, MTU), peer)
}

fn up(device: u32) -> Request {
    convert::request(&Change::SetLinkUp(device))
}

/// The default route. Its gateway is nobody: it keeps the kernel from making a neighbour for each
/// destination.
fn way_back(device: u32, gateway: IpAddr) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = match gateway {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::from(ROUTE_PROTOCOL);
    message.header.kind = RouteType::Unicast;
    message.header.flags = RouteFlags::Onlink;
    message.attributes = vec![
        RouteAttribute::Oif(device),
        RouteAttribute::Gateway(gateway.into()),
    ];
    Request {
        message: RouteNetlinkMessage::NewRoute(message),
        flags: NLM_F_CREATE | NLM_F_EXCL,
    }
}

/// Sets the switches of the node's end before it is up, in the network namespace of the calling thread.
///
/// # Errors
///
/// The first failure, with the file; a node without IPv6 is none.
pub fn set_switches() -> io::Result<()> {
    set(&NODE)
}

fn set(switches: &[(&str, &str)]) -> io::Result<()> {
    for (switch, value) in switches {
        let path = Path::new("/proc/sys/net").join(switch.replace("DEV", DEFRAG_DEVICE));
        // Writing what is there already would be news to everybody who watches.
        if fs::read_to_string(&path).is_ok_and(|present| present.trim() == *value) {
            continue;
        }
        match fs::write(&path, value) {
            Err(error)
                if error.kind() == io::ErrorKind::NotFound && !switch.starts_with("ipv4/conf") => {}
            outcome => outcome.map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("cannot write {value} to {}: {error}", path.display()),
                )
            })?,
        }
    }
    Ok(())
}
