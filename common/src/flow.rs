//! The flow table: what is known of a connection that is translated or policed.
//!
//! A connection has two entries, one for each direction, keyed by the tuple as it arrives at the
//! hook. Each is complete: a packet needs its own entry only. Either gives the key of the other
//! ([`FlowEntry::partner_key`]), so both can always be removed together.

use crate::{
    Ipv4, Ipv6, Port,
    address::Address,
    assert_abi_size, map_types,
    protocol::{self, tcp_flag},
};

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

/// How long a connection may be idle before it is forgotten, in seconds, by [`ConnectionState`] and in
/// the order of the states. The defaults are those of Linux' connection tracking
/// (`nf_conntrack_proto_tcp.c`, `…_udp.c`, `…_icmp.c`, `…_sctp.c`), but for what the states cannot
/// tell, and for established TCP, which is kept for a day instead of five (times wrap after 26 days).
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Timeouts {
    /// [`ConnectionState::TcpSynSent`].
    pub tcp_syn: u32,
    /// [`ConnectionState::TcpSynReceived`].
    pub tcp_syn_received: u32,
    /// [`ConnectionState::TcpEstablished`].
    pub tcp_established: u32,
    /// [`ConnectionState::TcpFinWait`].
    pub tcp_fin_wait: u32,
    /// [`ConnectionState::TcpTimeWait`].
    pub tcp_time_wait: u32,
    /// [`ConnectionState::TcpClosed`].
    pub tcp_closed: u32,
    /// [`ConnectionState::Unanswered`].
    pub udp: u32,
    /// [`ConnectionState::Answered`].
    pub udp_stream: u32,
    /// [`ConnectionState::IcmpEcho`].
    pub icmp: u32,
    /// [`ConnectionState::SctpOpening`].
    pub sctp: u32,
    /// [`ConnectionState::SctpEstablished`].
    pub sctp_established: u32,
}

assert_abi_size!(Timeouts = 44);
map_types!(Timeouts);

impl Timeouts {
    /// The defaults.
    pub const DEFAULT: Self = Self {
        tcp_syn: 120,
        tcp_syn_received: 60,
        tcp_established: 86_400,
        tcp_fin_wait: 120,
        tcp_time_wait: 120,
        tcp_closed: 10,
        udp: 30,
        udp_stream: 120,
        icmp: 30,
        sctp: 30,
        sctp_established: 210,
    };

    /// Seconds that a connection in this state may be idle. One read from a table: the verifier of the
    /// programs would follow a branch for each state.
    #[inline(always)]
    #[must_use]
    pub fn of(&self, state: ConnectionState) -> u32 {
        let seconds = &raw const *self;
        // SAFETY: the type is as many words as there are states, without padding, and is borrowed as
        // long as the array is.
        let seconds = unsafe { &*seconds.cast::<[u32; ConnectionState::COUNT]>() };
        seconds.get(state as usize).copied().unwrap_or(self.udp)
    }

    /// The shortest of all.
    #[must_use]
    pub fn shortest(&self) -> u32 {
        ConnectionState::ALL
            .into_iter()
            .fold(u32::MAX, |shortest, state| shortest.min(self.of(state)))
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// The state of a connection, derived from both entries. An entry holds the TCP flags that were seen
/// in its direction, not their order: states that differ only by an acknowledgement of a FIN are one.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ConnectionState {
    /// TCP, not answered yet; or answered by a SYN only (both open at once, `SYN_SENT2`).
    TcpSynSent,
    /// TCP, answered, but one side has acknowledged nothing yet.
    TcpSynReceived,
    /// TCP, acknowledged in both directions.
    TcpEstablished,
    /// TCP, one side has sent FIN: `FIN_WAIT`, and `CLOSE_WAIT` with the longer time-out of the two,
    /// as the other side may go on for long.
    TcpFinWait,
    /// TCP, both sides have sent FIN: `LAST_ACK`, and `TIME_WAIT` with the longer time-out.
    TcpTimeWait,
    /// TCP, one side has sent RST: `CLOSE`.
    TcpClosed,
    /// UDP, or a protocol without a state of its own, not answered yet.
    Unanswered,
    /// UDP, or a protocol without a state of its own, both directions seen.
    Answered,
    /// ICMP or ICMPv6 echo, answered or not.
    IcmpEcho,
    /// SCTP, not answered yet. Chunk types are not looked at.
    SctpOpening,
    /// SCTP, both directions seen; also while it is shut down.
    SctpEstablished,
}

impl ConnectionState {
    /// How many there are.
    pub const COUNT: usize = 11;
    /// Every state, in their order.
    pub const ALL: [Self; Self::COUNT] = [
        Self::TcpSynSent,
        Self::TcpSynReceived,
        Self::TcpEstablished,
        Self::TcpFinWait,
        Self::TcpTimeWait,
        Self::TcpClosed,
        Self::Unanswered,
        Self::Answered,
        Self::IcmpEcho,
        Self::SctpOpening,
        Self::SctpEstablished,
    ];

