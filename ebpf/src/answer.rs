//! Turns a packet into its answer: empties it, writes a new network header, and sends it back to
//! where it came from. What stands behind the network header is up to the caller.

use aya_ebpf::{
    bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    helpers::{bpf_redirect, bpf_redirect_peer, bpf_skb_adjust_room, bpf_skb_change_tail},
    programs::TcContext,
};
use weir_common::{MacAddress, mark, metrics::Hook};

use crate::{
    access::{self, ETHERNET, OFFSET_MASK},
    family::Family,
    switches,
};

/// Time to live of what the programs send themselves.
pub const TTL: u8 = 64;

/// Bytes that [`empty`] takes away behind the Ethernet header: all headers up to that of layer 4,
/// wherever that is.
const EMPTIED: u32 = OFFSET_MASK + 1;

/// Leaves of the packet its Ethernet header, turned round, and writes a network header for `length`
/// bytes of `protocol` behind it, which are of unknown content. Returns 0, or what failed.
#[inline(always)]
pub fn begin<F: Family>(
    ctx: &TcContext,
    source: &F::Address,
    destination: &F::Address,
    protocol: u8,
    length: u32,
) -> u32 {
    if !empty(ctx, F::HEADER + length) {
        return 3;
    }
    if F::write_header(ctx, source, destination, protocol, length).is_err() {
        return 4;
    }
    // SAFETY: plain bytes, checked by `at`.
    unsafe {
        let Some(macs) = access::at::<[MacAddress; 2]>(ctx, 0) else {
            return 6;
        };
        let [destination, source] = *macs;
        *macs = [source, destination];
    }
    0
}

/// Gives the packet `length` bytes behind its Ethernet header, of unknown content, and takes from
/// it what its sender asked of the device. Returns whether it worked.
///
/// The first call ends segmentation. The second makes the kernel forget a checksum that is yet to
/// be computed, as it was to begin among the bytes taken (`skb_postpull_rcsum`); otherwise it
/// would be written into what the answer holds.
#[inline(always)]
fn empty(ctx: &TcContext, length: u32) -> bool {
    // SAFETY: the context is valid; the helpers check their arguments.
    unsafe {
        bpf_skb_change_tail(ctx.skb.skb, ETHERNET + EMPTIED + length, 0) == 0
            && bpf_skb_adjust_room(ctx.skb.skb, -(EMPTIED as i32), BPF_ADJ_ROOM_MAC, 0) == 0
    }
}

/// Sends the packet back to where it came from. Gives the action.
#[inline(always)]
pub fn send_back(ctx: &TcContext, hook: Hook) -> i32 {
    let ifindex = access::ifindex(ctx);
    // SAFETY: no preconditions.
    let action = unsafe {
        match hook {
            Hook::FromPod => bpf_redirect_peer(ifindex, 0),
            // No program of ours takes the mark off there.
            Hook::FromHost => bpf_redirect(ifindex, 0),
            _ => {
                ctx.set_mark(access::mark(ctx) | mark::DONE << switches::mark_shift());
                bpf_redirect(ifindex, 0)
            }
        }
    };
    action as i32
}
