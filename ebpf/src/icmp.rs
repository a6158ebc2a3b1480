//! ICMP: the errors that the programs send themselves, and the translation of errors that come
//! from elsewhere about a packet that was translated here.
//!
//! An error is made of the packet it is about, which is emptied, filled anew and sent to where it
//! came from.

use aya_ebpf::{
    bindings::BPF_F_PSEUDO_HDR,
    helpers::{bpf_csum_diff, bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes},
    programs::TcContext,
};
use weir_common::{
    DropReason, Ipv6, Port,
    address::Address,
    checksum::{self, Summed},
    flow::FlowKey,
    lookup::Lookup,
    metrics::{Hook, outcome},
    protocol,
};

use crate::{
    access::{self, ETHERNET},
    answer,
    family::Family,
    local, maps,
    packet::{Packet, icmp_type},
    refuse, scratch, switches,
    verdict::{self, Verdict},
};

/// Bytes of the offending packet that an error quotes at most: any network header with options or
/// the usual extension headers, and a TCP header. (Linux needs the first eight bytes of layer 4.)
const QUOTE_MAX: u32 = 128;
/// Bytes that it quotes at least: IPv4 and UDP header.
const QUOTE_MIN: u32 = 28;
/// Bytes of an ICMP header.
const ICMP: u32 = 8;
/// Where in it the identifier of an echo stands.
pub const IDENTIFIER: u32 = 4;

/// An error to be sent.
#[derive(Clone, Copy)]
#[repr(C)]
struct Error {
    kind: u8,
    code: u8,
    /// The last four bytes of the header, network byte order.
    rest: u32,
}

/// Answers a packet that is larger than the way allows (RFC 1191, RFC 8201).
#[inline(always)]
pub fn answer_too_big<F: Family>(
    ctx: &TcContext,
    hook: Hook,
    packet: &Packet<F::Address>,
    mtu: u32,
) -> Result<Verdict, DropReason> {
    let (kind, code) = if F::NUMBER == 4 {
        (icmp_type::UNREACHABLE, 4)
    } else {
        (icmp_type::V6_TOO_BIG, 0)
    };
    let error = Error {
        kind,
        code,
        rest: mtu.to_be(),
    };
    answer::<F>(ctx, hook, packet, error, DropReason::TooBig)
}

/// Answers a packet whose time to live is used up.
#[inline(always)]
pub fn answer_time_exceeded<F: Family>(
    ctx: &TcContext,
    hook: Hook,
    packet: &Packet<F::Address>,
) -> Result<Verdict, DropReason> {
    let kind = if F::NUMBER == 4 {
        icmp_type::TIME_EXCEEDED
    } else {
        icmp_type::V6_TIME_EXCEEDED
    };
    answer::<F>(
        ctx,
        hook,
        packet,
        Error {
            kind,
            code: 0,
            rest: 0,
        },
        DropReason::TtlExceeded,
    )
}

/// Sends an error, or drops with `reason` what must not be answered (RFC 1122 section 3.2.2): errors, later
/// fragments, and packets without a usable source; and what exceeds the limit of errors to the outside
/// (RFC 4443 section 2.4). A pod that provokes errors gets them itself.
#[inline(always)]
fn answer<F: Family>(
    ctx: &TcContext,
    hook: Hook,
    packet: &Packet<F::Address>,
    error: Error,
    reason: DropReason,
) -> Result<Verdict, DropReason> {
    if packet.is_later_fragment() || is_error(packet) || F::is_link_local(packet.key.source) {
        return Err(reason);
    }
    if matches!(hook, Hook::FromNetdev) {
        // A way whose MTU nobody tells of is no way: a flood of something else must not use this up.
        let row = if matches!(reason, DropReason::TooBig) {
            refuse::too_big_outside(packet.key.source)
        } else {
            refuse::ERRORS_OUTSIDE
        };
        if !refuse::may_answer(row) {
            verdict::count(hook, outcome::REFUSAL_LIMITED, 0);
            return Err(reason);
        }
    }
    build_from_node::<F>(ctx, error)?;
    Ok(Verdict::answered(answer::send_back(ctx, hook)))
}

/// Turns the packet into 'port unreachable' (RFC 792, RFC 4443) to its source.
#[inline(always)]
pub fn build_port_unreachable<F: Family>(ctx: &TcContext) -> Result<(), DropReason> {
    let (kind, code) = if F::NUMBER == 4 {
        (icmp_type::UNREACHABLE, 3)
    } else {
        (icmp_type::V6_UNREACHABLE, 4)
    };
    let error = Error {
        kind,
        code,
        rest: 0,
    };
    build_from_node::<F>(ctx, error)
}

