//! The node's routes, asked from a program (`bpf_fib_lookup`): where a packet to the outside goes, past the
//! stack, and which address the node sends from there. What the routes do not lead to a neighbour is left to
//! the stack, which knows the answer to give.

use aya_ebpf::{
    bindings::{bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1},
    helpers::{bpf_fib_lookup, bpf_redirect_neigh},
    programs::TcContext,
};
use weir_common::{
    DropReason, Ipv6, Port, address::Address, config::device_flag, flow::flag, lookup::Lookup,
};

use crate::{access, family::Family, maps, scratch, switches};

/// What is asked and answered: `struct bpf_fib_lookup` (include/uapi/linux/bpf.h). All that has a byte order is
/// in network byte order, but for `ifindex` and `length`.
#[repr(C, align(8))]
pub struct Question {
    /// `AF_INET` or `AF_INET6`; of the gateway in the answer.
    family: u8,
    l4_protocol: u8,
    source_port: Port,
    destination_port: Port,
    /// Asked: bytes of the packet from the network header on. Answered: the MTU, if it is too large.
    length: u16,
    /// Asked: the device that it came in by. Answered: the one that it leaves by.
    ifindex: u32,
    /// Type of service or flow label.
    flow_info: u32,
    source: Ipv6,
    /// Answered: the gateway, or the destination if there is none.
    destination: Ipv6,
    vlan: u32,
    macs: [u32; 3],
}

const _: () = assert!(size_of::<Question>() == 64);

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// Results of `bpf_fib_lookup` (`BPF_FIB_LKUP_RET_…`).
mod found {
    pub const SUCCESS: i64 = 0;
    pub const BLACKHOLE: i64 = 1;
    pub const FWD_DISABLED: i64 = 5;
    pub const UNSUPP_LWT: i64 = 6;
    pub const NO_NEIGH: i64 = 7;
    pub const FRAG_NEEDED: i64 = 8;
    pub const NO_SRC_ADDR: i64 = 9;
}

/// Results of [`find`] that are no MTU.
pub mod way {
    /// Not to a neighbour that a program could send to.
    pub const STACK: u32 = 0;
    /// Nowhere: no route, or one that forbids it.
    pub const NOWHERE: u32 = 1;
    /// It fits, whatever the MTU.
    pub const FITS: u32 = u16::MAX as u32;
}

#[inline(always)]
fn room() -> Option<&'static mut Question> {
    const { assert!(size_of::<Question>() <= size_of::<maps::RouteRoom>()) };
    let room = maps::ROUTE.get_ptr_mut(0)?;
    // SAFETY: large enough and aligned; all fields are words; the functions below take it in turn.
    Some(unsafe { &mut *room.cast::<Question>() })
}

/// Finds the way of the packet in the scratch room, as it will be once it is translated. Returns the MTU of the way
/// if the packet exceeds it, or one of [`way`]. (The body of [`Family::find_route`].)
#[inline(always)]
pub fn find<F: Family>(ctx: &TcContext) -> u32 {
    let (Ok(packet), Some(room)) = (scratch::packet::<F>(), room()) else {
        return way::STACK;
    };
    let length = packet.wire_length(ctx);
    let length = if length > u32::from(u16::MAX) {
        u16::MAX
    } else {
        length as u16
    };
    let rewrite = &packet.rewrite;
    if rewrite.is_needed() {
        room.destination = rewrite.destination.to_shared();
        room.destination_port = rewrite.destination_port;
    } else {
        room.destination = packet.key.destination.to_shared();
        room.destination_port = packet.key.destination_port;
    }
    // What is translated to the node is asked for as it was when its source was found, so that of several ways
    // (ECMP, rules by source) it takes that of its source; netfilter routes before it masquerades, too.
    let is_masqueraded = rewrite.flags & (flag::SOURCE_NAT | flag::REPLY) == flag::SOURCE_NAT;
    if rewrite.is_needed() && !is_masqueraded {
        room.source = rewrite.source.to_shared();
        room.source_port = rewrite.source_port;
    } else {
        room.source = packet.key.source.to_shared();
        room.source_port = packet.key.source_port;
    }
    room.l4_protocol = packet.key.protocol;
    room.length = length;
    match ask::<F>(ctx, room, switches::fib_neighbour_flag()) {
        found::SUCCESS | found::NO_NEIGH => way::FITS,
        found::FRAG_NEEDED => u32::from(room.length),
        found::BLACKHOLE..=found::FWD_DISABLED => way::NOWHERE,
        _ => way::STACK,
    }
}

