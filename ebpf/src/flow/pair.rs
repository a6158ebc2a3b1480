//! Both entries of a connection, found from either: what they tell of it, and their removal.

use weir_common::{
    flow::{self, ConnectionState, FlowKey, flag},
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

/// Removes both entries of a connection, by the key of one. (As [`remove_both`] after [`look_at`], with less on the
/// stack.)
#[inline(always)]
pub fn forget<F: Family>(key: &FlowKey<F::Address>) {
    maps::count_lookup(Lookup::Flow);
    if let Some(entry) = F::flows().get_ptr(key) {
        // SAFETY: as in `look_at`.
        let partner = unsafe { (*entry).partner_key(key.protocol) };
        maps::count_lookup(Lookup::Flow);
        let other = F::flows().get_ptr(&partner);
        // SAFETY: as above. The tuple may be another connection's by now.
        if other.is_some_and(|other| unsafe { (*other).has_partner(key) }) {
            remove::<F>(&partner);
        }
    }
    remove::<F>(key);
}

/// Removes an entry.
#[inline(always)]
pub fn remove<F: Family>(key: &FlowKey<F::Address>) {
    maps::count_lookup(Lookup::FlowUpdate);
    // Gone already is as good.
    let _ = F::flows().remove(key);
}