    /// The state from the protocol, the TCP flags collected in each direction, and whether a
    /// reply was seen.
    #[inline(always)]
    #[must_use]
    pub const fn new(protocol: u8, flags: u8, reply_flags: u8, replied: bool) -> Self {
        match protocol {
            protocol::TCP => Self::of_tcp(flags, reply_flags, replied),
            protocol::ICMP | protocol::ICMPV6 => Self::IcmpEcho,
            protocol::SCTP if replied => Self::SctpEstablished,
            protocol::SCTP => Self::SctpOpening,
            _ if replied => Self::Answered,
            _ => Self::Unanswered,
        }
    }

    #[inline(always)]
    const fn of_tcp(flags: u8, reply_flags: u8, replied: bool) -> Self {
        let (either, both) = (flags | reply_flags, flags & reply_flags);
        if either & tcp_flag::RST != 0 {
            Self::TcpClosed
        } else if both & tcp_flag::FIN != 0 {
            Self::TcpTimeWait
        } else if either & tcp_flag::FIN != 0 {
            Self::TcpFinWait
        } else if both & tcp_flag::ACK != 0 {
            Self::TcpEstablished
        } else if replied && either & tcp_flag::ACK != 0 {
            Self::TcpSynReceived
        } else {
            Self::TcpSynSent
        }
    }

    /// Whether nobody can go on with the connection.
    #[inline(always)]
    #[must_use]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::TcpTimeWait | Self::TcpClosed)
    }

    /// Order in which connections give way when the table is full: the lower, the earlier.
    #[inline(always)]
    #[must_use]
    pub const fn eviction_rank(self) -> u32 {
        /// Four bits for each state; a word for the reason that [`Timeouts::of`] gives.
        const RANKS: u64 = {
            let (mut ranks, mut index) = (0, 0);
            while index < ConnectionState::COUNT {
                let rank = match ConnectionState::ALL[index] {
                    ConnectionState::TcpClosed | ConnectionState::TcpTimeWait => 0,
                    ConnectionState::Unanswered
                    | ConnectionState::IcmpEcho
                    | ConnectionState::SctpOpening
                    | ConnectionState::TcpSynSent
                    | ConnectionState::TcpSynReceived => 1,
                    ConnectionState::Answered | ConnectionState::TcpFinWait => 2,
                    ConnectionState::TcpEstablished | ConnectionState::SctpEstablished => 3,
                };
                ranks |= rank << (4 * index);
                index += 1;
            }
            ranks
        };
        (RANKS >> (4 * self as u32)) as u32 & 0xf
    }
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

