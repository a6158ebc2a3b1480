//! Links, addresses, routes, neighbours and their changes, in the network namespace of the agent. Knows the
//! kernel's words only, nothing of Kubernetes or maps.

use std::net::IpAddr;

use ipnet::IpNet;

/// A network device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    /// Interface index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// MTU, bytes (layer 3).
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Ethernet address, if it has one.
    pub mac: Option<[u8; 6]>,
    /// Kind as `ip -d link` shows it (`veth`, `vlan` …), or empty for hardware.
    pub kind: String,
}

/// An address on a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Address {
    /// Interface index.
    pub ifindex: u32,
    /// The address with its prefix length (not truncated).
    pub address: IpNet,
}

/// How the kernel would send to a destination.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ResolvedRoute {
    /// Device.
    pub ifindex: u32,
    /// Gateway; `None` when the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// MTU of the route if it has one of its own.
    pub mtu: Option<u32>,
    /// The destination is an address of this node.
    pub local: bool,
}

/// What changed. Bursts are merged; a lost message of the kernel shows as `Changed`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NetlinkEvent {
    /// The device is gone.
    LinkRemoved(u32),
    /// Links, addresses or routes changed: look again.
    Changed,
}
