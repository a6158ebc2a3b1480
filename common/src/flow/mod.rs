//! The flow table: what is known of a connection that is translated or policed.
//!
//! A connection has two entries, one for each direction, keyed by the tuple as it arrives at the
//! hook. Each is complete: a packet needs its own entry only. Either gives the key of the other
//! ([`FlowEntry::partner_key`]), so both can always be removed together.

mod state;

pub use state::{ConnectionState, STREAM_TICKS, Timeouts, lasted};

use crate::{Ipv4, Ipv6, Port, address::Address, assert_abi_size, map_types};

/// Where a packet is seen. Stored as a byte; part of the key, so that the same tuple at two hooks
/// makes two different entries.
pub mod scope {
    /// Leaving a pod (`from_pod`).
    pub const POD: u8 = 0;
    /// Entering the node from a device (`from_netdev`).
    pub const UNDERLAY: u8 = 1;
    /// Sent to a pod by the host's stack (`to_pod`).
    pub const HOST: u8 = 2;
    /// Entering the node from a tunnel.
    pub const OVERLAY: u8 = 3;
    /// Sent by the node itself, on its own device or on the loopback device (`from_host`).
    pub const NODE: u8 = 4;
    /// Of fragments only: back from being put together (`from_defrag`). The datagram's identification
    /// is zero there, and the 'ports' of [`crate::metrics::FragmentPorts`] are the interface index of the device that it
    /// came in by, byte order of the machine.
    pub const DEFRAG: u8 = 5;
    /// Leaving the node by one of its devices (`to_netdev`).
    pub const DEVICE: u8 = 6;
}

/// A key of `FLOWS_V4` and `FLOWS_V6`: the tuple as it arrives at the hook.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct FlowKey<A> {
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Source port, or the identifier of an ICMP echo request.
    pub source_port: Port,
    /// Destination port, or the identifier of an ICMP echo reply.
    pub destination_port: Port,
    /// IANA protocol number.
    pub protocol: u8,
    /// One of [`scope`].
    pub scope: u8,
    /// Zero.
    pub reserved: u16,
}

assert_abi_size!(FlowKey<Ipv4> = 16, FlowKey<Ipv6> = 40);
map_types!(FlowKey<Ipv4>, FlowKey<Ipv6>);

impl<A: Address> FlowKey<A> {
    /// 32 bits that tell entries apart, stored in [`FlowEntry::tag`]. Not a hash for tables: it
    /// costs a few instructions and need only differ between keys that succeed each other in a
    /// recycled element.
    #[inline(always)]
    #[must_use]
    pub fn tag(&self) -> u32 {
        let ports =
            u32::from(self.source_port.word()) << 16 | u32::from(self.destination_port.word());
        let kind = u32::from(self.protocol) << 8 | u32::from(self.scope);
        let mixed = self.source.fold() ^ self.destination.fold().rotate_left(13);
        (mixed.wrapping_mul(0x9e37_79b1) ^ ports.wrapping_mul(0x85eb_ca77)).wrapping_add(kind)
    }
}

/// Bits of [`FlowEntry::flags`].
pub mod flag {
    /// This entry is the replying direction.
    pub const REPLY: u16 = 0x0001;
    /// The source address or port is rewritten.
    pub const REWRITE_SOURCE: u16 = 0x0002;
    /// The destination address or port is rewritten.
    pub const REWRITE_DESTINATION: u16 = 0x0004;
    /// A pod that reaches itself through a Service.
    pub const HAIRPIN: u16 = 0x0008;
    /// Scope of the partner's key, three bits: `(flags & PARTNER_SCOPE_MASK) >> PARTNER_SCOPE_SHIFT`.
    pub const PARTNER_SCOPE_MASK: u16 = 0x0070;
    /// See [`PARTNER_SCOPE_MASK`].
    pub const PARTNER_SCOPE_SHIFT: u16 = 4;
    /// Only this direction passes here (direct server return); kept for later.
    pub const ONE_WAY: u16 = 0x0080;
    /// Replies go back through the tunnel they came from; kept for later.
    pub const REPLY_VIA_TUNNEL: u16 = 0x0100;
    /// The connection has an address of this node as its source, and a port out of the NAT range: a client outside whose
    /// endpoint is elsewhere, or a pod that talks to the outside. Both entries have it.
    pub const SOURCE_NAT: u16 = 0x0200;
}

