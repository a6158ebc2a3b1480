//! Both entries of a connection, found from either: what they tell of it, and their removal.

use core::intrinsics::{AtomicOrdering, atomic_cxchg};

use weir_common::{
    Port,
    address::Address,
    flow::{self, ConnectionState, FlowKey, flag},
    hash,
    lookup::Lookup,
    protocol::tcp_flag,
};

use crate::{access, family::Family, maps};

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
    /// The entry at `partner` knows this one: it is not another connection's.
    is_paired: bool,
    created: u32,
    last_seen: u32,
    partner_seen: u32,
}

impl<A: Address> Glance<A> {
    /// What tells this connection from another one that has its tuple later: a hash of when it began, and of the
    /// far side of the entry that was looked at.
    #[inline(always)]
    pub fn identity(&self) -> u32 {
        identity(self.created, self.partner.source, self.partner.source_port)
    }

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
    let (partner, ring, flags, last_seen, created, packets, is_reply) = unsafe {
        (
            (*entry).partner_key(key.protocol),
            (*entry).ring,
            (*entry).tcp_flags,
            (*entry).last_seen,
            (*entry).created,
            (*entry).packets,
            (*entry).flags & flag::REPLY != 0,
        )
    };
    maps::count_lookup(Lookup::Flow);
    let other = F::flows().get_ptr(&partner);
    // SAFETY: as above.
    let other = other.filter(|other| unsafe { (**other).has_partner(key) });
    let (other_flags, other_packets, partner_seen) = match other {
        // SAFETY: as above.
        Some(p) => unsafe { ((*p).tcp_flags, (*p).packets, (*p).last_seen) },
        None => (0, 0, last_seen),
    };
    let replied = if is_reply { packets } else { other_packets } != 0;
    let lasted = access::forget_bounds(flow::lasted(created, last_seen, partner_seen));
    let state = ConnectionState::new(key.protocol, flags, other_flags, replied, lasted);
    let over = (flags | other_flags) & (tcp_flag::FIN | tcp_flag::RST) != 0;
    Some(Glance {
        partner,
        ring,
        state,
        over,
        is_paired: other.is_some(),
        created,
        last_seen,
        partner_seen,
    })
}

/// Removes both entries of a connection that was looked at by `key`.
#[inline(always)]
pub fn remove_both<F: Family>(key: &FlowKey<F::Address>, glance: &Glance<F::Address>) {
    if glance.is_paired {
        remove::<F>(&glance.partner);
    }
    remove::<F>(key);
}

/// See [`Glance::identity`].
#[inline(always)]
fn identity<A: Address>(created: u32, far: A, far_port: Port) -> u32 {
    created ^ hash::mix([far.fold(), u32::from(far_port.word())])
}

/// Bit that is flipped in the time when an entry began, by the processor that removes it: of several that want its
/// tuple one wins, and nobody removes what the winner has entered since.
const ENDED: u32 = 1 << 31;

/// Removes both entries of the connection that was looked at by `key` and had this identity. Returns 1, or 0 if
/// another processor does, has done so, or has entered another connection since.
#[inline(always)]
pub fn forget<F: Family>(key: &FlowKey<F::Address>, expected: u32) -> u32 {
    maps::count_lookup(Lookup::Flow);
    let Some(entry) = F::flows().get_ptr_mut(key) else {
        return 0;
    };
    // SAFETY: as in `look_at`; a word of the element that may be written at any time.
    let (partner, is_mine) = unsafe {
        let created = access::read_last(&raw const (*entry).created);
        let (far, far_port) = ((*entry).new_destination, (*entry).new_destination_port);
        if identity(created, far, far_port) != expected {
            return 0;
        }
        (
            (*entry).partner_key(key.protocol),
            atomic_cxchg::<u32, { AtomicOrdering::AcqRel }, { AtomicOrdering::Acquire }>(
                &raw mut (*entry).created,
                created,
                created ^ ENDED,
            )
            .1,
        )
    };
    if !is_mine {
        return 0;
    }
    // It may be another connection's by now.
    remove_half::<F>(&partner, key);
    remove::<F>(key);
    1
}

/// Removes the entry at `key` if `partner` is the key of its other direction: else it is another connection's.
#[inline(always)]
pub fn remove_half<F: Family>(key: &FlowKey<F::Address>, partner: &FlowKey<F::Address>) {
    if is_half::<F>(key, partner) {
        remove::<F>(key);
    }
}

/// Whether there is an entry at `key`, and `partner` is the key of its other direction.
#[inline(always)]
pub fn is_half<F: Family>(key: &FlowKey<F::Address>, partner: &FlowKey<F::Address>) -> bool {
    maps::count_lookup(Lookup::Flow);
    let entry = F::flows().get_ptr(key);
    // SAFETY: as in `look_at`.
    entry.is_some_and(|entry| unsafe { (*entry).has_partner(partner) })
}

/// Removes an entry.
#[inline(always)]
pub fn remove<F: Family>(key: &FlowKey<F::Address>) {
    maps::count_lookup(Lookup::FlowUpdate);
    // Gone already is as good.
    let _ = F::flows().remove(key);
}
