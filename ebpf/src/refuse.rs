//! Refusals: what is sent to a Service without endpoints, or to a port that no Service has, is
//! answered at once, TCP with a reset, the rest with ICMP port unreachable, so that clients need
//! not wait for their time-outs. Answers to each sender are limited; what exceeds the limit is
//! dropped only.

use aya_ebpf::{
    bindings::TC_ACT_SHOT,
    helpers::{bpf_csum_diff, bpf_ktime_get_ns},
    programs::TcContext,
};
use weir_common::{
    DropReason, Ipv6, Port,
    address::Address,
    checksum, hash, limits,
    metrics::{Hook, outcome},
    protocol::{self, tcp_flag},
};

use crate::{
    access::{self, ETHERNET},
    answer, decide, event,
    family::Family,
    icmp, local, maps,
    packet::Packet,
    scratch,
    verdict::{self, Verdict},
};

/// Nanoseconds of refusals that may be sent at once.
const BURST: u64 = 250_000_000;
const SECOND: u64 = 1_000_000_000;
/// Bytes of a TCP header without options.
const TCP: u32 = 20;

/// Drops the packet of `sender`, a pod or one of [`decide::NODE`] and [`decide::OUTSIDE`], for `reason`, and refuses it if it is of the
/// kind that is refused.
#[inline(always)]
pub fn or_drop<F: Family>(
    ctx: &TcContext,
    sender: u32,
    reason: DropReason,
) -> Result<Verdict, DropReason> {
    let is_refused = matches!(
        reason,
        DropReason::NoBackend | DropReason::NoServicePort | DropReason::InvalidDestination
    );
    if !is_refused {
        return Err(reason);
    }
    Ok(Verdict::from_word(F::refuse(ctx, sender, reason as u32)))
}

/// The body of [`Family::refuse`]: gives the word of the verdict.
#[inline(always)]
pub fn refuse<F: Family>(ctx: &TcContext, sender: u32, reason: u32) -> u32 {
    Verdict::of(try_refuse::<F>(ctx, sender, DropReason::of_kernel(reason))).word()
}

#[inline(always)]
fn try_refuse<F: Family>(
    ctx: &TcContext,
    sender: u32,
    reason: DropReason,
) -> Result<Verdict, DropReason> {
    let hook = match sender {
        decide::NODE => Hook::FromHost,
        decide::OUTSIDE => Hook::FromNetdev,
        _ => Hook::FromPod,
    };
    let packet = scratch::packet::<F>()?;
    let is_tcp = packet.key.protocol == protocol::TCP;
    let has_ports = is_tcp || matches!(packet.key.protocol, protocol::UDP | protocol::SCTP);
    let unanswerable = packet.is_later_fragment() || packet.tcp_flags & tcp_flag::RST != 0;
    if !has_ports || unanswerable {
        return Err(reason);
    }
    if !may_answer(sender) {
        verdict::count(hook, outcome::REFUSAL_LIMITED, 0);
        return Err(reason);
    }
    // Now, while the packet is what it was.
    event::report_drop(ctx, hook, reason as u8);
    let built = if is_tcp {
        reset::<F>(ctx, packet)
    } else {
        icmp::build_port_unreachable::<F>(ctx)
    };
    if built.is_err() {
        // Dropped only, for the reason that was reported.
        return Ok(Verdict::refused(reason, TC_ACT_SHOT));
    }
    verdict::count(hook, outcome::REFUSED, 0);
    Ok(Verdict::refused(reason, answer::send_back(ctx, hook)))
}

/// Row of `REFUSALS` for ICMP errors to the outside, other than 'too big'.
pub const ERRORS_OUTSIDE: u32 = limits::ENDPOINT_FLOWS_ROWS;

/// Row of `REFUSALS` for 'too big' to a client outside.
#[inline(always)]
pub fn too_big_outside<A: Address>(client: A) -> u32 {
    ERRORS_OUTSIDE + 1 + hash::mix([client.fold(), 0]) % limits::REFUSALS_TOO_BIG
}

