//! The tuple of a connection's replies: whoever inserts its entry has it, and so a NAT port is claimed.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use weir_common::{
    flow::{self, flag},
    lookup::Lookup,
};

use super::{
    RIGHT_NOW, now,
    pair::{look_at, remove_both},
};
use crate::{
    family::Family,
    local, maps, rewrite,
    scratch::{self, Work},
};

/// Whether replies to a packet that needs no entry would be taken for those of a connection that
/// has one: 1 or 0. The packet then needs an entry and another source port. A connection that is
/// over makes way instead. (The body of [`Family::reply_tuple_is_taken`].)
#[inline(always)]
pub fn reply_tuple_is_taken<F: Family>() -> u32 {
    let Ok(config) = local::config() else {
        return 0;
    };
    let Ok(packet) = scratch::packet::<F>() else {
        return 0;
    };
    let Ok(Work {
        decision,
        reply_key,
        ..
    }) = scratch::decision::<F>()
    else {
        return 0;
    };
    if decision.stateful != 0 {
        return 0;
    }
    reply_key.source = packet.key.destination;
    reply_key.destination = packet.key.source;
    reply_key.source_port = packet.key.destination_port;
    reply_key.destination_port = packet.key.source_port;
    reply_key.protocol = packet.key.protocol;
    reply_key.scope = decision.reply_scope;
    reply_key.reserved = 0;
    let Some(glance) = look_at::<F>(reply_key) else {
        return 0;
    };
    let timeout = config.timeouts.of(glance.state);
    if !glance.state.is_over()
        && glance.idle(now()) <= timeout.saturating_mul(flow::TICKS_PER_SECOND)
    {
        return 1;
    }
    remove_both::<F>(reply_key, &glance);
    0
}

/// Fills in the key of the reply entry, field by field: as a whole it would pass the stack.
#[inline(always)]
pub fn write_reply_key<F: Family>(work: &mut Work<F::Address>, protocol: u8) {
    let (key, forward) = (&mut work.reply_key, &work.forward);
    key.source = forward.new_destination;
    key.destination = forward.new_source;
    key.source_port = forward.new_destination_port;
    key.destination_port = forward.new_source_port;
    key.protocol = protocol;
    key.scope = forward.partner_scope();
    key.reserved = 0;
}

/// Inserts the reply entry. Returns 0, or 1 if its tuple belongs to another connection. (The body of
/// [`Family::claim_reply_tuple`].)
#[inline(always)]
pub fn claim_reply_tuple<F: Family>() -> u32 {
    let Ok(packet) = scratch::packet::<F>() else {
        return 1;
    };
    let Ok(work) = scratch::decision::<F>() else {
        return 1;
    };
    write_reply_key::<F>(work, packet.key.protocol);
    let Work {
        reply,
        reply_key,
        reply_inserted,
        ..
    } = work;
    reply.tag = reply_key.tag();
    reply.flags &= !(flag::REWRITE_SOURCE | flag::REWRITE_DESTINATION);
    rewrite::complete(reply, reply_key);
    maps::count_lookup(Lookup::FlowUpdate);
    *reply_inserted = 1;
    if F::flows()
        .insert(&*reply_key, &*reply, u64::from(BPF_NOEXIST))
        .is_ok()
    {
        return 0;
    }
    maps::count_lookup(Lookup::Flow);
    let Some(other) = F::flows().get_ptr(&*reply_key) else {
        return 1;
    };
    // SAFETY: as in `find`.
    let (is_ours, created) = unsafe { ((*other).has_partner(&packet.key), (*other).created) };
    if !is_ours {
        return 1;
    }
    if flow::age(reply.created, created) <= RIGHT_NOW {
        // Another processor enters the same connection just now: its half is as good.
        *reply_inserted = 0;
        return 0;
    }
    // A former life of the connection left this half.
    u32::from(
        F::flows()
            .insert(&*reply_key, &*reply, u64::from(BPF_ANY))
            .is_err(),
    )
}
