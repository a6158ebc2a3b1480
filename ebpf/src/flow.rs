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
    config::{self, Config},
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
        access::compiler_barrier();
        // SAFETY: by contract.
        copy.tag = unsafe { (&raw const (*entry).tag).read_volatile() };
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
/// port) this one gets another source port.
#[inline(always)]
pub fn commit<F: Family>(
    ctx: &TcContext,
    hook: Hook,
    packet: &Packet<F::Address>,
    sender: u32,
) -> Result<(), DropReason> {
    match enter::<F>(ctx, hook as u32, packet, sender) {
        0 => Ok(()),
        reason => Err(DropReason::of_kernel(reason)),
    }
}

/// A function of its own for the sake of the stack. Returns 0, or the number of a drop reason.
#[inline(never)]
fn enter<F: Family>(ctx: &TcContext, hook: u32, packet: &Packet<F::Address>, sender: u32) -> u32 {
    let hook = if hook == Hook::FromPod as u32 {
        Hook::FromPod
    } else {
        Hook::FromNetdev
    };
    match try_enter::<F>(ctx, hook, packet, sender) {
        Ok(()) => 0,
        Err(reason) => reason as u32,
    }
}

#[inline(always)]
fn try_enter<F: Family>(
    ctx: &TcContext,
    hook: Hook,
    packet: &Packet<F::Address>,
    sender: u32,
) -> Result<(), DropReason> {
    let config = local::config()?;
    let sender = local::by_number(sender).ok_or(DropReason::StaleEndpoint)?;
    let Work {
        decision,
        forward,
        reply,
    } = scratch::decision::<F>()?;
    let hop = Hop::find(decision.next_hop)?;
    let now = now();

    // A stale entry of the same tuple: its partner goes, its place in the ring is taken over.
    let ring = match look_at::<F>(&packet.key) {
        Some(old) => {
            remove::<F>(&old.partner);
            old.ring
        }
        None => ring::claim::<F>(config, now)?,
    };

    let (reply_source, reply_generation, reply_egress, reply_ifindex) = match hop {
        Hop::Endpoint(row) => (
            decision.next_hop,
            row.generation,
            row.egress_set,
            row.ifindex,
        ),
        _ => (0, 0, 0, 0),
    };
    *forward = FlowEntry {
        tag: packet.key.tag(),
        version: flow::VERSION,
        tcp_flags: packet.tcp_flags,
        flags: u16::from(decision.reply_scope) << flag::PARTNER_SCOPE_SHIFT
            | if decision.hairpin != 0 {
                flag::HAIRPIN
            } else {
                0
            },
        new_source: decision.source,
        new_destination: decision.destination,
        new_source_port: packet.key.source_port,
        new_destination_port: decision.destination_port,
        address_difference: 0,
        port_difference: 0,
        next_hop: decision.next_hop,
        next_hop_generation: hop.generation(),
        ifindex: sender.row.ifindex,
        source_endpoint: sender.number,
        source_generation: sender.row.generation,
        egress_set: sender.row.egress_set,
        ingress_set: hop.ingress_set(),
        backend: decision.backend,
        backend_generation: decision.backend_generation,
        ring,
        last_seen: now,
        created: now,
        packets: 1,
        bytes: u64::from(ctx.len()),
    };
    *reply = FlowEntry {
        tag: 0,
        version: flow::VERSION,
        tcp_flags: 0,
        flags: flag::REPLY
            | u16::from(packet.key.scope) << flag::PARTNER_SCOPE_SHIFT
            | if decision.hairpin != 0 {
                flag::HAIRPIN
            } else {
                0
            },
        new_source: packet.key.destination,
        new_destination: packet.key.source,
        new_source_port: packet.key.destination_port,
        new_destination_port: packet.key.source_port,
        address_difference: 0,
        port_difference: 0,
        next_hop: sender.number,
        next_hop_generation: sender.row.generation,
        ifindex: if decision.reply_scope == scope::POD {
            reply_ifindex
        } else {
            0
        },
        source_endpoint: reply_source,
        source_generation: reply_generation,
        egress_set: reply_egress,
        ingress_set: sender.row.ingress_set,
        backend: decision.backend,
        backend_generation: decision.backend_generation,
        ring,
        last_seen: now,
        created: now,
        packets: 0,
        bytes: 0,
    };
    claim_reply_tuple::<F>(hook, config, packet, forward, reply)?;
    rewrite::complete(forward, &packet.key);
    maps::count_lookup(Lookup::FlowUpdate);
    if F::flows()
        .insert(&packet.key, &*forward, u64::from(BPF_ANY))
        .is_err()
    {
        remove::<F>(&forward.partner_key(packet.key.protocol));
        return Err(DropReason::FlowTableFull);
    }
    ring::enter::<F>(ring, &packet.key);
    local::note_flows(sender.number);
    if reply_source != 0 {
        local::note_flows(reply_source);
    }
    verdict::count(hook, outcome::FLOW_CREATED, 0);
    if config.flags & config::flag::EVENT_NEW_FLOW != 0 {
        event::report_new_flow::<F>(ctx, hook, packet, forward);
    }
    Ok(())
}

/// Inserts the reply entry, under another source port if need be.
#[inline(always)]
fn claim_reply_tuple<F: Family>(
    hook: Hook,
    config: &Config,
    packet: &Packet<F::Address>,
    forward: &mut FlowEntry<F::Address>,
    reply: &mut FlowEntry<F::Address>,
) -> Result<(), DropReason> {
    let mut attempt = 0;
    while attempt <= NAT_PORT_PROBES {
        let key = forward.partner_key(packet.key.protocol);
        reply.tag = key.tag();
        reply.flags &= !(flag::REWRITE_SOURCE | flag::REWRITE_DESTINATION);
        rewrite::complete(reply, &key);
        maps::count_lookup(Lookup::FlowUpdate);
        if F::flows()
            .insert(&key, &*reply, u64::from(BPF_NOEXIST))
            .is_ok()
        {
            if attempt != 0 {
                verdict::count(hook, outcome::FLOW_PORT_CHANGED, 0);
            }
            return Ok(());
        }
        match look_at::<F>(&key) {
            // Another processor enters the same connection just now, or a former life of it left
            // this half: the new entry is as good.
            Some(other) if other.partner == packet.key => {
                return F::flows()
                    .insert(&key, &*reply, u64::from(BPF_ANY))
                    .map_err(|_| DropReason::FlowTableFull);
            }
            Some(_) => {}
            None => return Err(DropReason::FlowTableFull),
        }
        if !matches!(packet.key.protocol, protocol::TCP | protocol::UDP)
            || config.nat_port_count == 0
        {
            break;
        }
        attempt += 1;
        // SAFETY: no preconditions.
        let random = unsafe { bpf_get_prandom_u32() } % u32::from(config.nat_port_count);
        forward.new_source_port =
            weir_common::Port::new(config.nat_port_first.wrapping_add(random as u16));
    }
    Err(DropReason::NatPortsExhausted)
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

/// Removes both entries of a connection.
#[inline(always)]
pub fn remove_pair<F: Family>(key: &FlowKey<F::Address>) {
    if let Some(glance) = look_at::<F>(key) {
        remove::<F>(&glance.partner);
    }
    remove::<F>(key);
}

#[inline(always)]
fn remove<F: Family>(key: &FlowKey<F::Address>) {
    maps::count_lookup(Lookup::FlowUpdate);
    // Gone already is as good.
    let _ = F::flows().remove(key);
}
