//! Puts a packet back and calls the program under test.

use aya_ebpf::{
    bindings::TC_ACT_SHOT,
    btf_maps::{Array, ProgramArray},
    macros::btf_map,
    programs::TcContext,
};

/// Words of eight bytes in an IPv4 packet: 64 bytes.
pub const V4_WORDS: usize = 8;
/// Words of eight bytes in an IPv6 packet: 80 bytes.
pub const V6_WORDS: usize = 10;

/// A packet; IPv4 uses the first eight words.
#[repr(C, align(8))]
pub struct Template([u64; V6_WORDS]);

/// Which packet comes next.
#[repr(C, align(8))]
pub struct Turn {
    /// Its row in `TEMPLATES`.
    next: u32,
    /// Rows that take turns.
    count: u32,
}

/// The packets. The size is set when the object is loaded.
#[btf_map]
static TEMPLATES: Array<Template, 1> = Array::new();
#[btf_map]
static TURN: Array<Turn, 1> = Array::new();
/// Row 0: the program under test.
#[btf_map]
static TARGET: ProgramArray<1> = ProgramArray::new();

/// See the module. A failure shows as a drop, which the caller of the test run does not expect.
#[inline(always)]
pub fn restore<const WORDS: usize>(ctx: &TcContext) -> i32 {
    if next_packet::<WORDS>(ctx).is_some() {
        ctx.set_mark(0);
        // SAFETY: the target is a program of this type.
        unsafe { TARGET.tail_call(ctx, 0) };
    }
    TC_ACT_SHOT
}

#[inline(always)]
fn next_packet<const WORDS: usize>(ctx: &TcContext) -> Option<()> {
    let turn = TURN.get_ptr_mut(0)?;
    // SAFETY: an element of an array; one test run at a time uses it.
    let row = unsafe {
        let row = (*turn).next;
        (*turn).next = if row + 1 >= (*turn).count { 0 } else { row + 1 };
        row
    };
    let template = TEMPLATES.get(row)?;
    let start = ctx.data();
    if start + WORDS * 8 > ctx.data_end() {
        return None;
    }
    let packet = start as *mut u64;
    let mut i = 0;
    while i < WORDS {
        // SAFETY: the packet has that many words, checked above.
        unsafe { *packet.add(i) = template.0[i] };
        i += 1;
    }
    Some(())
}
