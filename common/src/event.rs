//! Events that the programs send to user space through the ring buffer `EVENTS`.

use crate::{Ipv6, Port, assert_abi_size, map_types};

/// What an event tells. Stored as a byte.
pub mod kind {
    /// A packet was dropped; `reason` says why.
    pub const DROP: u8 = 1;
    /// A connection was entered in the flow table (only while someone watches).
    pub const NEW_FLOW: u8 = 2;
}

/// One event. Unknown parts are zero: a truncated packet has no ports.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Event {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// One of [`kind`].
    pub kind: u8,
    /// Number of the [`crate::DropReason`]; 0 for other kinds.
    pub reason: u8,
    /// Number of the [`crate::metrics::Hook`].
    pub hook: u8,
    /// 4, 6, or 0 if it is neither.
    pub family: u8,
    /// IANA protocol number.
    pub protocol: u8,
    /// TCP flags.
    pub tcp_flags: u8,
    /// EtherType, byte order of the machine.
    pub ether_type: u16,
    /// Interface index of the device the program ran on.
    pub ifindex: u32,
    /// Bytes of the packet from the Ethernet header on.
    pub length: u32,
    /// Source address in the shared form, as it arrived.
    pub source: Ipv6,
    /// Destination address in the shared form, as it arrived.
    pub destination: Ipv6,
    /// Source port.
    pub source_port: Port,
    /// Destination port.
    pub destination_port: Port,
    /// For a new flow: port of the backend.
    pub backend_port: Port,
    /// Zero.
    pub reserved: u16,
    /// For a new flow: address of the backend, shared form.
    pub backend_address: Ipv6,
    /// Number of the local endpoint that sent it, 0 if unknown.
    pub source_endpoint: u32,
    /// Number of the next hop it would take, 0 if undecided.
    pub next_hop: u32,
}

assert_abi_size!(Event = 88);
map_types!(Event);