    /// Flags of both directions → state, and its time-out by default.
    #[test]
    fn states_follow_the_flags() {
        use ConnectionState as S;
        const NONE: u8 = 0;
        const SYN: u8 = tcp_flag::SYN;
        const ACK: u8 = tcp_flag::ACK;
        const FIN: u8 = tcp_flag::FIN;
        const RST: u8 = tcp_flag::RST;
        const OPEN: u8 = SYN | ACK;
        const TCP: u8 = protocol::TCP;
        // Name, protocol, flags of both directions, answered, state, seconds.
        type Row = (&'static str, u8, [u8; 2], bool, S, u32);
        let table: &[Row] = &[
            ("SYN", TCP, [SYN, NONE], false, S::TcpSynSent, 120),
            ("picked up", TCP, [ACK, NONE], false, S::TcpSynSent, 120),
            ("both SYN", TCP, [SYN, SYN], true, S::TcpSynSent, 120),
            (
                "SYN, SYN+ACK",
                TCP,
                [SYN, OPEN],
                true,
                S::TcpSynReceived,
                60,
            ),
            (
                "both SYN, one ACK",
                TCP,
                [OPEN, SYN],
                true,
                S::TcpSynReceived,
                60,
            ),
            (
                "handshake",
                TCP,
                [OPEN, OPEN],
                true,
                S::TcpEstablished,
                86_400,
            ),
            (
                "picked up, answered",
                TCP,
                [ACK, ACK],
                true,
                S::TcpEstablished,
                86_400,
            ),
            (
                "FIN of the client",
                TCP,
                [OPEN | FIN, OPEN],
                true,
                S::TcpFinWait,
                120,
            ),
            (
                "FIN of the server",
                TCP,
                [OPEN, OPEN | FIN],
                true,
                S::TcpFinWait,
                120,
            ),
            (
                "FIN of both",
                TCP,
                [OPEN | FIN, OPEN | FIN],
                true,
                S::TcpTimeWait,
                120,
            ),
            ("refused", TCP, [SYN, RST | ACK], true, S::TcpClosed, 10),
            (
                "RST of the client",
                TCP,
                [OPEN | RST, OPEN],
                true,
                S::TcpClosed,
                10,
            ),
            (
                "RST after FIN",
                TCP,
                [OPEN | FIN | RST, OPEN | FIN],
                true,
                S::TcpClosed,
                10,
            ),
            ("UDP", protocol::UDP, [NONE, NONE], false, S::Unanswered, 30),
            (
                "UDP answered",
                protocol::UDP,
                [NONE, NONE],
                true,
                S::Answered,
                120,
            ),
            ("echo", protocol::ICMP, [NONE, NONE], false, S::IcmpEcho, 30),
            (
                "echo answered",
                protocol::ICMP,
                [NONE, NONE],
                true,
                S::IcmpEcho,
                30,
            ),
            (
                "IPv6 echo",
                protocol::ICMPV6,
                [NONE, NONE],
                true,
                S::IcmpEcho,
                30,
            ),
            (
                "SCTP",
                protocol::SCTP,
                [NONE, NONE],
                false,
                S::SctpOpening,
                30,
            ),
            (
                "SCTP answered",
                protocol::SCTP,
                [NONE, NONE],
                true,
                S::SctpEstablished,
                210,
            ),
            ("another", 47, [NONE, NONE], false, S::Unanswered, 30),
            ("another answered", 47, [NONE, NONE], true, S::Answered, 120),
        ];
        for &(name, protocol, [flags, reply], replied, expected, seconds) in table {
            let state = S::new(protocol, flags, reply, replied);
            assert_eq!(state, expected, "{name}");
            assert_eq!(Timeouts::DEFAULT.of(state), seconds, "{name}");
        }
        for state in S::ALL {
            let in_table = table.iter().any(|row| row.4 == state);
            assert!(in_table, "{state:?}");
        }
    }

    #[test]
    fn each_state_has_its_own_time_out() {
        use ConnectionState as S;
        let timeouts = Timeouts {
            tcp_syn: 1,
            tcp_syn_received: 2,
            tcp_established: 3,
            tcp_fin_wait: 4,
            tcp_time_wait: 5,
            tcp_closed: 6,
            udp: 7,
            udp_stream: 8,
            icmp: 9,
            sctp: 10,
            sctp_established: 11,
        };
        for (state, seconds) in [
            (S::TcpSynSent, 1),
            (S::TcpSynReceived, 2),
            (S::TcpEstablished, 3),
            (S::TcpFinWait, 4),
            (S::TcpTimeWait, 5),
            (S::TcpClosed, 6),
            (S::Unanswered, 7),
            (S::Answered, 8),
            (S::IcmpEcho, 9),
            (S::SctpOpening, 10),
            (S::SctpEstablished, 11),
        ] {
            assert_eq!(timeouts.of(state), seconds, "{state:?}");
        }
        assert_eq!(timeouts.shortest(), 1);
        assert_eq!(Timeouts::DEFAULT.shortest(), 10);
    }

    #[test]
    fn what_is_over_gives_way_first_and_what_lives_last() {
        use ConnectionState as S;
        for state in S::ALL {
            assert_eq!(state.eviction_rank() == 0, state.is_over(), "{state:?}");
        }
        for (earlier, later) in [
            (S::TcpSynReceived, S::TcpFinWait),
            (S::Unanswered, S::Answered),
            (S::IcmpEcho, S::Answered),
            (S::SctpOpening, S::SctpEstablished),
            (S::Answered, S::TcpEstablished),
            (S::TcpFinWait, S::TcpEstablished),
        ] {
            assert!(
                earlier.eviction_rank() < later.eviction_rank(),
                "{earlier:?} before {later:?}"
            );
        }
    }
}