/// A value of `FLOWS_V4` and `FLOWS_V6`.
///
/// A hash element may be recycled while a program reads it. `tag` is the first member and so the
/// first that a new tenant writes: a reader copies what it needs and then checks that `tag` is
/// still that of its key.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FlowEntry<A> {
    /// [`FlowKey::tag`] of this entry's key.
    pub tag: u32,
    /// [`VERSION`] of this layout.
    pub version: u8,
    /// TCP flags seen in this direction ([`tcp_flag`]), collected.
    pub tcp_flags: u8,
    /// Bits of [`flag`].
    pub flags: u16,
    /// Source address after the rewrite (the same when it is not rewritten).
    pub new_source: A,
    /// Destination address after the rewrite.
    pub new_destination: A,
    /// Source port after the rewrite.
    pub new_source_port: Port,
    /// Destination port after the rewrite.
    pub new_destination_port: Port,
    /// Difference for the IPv4 header checksum and, as part of the pseudo-header, for the
    /// layer-4 checksum: one's complement sum of new minus old addresses, 32 bits unfolded.
    pub address_difference: u32,
    /// Difference for the layer-4 checksum that the ports make.
    pub port_difference: u32,
    /// Number of the next hop, see [`crate::next_hop`].
    pub next_hop: u32,
    /// Generation of the next hop's row (of the endpoint's row, if it is an endpoint).
    pub next_hop_generation: u32,
    /// Interface index on which this direction arrives. A packet from elsewhere is not this flow.
    /// 0: any device of the node (scopes other than [`scope::POD`]).
    pub ifindex: u32,
    /// Number of the endpoint that sends in this direction, 0 if it is not on this node.
    pub source_endpoint: u32,
    /// Generation of `source_endpoint`'s row.
    pub source_generation: u32,
    /// Policy set of the sender when the flow was judged.
    pub egress_set: u32,
    /// Policy set of the receiver when the flow was judged.
    pub ingress_set: u32,
    /// Number of the backend, 0 without a Service.
    pub backend: u32,
    /// Generation of the backend's row.
    pub backend_generation: u32,
    /// Place of the connection in `FLOW_RING_*`.
    pub ring: u32,
    /// When the last packet in this direction passed, in [`ticks`](now_from_nanoseconds).
    pub last_seen: u32,
    /// When the connection began, in ticks.
    pub created: u32,
    /// Packets in this direction (segments of an offloaded packet count as one). Not atomic: two
    /// processors that carry one direction at once may lose a count.
    pub packets: u64,
    /// Bytes in this direction, from the Ethernet header on. Not atomic either.
    pub bytes: u64,
}

assert_abi_size!(FlowEntry<Ipv4> = 96, FlowEntry<Ipv6> = 120);
map_types!(FlowEntry<Ipv4>, FlowEntry<Ipv6>);

/// Version of the layout of [`FlowEntry`].
pub const VERSION: u8 = 1;

impl<A: Address> FlowEntry<A> {
    /// Scope of the partner's key.
    #[inline(always)]
    #[must_use]
    pub const fn partner_scope(&self) -> u8 {
        ((self.flags & flag::PARTNER_SCOPE_MASK) >> flag::PARTNER_SCOPE_SHIFT) as u8
    }

    /// Whether `key` is that of the entry of the other direction, apart from the protocol.
    #[inline(always)]
    #[must_use]
    pub fn has_partner(&self, key: &FlowKey<A>) -> bool {
        key.source == self.new_destination
            && key.destination == self.new_source
            && key.source_port == self.new_destination_port
            && key.destination_port == self.new_source_port
            && key.scope == self.partner_scope()
    }

    /// Key of the entry of the other direction, given the protocol of this one's key.
    #[inline(always)]
    #[must_use]
    pub fn partner_key(&self, protocol: u8) -> FlowKey<A> {
        FlowKey {
            source: self.new_destination,
            destination: self.new_source,
            source_port: self.new_destination_port,
            destination_port: self.new_source_port,
            protocol,
            scope: self.partner_scope(),
            reserved: 0,
        }
    }
}

/// Ticks per second of flow times: a tick is 2^20 nanoseconds, 1.05 ms.
pub const TICKS_PER_SECOND: u32 = 954;

/// A time of `CLOCK_MONOTONIC` in ticks. It wraps after 52 days; compare with [`age`].
#[inline(always)]
#[must_use]
pub const fn now_from_nanoseconds(nanoseconds: u64) -> u32 {
    (nanoseconds >> 20) as u32
}

/// Ticks from `then` to `now`; 0 if `then` lies in the future (clocks of two processors may be
/// read in either order). Right as long as the true distance is under 26 days.
#[inline(always)]
#[must_use]
pub const fn age(now: u32, then: u32) -> u32 {
    let distance = now.wrapping_sub(then);
    if distance > u32::MAX / 2 { 0 } else { distance }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_survives_the_wrap_and_clocks_that_disagree() {
        assert_eq!(age(5, u32::MAX), 6);
        assert_eq!(age(10, 12), 0);
        assert_eq!(age(12, 10), 2);
    }

    #[test]
    fn the_partner_of_the_partner_is_the_flow() {
        let key = FlowKey {
            source: Ipv4([10, 0, 0, 1]),
            destination: Ipv4([10, 96, 0, 1]),
            source_port: Port::new(4000),
            destination_port: Port::new(80),
            protocol: 6,
            scope: scope::POD,
            reserved: 0,
        };
        let forward = FlowEntry {
            new_source: key.source,
            new_destination: Ipv4([10, 0, 1, 7]),
            new_source_port: key.source_port,
            new_destination_port: Port::new(8080),
            flags: u16::from(scope::UNDERLAY) << flag::PARTNER_SCOPE_SHIFT,
            ..FlowEntry::default()
        };
        let reply_key = forward.partner_key(6);
        assert_eq!(reply_key.source, Ipv4([10, 0, 1, 7]));
        assert_eq!(reply_key.scope, scope::UNDERLAY);
        let reply = FlowEntry {
            new_source: key.destination,
            new_destination: key.source,
            new_source_port: key.destination_port,
            new_destination_port: key.source_port,
            flags: flag::REPLY | u16::from(scope::POD) << flag::PARTNER_SCOPE_SHIFT,
            ..FlowEntry::default()
        };
        assert_eq!(reply.partner_key(6), key);
    }
}
