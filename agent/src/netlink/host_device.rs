//! The node's own device: a veth pair in the node's network namespace. Routes of Services lead what
//! the node's processes send to its one end, `weir-host`; at the other, `weir-net`, the data path
//! takes it over. Answers come back the same way.
//!
//! Neither end has an address or asks for neighbours, and both have one Ethernet address, so that
//! whatever is sent to one is for the other.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use weir_common::config::HOST_DEVICE_MAC;

use super::{Link, connection::Request, veth};

/// The end that the node's stack sends to and receives from.
pub const HOST_DEVICE: &str = "weir-host";
/// The end where the data path takes over.
pub const NET_DEVICE: &str = "weir-net";

/// Both ends, by interface index.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HostDevice {
    /// Of [`HOST_DEVICE`].
    pub host: u32,
    /// Of [`NET_DEVICE`].
    pub net: u32,
}

/// The pair among all links, if both ends are there and ours.
pub fn find(links: &[Link]) -> Option<HostDevice> {
    let end = |name: &str| {
        links
            .iter()
            .find(|link| {
                link.name == name && link.kind == "veth" && link.mac == Some(HOST_DEVICE_MAC.0)
            })
            .map(|link| link.ifindex)
    };
    Some(HostDevice {
        host: end(HOST_DEVICE)?,
        net: end(NET_DEVICE)?,
    })
}

/// The request that makes the pair, down. `mtu` in bytes.
pub(super) fn creation(mtu: u32) -> Request {
    veth::creation(veth::end(HOST_DEVICE, mtu), veth::end(NET_DEVICE, mtu))
}

/// Switches of both ends. Answers come from Services and from the node itself, which the stack takes
/// for forged otherwise.
const SWITCHES: [(&str, &str); 7] = [
    ("ipv4/conf/DEV/rp_filter", "0"),
    ("ipv4/conf/DEV/accept_local", "1"),
    ("ipv4/conf/DEV/forwarding", "1"),
    ("ipv6/conf/DEV/disable_ipv6", "0"),
    ("ipv6/conf/DEV/accept_ra", "0"),
    ("ipv6/conf/DEV/accept_dad", "0"),
    // No link-local address: nobody is to be found there.
    ("ipv6/conf/DEV/addr_gen_mode", "1"),
];

/// Sets the switches of both ends before they are up, in the network namespace of the calling thread.
///
/// # Errors
///
/// The first failure, with the file; a node without IPv6 is none.
pub fn set_switches() -> io::Result<()> {
    for device in [HOST_DEVICE, NET_DEVICE] {
        for (switch, value) in SWITCHES {
            let path: PathBuf = Path::new("/proc/sys/net").join(switch.replace("DEV", device));
            // Writing what is there already would be news to everybody who watches.
            if fs::read_to_string(&path).is_ok_and(|present| present.trim() == value) {
                continue;
            }
            match fs::write(&path, value) {
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound && switch.starts_with("ipv6") => {}
                outcome => outcome.map_err(|error| {
                    io::Error::new(
                        error.kind(),
                        format!("cannot write {value} to {}: {error}", path.display()),
                    )
                })?,
            }
        }
    }
    Ok(())
}
