//! Enters a new connection: its two entries are filled in, the reply entry is inserted first, then the forward one. Another
//! processor may enter the same connection at the same time, and a former life of the tuple may have left entries.

use aya_ebpf::{bindings::BPF_NOEXIST, programs::TcContext};
use weir_common::{
    DropReason, config,
    flow::{self, FlowEntry, flag, scope},
    lookup::Lookup,
    metrics::{Hook, outcome},
    next_hop,
};

use super::{
    RIGHT_NOW, now,
    pair::{is_half, remove, remove_half},
};
use crate::{
    access, affinity,
    decide::{self, Decision},
    event,
    family::Family,
    local, maps, nat_port,
    packet::{Packet, asked},
    rewrite, ring,
    scratch::{self, Work},
    service, verdict,
};

/// Enters the connection that was decided: reply entry first, which claims the reply tuple, then
/// the forward one, which is left in the scratch room. When another processor has entered the same
/// connection meanwhile, its forward entry is left there, with its next hop.
///
/// When the reply tuple belongs to another connection (two frontends, one endpoint, one client
/// port) this one gets another source port. The steps are functions of their own for the sake of
/// the stack and of the verifier, which then follows them one after another.
#[inline(always)]
pub fn commit<F: Family>(ctx: &TcContext, hook: Hook, sender: u32) -> Result<(), DropReason> {
    match F::commit(ctx, hook as u32, sender) {
        0 => Ok(()),
        reason => Err(DropReason::of_kernel(reason)),
    }
}

/// The body of [`Family::commit`]: returns 0, or the number of a drop reason.
#[inline(always)]
pub fn enter<F: Family>(ctx: &TcContext, hook: u32, sender: u32) -> u32 {
    let hook = Hook::of_kernel(hook);
    match try_enter::<F>(ctx, hook, sender) {
        Ok(()) => 0,
        Err(reason) => reason as u32,
    }
}

#[inline(always)]
fn try_enter<F: Family>(ctx: &TcContext, hook: Hook, sender: u32) -> Result<(), DropReason> {
    let packet = scratch::packet::<F>()?;
    if packet.asked == asked::STALE {
        remove_stale::<F>(packet);
    }
    let place = ring::choose_place::<F>();
    if place == ring::NO_PLACE {
        return Err(DropReason::FlowTableFull);
    }
    if fill::<F>(ctx, packet, sender, place) != 0 {
        return Err(DropReason::StaleEndpoint);
    }
    let decision = &scratch::decision::<F>()?.decision;
    let wants_nat_port = decision.source_nat | decision.nat_port != 0;
    let is_changeable = nat_port::is_changeable(packet);
    // Translated to the node it must have a port that is nobody's here.
    let keeps_port = !(wants_nat_port && is_changeable) && F::claim_reply_tuple() == 0;
    if !keeps_port {
        // What the stack sends must arrive as it was sent.
        if !is_changeable || matches!(hook, Hook::ToPod) || F::claim_nat_port(hook as u32) != 0 {
            return Err(DropReason::NatPortsExhausted);
        }
        if !wants_nat_port {
            verdict::count(hook, outcome::FLOW_PORT_CHANGED, 0);
        }
    }
    ring::vacate::<F>();
    match publish::<F>(packet) {
        published::ENTERED => {}
        published::BY_ANOTHER => return Ok(()),
        published::PORT_LOST => return Err(DropReason::NatPortsExhausted),
        _ => return Err(DropReason::FlowTableFull),
    }
    verdict::count(hook, outcome::FLOW_CREATED, 0);
    remember_affinity::<F>(packet, sender);
    if local::config()?.flags & config::flag::EVENT_NEW_FLOW != 0 {
        event::report_new_flow::<F>(ctx, hook, packet, &scratch::decision::<F>()?.forward);
    }
    Ok(())
}

/// With session affinity, notes where the client was led.
#[inline(always)]
fn remember_affinity<F: Family>(packet: &Packet<F::Address>, sender: u32) {
    let Ok(Work { decision, .. }) = scratch::decision::<F>() else {
        return;
    };
    if decision.affinity_port != 0 {
        affinity::remember(
            &service::client_of::<F>(packet.key.source, sender == decide::NODE),
            decision.affinity_port,
            decision.backend,
            decision.backend_generation,
        );
    }
}

/// Fills both entries in the scratch room. Returns 0, or 1 if an endpoint went away meanwhile.
#[inline(always)]
fn fill<F: Family>(ctx: &TcContext, packet: &Packet<F::Address>, sender: u32, place: u32) -> u32 {
    fill_forward::<F>(ctx, packet, sender, place) | fill_reply::<F>(packet, sender, place)
}

