//! The flow table: finding the entry of a packet, entering a new connection, removing both of its
//! entries.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns},
    programs::TcContext,
};
use weir_common::{
    DropReason,
    address::Address,
    config,
    flow::{self, ConnectionState, FlowEntry, FlowKey, flag, scope},
    limits::NAT_PORT_PROBES,
    lookup::Lookup,
    metrics::{Hook, outcome},
    protocol::{self, tcp_flag},
};

use crate::{
    access,
    deliver::Hop,
    event,
    family::Family,
    local::{self, Local},
    maps,
    packet::Packet,
    rewrite::{self, Rewrite},
    ring,
    scratch::{self, Work},
    verdict,
};

/// A packet's entry, found and checked.
pub struct Found<A> {
    /// Its translation.
    pub rewrite: Rewrite<A>,
    /// Its next hop.
    pub hop: Hop,
}

/// Now, in ticks of the flow table.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: no preconditions.
    flow::now_from_nanoseconds(unsafe { bpf_ktime_get_coarse_ns() })
}

/// Finds the entry of a packet: the one lookup of the fast path. `None` when there is none, or
/// when it is stale and the packet must be decided anew.
#[inline(always)]
pub fn find<F: Family>(
    ctx: &TcContext,
    hook: Hook,
    packet: &Packet<F::Address>,
    sender: Option<Local>,
) -> Option<Found<F::Address>> {
    maps::count_lookup(Lookup::Flow);
    let entry = F::flows().get_ptr_mut(&packet.key)?;
    // SAFETY: the element stays allocated while the program runs; should it be recycled meanwhile,
    // the tag tells.
    let copy = unsafe { Copied::read(entry) };
    if copy.tag != packet.key.tag() || copy.version != flow::VERSION {
        return None;
    }
    if let Some(hop) = check::<F>(ctx, packet, sender, &copy) {
        // SAFETY: as above; a count that hits a recycled element is off by one packet.
        unsafe { touch(entry, &copy, packet.tcp_flags, ctx.len()) };
        return Some(Found {
            rewrite: copy.rewrite,
            hop,
        });
    }
    verdict::count(hook, outcome::FLOW_STALE, 0);
    None
}

/// What the fast path needs of an entry.
struct Copied<A> {
    tag: u32,
    version: u8,
    tcp_flags: u8,
    rewrite: Rewrite<A>,
    next_hop: u32,
    next_hop_generation: u32,
    ifindex: u32,
    source_generation: u32,
    egress_set: u32,
    ingress_set: u32,
    backend: u32,
    backend_generation: u32,
}

impl<A: Address + weir_common::checksum::Summed> Copied<A> {
    /// Copies, and reads the tag last: see [`FlowEntry`].
    ///
    /// # Safety
    ///
    /// `entry` must point to an element of the flow table.
    #[inline(always)]
    unsafe fn read(entry: *const FlowEntry<A>) -> Self {
        // SAFETY: by contract.
        let e = unsafe { &*entry };
        let mut copy = Self {
            tag: 0,
            version: e.version,
            tcp_flags: e.tcp_flags,
            rewrite: Rewrite::of(e),
            next_hop: e.next_hop,
            next_hop_generation: e.next_hop_generation,
            ifindex: e.ifindex,
            source_generation: e.source_generation,
            egress_set: e.egress_set,
            ingress_set: e.ingress_set,
            backend: e.backend,
            backend_generation: e.backend_generation,
        };
        // SAFETY: by contract.
        copy.tag = unsafe { access::read_last(&raw const (*entry).tag) };
        copy
    }
}

