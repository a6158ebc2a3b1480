//! The flow table: finding the entry of a packet, entering a new connection, removing both of its
//! entries.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns},
    programs::TcContext,
};
use weir_common::{
    DropReason, config,
    flow::{self, ConnectionState, FlowEntry, FlowKey, flag},
    limits::NAT_PORT_PROBES,
    lookup::Lookup,
    metrics::{Hook, outcome},
    protocol::{self, tcp_flag},
};

use crate::{
    access, affinity,
    decide::{self, Decision},
    deliver::Hop,
    event,
    family::Family,
    local::{self, Local},
    maps,
    packet::Packet,
    rewrite, ring,
    scratch::{self, Work},
    service, verdict,
};

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
        packet.is_unknown = 1;
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

/// Enters the connection that was decided: reply entry first, which claims the reply tuple, then
/// the forward one, which is left in the scratch room.
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
    let hook = if hook == Hook::FromPod as u32 {
        Hook::FromPod
    } else {
        Hook::FromHost
    };
    match try_enter::<F>(ctx, hook, sender) {
        Ok(()) => 0,
        Err(reason) => reason as u32,
    }
}

#[inline(always)]
fn try_enter<F: Family>(ctx: &TcContext, hook: Hook, sender: u32) -> Result<(), DropReason> {
    let packet = scratch::packet::<F>()?;
    let place = ring::take_place::<F>(packet);
    if place == ring::NO_PLACE {
        return Err(DropReason::FlowTableFull);
    }
    if fill::<F>(ctx, packet, sender, place) != 0 {
        return Err(DropReason::StaleEndpoint);
    }
    let mut attempt = 0;
    while claim_reply_tuple::<F>(packet) != 0 {
        attempt += 1;
        if attempt > NAT_PORT_PROBES || change_source_port::<F>(packet) != 0 {
            return Err(DropReason::NatPortsExhausted);
        }
    }
    if attempt != 0 {
        verdict::count(hook, outcome::FLOW_PORT_CHANGED, 0);
    }
    if publish::<F>(packet) != 0 {
        return Err(DropReason::FlowTableFull);
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
    let hairpin = if decision.hairpin != 0 {
        flag::HAIRPIN
    } else {
        0
    };
    begin::<F>(forward, decision, place);
    if sender != decide::NODE {
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
    forward.flags = u16::from(decision.reply_scope) << flag::PARTNER_SCOPE_SHIFT | hairpin;
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
    let hairpin = if decision.hairpin != 0 {
        flag::HAIRPIN
    } else {
        0
    };
    begin::<F>(reply, decision, place);
    if sender == decide::NODE {
        reply.next_hop = weir_common::next_hop::HOST;
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
    reply.flags = flag::REPLY | u16::from(packet.key.scope) << flag::PARTNER_SCOPE_SHIFT | hairpin;
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
fn local_number(next_hop: u32) -> u32 {
    if weir_common::next_hop::is_endpoint(next_hop) {
        next_hop
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
    remove::<F>(&glance.partner);
    remove::<F>(reply_key);
    0
}

/// Inserts the reply entry. Returns 0, or 1 if its tuple belongs to another connection.
#[inline(never)]
fn claim_reply_tuple<F: Family>(packet: &Packet<F::Address>) -> u32 {
    let Ok(Work {
        forward,
        reply,
        reply_key,
        ..
    }) = scratch::decision::<F>()
    else {
        return 1;
    };
    *reply_key = forward.partner_key(packet.key.protocol);
    reply.tag = reply_key.tag();
    reply.flags &= !(flag::REWRITE_SOURCE | flag::REWRITE_DESTINATION);
    rewrite::complete(reply, reply_key);
    maps::count_lookup(Lookup::FlowUpdate);
    if F::flows()
        .insert(&*reply_key, &*reply, u64::from(BPF_NOEXIST))
        .is_ok()
    {
        return 0;
    }
    // Another processor enters the same connection just now, or a former life of it left this
    // half: the new entry is as good.
    maps::count_lookup(Lookup::Flow);
    let same = match F::flows().get_ptr(&*reply_key) {
        // SAFETY: as in `find`.
        Some(other) => unsafe { (*other).has_partner(&packet.key) },
        None => false,
    };
    u32::from(
        !(same
            && F::flows()
                .insert(&*reply_key, &*reply, u64::from(BPF_ANY))
                .is_ok()),
    )
}

/// Gives the connection another source port. Returns 0, or 1 if it cannot have one.
#[inline(never)]
fn change_source_port<F: Family>(packet: &Packet<F::Address>) -> u32 {
    let Ok(Work { forward, .. }) = scratch::decision::<F>() else {
        return 1;
    };
    let Ok(config) = local::config() else {
        return 1;
    };
    if !matches!(packet.key.protocol, protocol::TCP | protocol::UDP) || config.nat_port_count == 0 {
        return 1;
    }
    // SAFETY: no preconditions.
    let random = unsafe { bpf_get_prandom_u32() } % u32::from(config.nat_port_count);
    let port = config.nat_port_first.wrapping_add(random as u16);
    forward.new_source_port = weir_common::Port::new(port);
    0
}

/// Inserts the forward entry: from here on the connection exists. Returns 0, or 1 if there was no
/// room, and then takes the reply entry back.
#[inline(never)]
fn publish<F: Family>(packet: &Packet<F::Address>) -> u32 {
    let Ok(Work {
        forward, reply_key, ..
    }) = scratch::decision::<F>()
    else {
        return 1;
    };
    rewrite::complete(forward, &packet.key);
    let entered = packet.is_unknown != 0 && {
        maps::count_lookup(Lookup::FlowUpdate);
        F::flows()
            .insert(&packet.key, &*forward, u64::from(BPF_NOEXIST))
            .is_ok()
    };
    if !entered && replace::<F>(&packet.key, forward, reply_key) != 0 {
        remove::<F>(reply_key);
        return 1;
    }
    ring::enter::<F>(forward.ring, &packet.key);
    local::note_flows(forward.source_endpoint);
    let target = local_number(forward.next_hop);
    if target != 0 {
        local::note_flows(target);
    }
    0
}

/// Puts the forward entry in place of one that another processor has entered for the same tuple
/// since, or that is stale. When endpoints have just changed that one may lead elsewhere: its
/// replying half goes with it. Returns 0, or 1 if there was no room.
#[inline(always)]
fn replace<F: Family>(
    key: &FlowKey<F::Address>,
    forward: &FlowEntry<F::Address>,
    reply_key: &FlowKey<F::Address>,
) -> u32 {
    if let Some(other) = look_at::<F>(key)
        && other.partner != *reply_key
    {
        remove::<F>(&other.partner);
    }
    maps::count_lookup(Lookup::FlowUpdate);
    u32::from(F::flows().insert(key, forward, u64::from(BPF_ANY)).is_err())
}

/// What the ring and `commit` need to know of a connection.
pub struct Glance<A> {
    /// Key of the other direction's entry.
    pub partner: FlowKey<A>,
    /// Place in the ring.
    pub ring: u32,
    /// State of the connection.
    pub state: ConnectionState,
    /// Either side has said that it sends no more.
    pub over: bool,
    last_seen: u32,
    partner_seen: u32,
}

impl<A> Glance<A> {
    /// Ticks since a packet passed in either direction.
    #[inline(always)]
    pub fn idle(&self, now: u32) -> u32 {
        let (own, other) = (
            flow::age(now, self.last_seen),
            flow::age(now, self.partner_seen),
        );
        if own < other { own } else { other }
    }
}

/// Looks at a connection by the key of one entry, `None` if there is none.
#[inline(always)]
pub fn look_at<F: Family>(key: &FlowKey<F::Address>) -> Option<Glance<F::Address>> {
    maps::count_lookup(Lookup::Flow);
    let entry = F::flows().get_ptr(key)?;
    // SAFETY: as in `find`: a recycled element gives a glance at another connection, and what
    // follows from it is right for that one or finds nothing.
    let (partner, ring, flags, last_seen, packets, is_reply) = unsafe {
        (
            (*entry).partner_key(key.protocol),
            (*entry).ring,
            (*entry).tcp_flags,
            (*entry).last_seen,
            (*entry).packets,
            (*entry).flags & flag::REPLY != 0,
        )
    };
    maps::count_lookup(Lookup::Flow);
    let (other_flags, other_packets, partner_seen) = match F::flows().get_ptr(&partner) {
        // SAFETY: as above.
        Some(p) => unsafe { ((*p).tcp_flags, (*p).packets, (*p).last_seen) },
        None => (0, 0, last_seen),
    };
    let replied = if is_reply { packets } else { other_packets } != 0;
    let state = ConnectionState::new(key.protocol, flags, other_flags, replied);
    let over = (flags | other_flags) & (tcp_flag::FIN | tcp_flag::RST) != 0;
    Some(Glance {
        partner,
        ring,
        state,
        over,
        last_seen,
        partner_seen,
    })
}

/// Removes an entry.
#[inline(always)]
pub fn remove<F: Family>(key: &FlowKey<F::Address>) {
    maps::count_lookup(Lookup::FlowUpdate);
    // Gone already is as good.
    let _ = F::flows().remove(key);
}
