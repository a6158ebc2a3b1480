//! Links, addresses, routes, neighbours and their changes, in the network namespace of the agent. Knows the
//! kernel's words only, nothing of Kubernetes or maps.
//!
//! [`Netlink`] asks and changes, [`Netlink::watch`] tells of changes by others, [`pod`] is the host
//! side of a pod, [`sysctl`] the switches under `/proc/sys/net`, [`sock_diag`] the TCP sockets of any
//! namespace. All of Weir's routes and neighbours carry [`ROUTE_PROTOCOL`]; whatever has another
//! number belongs to someone else and is never changed.

mod connection;
mod convert;
pub mod defrag_device;
pub mod host_device;
pub mod pod;
mod ports;
pub mod sock_diag;
mod socket;
pub mod sysctl;
mod veth;
mod watch;

use std::{collections::BTreeSet, fmt, io, net::IpAddr};

use ipnet::IpNet;

pub use self::{connection::Refusal, socket::Netlink};
use crate::objects::Family;

/// The routing protocol number (`rtm_protocol`, also `NDA_PROTOCOL`) of what Weir enters.
///
/// Numbers above 4 are for user space. In use elsewhere (linux/rtnetlink.h, iproute2's
/// `rt_protos`, the programs' sources): 8 gated, 9 router advertisements, 10 mrt, 11 zebra, 12
/// bird, 13 dnrouted, 14 xorp, 15 ntk, 16 dhcp, 17 mrouted, 18 keepalived, 42 babel, 80 Calico, 99
/// Open/R, 186 to 197 FRR's daemons, 201 OVN. To see Weir's: `ip route show proto 157`.
pub const ROUTE_PROTOCOL: u8 = 157;

/// Metric of Weir's unicast routes. Not the kernel's default (0 for IPv4, 1024 for IPv6), so that
/// a route of an administrator to the same prefix is another route and never replaced.
pub const ROUTE_METRIC: u32 = 157;
/// Metric of routes to addresses of Services.
pub const SERVICE_METRIC: u32 = 158;
/// Routing table of these routes. A rule of Weir's asks it first, for what this node's own processes
/// send: what the node only forwards is never led to its own device, and what comes from there is not
/// led back.
pub const SERVICE_TABLE: u8 = 157;
/// Priority of that rule: after the table of local addresses (0), before the main table (32766).
pub const SERVICE_RULE: u32 = 157;

/// Metric of Weir's `unreachable` routes: any other route to the same prefix is preferred. The
/// number is the one of the kernel's `Documentation/networking/vrf.rst`.
pub const UNREACHABLE_METRIC: u32 = 4_278_198_272;

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
    /// What stands before the network header of its packets.
    pub link_layer: LinkLayer,
    /// Interface index of the bridge, bond or VRF that the device belongs to (`IFLA_MASTER`).
    pub master: Option<u32>,
}

/// What stands before the network header of a device's packets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LinkLayer {
    /// An Ethernet header (`ARPHRD_ETHER`).
    Ethernet,
    /// Nothing: tunnels and point-to-point links.
    None,
    /// Another header, which the programs do not know.
    Other,
}

/// An address on a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Address {
    /// Interface index.
    pub ifindex: u32,
    /// The address with its prefix length (not truncated).
    pub address: IpNet,
    /// The kernel may choose it as the source of what goes anywhere: its scope is global, and it is
    /// neither secondary, temporary nor deprecated, and ready for use.
    pub preferred: bool,
    /// As [`Self::preferred`], but for being secondary, temporary or deprecated: a source where there is no other.
    pub second_choice: bool,
    /// Whether it may be used.
    pub readiness: Readiness,
}

/// What duplicate address detection (RFC 4862 section 5.4) says of an address; IPv4 has none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Readiness {
    /// It is this node's; also while it is detected still, if it may be used meanwhile (optimistic, RFC 4429).
    Ready,
    /// It is not known yet whether somebody else has it: the node neither sends from it nor takes packets for it.
    Tentative,
    /// Somebody else on the link has it.
    Taken,
}

