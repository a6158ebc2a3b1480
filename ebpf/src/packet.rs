//! What the programs need to know of a packet, read once at the start.

use aya_ebpf::programs::TcContext;
use weir_common::{
    DropReason, Port,
    address::Address,
    flow::FlowKey,
    protocol::{self, tcp_flag},
};

use crate::{
    access::{self, ETHERNET},
    rewrite::Rewrite,
};

/// Place of a packet in a fragmented datagram: values of [`Packet::fragment`].
pub mod fragment {
    /// The whole datagram.
    pub const WHOLE: u8 = 0;
    /// The first fragment: it has the ports.
    pub const FIRST: u8 = 1;
    /// A later fragment: it has no layer-4 header.
    pub const LATER: u8 = 2;
}

/// What the flow table was asked about a tuple, and said: values of [`Packet::asked`].
pub mod asked {
    /// It was not asked: nobody there has an entry, as far as is known.
    pub const NOT: u8 = 0;
    /// It has none.
    pub const UNKNOWN: u8 = 1;
    /// It has one that does not hold any more.
    pub const STALE: u8 = 2;
}

/// A packet whose headers have been read and found consistent. Every bit pattern of it is valid:
/// it stands in [`crate::scratch::packet`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Packet<A> {
    /// The tuple, with the scope of the hook.
    pub key: FlowKey<A>,
    /// Offset of the layer-4 header from the start of the packet.
    pub l4_offset: u32,
    /// Bytes from the start of the network header to the end of the packet as its header says, or
    /// as they are if the header does not say (offloaded packets beyond 64 KiB).
    pub l3_length: u32,
    /// Identification of a fragmented datagram.
    pub identification: u32,
    /// One of [`fragment`].
    pub fragment: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// TCP flags.
    pub tcp_flags: u8,
    /// Bytes of the TCP header.
    pub tcp_header: u8,
    /// Type of an ICMP message.
    pub icmp_type: u8,
    /// 1: may not be fragmented (always so in IPv6).
    pub dont_fragment: u8,
    /// What the flow table has said of this tuple, one of [`asked`].
    pub asked: u8,
    /// Bytes of the jumbo payload option of an offloaded packet. Its segments have none.
    pub jumbo_option: u8,
    /// 1: it was put together with the others of its datagram and cut again.
    pub has_come_back: u8,
    /// When the connection of the stale entry began, in ticks of the flow table: by that it is recognised again.
    pub stale_created: u32,
    /// How it is translated; nothing as long as its flags are zero.
    pub rewrite: Rewrite<A>,
}

impl<A: Address> Packet<A> {
    /// Starts anew with a tuple of which the ports are not known yet.
    #[inline(always)]
    pub fn reset(&mut self, source: A, destination: A, protocol: u8, scope: u8) {
        self.key.source = source;
        self.key.destination = destination;
        self.key.source_port = Port([0; 2]);
        self.key.destination_port = Port([0; 2]);
        self.key.protocol = protocol;
        self.key.scope = scope;
        self.key.reserved = 0;
        self.identification = 0;
        self.fragment = fragment::WHOLE;
        self.tcp_flags = 0;
        self.tcp_header = 0;
        self.icmp_type = 0;
        self.dont_fragment = 1;
        self.asked = asked::NOT;
        self.jumbo_option = 0;
        self.has_come_back = 0;
        self.rewrite.flags = 0;
    }

    /// A later fragment, which has no layer-4 header.
    #[inline(always)]
    pub fn is_later_fragment(&self) -> bool {
        self.fragment == fragment::LATER
    }