/// Whether one more answer is within the limit of a row of `REFUSALS` (the generic cell rate algorithm).
/// Processors that ask at the same instant may get one answer more.
#[inline(always)]
pub fn may_answer(row: u32) -> bool {
    let Ok(config) = local::config() else {
        return false;
    };
    let rate = u64::from(config.refusals_per_second);
    if rate == 0 {
        return true;
    }
    let Some(place) = maps::REFUSALS.get_ptr_mut(row) else {
        return false;
    };
    // SAFETY: no preconditions; an aligned word of an array.
    let (now, next) = unsafe { (bpf_ktime_get_ns(), *place) };
    let next = if next > now { next } else { now };
    if next - now > BURST {
        return false;
    }
    // SAFETY: as above.
    unsafe { *place = next + SECOND / rate };
    true
}

/// A reset, and before it what else its checksum is computed over; an IPv4 address fills the first
/// bytes of its place, and zeros add nothing.
#[repr(C, align(4))]
struct Reset {
    source: Ipv6,
    destination: Ipv6,
    length: u32,
    next_header: u32,
    header: [u32; (TCP / 4) as usize],
}

/// Turns the packet into a TCP reset from its destination to its source (RFC 9293 section 3.10.7.1).
#[inline(always)]
fn reset<F: Family>(ctx: &TcContext, packet: &Packet<F::Address>) -> Result<(), DropReason> {
    if fill_reset::<F>(ctx, packet) != 0 {
        return Err(DropReason::IcmpReplyFailed);
    }
    // SAFETY: plain words, filled above.
    let reset = unsafe { scratch::room::<Reset>() }?;
    let (source, destination) = (packet.key.destination, packet.key.source);
    if answer::begin::<F>(ctx, &source, &destination, protocol::TCP, TCP) != 0 {
        return Err(DropReason::IcmpReplyFailed);
    }
    // SAFETY: plain bytes, checked by `at`.
    unsafe {
        let place = access::at::<[u32; (TCP / 4) as usize]>(ctx, ETHERNET + F::HEADER)
            .ok_or(DropReason::IcmpReplyFailed)?;
        *place = reset.header;
    }
    Ok(())
}

/// Computes the reset in the scratch room. Returns 0, or what failed.
#[inline(never)]
fn fill_reset<F: Family>(ctx: &TcContext, packet: &Packet<F::Address>) -> u32 {
    let Ok([sequence, acknowledgement]) = ctx.load::<[[u8; 4]; 2]>(packet.l4_offset as usize + 4)
    else {
        return 1;
    };
    // SAFETY: plain words; nothing that stands there is needed any more.
    let Ok(reset) = (unsafe { scratch::room::<Reset>() }) else {
        return 2;
    };
    let headers = packet.l4_offset - ETHERNET + u32::from(packet.tcp_header);
    let flags = packet.tcp_flags;
    let control = u32::from(flags & tcp_flag::SYN != 0) + u32::from(flags & tcp_flag::FIN != 0);
    let length = packet.l3_length.wrapping_sub(headers).wrapping_add(control);
    let (sequence, acknowledgement, flags) = if flags & tcp_flag::ACK != 0 {
        (u32::from_ne_bytes(acknowledgement), 0, tcp_flag::RST)
    } else {
        let next = u32::from_be_bytes(sequence).wrapping_add(length);
        (0, next.to_be(), tcp_flag::RST | tcp_flag::ACK)
    };
    reset.source = packet.key.destination.to_shared();
    reset.destination = packet.key.source.to_shared();
    reset.length = TCP.to_be();
    reset.next_header = u32::from(protocol::TCP).to_be();
    reset.header = [
        ports(packet.key.destination_port, packet.key.source_port),
        sequence,
        acknowledgement,
        u32::from_ne_bytes([((TCP / 4) << 4) as u8, flags, 0, 0]),
        0,
    ];
    // SAFETY: the whole structure is initialised; its size is a multiple of four.
    let sum = unsafe {
        bpf_csum_diff(
            core::ptr::null_mut(),
            0,
            (&raw mut *reset).cast(),
            size_of::<Reset>() as u32,
            0,
        )
    };
    reset.header[4] = u32::from(!checksum::fold16(sum as u64 & 0xffff_ffff));
    0
}

#[inline(always)]
fn ports(source: Port, destination: Port) -> u32 {
    u32::from(source.word()) | u32::from(destination.word()) << 16
}
