//! What state a connection is in, how long it may be idle in it, and in which order connections give way.

use super::TICKS_PER_SECOND;
use crate::{
    assert_abi_size, map_types,
    protocol::{self, tcp_flag},
};

/// Ticks after which an answered flow of UDP is more than a question and its answer: two seconds, as in Linux
/// (`nf_conntrack_proto_udp.c`).
pub const STREAM_TICKS: u32 = 2 * TICKS_PER_SECOND;

/// Ticks from `created` to the last packet of a connection, given when the last of either direction was. Without a
/// branch: the verifier of the programs would follow each.
#[inline(always)]
#[must_use]
pub const fn lasted(created: u32, last_seen: u32, partner_seen: u32) -> u32 {
    /// The number, or 0 if it is negative.
    const fn positive(number: u32) -> u32 {
        number & !((number as i32 >> 31) as u32)
    }
    let own = positive(last_seen.wrapping_sub(created));
    let other = positive(partner_seen.wrapping_sub(created));
    own + positive(other.wrapping_sub(own))
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
        tcp_fin_wait: 3600,
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
        // SAFETY: the type is as many words as states have one, without padding, and is borrowed as
        // long as the array is.
        let seconds = unsafe { &*seconds.cast::<[u32; ConnectionState::TIMED]>() };
        seconds.get(state.timed()).copied().unwrap_or(self.udp)
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
    /// TCP, one side has sent FIN: `FIN_WAIT` and `CLOSE_WAIT`, which cannot be told apart. The default is kube-proxy's
    /// hour for `CLOSE_WAIT`, the longer of the two, as the other side may go on for long.
    TcpFinWait,
    /// TCP, both sides have sent FIN: `LAST_ACK`, and `TIME_WAIT` with the longer time-out.
    TcpTimeWait,
    /// TCP, one side has sent RST: `CLOSE`.
    TcpClosed,
    /// UDP, or a protocol without a state of its own, not answered yet.
    Unanswered,
    /// UDP, or a protocol without a state of its own, both directions seen for two seconds or more.
    Answered,
    /// ICMP or ICMPv6 echo, not answered yet.
    IcmpEcho,
    /// SCTP, not answered yet. Chunk types are not looked at.
    SctpOpening,
    /// SCTP, both directions seen; also while it is shut down.
    SctpEstablished,
    /// UDP, or a protocol without a state of its own, both directions seen, but for less than two seconds: a question and
    /// its answer. It has no time-out of its own but that of [`Self::Unanswered`], so it stands behind those that have.
    Exchanged,
    /// ICMP or ICMPv6 echo, answered. It has the time-out of [`Self::IcmpEcho`].
    IcmpAnswered,
}

impl ConnectionState {
    /// How many there are.
    pub const COUNT: usize = 13;
    /// How many have a time-out of their own: the first.
    pub const TIMED: usize = 11;
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
        Self::Exchanged,
        Self::IcmpAnswered,
    ];

    /// The state from the protocol, the TCP flags collected in each direction, whether a reply was seen, and the ticks
    /// from the connection's beginning to its last packet in either direction.
    #[inline(always)]
    #[must_use]
    pub const fn new(protocol: u8, flags: u8, reply_flags: u8, replied: bool, lasted: u32) -> Self {
        match protocol {
            protocol::TCP => Self::of_tcp(flags, reply_flags, replied),
            protocol::ICMP | protocol::ICMPV6 if replied => Self::IcmpAnswered,
            protocol::ICMP | protocol::ICMPV6 => Self::IcmpEcho,
            protocol::SCTP if replied => Self::SctpEstablished,
            protocol::SCTP => Self::SctpOpening,
            _ if replied && lasted >= STREAM_TICKS => Self::Answered,
            _ if replied => Self::Exchanged,
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

    /// Number of the state whose time-out it has.
    #[inline(always)]
    const fn timed(self) -> usize {
        /// Four bits for each state; a word for the reason that [`Timeouts::of`] gives.
        const NUMBERS: u64 = {
            let (mut numbers, mut index) = (0, 0);
            while index < ConnectionState::COUNT {
                let timed = match ConnectionState::ALL[index] {
                    ConnectionState::Exchanged => ConnectionState::Unanswered,
                    ConnectionState::IcmpAnswered => ConnectionState::IcmpEcho,
                    other => other,
                };
                numbers |= (timed as u64) << (4 * index);
                index += 1;
            }
            numbers
        };
        (NUMBERS >> (4 * self as u32)) as usize & 0xf
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
                    ConnectionState::Answered
                    | ConnectionState::Exchanged
                    | ConnectionState::IcmpAnswered
                    | ConnectionState::TcpFinWait => 2,
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
                3600,
            ),
            (
                "FIN of the server",
                TCP,
                [OPEN, OPEN | FIN],
                true,
                S::TcpFinWait,
                3600,
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
                S::IcmpAnswered,
                30,
            ),
            (
                "IPv6 echo",
                protocol::ICMPV6,
                [NONE, NONE],
                true,
                S::IcmpAnswered,
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
            let state = S::new(protocol, flags, reply, replied, STREAM_TICKS);
            assert_eq!(state, expected, "{name}");
            assert_eq!(Timeouts::DEFAULT.of(state), seconds, "{name}");
        }
        for state in S::ALL {
            let in_table = table.iter().any(|row| row.4 == state) || state == S::Exchanged;
            assert!(in_table, "{state:?}");
        }
    }

    #[test]
    fn a_short_exchange_is_no_stream() {
        use ConnectionState as S;
        for (protocol, short) in [
            (protocol::UDP, S::Exchanged),
            (47, S::Exchanged),
            (protocol::ICMP, S::IcmpAnswered),
            (protocol::SCTP, S::SctpEstablished),
            (protocol::TCP, S::TcpEstablished),
        ] {
            let ack = tcp_flag::ACK;
            let state = |lasted| S::new(protocol, ack, ack, true, lasted);
            assert_eq!(state(STREAM_TICKS - 1), short, "{protocol}");
            let long = if short == S::Exchanged {
                S::Answered
            } else {
                short
            };
            assert_eq!(state(STREAM_TICKS), long, "{protocol}");
        }
        let unanswered = S::new(protocol::UDP, 0, 0, false, u32::MAX);
        assert_eq!(unanswered, S::Unanswered);
    }

    #[test]
    fn a_connection_lasts_to_the_later_of_both_directions() {
        assert_eq!(lasted(10, 10, 10), 0);
        assert_eq!(lasted(10, 12, 15), 5);
        assert_eq!(lasted(10, 15, 12), 5);
        assert_eq!(lasted(u32::MAX, 5, 1), 6);
        // The clock of another processor is behind.
        assert_eq!(lasted(10, 9, 10), 0);
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
            (S::Exchanged, 7),
            (S::IcmpAnswered, 9),
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
            (S::Unanswered, S::Exchanged),
            (S::IcmpEcho, S::IcmpAnswered),
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