/// What the routes of this node say that concerns all of its traffic.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RouteFacts {
    /// Interface indices of the devices with a default route of either family in the main table.
    pub default_devices: BTreeSet<u32>,
    /// Some IPv6 route says which address to send from.
    pub ipv6_has_sources: bool,
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
    /// The address that the kernel would send from (`RTA_PREFSRC`).
    pub source: Option<IpAddr>,
}

/// What changed. Bursts are merged; a lost message of the kernel shows as `Changed`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NetlinkEvent {
    /// The device is gone.
    LinkRemoved(u32),
    /// Links, addresses or routes changed: look again.
    Changed,
}

/// A route of Weir's own protocol in the main table.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Route {
    /// Destination, truncated to the network.
    pub destination: IpNet,
    /// Metric; destination and metric are the identity of a route.
    pub metric: u32,
    /// Where to.
    pub target: RouteTarget,
}

/// Where a route leads to.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum RouteTarget {
    /// To a neighbour on the link: a pod's device.
    Link {
        /// Interface index.
        ifindex: u32,
    },
    /// To the node's own device: an address of Services.
    Service {
        /// Interface index.
        ifindex: u32,
        /// Source address of what takes the route and has none yet, an address of the node; `None`: the
        /// kernel chooses.
        source: Option<IpAddr>,
    },
    /// Through a gateway on the link, of either family (RFC 5549).
    Via {
        /// Interface index.
        ifindex: u32,
        /// Address of the gateway.
        gateway: IpAddr,
    },
    /// Nowhere, with an ICMP error.
    Unreachable,
    /// Anything that Weir does not make: someone has tampered with the route.
    Foreign,
}

impl Route {
    /// To a pod behind a device of this node.
    pub fn to_pod(address: IpAddr, ifindex: u32) -> Self {
        Self {
            destination: address.into(),
            metric: ROUTE_METRIC,
            target: RouteTarget::Link { ifindex },
        }
    }

    /// An address of Services, to the node's own device.
    pub fn to_service(address: IpAddr, ifindex: u32, source: Option<IpAddr>) -> Self {
        Self {
            destination: address.into(),
            metric: SERVICE_METRIC,
            target: RouteTarget::Service { ifindex, source },
        }
    }

    /// Through a gateway.
    pub fn via(destination: IpNet, ifindex: u32, gateway: IpAddr) -> Self {
        Self {
            destination: destination.trunc(),
            metric: ROUTE_METRIC,
            target: RouteTarget::Via { ifindex, gateway },
        }
    }

    /// For what nothing more specific and nobody else has a route to.
    pub fn unreachable(destination: IpNet) -> Self {
        Self {
            destination: destination.trunc(),
            metric: UNREACHABLE_METRIC,
            target: RouteTarget::Unreachable,
        }
    }

    /// Whether it is one of the node manager's: pods and Services have theirs from others.
    pub fn is_to_node(&self) -> bool {
        !self.is_to_pod() && !self.is_to_service()
    }

    /// Whether it leads to an address of Services.
    pub fn is_to_service(&self) -> bool {
        self.metric == SERVICE_METRIC
    }

    /// Whether it is one that [`pod::install`] makes.
    pub fn is_to_pod(&self) -> bool {
        matches!(self.target, RouteTarget::Link { .. })
            && self.destination.prefix_len() == self.destination.max_prefix_len()
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let destination = self.destination;
        match self.target {
            RouteTarget::Link { ifindex } => write!(f, "{destination} dev #{ifindex}"),
            RouteTarget::Service { ifindex, source } => {
                write!(f, "{destination} dev #{ifindex}")?;
                source.map_or(Ok(()), |source| write!(f, " src {source}"))
            }
            RouteTarget::Via { ifindex, gateway } => {
                write!(f, "{destination} via {gateway} dev #{ifindex}")
            }
            RouteTarget::Unreachable => write!(f, "unreachable {destination}"),
            RouteTarget::Foreign => write!(f, "{destination}"),
        }
    }
}