/// Turns the packet into an error from this node to its source.
#[inline(always)]
fn build_from_node<F: Family>(ctx: &TcContext, error: Error) -> Result<(), DropReason> {
    let source = F::node(local::config()?);
    match build::<F>(ctx, &source, error.kind, error.code, error.rest) {
        0 => Ok(()),
        _ => Err(DropReason::IcmpReplyFailed),
    }
}

/// Whether a packet is an ICMP error itself.
#[inline(always)]
pub fn is_error<A: Address>(packet: &Packet<A>) -> bool {
    match packet.key.protocol {
        protocol::ICMP if A::BITS == 32 => matches!(
            packet.icmp_type,
            icmp_type::UNREACHABLE | icmp_type::TIME_EXCEEDED | icmp_type::PARAMETER_PROBLEM
        ),
        protocol::ICMPV6 if A::BITS == 128 => packet.icmp_type < 128,
        _ => false,
    }
}

/// Whether a packet is an echo request, whose identifier stands for a source port.
#[inline(always)]
pub fn is_echo_request<A: Address>(packet: &Packet<A>) -> bool {
    matches!(
        (packet.key.protocol, packet.icmp_type),
        (protocol::ICMP, icmp_type::ECHO_REQUEST) | (protocol::ICMPV6, icmp_type::V6_ECHO_REQUEST)
    )
}

/// An error from its ICMP header on, and before it what else its checksum is computed over; zeros
/// add nothing.
#[repr(C, align(8))]
struct Message {
    /// IPv6 only: source, destination, length and next header (RFC 8200 section 8.1).
    pseudo_source: Ipv6,
    pseudo_destination: Ipv6,
    pseudo_length: u32,
    pseudo_next_header: u32,
    icmp: [u32; 2],
    quote: [u8; QUOTE_MAX as usize],
}

/// Turns the packet into an error from `source` to its own source. Returns 0, or what failed.
#[inline(never)]
fn build<F: Family>(ctx: &TcContext, source: &F::Address, kind: u8, code: u8, rest: u32) -> u32 {
    let source = *source;
    let Ok(destination) = ctx.load::<F::Address>((ETHERNET + F::SOURCE) as usize) else {
        return 1;
    };
    let quote = match take_quote(ctx) {
        0 => return 2,
        quote => quote,
    };
    let failed = answer::begin::<F>(ctx, &source, &destination, F::ICMP, ICMP + quote);
    if failed != 0 {
        return failed;
    }
    // The checksum of ICMP covers no addresses (RFC 792), that of ICMPv6 does (RFC 4443).
    let pseudo = (F::NUMBER == 6).then(|| (source.to_shared(), destination.to_shared()));
    finish(ctx, F::HEADER, quote, [kind, code], rest, pseudo)
}

/// Copies what is quoted into the scratch room. Returns its bytes, 0 on failure.
#[inline(always)]
fn take_quote(ctx: &TcContext) -> u32 {
    let available = ctx.len() - ETHERNET;
    if available < QUOTE_MIN {
        return 0;
    }
    let quote = if available > QUOTE_MAX {
        QUOTE_MAX
    } else {
        available & !3
    };
    // Of a sum, the verifier of 6.1 knows the lower bound in a half register too; of a comparison
    // it forgets it there.
    let quote = QUOTE_MIN + (access::forget_bounds(quote - QUOTE_MIN) & 0x7f);
    // SAFETY: plain bytes; nothing that stands there is needed any more.
    let Ok(message) = (unsafe { scratch::room::<Message>() }) else {
        return 0;
    };
    message.quote = [0; QUOTE_MAX as usize];
    // SAFETY: there is room for the largest length.
    let loaded = unsafe {
        bpf_skb_load_bytes(
            ctx.skb.skb.cast(),
            ETHERNET,
            message.quote.as_mut_ptr().cast(),
            quote,
        )
    };
    if loaded == 0 { quote } else { 0 }
}

/// Writes all from the ICMP header on, with its checksum. Returns 0, or what failed.
#[inline(always)]
fn finish(
    ctx: &TcContext,
    header: u32,
    quote: u32,
    kind_and_code: [u8; 2],
    rest: u32,
    pseudo: Option<(Ipv6, Ipv6)>,
) -> u32 {
    // SAFETY: plain bytes, filled by `take_quote`.
    let Ok(message) = (unsafe { scratch::room::<Message>() }) else {
        return 5;
    };
    let [kind, code] = kind_and_code;
    let length = access::forget_bounds(ICMP + quote);
    message.icmp = [u32::from_ne_bytes([kind, code, 0, 0]), rest];
    message.pseudo_source = Ipv6::default();
    message.pseudo_destination = Ipv6::default();
    message.pseudo_length = 0;
    message.pseudo_next_header = 0;
    if let Some((source, destination)) = pseudo {
        message.pseudo_source = source;
        message.pseudo_destination = destination;
        message.pseudo_length = length.to_be();
        message.pseudo_next_header = u32::from(protocol::ICMPV6).to_be();
    }
    // SAFETY: the whole structure is initialised; its size is a multiple of four.
    let total = unsafe {
        bpf_csum_diff(
            core::ptr::null_mut(),
            0,
            (&raw mut *message).cast(),
            size_of::<Message>() as u32,
            0,
        )
    };
    let checksum = !checksum::fold16(total as u64 & 0xffff_ffff);
    message.icmp[0] |= u32::from(checksum) << 16;
    if !(ICMP..=ICMP + QUOTE_MAX).contains(&length) {
        return 7;
    }
    // SAFETY: `icmp` and the quote behind it have room for the largest length.
    unsafe {
        bpf_skb_store_bytes(
            ctx.skb.skb,
            ETHERNET + header,
            (&raw const message.icmp).cast(),
            length,
            0,
        ) as u32
    }
}