/// Whether an entry still holds for this packet; gives its next hop if so.
#[inline(always)]
fn check<F: Family>(
    ctx: &TcContext,
    packet: &Packet<F::Address>,
    sender: Option<Local>,
    copy: &Copied<F::Address>,
) -> Option<Hop> {
    if copy.ifindex != 0 && copy.ifindex != access::ifindex(ctx) {
        return None;
    }
    if let Some(sender) = sender
        && (copy.source_generation != sender.row.generation
            || copy.egress_set != sender.row.egress_set)
    {
        return None;
    }
    let forward_to_service = copy.backend != 0 && copy.rewrite.flags & flag::REPLY == 0;
    if forward_to_service {
        // TCP keeps its endpoint to the end; a new connection of the same tuple does not.
        let reopens = packet.is_syn();
        if reopens && copy.tcp_flags & (tcp_flag::FIN | tcp_flag::RST) != 0 {
            return None;
        }
        if (packet.key.protocol != protocol::TCP || reopens)
            && maps::BACKENDS.get(copy.backend)?.generation != copy.backend_generation
        {
            return None;
        }
    }
    let hop = Hop::find(copy.next_hop).ok()?;
    if hop.generation() != copy.next_hop_generation || hop.ingress_set() != copy.ingress_set {
        return None;
    }
    Some(hop)
}

