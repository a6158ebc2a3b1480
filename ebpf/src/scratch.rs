//! Room beside the stack of 512 bytes: one element per processor, on which one program runs at a
//! time. What stands in it is valid from the function that fills it to the end of the same packet.
//!
//! The packet stands here for another reason too: the verifier follows every value on the stack
//! along every path, but not what is in a map. So the paths by protocol and kind of fragment meet
//! again once the headers have been read, instead of being multiplied with all that follows.

use weir_common::{
    DropReason, Ipv6,
    flow::{FlowEntry, FlowKey},
};

use crate::{decide::Decision, family::Family, maps, nat_port::Search, packet::Packet};

/// The slow path: what was decided, and both entries of the connection that is entered. Without a
/// connection `forward` rewrites nothing.
#[repr(C, align(8))]
pub struct Work<A> {
    /// What was decided.
    pub decision: Decision<A>,
    /// Entry of the direction of this packet.
    pub forward: FlowEntry<A>,
    /// Entry of the other direction.
    pub reply: FlowEntry<A>,
    /// Key of `reply`.
    pub reply_key: FlowKey<A>,
    /// 0: another processor has inserted an entry that is as good as `reply`.
    pub reply_inserted: u32,
    /// Place in the flow ring that gives way if no free one is found.
    pub candidate: u32,
    /// What speaks for the connection that has it: the higher, the longer it stays.
    pub candidate_merit: u32,
    /// A search for a source port.
    pub search: Search,
}

/// The room of this processor as a `T`.
///
/// # Safety
///
/// `T` must be valid for every bit pattern, and no other reference to the room may be in use.
#[inline(always)]
pub unsafe fn room<T>() -> Result<&'static mut T, DropReason> {
    const {
        assert!(size_of::<T>() <= size_of::<maps::Scratch>());
        assert!(align_of::<T>() <= align_of::<maps::Scratch>());
    };
    let scratch = maps::SCRATCH
        .get_ptr_mut(0)
        .ok_or(DropReason::MissingConfig)?;
    // SAFETY: large enough and aligned, checked above; the rest by contract.
    Ok(unsafe { &mut *scratch.cast::<T>() })
}

/// The room of the packet. It holds that of the last one until [`Family::parse`] has filled it.
#[inline(always)]
pub fn packet<F: Family>() -> Result<&'static mut Packet<F::Address>, DropReason> {
    const {
        assert!(size_of::<Packet<Ipv6>>() <= size_of::<maps::PacketRoom>());
        assert!(align_of::<Packet<Ipv6>>() <= align_of::<maps::PacketRoom>());
    };
    let room = maps::PACKET
        .get_ptr_mut(0)
        .ok_or(DropReason::MissingConfig)?;
    // SAFETY: large enough and aligned, checked above; all fields are words.
    Ok(unsafe { &mut *room.cast::<Packet<F::Address>>() })
}

/// The room of the slow path.
#[inline(always)]
pub fn decision<F: Family>() -> Result<&'static mut Work<F::Address>, DropReason> {
    const { assert!(size_of::<Work<Ipv6>>() <= size_of::<maps::Scratch>()) };
    // SAFETY: plain words; the functions of the slow path take it in turn.
    unsafe { room::<Work<F::Address>>() }
}
