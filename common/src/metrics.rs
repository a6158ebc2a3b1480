//! Packet counters: the per-CPU array `METRICS`.
//!
//! A row is [`index`] of a hook and an outcome. Outcomes below [`OUTCOMES`] that are drop reasons
//! have the reason's number; the small numbers in [`outcome`] are the ways a packet is forwarded.

use crate::{assert_abi_size, map_types};

/// A hook of the data path.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Hook {
    /// What leaves a pod.
    FromPod = 0,
    /// What the host's stack sends to a pod.
    ToPod = 1,
    /// What enters the node from a device.
    FromNetdev = 2,
    /// What leaves the node by a device.
    ToNetdev = 3,
    /// What the node itself sends to Services, and to its own addresses.
    FromHost = 4,
    /// System calls on sockets; 'packets' are calls here.
    Socket = 5,
    /// What comes back from the device behind which datagrams are put together.
    FromDefrag = 6,
}

/// Hooks, in the order of their numbers.
pub const HOOKS: [Hook; 7] = [
    Hook::FromPod,
    Hook::ToPod,
    Hook::FromNetdev,
    Hook::ToNetdev,
    Hook::FromHost,
    Hook::Socket,
    Hook::FromDefrag,
];

/// Hooks at devices: each is one program of the hook's name.
pub const DEVICE_HOOKS: [Hook; 6] = [
    Hook::FromPod,
    Hook::ToPod,
    Hook::FromNetdev,
    Hook::ToNetdev,
    Hook::FromHost,
    Hook::FromDefrag,
];

impl Hook {
    /// From the number that a global function of the kernel got; what enters no connections is [`Self::FromHost`].
    #[inline(always)]
    #[must_use]
    pub const fn of_kernel(number: u32) -> Self {
        const FROM_POD: u32 = Hook::FromPod as u32;
        const TO_POD: u32 = Hook::ToPod as u32;
        const FROM_NETDEV: u32 = Hook::FromNetdev as u32;
        match number {
            FROM_POD => Self::FromPod,
            TO_POD => Self::ToPod,
            FROM_NETDEV => Self::FromNetdev,
            _ => Self::FromHost,
        }
    }

    /// The name of the hook; at a device that of the program too.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromPod => "from_pod",
            Self::ToPod => "to_pod",
            Self::FromNetdev => "from_netdev",
            Self::ToNetdev => "to_netdev",
            Self::FromHost => "from_host",
            Self::Socket => "socket",
            Self::FromDefrag => "from_defrag",
        }
    }
}

/// Outcomes that are not drops, and counters of the flow table that belong to no packet. Their
/// numbers are below those of the drop reasons (130 and up; 1 is kept for the unknown reason).
pub mod outcome {
    /// Handed to the host's stack or to whatever program is attached next.
    pub const STACK: u8 = 2;
    /// Delivered to a pod of this node past the stack.
    pub const LOCAL: u8 = 3;
    /// Sent to another node past the stack.
    pub const REMOTE: u8 = 4;
    /// Answered in place (ARP, neighbour discovery, ICMP errors).
    pub const ANSWERED: u8 = 5;
    /// A socket's destination was translated.
    pub const TRANSLATED: u8 = 6;
    /// Fragments sent to be put together, as they came before their first; at `from_defrag` those that
    /// came back.
    pub const DEFRAG: u8 = 7;
    /// Sent to the outside by the node's routes, past the stack.
    pub const ROUTED: u8 = 8;
    /// New connections entered in the flow table.
    pub const FLOW_CREATED: u8 = 10;
    /// Connections that left their place in the table or their NAT port to others because they had been idle for their
    /// time-out.
    pub const FLOW_EXPIRED: u8 = 11;
    /// Connections that left their place or port to others before their time-out.
    pub const FLOW_EVICTED: u8 = 12;
    /// Connections whose own source port was taken and that got another.
    pub const FLOW_PORT_CHANGED: u8 = 13;
    /// Entries removed because their endpoint, backend or next hop has become another's.
    pub const FLOW_STALE: u8 = 14;
    /// Packets that were dropped, under the reason that is counted too, and refused: the sender got a
    /// TCP reset or ICMP port unreachable.
    pub const REFUSED: u8 = 15;
    /// Refusals that were not sent, to keep within the limit.
    pub const REFUSAL_LIMITED: u8 = 16;
    /// Ports of the NAT range tried for new connections, those that were free included.
    pub const NAT_PORT_TRIED: u8 = 17;
    /// Searches of the whole NAT range, where a few random tries found no free port.
    pub const NAT_PORT_SEARCH: u8 = 18;
    /// Events that found no room in the ring buffer.
    pub const EVENT_LOST: u8 = 20;