#[inline(never)]
fn fill_forward<F: Family>(
    ctx: &TcContext,
    packet: &Packet<F::Address>,
    sender: u32,
    place: u32,
) -> u32 {
    let Ok(Work {
        decision, forward, ..
    }) = scratch::decision::<F>()
    else {
        return 1;
    };
    begin::<F>(forward, decision, place);
    if next_hop::is_endpoint(sender) {
        let Some(sender) = local::by_number(sender) else {
            return 1;
        };
        forward.ifindex = sender.row.ifindex;
        forward.source_endpoint = sender.number;
        forward.source_generation = sender.row.generation;
        forward.egress_set = sender.row.egress_set;
    }
    forward.tag = packet.key.tag();
    forward.tcp_flags = packet.tcp_flags;
    forward.flags |= u16::from(decision.reply_scope) << flag::PARTNER_SCOPE_SHIFT;
    forward.new_source = decision.source;
    forward.new_destination = decision.destination;
    forward.new_source_port = packet.key.source_port;
    forward.new_destination_port = decision.destination_port;
    forward.next_hop = decision.next_hop;
    forward.next_hop_generation = decision.next_hop_generation;
    forward.ingress_set = decision.ingress_set;
    forward.packets = 1;
    forward.bytes = u64::from(ctx.len());
    0
}

#[inline(never)]
fn fill_reply<F: Family>(packet: &Packet<F::Address>, sender: u32, place: u32) -> u32 {
    let Ok(Work {
        decision, reply, ..
    }) = scratch::decision::<F>()
    else {
        return 1;
    };
    begin::<F>(reply, decision, place);
    if !next_hop::is_endpoint(sender) {
        reply.next_hop = if sender == decide::NODE {
            next_hop::HOST
        } else {
            next_hop::ROUTED
        };
        reply.next_hop_generation = 0;
        reply.ingress_set = 0;
    } else {
        let Some(sender) = local::by_number(sender) else {
            return 1;
        };
        reply.next_hop = sender.number;
        reply.next_hop_generation = sender.row.generation;
        reply.ingress_set = sender.row.ingress_set;
    }
    reply.flags |= flag::REPLY | u16::from(packet.key.scope) << flag::PARTNER_SCOPE_SHIFT;
    reply.new_source = packet.key.destination;
    reply.new_destination = packet.key.source;
    reply.new_source_port = packet.key.destination_port;
    reply.new_destination_port = packet.key.source_port;
    if let Some(local) = local::by_number(local_number(decision.next_hop)) {
        reply.source_endpoint = local.number;
        reply.source_generation = local.row.generation;
        reply.egress_set = local.row.egress_set;
        reply.ifindex = local.row.ifindex;
    }
    0
}

/// The next hop if it is an endpoint of this node, else 0.
#[inline(always)]
fn local_number(number: u32) -> u32 {
    if next_hop::is_endpoint(number) {
        number
    } else {
        0
    }
}

/// What both entries begin with.
#[inline(always)]
fn begin<F: Family>(
    entry: &mut FlowEntry<F::Address>,
    decision: &Decision<F::Address>,
    place: u32,
) {
    let now = now();
    entry.version = flow::VERSION;
    entry.flags = 0;
    if decision.hairpin != 0 {
        entry.flags |= flag::HAIRPIN;
    }
    if decision.source_nat != 0 {
        entry.flags |= flag::SOURCE_NAT;
    }
    entry.tcp_flags = 0;
    entry.ifindex = 0;
    entry.source_endpoint = 0;
    entry.source_generation = 0;
    entry.egress_set = 0;
    entry.backend = decision.backend;
    entry.backend_generation = decision.backend_generation;
    entry.ring = place;
    entry.last_seen = now;
    entry.created = now;
    entry.packets = 0;
    entry.bytes = 0;
}

/// Results of [`publish`].
mod published {
    /// The connection exists.
    pub const ENTERED: u32 = 0;
    /// Another processor has entered it a moment ago.
    pub const BY_ANOTHER: u32 = 1;
    /// There was no room.
    pub const NO_ROOM: u32 = 2;
    /// Another processor took the port of a connection that made way for this one too.
    pub const PORT_LOST: u32 = 3;
}