    /// A TCP packet that opens a connection.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.key.protocol == protocol::TCP
            && self.tcp_flags & (tcp_flag::SYN | tcp_flag::ACK) == tcp_flag::SYN
    }

    /// Whether it can be the first of a connection of a protocol whose ports can be changed: a SYN,
    /// or any UDP packet.
    #[inline(always)]
    pub fn may_begin_flow(&self) -> bool {
        self.is_syn() || self.key.protocol == protocol::UDP
    }

    /// Largest layer-3 length that this packet will have on the wire, bytes: of one segment if
    /// the device will cut it.
    #[inline(always)]
    pub fn wire_length(&self, ctx: &TcContext) -> u32 {
        let segment = access::gso_size(ctx);
        if segment == 0 {
            return ctx.len() - ETHERNET;
        }
        let l4_header = if self.key.protocol == protocol::TCP {
            self.tcp_header as u32
        } else {
            8
        };
        (self.l4_offset - ETHERNET) - u32::from(self.jumbo_option) + l4_header + segment
    }

    /// Reads the layer-4 header. `l4_length` is what is left of the packet from there on, by the
    /// network header.
    #[inline(always)]
    pub fn read_l4(&mut self, ctx: &TcContext, l4_length: u32) -> Result<(), DropReason> {
        if self.is_later_fragment() {
            return Ok(());
        }
        match self.key.protocol {
            protocol::TCP => self.read_tcp(ctx, l4_length),
            protocol::UDP => self.read_udp(ctx, l4_length),
            protocol::ICMP | protocol::ICMPV6 => self.read_icmp(ctx, l4_length),
            protocol::SCTP => {
                if l4_length < 12 {
                    return Err(DropReason::Malformed);
                }
                self.read_ports(ctx)
            }
            _ => Ok(()),
        }
    }

    #[inline(always)]
    fn read_ports(&mut self, ctx: &TcContext) -> Result<(), DropReason> {
        // SAFETY: plain bytes.
        let ports =
            unsafe { access::at::<[Port; 2]>(ctx, self.l4_offset) }.ok_or(DropReason::Malformed)?;
        // SAFETY: checked by `at`.
        let [source, destination] = unsafe { *ports };
        self.key.source_port = source;
        self.key.destination_port = destination;
        Ok(())
    }

    #[inline(always)]
    fn read_tcp(&mut self, ctx: &TcContext, l4_length: u32) -> Result<(), DropReason> {
        // SAFETY: plain bytes.
        let header =
            unsafe { access::at::<TcpHeader>(ctx, self.l4_offset) }.ok_or(DropReason::Malformed)?;
        // SAFETY: checked by `at`.
        let header = unsafe { &*header };
        let length = (header.offset >> 4) * 4;
        if length < 20 || (length as u32) > l4_length {
            return Err(DropReason::Malformed);
        }
        self.key.source_port = header.source;
        self.key.destination_port = header.destination;
        self.tcp_flags = header.flags;
        self.tcp_header = length;
        Ok(())
    }

    #[inline(always)]
    fn read_udp(&mut self, ctx: &TcContext, l4_length: u32) -> Result<(), DropReason> {
        // SAFETY: plain bytes.
        let header =
            unsafe { access::at::<UdpHeader>(ctx, self.l4_offset) }.ok_or(DropReason::Malformed)?;
        // SAFETY: checked by `at`.
        let header = unsafe { &*header };
        let length = u16::from_be(header.length) as u32;
        // The length of a first fragment is that of the whole datagram; that of an offloaded
        // packet beyond 64 KiB is zero.
        let whole = self.fragment == fragment::WHOLE;
        let jumbo = length == 0 && access::gso_size(ctx) != 0;
        if l4_length < 8 || (!jumbo && (length < 8 || (whole && length > l4_length))) {
            return Err(DropReason::Malformed);
        }
        self.key.source_port = header.source;
        self.key.destination_port = header.destination;
        Ok(())
    }

    #[inline(always)]
    fn read_icmp(&mut self, ctx: &TcContext, l4_length: u32) -> Result<(), DropReason> {
        if l4_length < 8 {
            return Err(DropReason::Malformed);
        }
        // SAFETY: plain bytes.
        let header = unsafe { access::at::<IcmpHeader>(ctx, self.l4_offset) }
            .ok_or(DropReason::Malformed)?;
        // SAFETY: checked by `at`.
        let header = unsafe { &*header };
        self.icmp_type = header.kind;
        let v6 = self.key.protocol == protocol::ICMPV6;
        match (v6, header.kind) {
            (false, icmp_type::ECHO_REQUEST) | (true, icmp_type::V6_ECHO_REQUEST) => {
                self.key.source_port = header.identifier;
            }
            (false, icmp_type::ECHO_REPLY) | (true, icmp_type::V6_ECHO_REPLY) => {
                self.key.destination_port = header.identifier;
            }
            _ => {}
        }
        Ok(())
    }
}

/// TCP header (RFC 9293) up to the checksum.
#[repr(C)]
struct TcpHeader {
    source: Port,
    destination: Port,
    sequence: u32,
    acknowledgement: u32,
    offset: u8,
    flags: u8,
    window: u16,
    checksum: u16,
    urgent: u16,
}

/// UDP header (RFC 768).
#[repr(C)]
struct UdpHeader {
    source: Port,
    destination: Port,
    length: u16,
    checksum: u16,
}

/// ICMP and ICMPv6 header.
#[repr(C)]
struct IcmpHeader {
    kind: u8,
    code: u8,
    checksum: u16,
    identifier: Port,
    sequence: u16,
}

/// Types of ICMP messages (RFC 792, RFC 4443).
pub mod icmp_type {
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 0;
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 3;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 8;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 11;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 12;
    /// ICMPv6: destination unreachable.
    pub const V6_UNREACHABLE: u8 = 1;
    /// ICMPv6: packet too big.
    pub const V6_TOO_BIG: u8 = 2;
    /// ICMPv6: time exceeded.
    pub const V6_TIME_EXCEEDED: u8 = 3;
    /// ICMPv6: echo request.
    pub const V6_ECHO_REQUEST: u8 = 128;
    /// ICMPv6: echo reply.
    pub const V6_ECHO_REPLY: u8 = 129;
    /// ICMPv6: neighbour solicitation.
    pub const V6_NEIGHBOUR_SOLICITATION: u8 = 135;
    /// ICMPv6: neighbour advertisement.
    pub const V6_NEIGHBOUR_ADVERTISEMENT: u8 = 136;
}