/// Translates an ICMP error about a packet that was translated here, and gives the number of the
/// next hop of the connection's other direction: the error goes where that goes. `None`: it is about
/// no connection known here.
///
/// The quoted packet went the other way: turned round, its tuple is that of a packet arriving at
/// this hook, whose entry says how to put it back.
#[inline(always)]
pub fn translate_error<F: Family>(
    ctx: &TcContext,
    packet: &mut Packet<F::Address>,
) -> Result<Option<u32>, DropReason> {
    let next_hop = find_quoted::<F>(ctx, packet);
    if next_hop == 0 {
        return Ok(None);
    }
    if put_back_quoted::<F>(ctx, packet) != 0 || put_back_outer::<F>(ctx, packet) != 0 {
        return Err(DropReason::ChecksumUpdate);
    }
    // As it is now, for whoever looks for its way.
    if let Some(work) = work::<F>() {
        packet.key.source = work.outer_source;
        packet.key.destination = work.source;
    }
    Ok(Some(next_hop))
}

/// What an error quotes and what becomes of it; kept in the scratch room: two IPv6 tuples are too
/// much for the stack.
#[repr(C, align(8))]
struct Work<A> {
    /// The quoted tuple turned round: that of a packet that arrives here.
    quoted: FlowKey<A>,
    /// The quoted tuple as its sender knows it.
    source: A,
    destination: A,
    source_port: Port,
    destination_port: Port,
    /// Source of the error itself after translation.
    outer_source: A,
    l3_offset: u32,
    l4_offset: u32,
}

#[inline(always)]
fn work<F: Family>() -> Option<&'static mut Work<F::Address>> {
    // SAFETY: plain words; the functions below take it in turn.
    unsafe { scratch::room::<Work<F::Address>>() }.ok()
}

/// Finds the connection that an error is about. Returns the number of the next hop, or 0. (This
/// function and the next two are not inlined for the sake of the stack.)
#[inline(never)]
fn find_quoted<F: Family>(ctx: &TcContext, packet: &Packet<F::Address>) -> u32 {
    let Some(work) = work::<F>() else { return 0 };
    if read_quoted::<F>(ctx, packet, work).is_none() {
        return 0;
    }
    maps::count_lookup(Lookup::Flow);
    let Some(entry) = F::flows().get_ptr(&work.quoted) else {
        return 0;
    };
    // SAFETY: the element stays allocated; should it be recycled meanwhile, the tag tells.
    let (next_hop, ifindex, tag) = unsafe {
        work.source = (*entry).new_destination;
        work.destination = (*entry).new_source;
        work.source_port = (*entry).new_destination_port;
        work.destination_port = (*entry).new_source_port;
        (
            (*entry).next_hop,
            (*entry).ifindex,
            access::read_last(&raw const (*entry).tag),
        )
    };
    // A pod tells of its own connections only.
    if tag != work.quoted.tag() || (ifindex != 0 && ifindex != access::ifindex(ctx)) {
        return 0;
    }
    // Sent by the endpoint itself, it comes from the Service; a router stays what it is.
    work.outer_source = if packet.key.source == work.quoted.source {
        work.destination
    } else {
        packet.key.source
    };
    next_hop
}

/// Puts the quoted headers back. Returns 0, or what failed.
#[inline(never)]
fn put_back_quoted<F: Family>(ctx: &TcContext, packet: &Packet<F::Address>) -> u32 {
    let Some(work) = work::<F>() else { return 1 };
    if write_quoted::<F>(ctx, work).is_none() {
        return 2;
    }
    let ports = checksum::add(
        checksum::difference(work.quoted.destination_port, work.source_port),
        checksum::difference(work.quoted.source_port, work.destination_port),
    );
    // A quoted IPv4 header has a checksum of its own that makes up for its addresses.
    let body = if F::NUMBER == 4 {
        ports
    } else {
        checksum::add(ports, quoted_difference(work))
    };
    // SAFETY: the context is valid; the helper checks the offset.
    unsafe { bpf_l4_csum_replace(ctx.skb.skb, packet.l4_offset + 2, 0, u64::from(body), 0) as u32 }
}

