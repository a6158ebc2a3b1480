//! The one place where a decision becomes an action, is counted and, if it is a drop, reported.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    programs::TcContext,
};
use weir_common::{
    DropReason,
    metrics::{self, Hook, outcome},
};

use crate::{access, event, maps};

/// What becomes of a packet, as one word: functions that are not inlined return scalars only.
#[derive(Clone, Copy)]
pub struct Verdict(u32);

/// Bit of a verdict that forwards: outcome in the second byte, action in the first. Without it the
/// word is the number of a drop reason.
const FORWARDED: u32 = 0x1_0000;

impl Verdict {
    /// To the host's stack, or to whatever program is attached next.
    ///
    /// 'Pass' is `TCX_NEXT` (the same number as `TC_ACT_UNSPEC`): programs of others still run.
    pub const STACK: Self = Self::forwarded(outcome::STACK, TC_ACT_UNSPEC);

    /// To the host's stack by way of the node's own device; `action` is the helper's return value.
    #[inline(always)]
    pub const fn to_stack_by(action: i32) -> Self {
        Self::forwarded(outcome::STACK, action)
    }

    /// Dropped, reported already, and refused: the packet was turned into its answer and redirected
    /// back. The drop is counted under its reason.
    #[inline(always)]
    pub const fn refused(reason: DropReason, action: i32) -> Self {
        Self::forwarded(reason as u8, action)
    }

    /// Redirected to a pod of this node; `action` is the helper's return value.
    #[inline(always)]
    pub const fn local(action: i32) -> Self {
        Self::forwarded(outcome::LOCAL, action)
    }

    /// Redirected to another node.
    #[inline(always)]
    pub const fn remote(action: i32) -> Self {
        Self::forwarded(outcome::REMOTE, action)
    }

    /// Redirected to the outside.
    #[inline(always)]
    pub const fn routed(action: i32) -> Self {
        Self::forwarded(outcome::ROUTED, action)
    }

    /// Redirected to be put together with the others of its datagram, or back from there.
    #[inline(always)]
    pub const fn defragmented(action: i32) -> Self {
        Self::forwarded(outcome::DEFRAG, action)
    }

    /// Whether it is no drop.
    #[inline(always)]
    pub const fn forwards(self) -> bool {
        self.0 & FORWARDED != 0
    }

    /// The packet was turned into its answer and redirected back.
    #[inline(always)]
    pub const fn answered(action: i32) -> Self {
        Self::forwarded(outcome::ANSWERED, action)
    }

    #[inline(always)]
    const fn forwarded(outcome: u8, action: i32) -> Self {
        Self(FORWARDED | (outcome as u32) << 8 | action as u8 as u32)
    }

    /// A verdict from a result.
    #[inline(always)]
    pub fn of(result: Result<Self, DropReason>) -> Self {
        match result {
            Ok(verdict) => verdict,
            Err(reason) => Self(reason as u32),
        }
    }

    /// A verdict from a result, drops included, of which the compiler forgets how it came about: else it keeps the
    /// verdict of the paths that have none, undefined, on the stack.
    #[inline(always)]
    pub fn settled(result: Result<Self, DropReason>) -> Result<Self, DropReason> {
        let word = match result {
            Ok(verdict) => access::forget_bounds(verdict.word()),
            Err(reason) => access::forget_bounds(reason as u32),
        };
        Ok(Self(word))
    }

    /// As a word.
    #[inline(always)]
    pub const fn word(self) -> u32 {
        self.0
    }

    /// From the word that [`Self::word`] gave.
    #[inline(always)]
    pub const fn from_word(word: u32) -> Self {
        Self(word)
    }
}

/// Counts the outcome, reports a drop, and gives the action.
#[inline(always)]
pub fn conclude(ctx: &TcContext, hook: Hook, result: Result<Verdict, DropReason>) -> i32 {
    // Through the wall of an `asm!` on each side: else the compiler keeps the verdict of the paths
    // that have none on the stack, undefined, which the verifier refuses to store.
    let word = match result {
        Ok(verdict) => access::forget_bounds(verdict.word()),
        Err(reason) => access::forget_bounds(reason as u32),
    };
    // (A refusal counts under its reason, and was reported before the packet became the answer.)
    let (outcome, action) = if word & FORWARDED != 0 {
        ((word >> 8) as u8, i32::from(word as u8 as i8))
    } else {
        event::report_drop(ctx, hook, word as u8);
        (word as u8, TC_ACT_SHOT)
    };
    count(hook, outcome, ctx.len());
    #[cfg(feature = "log-packets")]
    crate::log::packet(ctx, hook as u32, u32::from(outcome));
    action
}

/// Adds a packet of `bytes` to a counter.
#[inline(always)]
pub fn count(hook: Hook, outcome: u8, bytes: u32) {
    if let Some(counter) = maps::METRICS.get_ptr_mut(metrics::index(hook, outcome)) {
        // SAFETY: an element of a per-CPU array, written by this processor only.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(bytes);
        }
    }
}