    /// All, with their names.
    pub const ALL: &[(u8, &str)] = &[
        (STACK, "STACK"),
        (LOCAL, "LOCAL"),
        (REMOTE, "REMOTE"),
        (ANSWERED, "ANSWERED"),
        (TRANSLATED, "TRANSLATED"),
        (DEFRAG, "DEFRAG"),
        (ROUTED, "ROUTED"),
        (FLOW_CREATED, "FLOW_CREATED"),
        (FLOW_EXPIRED, "FLOW_EXPIRED"),
        (FLOW_EVICTED, "FLOW_EVICTED"),
        (FLOW_PORT_CHANGED, "FLOW_PORT_CHANGED"),
        (FLOW_STALE, "FLOW_STALE"),
        (REFUSED, "REFUSED"),
        (REFUSAL_LIMITED, "REFUSAL_LIMITED"),
        (NAT_PORT_TRIED, "NAT_PORT_TRIED"),
        (NAT_PORT_SEARCH, "NAT_PORT_SEARCH"),
        (EVENT_LOST, "EVENT_LOST"),
    ];
}

/// Outcomes per hook.
pub const OUTCOMES: u32 = 256;
/// Rows of `METRICS`.
pub const ROWS: u32 = OUTCOMES * HOOKS.len() as u32;

/// The row of a hook and an outcome (one of [`outcome`] or a drop reason's number).
#[inline(always)]
#[must_use]
pub const fn index(hook: Hook, outcome: u8) -> u32 {
    hook as u32 * OUTCOMES + outcome as u32
}

/// A row of `METRICS`, on each processor.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counter {
    /// Packets (an offloaded packet counts as one), or occurrences.
    pub packets: u64,
    /// Bytes from the Ethernet header on.
    pub bytes: u64,
}

assert_abi_size!(Counter = 16);
map_types!(Counter);

/// State of the flow ring of one family: a row of `FLOW_RING_STATE` (row 0 IPv4, row 1 IPv6).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FlowRingState {
    /// Places handed out since the map was made; the next one is this modulo the ring's size.
    pub hand: u64,
}

assert_abi_size!(FlowRingState = 8);
map_types!(FlowRingState);

/// The ports of a datagram whose fragments are under way: a value of `FRAGMENTS_*`.
#[repr(C, align(2))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FragmentPorts {
    /// Source port of the first fragment.
    pub source: crate::Port,
    /// Destination port of the first fragment.
    pub destination: crate::Port,
}

/// A key of `FRAGMENTS_V4` and `FRAGMENTS_V6` (RFC 791, RFC 8200: a datagram's fragments share
/// addresses, protocol and identification).
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct FragmentKey<A> {
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Identification as it stands in the header (16 bits in IPv4, zero-extended).
    pub identification: u32,
    /// IANA protocol number.
    pub protocol: u8,
    /// One of [`crate::flow::scope`].
    pub scope: u8,
    /// Zero.
    pub reserved: u16,
}

assert_abi_size!(
    FragmentPorts = 4,
    FragmentKey<crate::Ipv4> = 16,
    FragmentKey<crate::Ipv6> = 40
);
map_types!(
    FragmentPorts,
    FragmentKey<crate::Ipv4>,
    FragmentKey<crate::Ipv6>
);
