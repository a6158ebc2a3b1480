//! What the programs need to know of the node and can change while they run: the one row of the
//! `CONFIG` array. Switches that remove code are globals set at load instead (see
//! `weir-ebpf`'s `switches`).

use crate::{
    Ipv4, Ipv6, MacAddress, address::Address, assert_abi_size, flow::Timeouts, limits, map_types,
};

/// A range of addresses that pods of this node have.
///
/// The addresses are `base` to `base + length - 1`; that of endpoint `n` is found at
/// `LOCAL_ADDRESSES_*[first_index + (address - base)] == n`.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PodRange<A> {
    /// First address, network byte order.
    pub base: A,
    /// Network mask: an address belongs to the range if `address & mask == base`.
    pub mask: A,
    /// Addresses in use of this range, at most [`limits::LOCAL_ADDRESSES_MAX`]; 0: unused row.
    pub length: u32,
    /// Row of the first address in `LOCAL_ADDRESSES_*`.
    pub first_index: u32,
}

assert_abi_size!(PodRange<Ipv4> = 16, PodRange<Ipv6> = 40);

/// The row of `CONFIG`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Config {
    /// [`crate::ABI_VERSION`] of the agent that wrote the row.
    pub abi_version: u32,
    /// Bits of [`flag`].
    pub flags: u32,
    /// Source address of hairpin traffic, IPv4.
    pub loopback_v4: Ipv4,
    /// Source address of hairpin traffic, IPv6.
    pub loopback_v6: Ipv6,
    /// Gateway of the pods, IPv4: the address for which `from_pod` answers ARP.
    pub gateway_v4: Ipv4,
    /// Gateway of the pods, IPv6: the address for which `from_pod` answers neighbour solicitations.
    pub gateway_v6: Ipv6,
    /// First source port for connections whose own port is taken, byte order of the machine.
    pub nat_port_first: u16,
    /// Number of such ports.
    pub nat_port_count: u16,
    /// Connections of one family: rows of `FLOW_RING_*`.
    pub connections: u32,
    /// Idle times of connections, seconds.
    pub timeouts: Timeouts,
    /// Address of this node from which ICMP errors are sent to the outside, IPv4; zero if it has none.
    pub node_v4: Ipv4,
    /// The same for IPv6.
    pub node_v6: Ipv6,
    /// Cookie of the node's own network namespace (`SO_NETNS_COOKIE`), 0 if unknown.
    pub netns_cookie: u64,
    /// Interface index of the node's own device, the end that its stack sends to and receives
    /// from; 0 if there is none.
    pub host_ifindex: u32,
    /// Refusals (TCP resets, ICMP port unreachable) that may be sent per second, 0 for no limit.
    pub refusals_per_second: u32,
    /// Pod ranges, IPv4.
    pub pod_ranges_v4: [PodRange<Ipv4>; limits::POD_RANGES_MAX],
    /// Pod ranges, IPv6.
    pub pod_ranges_v6: [PodRange<Ipv6>; limits::POD_RANGES_MAX],
}

assert_abi_size!(Config = 360);
map_types!(Config);

/// Bits of [`Config::flags`].
pub mod flag {
    /// Someone watches: send an event for every new flow too, not for drops only.
    pub const EVENT_NEW_FLOW: u32 = 0x1;
}

/// Default gateway of the pods, IPv4; link-local, never seen outside the veth pair.
pub const GATEWAY_V4: Ipv4 = Ipv4([169, 254, 1, 1]);
/// Default gateway of the pods, IPv6.
pub const GATEWAY_V6: Ipv6 = Ipv6([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
/// Default source address of hairpin traffic, IPv4.
pub const LOOPBACK_V4: Ipv4 = Ipv4([169, 254, 42, 1]);
/// Default source address of hairpin traffic, IPv6 (unique local, never routed).
pub const LOOPBACK_V6: Ipv6 = Ipv6([
    0xfd, 0x57, 0x65, 0x69, 0x72, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
]);
/// Default first NAT port: the top of the port range, above the range from which Linux picks source
/// ports of its own by default (32768 to 60999).
pub const NAT_PORT_FIRST: u16 = 61_000;
/// Default number of NAT ports: 61000 to 65534.
pub const NAT_PORT_COUNT: u16 = 4535;

/// Ethernet address of both ends of the node's own device (locally administered, unicast).
pub const HOST_DEVICE_MAC: MacAddress = MacAddress([0x06, 0x57, 0, 0, 0, 1]);
/// Default of [`Config::refusals_per_second`]: what Linux sends of ICMP errors
/// (`net.ipv4.icmp_msgs_per_sec`).
pub const REFUSALS_PER_SECOND: u32 = 1000;

impl<A: Address> PodRange<A> {
    /// Whether the row is used.
    #[inline(always)]
    #[must_use]
    pub const fn is_used(&self) -> bool {
        self.length != 0
    }
}