/// A change of the kernel's configuration; applying it twice is applying it once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    /// Enter the route, or replace the one with its destination and metric.
    ReplaceRoute(Route),
    /// Remove the route of Weir's protocol with its destination and metric (and device, if the
    /// target is a link), if there is one.
    RemoveRoute(Route),
    /// Have the rule for [`SERVICE_TABLE`], of one family.
    AddServiceRule(Family),
    /// Remove that rule, if it is there.
    RemoveServiceRule(Family),
    /// Enter a permanent neighbour, or replace the neighbour of that address.
    ReplaceNeighbour {
        /// Interface index.
        ifindex: u32,
        /// Its address.
        address: IpAddr,
        /// Its Ethernet address.
        mac: [u8; 6],
    },
    /// Remove a neighbour, if it is there.
    RemoveNeighbour {
        /// Interface index.
        ifindex: u32,
        /// Its address.
        address: IpAddr,
    },
    /// Set a device up.
    SetLinkUp(u32),
    /// Set the MTU of a device.
    SetLinkMtu {
        /// Interface index.
        ifindex: u32,
        /// Bytes.
        mtu: u32,
    },
    /// Remove a device (and with a veth its peer), if it is there. Takes some 16 ms.
    RemoveLink(u32),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReplaceRoute(route) => write!(f, "enter the route {route}"),
            Self::RemoveRoute(route) => write!(f, "remove the route {route}"),
            Self::AddServiceRule(family) => {
                write!(
                    f,
                    "enter the {} rule for table {SERVICE_TABLE}",
                    family.name()
                )
            }
            Self::RemoveServiceRule(family) => {
                write!(
                    f,
                    "remove the {} rule for table {SERVICE_TABLE}",
                    family.name()
                )
            }
            Self::ReplaceNeighbour {
                ifindex, address, ..
            } => write!(f, "enter the neighbour {address} on device #{ifindex}"),
            Self::RemoveNeighbour { ifindex, address } => {
                write!(f, "remove the neighbour {address} of device #{ifindex}")
            }
            Self::SetLinkMtu { ifindex, mtu } => {
                write!(f, "set the MTU of device #{ifindex} to {mtu}")
            }
            Self::SetLinkUp(ifindex) => write!(f, "set device #{ifindex} up"),
            Self::RemoveLink(ifindex) => write!(f, "remove device #{ifindex}"),
        }
    }
}

/// Why something could not be asked or changed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The conversation itself failed.
    #[error("netlink: {0}")]
    Socket(#[from] io::Error),
    /// The kernel does not list.
    #[error("cannot list {what}: {refusal}")]
    List {
        /// Links, addresses, routes.
        what: &'static str,
        /// The kernel's answer.
        refusal: Refusal,
    },
    /// The kernel does not change.
    #[error("cannot {change}: {refusal}")]
    Change {
        /// What was wanted.
        change: Change,
        /// The kernel's answer.
        refusal: Refusal,
    },
    /// The node's own device cannot be made.
    #[error("cannot make the devices weir-host and weir-net: {0}")]
    HostDevice(String),
    /// The device behind which datagrams are put together cannot be made.
    #[error("cannot make the device weir-defrag: {0}")]
    DefragDevice(String),
    /// The kernel would not send to the address.
    #[error("no route to {destination}: {cause}")]
    NoRoute {
        /// The address.
        destination: IpAddr,
        /// The kernel's answer.
        cause: String,
    },
}

impl Link {
    /// Whether it is the host side of a pod's veth pair: its Ethernet address says so.
    pub fn is_pod_device(&self) -> bool {
        self.kind == "veth"
            && self
                .mac
                .is_some_and(|mac| mac[..2] == weir_common::endpoint::HOST_MAC_PREFIX)
    }

    /// Whether it is one of the devices that Weir makes for itself.
    pub fn is_own_device(&self) -> bool {
        let own = [
            host_device::HOST_DEVICE,
            host_device::NET_DEVICE,
            defrag_device::DEFRAG_DEVICE,
        ];
        self.kind == "veth" && own.contains(&self.name.as_str())
    }

    /// Whether it is a device by which the node talks to others: neither the loopback device, nor a
    /// pod's, nor one of Weir's own.
    pub fn is_of_node(&self) -> bool {
        self.name != "lo" && !self.is_pod_device() && !self.is_own_device()
    }
}
