//! ARP and neighbour discovery of pods. A pod has a permanent entry for its gateway; a virtual
//! machine inside a pod asks, and is answered here. Nothing is learnt from the wire.

use aya_ebpf::{
    helpers::{bpf_csum_diff, bpf_redirect_peer},
    programs::TcContext,
};
use weir_common::{DropReason, Ipv4, Ipv6, MacAddress, checksum, protocol};

use crate::{
    access::{self, ETHERNET},
    local::{self, Local},
    packet::{Packet, icmp_type},
    scratch,
    verdict::Verdict,
};

/// An ARP packet for Ethernet and IPv4 (RFC 826).
#[repr(C)]
#[derive(Clone, Copy)]
struct Arp {
    hardware: u16,
    protocol: u16,
    lengths: [u8; 2],
    operation: u16,
    sender_mac: MacAddress,
    sender: [u16; 2],
    target_mac: MacAddress,
    target: [u16; 2],
}

const REQUEST: u16 = 1u16.to_be();
const REPLY: u16 = 2u16.to_be();

#[inline(always)]
fn halves(address: Ipv4) -> [u16; 2] {
    let b = address.0;
    [
        u16::from_ne_bytes([b[0], b[1]]),
        u16::from_ne_bytes([b[2], b[3]]),
    ]
}

/// Answers a request for the gateway; lets others go to the stack, which ignores what is not its
/// own. A pod that speaks for another's address is dropped.
#[inline(always)]
pub fn arp(ctx: &TcContext, sender: Local) -> Verdict {
    Verdict::from_word(arp_word(ctx, sender.number))
}

/// A function of its own for the sake of the callers' stack.
#[inline(never)]
fn arp_word(ctx: &TcContext, sender: u32) -> u32 {
    Verdict::of(try_arp(ctx, sender)).word()
}

#[inline(always)]
fn try_arp(ctx: &TcContext, sender: u32) -> Result<Verdict, DropReason> {
    let config = local::config()?;
    let sender = local::by_number(sender).ok_or(DropReason::StaleEndpoint)?;
    // SAFETY: plain bytes.
    let place = unsafe { access::at::<Arp>(ctx, ETHERNET) }.ok_or(DropReason::Neighbour)?;
    // SAFETY: checked by `at`.
    let request = unsafe { *place };
    if request.hardware != 1u16.to_be()
        || request.protocol != 0x0800u16.to_be()
        || request.lengths != [6, 4]
    {
        return Err(DropReason::Neighbour);
    }
    let claimed = request.sender;
    if claimed != [0, 0] && claimed != halves(sender.row.ipv4) {
        return Err(DropReason::InvalidSource);
    }
    if request.operation != REQUEST || request.target != halves(config.gateway_v4) {
        return Ok(Verdict::STACK);
    }
    // SAFETY: checked by `at`; nobody else holds a reference into the packet.
    unsafe {
        *place = Arp {
            operation: REPLY,
            sender_mac: sender.row.host_mac,
            sender: request.target,
            target_mac: request.sender_mac,
            target: request.sender,
            ..request
        };
    }
    answer(ctx, sender, request.sender_mac)
}

/// Neighbour solicitation with one option, or the advertisement that answers it (RFC 4861).
#[repr(C)]
#[derive(Clone, Copy)]
struct Neighbour {
    kind_and_checksum: u32,
    flags: u32,
    target: Ipv6,
    option: [u8; 2],
    mac: MacAddress,
}

/// Bytes of a solicitation with one option.
const SIZE: u32 = size_of::<Neighbour>() as u32;

/// What the checksum of an advertisement is computed over.
#[repr(C, align(8))]
struct Sum {
    source: Ipv6,
    destination: Ipv6,
    length: u32,
    next_header: u32,
    message: Neighbour,
}

