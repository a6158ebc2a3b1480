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

/// What pods' traffic to the outside becomes at a device of this node: a value of `DEVICE_ADDRESSES`, whose
/// key is the interface index (u32). Every device of the node has a row, but for those of pods: what would leave by a device
/// that is not known yet is dropped, lest it leaves with a pod's address.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DeviceAddresses {
    /// Bits of [`device_flag`].
    pub flags: u32,
    /// The address that it sends from where the kernel's routes do not tell one (before
    /// `BPF_FIB_LOOKUP_SRC`, kernel 6.7): its own, else one of the node's; zero if there is none.
    pub v4: Ipv4,
    /// The same for IPv6.
    pub v6: Ipv6,
}

/// Bits of [`DeviceAddresses::flags`].
pub mod device_flag {
    /// The programs are attached: what pods send to the outside by this device gets an address of the
    /// node. Without it the device is left to others, and pods keep their address there.
    pub const ATTACHED: u32 = 0x1;
    /// The device has one IPv6 address that it may send from, [`super::DeviceAddresses::v6`], and no route
    /// of the node says another: by RFC 6724 (rules 2, 3 and 5) it is the source of whatever leaves by the device. The kernel
    /// would find the same by looking at every address of every device, those of pods too.
    pub const SOLE_V6: u32 = 0x2;
}

assert_abi_size!(DeviceAddresses = 24);
map_types!(DeviceAddresses);

/// Bits of [`Config::flags`].
pub mod flag {
    /// Someone watches: send an event for every new flow too, not for drops only.
    pub const EVENT_NEW_FLOW: u32 = 0x1;
    /// What pods send to the outside over IPv4 gets an address of this node.
    pub const MASQUERADE_V4: u32 = 0x2;
    /// The same over IPv6.
    pub const MASQUERADE_V6: u32 = 0x4;
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