/// Notes that a packet has passed.
///
/// # Safety
///
/// `entry` must point to an element of the flow table.
#[inline(always)]
unsafe fn touch<A>(entry: *mut FlowEntry<A>, copy: &Copied<A>, tcp_flags: u8, bytes: u32) {
    let flags = copy.tcp_flags | tcp_flags;
    // SAFETY: by contract; all fields are words that may be written at any time.
    unsafe {
        (*entry).last_seen = now();
        (*entry).packets += 1;
        (*entry).bytes += u64::from(bytes);
        if flags != copy.tcp_flags {
            (*entry).tcp_flags = flags;
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
pub fn commit<F: Family>(
    ctx: &TcContext,
    hook: Hook,
    packet: &Packet<F::Address>,
    sender: u32,
) -> Result<(), DropReason> {
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
    if local::config()?.flags & config::flag::EVENT_NEW_FLOW != 0 {
        event::report_new_flow::<F>(ctx, hook, packet, &scratch::decision::<F>()?.forward);
    }
    Ok(())
}

/// Fills both entries in the scratch room. Returns 0, or 1 if an endpoint went away meanwhile.
#[inline(never)]
fn fill<F: Family>(ctx: &TcContext, packet: &Packet<F::Address>, sender: u32, place: u32) -> u32 {
    let Ok(Work { decision, forward, reply, .. }) = scratch::decision::<F>()
    else {
        return 1;
    };
    let Some(sender) = local::by_number(sender) else {
        return 1;
    };
    let Ok(hop) = Hop::find(decision.next_hop) else {
        return 1;
    };
    let now = now();
    let (reply_source, reply_generation, reply_egress, reply_ifindex) = match hop {
        Hop::Endpoint(row) => (
            decision.next_hop,
            row.generation,
            row.egress_set,
            row.ifindex,
        ),
        _ => (0, 0, 0, 0),
    };
    let hairpin = if decision.hairpin != 0 {
        flag::HAIRPIN
    } else {
        0
    };

    forward.tag = packet.key.tag();
    forward.version = flow::VERSION;
    forward.tcp_flags = packet.tcp_flags;
    forward.flags = u16::from(decision.reply_scope) << flag::PARTNER_SCOPE_SHIFT | hairpin;
    forward.new_source = decision.source;
    forward.new_destination = decision.destination;
    forward.new_source_port = packet.key.source_port;
    forward.new_destination_port = decision.destination_port;
    forward.next_hop = decision.next_hop;
    forward.next_hop_generation = hop.generation();
    forward.ifindex = sender.row.ifindex;
    forward.source_endpoint = sender.number;
    forward.source_generation = sender.row.generation;
    forward.egress_set = sender.row.egress_set;
    forward.ingress_set = hop.ingress_set();
    forward.packets = 1;
    forward.bytes = u64::from(ctx.len());

    reply.version = flow::VERSION;
    reply.tcp_flags = 0;
    reply.flags = flag::REPLY | u16::from(packet.key.scope) << flag::PARTNER_SCOPE_SHIFT | hairpin;
    reply.new_source = packet.key.destination;
    reply.new_destination = packet.key.source;
    reply.new_source_port = packet.key.destination_port;
    reply.new_destination_port = packet.key.source_port;
    reply.next_hop = sender.number;
    reply.next_hop_generation = sender.row.generation;
    reply.ifindex = if decision.reply_scope == scope::POD {
        reply_ifindex
    } else {
        0
    };
    reply.source_endpoint = reply_source;
    reply.source_generation = reply_generation;
    reply.egress_set = reply_egress;
    reply.ingress_set = sender.row.ingress_set;
    reply.packets = 0;
    reply.bytes = 0;

    for entry in [forward, reply] {
        entry.backend = decision.backend;
        entry.backend_generation = decision.backend_generation;
        entry.ring = place;
        entry.last_seen = now;
        entry.created = now;
    }
    0
}

/// Inserts the reply entry. Returns 0, or 1 if its tuple belongs to another connection.
#[inline(never)]
fn claim_reply_tuple<F: Family>(packet: &Packet<F::Address>) -> u32 {
    let Ok(Work { forward, reply, .. }) = scratch::decision::<F>() else {
        return 1;
    };
    let key = forward.partner_key(packet.key.protocol);
    reply.tag = key.tag();
    reply.flags &= !(flag::REWRITE_SOURCE | flag::REWRITE_DESTINATION);
    rewrite::complete(reply, &key);
    maps::count_lookup(Lookup::FlowUpdate);
    if F::flows()
        .insert(&key, &*reply, u64::from(BPF_NOEXIST))
        .is_ok()
    {
        return 0;
    }
    // Another processor enters the same connection just now, or a former life of it left this
    // half: the new entry is as good.
    maps::count_lookup(Lookup::Flow);
    let same = match F::flows().get_ptr(&key) {
        // SAFETY: as in `find`.
        Some(other) => packet.key == unsafe { (*other).partner_key(packet.key.protocol) },
        None => false,
    };
    u32::from(!(same && F::flows().insert(&key, &*reply, u64::from(BPF_ANY)).is_ok()))
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
    let Ok(Work { forward, .. }) = scratch::decision::<F>() else {
        return 1;
    };
    rewrite::complete(forward, &packet.key);
    maps::count_lookup(Lookup::FlowUpdate);
    if F::flows()
        .insert(&packet.key, &*forward, u64::from(BPF_ANY))
        .is_err()
    {
        remove::<F>(&forward.partner_key(packet.key.protocol));
        return 1;
    }
    ring::enter::<F>(forward.ring, &packet.key);
    local::note_flows(forward.source_endpoint);
    if weir_common::next_hop::is_endpoint(forward.next_hop) {
        local::note_flows(forward.next_hop);
    }
    0
}

/// What the ring and `commit` need to know of a connection.
pub struct Glance<A> {
    /// Key of the other direction's entry.
    pub partner: FlowKey<A>,
    /// Place in the ring.
    pub ring: u32,
    /// State of the connection.
    pub state: ConnectionState,
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
    let (partner, ring, flags, last_seen) = unsafe {
        (
            (*entry).partner_key(key.protocol),
            (*entry).ring,
            (*entry).tcp_flags,
            (*entry).last_seen,
        )
    };
    maps::count_lookup(Lookup::Flow);
    let (reply_flags, replied, partner_seen) = match F::flows().get_ptr(&partner) {
        // SAFETY: as above.
        Some(p) => unsafe { ((*p).tcp_flags, (*p).packets != 0, (*p).last_seen) },
        None => (0, false, last_seen),
    };
    let state = ConnectionState::new(key.protocol, flags, reply_flags, replied);
    Some(Glance {
        partner,
        ring,
        state,
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