/// Answers a solicitation for the gateway, if the packet is one; `None` if it is something else.
#[inline(always)]
pub fn solicitation(ctx: &TcContext, sender: Local, packet: &Packet<Ipv6>) -> Option<Verdict> {
    if packet.key.protocol != protocol::ICMPV6
        || packet.icmp_type != icmp_type::V6_NEIGHBOUR_SOLICITATION
        || packet.l4_offset != ETHERNET + 40
        || packet.l3_length != 40 + SIZE
        || packet.key.source.is_zero()
        || packet.ttl != 255
    {
        return None;
    }
    match solicitation_word(ctx, sender.number, packet) {
        NOT_OURS => None,
        word => Some(Verdict::from_word(word)),
    }
}

/// A solicitation for something else.
const NOT_OURS: u32 = 0;

/// A function of its own for the sake of the callers' stack. Returns a verdict, or [`NOT_OURS`].
#[inline(never)]
fn solicitation_word(ctx: &TcContext, sender: u32, packet: &Packet<Ipv6>) -> u32 {
    match try_solicitation(ctx, sender, packet) {
        Ok(Some(verdict)) => verdict.word(),
        Ok(None) => NOT_OURS,
        Err(reason) => Verdict::of(Err(reason)).word(),
    }
}

#[inline(always)]
fn try_solicitation(
    ctx: &TcContext,
    sender: u32,
    packet: &Packet<Ipv6>,
) -> Result<Option<Verdict>, DropReason> {
    let config = local::config()?;
    let sender = local::by_number(sender).ok_or(DropReason::StaleEndpoint)?;
    // SAFETY: plain bytes.
    let place =
        unsafe { access::at::<Neighbour>(ctx, ETHERNET + 40) }.ok_or(DropReason::Neighbour)?;
    // SAFETY: checked by `at`.
    let solicited = unsafe { *place };
    if solicited.target != config.gateway_v6 || solicited.option != [1, 1] {
        return Ok(None);
    }
    // SAFETY: plain bytes; nothing else stands there now.
    let sum = unsafe { scratch::room::<Sum>() }?;
    *sum = Sum {
        source: config.gateway_v6,
        destination: packet.key.source,
        length: SIZE.to_be(),
        next_header: u32::from(protocol::ICMPV6).to_be(),
        message: Neighbour {
            kind_and_checksum: u32::from_ne_bytes([icmp_type::V6_NEIGHBOUR_ADVERTISEMENT, 0, 0, 0]),
            // Router, solicited, override.
            flags: u32::from_ne_bytes([0xe0, 0, 0, 0]),
            target: config.gateway_v6,
            option: [2, 1],
            mac: sender.row.host_mac,
        },
    };
    // SAFETY: initialised above; its size is a multiple of four.
    let total = unsafe {
        bpf_csum_diff(
            core::ptr::null_mut(),
            0,
            (&raw mut *sum).cast(),
            size_of::<Sum>() as u32,
            0,
        )
    };
    let check = !checksum::fold16(total as u64 & 0xffff_ffff);
    sum.message.kind_and_checksum |= u32::from(check) << 16;
    // SAFETY: plain bytes; the pointers were checked by `at`.
    unsafe {
        *place = sum.message;
        let addresses = access::at::<[Ipv6; 2]>(ctx, ETHERNET + 8).ok_or(DropReason::Neighbour)?;
        *addresses = [config.gateway_v6, packet.key.source];
    }
    answer(ctx, sender, solicited.mac).map(Some)
}

/// Sends the packet back to the pod.
#[inline(always)]
fn answer(ctx: &TcContext, sender: Local, to: MacAddress) -> Result<Verdict, DropReason> {
    // SAFETY: plain bytes, checked by `at`.
    unsafe {
        let macs = access::at::<[MacAddress; 2]>(ctx, 0).ok_or(DropReason::Neighbour)?;
        *macs = [to, sender.row.host_mac];
        Ok(Verdict::answered(
            bpf_redirect_peer(access::ifindex(ctx), 0) as i32,
        ))
    }
}