/// Inserts the forward entry: from here on the connection exists. Returns one of [`published`]; where it is not
/// this processor's connection, its reply entry is taken back.
#[inline(never)]
fn publish<F: Family>(packet: &Packet<F::Address>) -> u32 {
    let Ok(Work {
        forward,
        reply_key,
        reply_inserted,
        ..
    }) = scratch::decision::<F>()
    else {
        return published::NO_ROOM;
    };
    rewrite::complete(forward, &packet.key);
    // Packets of either direction look for it from the moment that it is there.
    note_flows::<F>(forward);
    if insert_forward::<F>(packet) != 0 {
        let result = give_way::<F>(packet);
        if result != published::ENTERED {
            // The reply entry may be the other processor's, or shared with it.
            let is_needed = result == published::BY_ANOTHER && forward.has_partner(reply_key);
            if *reply_inserted != 0 && !is_needed {
                remove_half::<F>(reply_key, &packet.key);
            }
            return result;
        }
    }
    if forward.new_source_port != packet.key.source_port && !is_half::<F>(reply_key, &packet.key) {
        remove::<F>(&packet.key);
        return published::PORT_LOST;
    }
    ring::enter::<F>(forward.ring, &packet.key);
    published::ENTERED
}

/// Notes where packets of either direction look for a connection: with the pod that they are of or for, else with
/// the node.
#[inline(always)]
fn note_flows<F: Family>(forward: &FlowEntry<F::Address>) {
    local::note_flows(forward.source_endpoint);
    let target = local_number(forward.next_hop);
    if target != 0 {
        local::note_flows(target);
    }
    if forward.flags & flag::SOURCE_NAT != 0 {
        local::note_flows(decide::NODE);
    }
    if forward.partner_scope() == scope::DEVICE {
        local::note_flows(next_hop::HOST);
    }
}

/// Inserts the forward entry unless there is one. Returns 0 if it was inserted.
#[inline(never)]
fn insert_forward<F: Family>(packet: &Packet<F::Address>) -> u32 {
    let Ok(Work { forward, .. }) = scratch::decision::<F>() else {
        return 1;
    };
    maps::count_lookup(Lookup::FlowUpdate);
    u32::from(
        F::flows()
            .insert(&packet.key, &*forward, u64::from(BPF_NOEXIST))
            .is_err(),
    )
}

/// There is an entry for the tuple, or no room for one. The connection of another processor is the one that counts,
/// as the packet that it handles may be on its way already: its forward entry and next hop take the place of ours in
/// the scratch room. One that was left behind is removed, both halves, and ours inserted. Returns one of
/// [`published`].
#[inline(never)]
fn give_way<F: Family>(packet: &Packet<F::Address>) -> u32 {
    let Ok(Work {
        decision,
        forward,
        reply_key,
        ..
    }) = scratch::decision::<F>()
    else {
        return published::NO_ROOM;
    };
    maps::count_lookup(Lookup::Flow);
    let Some(other) = F::flows().get_ptr(&packet.key) else {
        return published::NO_ROOM;
    };
    // SAFETY: as in `find`.
    let other = unsafe { &*other };
    let is_of_sender = other.source_endpoint == forward.source_endpoint
        && other.source_generation == forward.source_generation;
    if packet.asked == asked::NOT && (!is_of_sender || flow::age(now(), other.created) > RIGHT_NOW)
    {
        if !other.has_partner(reply_key) {
            remove_half::<F>(&other.partner_key(packet.key.protocol), &packet.key);
        }
        remove::<F>(&packet.key);
        return match insert_forward::<F>(packet) {
            0 => published::ENTERED,
            _ => published::NO_ROOM,
        };
    }
    forward.flags = other.flags;
    forward.new_source = other.new_source;
    forward.new_destination = other.new_destination;
    forward.new_source_port = other.new_source_port;
    forward.new_destination_port = other.new_destination_port;
    forward.address_difference = other.address_difference;
    forward.port_difference = other.port_difference;
    decision.next_hop = other.next_hop;
    // SAFETY: as in `find`.
    if unsafe { access::read_last(&raw const other.tag) } == packet.key.tag() {
        published::BY_ANOTHER
    } else {
        published::NO_ROOM
    }
}

/// Removes both entries of the stale connection that was found for a packet, unless another processor has done so.
#[inline(never)]
fn remove_stale<F: Family>(packet: &Packet<F::Address>) {
    maps::count_lookup(Lookup::Flow);
    let Some(entry) = F::flows().get_ptr(&packet.key) else {
        return;
    };
    // SAFETY: as in `look_at`.
    let (partner, created) =
        unsafe { ((*entry).partner_key(packet.key.protocol), (*entry).created) };
    // SAFETY: as in `find`.
    let tag = unsafe { access::read_last(&raw const (*entry).tag) };
    if tag == packet.key.tag() && created == packet.stale_created {
        remove_half::<F>(&partner, &packet.key);
        remove::<F>(&packet.key);
    }
}