#[inline(always)]
fn quoted_difference<A: Address + Summed>(work: &Work<A>) -> u32 {
    checksum::add(
        checksum::difference(work.quoted.destination, work.source),
        checksum::difference(work.quoted.source, work.destination),
    )
}

/// Addresses the error itself to the quoted packet's sender. Returns 0, or what failed.
#[inline(never)]
fn put_back_outer<F: Family>(ctx: &TcContext, packet: &Packet<F::Address>) -> u32 {
    let Some(work) = work::<F>() else { return 1 };
    let difference = checksum::add(
        checksum::difference(packet.key.source, work.outer_source),
        checksum::difference(packet.key.destination, work.source),
    );
    if F::write_addresses(ctx, work.outer_source, work.source, difference).is_err() {
        return 2;
    }
    if F::NUMBER == 4 {
        return 0;
    }
    let flags = u64::from(BPF_F_PSEUDO_HDR) | switches::csum_ipv6_flag();
    let place = packet.l4_offset + 2;
    // SAFETY: the context is valid; the helper checks the offset.
    unsafe { bpf_l4_csum_replace(ctx.skb.skb, place, 0, u64::from(difference), flags) as u32 }
}

/// Reads the tuple that an error quotes, turned round. Options and extension headers in the
/// quoted packet are not followed: connections that are translated here have none.
#[inline(always)]
fn read_quoted<F: Family>(
    ctx: &TcContext,
    packet: &Packet<F::Address>,
    work: &mut Work<F::Address>,
) -> Option<()> {
    let l3_offset = packet.l4_offset + ICMP;
    let (header, addresses, protocol_at) = if F::NUMBER == 4 {
        (20, 12, 9)
    } else {
        (40, 8, 6)
    };
    let l4_offset = l3_offset + header;
    // What stands behind the end of the error is no quote.
    if l4_offset + 8 > ETHERNET + packet.l3_length || !access::make_readable(ctx, l4_offset + 8) {
        return None;
    }
    work.l3_offset = l3_offset;
    work.l4_offset = l4_offset;
    // SAFETY: plain bytes, checked by `at`.
    unsafe {
        let version = *access::at::<u8>(ctx, l3_offset)?;
        let expected = if F::NUMBER == 4 {
            version == 0x45
        } else {
            version >> 4 == 6
        };
        let protocol = *access::at::<u8>(ctx, l3_offset + protocol_at)?;
        let is_echo = protocol == F::ICMP;
        let has_ports = matches!(protocol, protocol::TCP | protocol::UDP | protocol::SCTP);
        if !expected || !(has_ports || is_echo) {
            return None;
        }
        let pair = access::at::<[F::Address; 2]>(ctx, l3_offset + addresses)?;
        work.quoted.source = (*pair)[1];
        work.quoted.destination = (*pair)[0];
        if is_echo {
            // Only requests: nobody answers a reply, and what it is about is told by its request.
            if *access::at::<u8>(ctx, l4_offset)? != F::ECHO_REQUEST {
                return None;
            }
            work.quoted.source_port = Port([0; 2]);
            work.quoted.destination_port = *access::at::<Port>(ctx, l4_offset + IDENTIFIER)?;
        } else {
            let ports = access::at::<[Port; 2]>(ctx, l4_offset)?;
            work.quoted.source_port = (*ports)[1];
            work.quoted.destination_port = (*ports)[0];
        }
        work.quoted.protocol = protocol;
        work.quoted.scope = packet.key.scope;
        work.quoted.reserved = 0;
    }
    Some(())
}

/// Writes the quoted tuple.
#[inline(always)]
fn write_quoted<F: Family>(ctx: &TcContext, work: &Work<F::Address>) -> Option<()> {
    let addresses = if F::NUMBER == 4 { 12 } else { 8 };
    // SAFETY: plain bytes, checked by `at`.
    unsafe {
        *access::at::<[F::Address; 2]>(ctx, work.l3_offset + addresses)? =
            [work.source, work.destination];
        if work.quoted.protocol == F::ICMP {
            *access::at::<Port>(ctx, work.l4_offset + IDENTIFIER)? = work.source_port;
        } else {
            *access::at::<[Port; 2]>(ctx, work.l4_offset)? =
                [work.source_port, work.destination_port];
        }
        if F::NUMBER == 4 {
            let place = access::at::<u16>(ctx, work.l3_offset + 10)?;
            *place = checksum::apply(*place, quoted_difference(work));
        }
    }
    Some(())
}
