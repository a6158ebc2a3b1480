//! The flow table: finding the entry of a packet. Its rooms enter a new connection (`enter`), claim the tuple of its replies
//! (`reply`), and look at or remove both of its entries (`pair`).

mod enter;
mod pair;
mod reply;

use aya_ebpf::{helpers::bpf_ktime_get_coarse_ns, programs::TcContext};
use weir_common::{
    DropReason,
    flow::{self, FlowEntry, FlowKey, flag},
    lookup::Lookup,
    metrics::{Hook, outcome},
    protocol,
};

pub use self::{
    enter::{commit, enter},
    pair::{forget, look_at, remove_both},
    reply::{claim_reply_tuple, reply_tuple_is_taken, write_reply_key},
};
use crate::{
    access,
    deliver::Hop,
    family::Family,
    local::Local,
    maps,
    packet::{Packet, asked},
    verdict,
};

/// Ticks within which an entry that was not looked for before is that of another processor, which handles a packet
/// of the same connection right now. An older one was left behind by a former user of the tuple. Times are those of the
/// last timer interrupt: two of them at 100 Hz, and some.
const RIGHT_NOW: u32 = 24;

/// Now, in ticks of the flow table.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: no preconditions.
    flow::now_from_nanoseconds(unsafe { bpf_ktime_get_coarse_ns() })
}

/// Finds the entry of a packet: the one lookup of the fast path. Leaves the translation in the
/// packet and gives the next hop; `None` when there is no entry, or a stale one, and the packet must
/// be decided anew. An error when the connection goes on to an endpoint that cannot be reached now.
///
/// The element stays allocated while the program runs, but may be recycled: everything needed is
/// read first and the tag last.
#[inline(always)]
pub fn find<F: Family>(
    ctx: &TcContext,
    hook: Hook,
    packet: &mut Packet<F::Address>,
    sender: Option<Local>,
) -> Result<Option<Hop>, DropReason> {
    maps::count_lookup(Lookup::Flow);
    let Some(place) = F::flows().get_ptr_mut(&packet.key) else {
        packet.asked = asked::UNKNOWN;
        return Ok(None);
    };
    // SAFETY: see above; every bit pattern of an entry is valid.
    let entry = unsafe { &*place };
    let hop = check::<F>(ctx, packet, sender, entry)?;
    packet.rewrite.copy_from(entry);
    // SAFETY: as above.
    let tag = unsafe { access::read_last(&raw const (*place).tag) };
    if hop.is_none() || tag != packet.key.tag() {
        packet.rewrite.flags = 0;
        packet.asked = asked::STALE;
        packet.stale_created = entry.created;
        verdict::count(hook, outcome::FLOW_STALE, 0);
        return Ok(None);
    }
    // SAFETY: as above; a count that hits a recycled element is off by one packet.
    unsafe { touch(place, packet.tcp_flags, ctx.len()) };
    Ok(hop)
}

/// Whether an entry still holds for this packet; gives its next hop if so.
#[inline(always)]
fn check<F: Family>(
    ctx: &TcContext,
    packet: &Packet<F::Address>,
    sender: Option<Local>,
    entry: &FlowEntry<F::Address>,
) -> Result<Option<Hop>, DropReason> {
    if entry.version != flow::VERSION
        || (entry.ifindex != 0 && entry.ifindex != access::ifindex(ctx))
    {
        return Ok(None);
    }
    if let Some(sender) = sender
        && (entry.source_generation != sender.row.generation
            || entry.egress_set != sender.row.egress_set)
    {
        return Ok(None);
    }
    let reopens = packet.is_syn();
    // A new connection of the same tuple begins with no flags seen, and with an endpoint of its own.
    if reopens && entry.flags & flag::REPLY == 0 && is_closing::<F>(packet) != 0 {
        return Ok(None);
    }
    if entry.backend != 0 && entry.flags & flag::REPLY == 0 {
        // TCP keeps its endpoint to the end.
        if packet.key.protocol != protocol::TCP || reopens {
            let Some(row) = maps::BACKENDS.get(entry.backend) else {
                return Ok(None);
            };
            if row.generation != entry.backend_generation {
                return Ok(None);
            }
        }
    }
    let hop = match Hop::find(entry.next_hop) {
        Ok(hop) => hop,
        // The node is out of reach for a while: another endpoint would be no help to a connection
        // that is open.
        Err(DropReason::NoNextHop) if packet.key.protocol == protocol::TCP && !reopens => {
            return Err(DropReason::NoNextHop);
        }
        Err(_) => return Ok(None),
    };
    if hop.generation() != entry.next_hop_generation || hop.ingress_set() != entry.ingress_set {
        return Ok(None);
    }
    Ok(Some(hop))
}

/// Whether the connection of a packet is over, by the flags of both directions: 1 or 0. Asked for
/// packets that open a connection only.
#[inline(never)]
fn is_closing<F: Family>(packet: &Packet<F::Address>) -> u32 {
    match look_at::<F>(&packet.key) {
        Some(glance) => u32::from(glance.over),
        None => 1,
    }
}

/// Notes that a packet has passed.
///
/// # Safety
///
/// `entry` must point to an element of the flow table.
#[inline(always)]
unsafe fn touch<A>(entry: *mut FlowEntry<A>, tcp_flags: u8, bytes: u32) {
    // SAFETY: by contract; all fields are words that may be written at any time.
    unsafe {
        (*entry).last_seen = now();
        (*entry).packets += 1;
        (*entry).bytes += u64::from(bytes);
        if (*entry).tcp_flags | tcp_flags != (*entry).tcp_flags {
            (*entry).tcp_flags |= tcp_flags;
        }
    }
}

/// The flags of an entry, `None` if there is none.
#[inline(always)]
pub fn flags_of<F: Family>(key: &FlowKey<F::Address>) -> Option<u16> {
    maps::count_lookup(Lookup::Flow);
    let entry = F::flows().get_ptr(key)?;
    // SAFETY: as in `find`; a recycled element tells of another connection for this one packet.
    Some(unsafe { (*entry).flags })
}