/// Results of [`find_source`] that are no drop reason.
pub mod source {
    /// One was found: [`chosen_source`](super::chosen_source).
    pub const FOUND: u32 = 0;
    /// The way leads by a device that is left to others, or nowhere: nothing is translated.
    pub const NOT_OURS: u32 = 1;
}

/// Finds the address that the node sends from to the destination that was decided. Returns one of [`source`],
/// or the number of a drop reason. (The body of [`Family::find_source`].)
#[inline(always)]
pub fn find_source<F: Family>(ctx: &TcContext) -> u32 {
    let (Ok(packet), Some(room)) = (scratch::packet::<F>(), room()) else {
        return DropReason::MissingConfig as u32;
    };
    let Ok(work) = scratch::decision::<F>() else {
        return DropReason::MissingConfig as u32;
    };
    room.source = packet.key.source.to_shared();
    room.destination = work.decision.destination.to_shared();
    room.source_port = packet.key.source_port;
    room.destination_port = work.decision.destination_port;
    room.l4_protocol = packet.key.protocol;
    // The MTU does not matter here.
    room.length = 1;
    let neighbour_flag = switches::fib_neighbour_flag();
    // Of IPv6 the kernel looks at every address of the node, where a look at the device is mostly enough.
    let is_asked_first = F::NUMBER == 4;
    let source_flag = switches::fib_source_flag();
    let first = if is_asked_first { source_flag } else { 0 };
    match source_of(ask::<F>(ctx, room, first | neighbour_flag)) {
        source::FOUND => {}
        other => return other,
    }
    maps::count_lookup(Lookup::DeviceAddress);
    // SAFETY: words, read at once; the agent replaces a row as a whole.
    let Some(device) = (unsafe { maps::DEVICE_ADDRESSES.get(&room.ifindex) }) else {
        return DropReason::NoSourceAddress as u32;
    };
    if device.flags & device_flag::ATTACHED == 0 {
        return source::NOT_OURS;
    }
    if source_flag == 0 || (!is_asked_first && device.flags & device_flag::SOLE_V6 != 0) {
        room.source = F::device_address(device).to_shared();
    } else if !is_asked_first {
        room.destination = work.decision.destination.to_shared();
        // As in the first question: it is the answer's room too.
        room.length = 1;
        match source_of(ask::<F>(ctx, room, source_flag | neighbour_flag)) {
            source::FOUND => {}
            other => return other,
        }
    }
    if room.source.is_zero() {
        return DropReason::NoSourceAddress as u32;
    }
    source::FOUND
}

/// What an answer says of the source: one of [`source`], or the number of a drop reason.
#[inline(always)]
fn source_of(answer: i64) -> u32 {
    match answer {
        found::SUCCESS | found::NO_NEIGH => source::FOUND,
        // By an encapsulation of the route's own, which programs cannot be told: nor the source then.
        found::UNSUPP_LWT | found::NO_SRC_ADDR => DropReason::NoSourceAddress as u32,
        _ => source::NOT_OURS,
    }
}

/// The address that [`find_source`] has found.
#[inline(always)]
pub fn chosen_source<F: Family>() -> F::Address {
    room().map_or_else(F::Address::default, |room| {
        F::Address::from_shared(room.source)
    })
}

/// Redirects the packet to the neighbour that [`find`] has found. Gives the action.
#[inline(always)]
pub fn redirect() -> i32 {
    let Some(room) = room() else {
        return aya_ebpf::bindings::TC_ACT_SHOT;
    };
    let mut parameters = bpf_redir_neigh {
        nh_family: u32::from(room.family),
        __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 {
            ipv6_nh: room.destination.words(),
        },
    };
    let size = size_of::<bpf_redir_neigh>() as i32;
    // SAFETY: the parameters are initialised and of the size given.
    unsafe { bpf_redirect_neigh(room.ifindex, &mut parameters, size, 0) as i32 }
}

#[inline(always)]
fn ask<F: Family>(ctx: &TcContext, room: &mut Question, flags: u32) -> i64 {
    maps::count_lookup(Lookup::Route);
    room.family = if F::NUMBER == 4 { AF_INET } else { AF_INET6 };
    room.ifindex = access::ifindex(ctx);
    room.flow_info = 0;
    room.vlan = 0;
    // SAFETY: the room is of the type that the helper expects.
    unsafe {
        bpf_fib_lookup(
            ctx.skb.skb.cast(),
            core::ptr::from_mut(room).cast(),
            size_of::<Question>() as i32,
            flags,
        )
    }
}
