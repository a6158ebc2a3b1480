//! The one door to packet bytes.

use aya_ebpf::{helpers::bpf_skb_vlan_pop, programs::TcContext};

/// Bytes of an Ethernet header.
pub const ETHERNET: u32 = 14;

/// Offsets into the packet that the verifier must be able to bound: headers are followed up to
/// here only.
pub const OFFSET_MASK: u32 = 0x3ff;

/// A pointer to a `T` at `offset` bytes from the start of the packet, or `None` if the readable
/// part ends before its end.
///
/// `offset` is cut to [`OFFSET_MASK`] so that the verifier sees its bound wherever it was kept.
///
/// # Safety
///
/// `T` must be valid for every bit pattern. The pointer is valid until the next helper call that
/// changes the packet (`bpf_l4_csum_replace`, `bpf_skb_pull_data`, `bpf_skb_change_tail` …); the
/// verifier refuses a use after that. It may be unaligned: BPF on every supported architecture
/// that has `HAVE_EFFICIENT_UNALIGNED_ACCESS` allows it, and a read through `read_unaligned` would become
/// single bytes.
#[inline(always)]
pub unsafe fn at<T>(ctx: &TcContext, offset: u32) -> Option<*mut T> {
    let mut start = ctx.data() + (offset & OFFSET_MASK) as usize;
    // The compiler must not know how the place came about, or it computes it twice (two places
    // for the verifier), and writes `start + 1 > end` as `start >= end` (which proves nothing).
    // SAFETY: a move of a register to itself.
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) start, options(nomem, nostack, preserves_flags));
    }
    if start + size_of::<T>() > ctx.data_end() {
        None
    } else {
        Some(start as *mut T)
    }
}

/// A number of which the compiler must forget what it knows, so that it writes the check of its
/// bounds where it is used. The verifier of kernel 6.1 follows some paths that cannot be, with
/// bounds that contradict each other, and needs to see the check there.
#[inline(always)]
pub fn forget_bounds(number: u32) -> u32 {
    let mut number = u64::from(number);
    // SAFETY: a move of a register to itself.
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) number, options(nomem, nostack, preserves_flags));
    }
    number as u32
}

/// Makes the first `length` bytes readable in place. No-op where they are.
///
/// Returns whether they are (a packet shorter than `length` is readable to its end).
#[inline(always)]
pub fn make_readable(ctx: &TcContext, length: u32) -> bool {
    let readable = (ctx.data_end() - ctx.data()) as u32;
    let wanted = if ctx.len() < length {
        ctx.len()
    } else {
        length
    };
    readable >= wanted || ctx.pull_data(wanted).is_ok()
}

/// Interface index of the device that the program runs on.
#[inline(always)]
pub fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid for the whole run of the program.
    unsafe { (*ctx.skb.skb).ifindex }
}

/// Bytes of payload in one segment of an offloaded packet, 0 for an ordinary one.
#[inline(always)]
pub fn gso_size(ctx: &TcContext) -> u32 {
    // SAFETY: as above.
    unsafe { (*ctx.skb.skb).gso_size }
}

/// Whether the frame has a VLAN tag that names a VLAN. (The kernel has taken it out of the bytes.) Number 0 gives a
/// priority only and belongs to the device itself (IEEE 802.1Q section 6.9.1).
#[inline(always)]
pub fn is_tagged(ctx: &TcContext) -> bool {
    const NUMBER: u32 = 0xfff;
    // SAFETY: as above.
    unsafe { (*ctx.skb.skb).vlan_tci & NUMBER != 0 }
}

/// Takes off a tag that gives a priority only: it would go along to the device that the frame is sent on. Gives
/// whether the frame has none now; one that stood behind it takes its place. Pointers into the packet are invalid
/// afterwards.
#[inline(always)]
pub fn remove_priority_tag(ctx: &TcContext) -> bool {
    // SAFETY: as above.
    if unsafe { (*ctx.skb.skb).vlan_present } == 0 {
        return true;
    }
    // SAFETY: the context is valid.
    unsafe { bpf_skb_vlan_pop(ctx.skb.skb) };
    // SAFETY: as above.
    unsafe { (*ctx.skb.skb).vlan_present == 0 }
}

/// Whether the frame is addressed to another host: a switch floods what it does not know, and a
/// device that is listened on takes everything.
#[inline(always)]
pub fn is_for_another_host(ctx: &TcContext) -> bool {
    /// `PACKET_OTHERHOST` (include/uapi/linux/if_packet.h).
    const OTHER_HOST: u32 = 3;
    // SAFETY: as above.
    unsafe { (*ctx.skb.skb).pkt_type == OTHER_HOST }
}

/// The packet mark.
#[inline(always)]
pub fn mark(ctx: &TcContext) -> u32 {
    // SAFETY: as above.
    unsafe { (*ctx.skb.skb).mark }
}

/// Reads an aligned word of eight bytes in one instruction, after all reads that stand before it
/// in the source.
///
/// # Safety
///
/// `word` must be valid to read and aligned.
#[inline(always)]
pub unsafe fn read_word(word: *const u64) -> u64 {
    let value: u64;
    // SAFETY: by contract; without `nomem` nothing is moved across it.
    unsafe {
        core::arch::asm!("{0} = *(u64 *)({1} + 0)", out(reg) value, in(reg) word, options(nostack));
    }
    value
}

/// Reads a word after all reads that stand before it in the source. (LLVM's BPF back end has no
/// compiler fence.)
///
/// # Safety
///
/// `word` must be valid to read.
#[inline(always)]
pub unsafe fn read_last(word: *const u32) -> u32 {
    let value: u64;
    // SAFETY: by contract; without `nomem` nothing is moved across it.
    unsafe {
        core::arch::asm!("{0} = *(u32 *)({1} + 0)", out(reg) value, in(reg) word, options(nostack));
    }
    value as u32
}
