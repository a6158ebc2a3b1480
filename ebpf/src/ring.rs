//! The flow ring: a place for every connection, handed out in turn. It ages the flow table without
//! the agent and decides who gives way when the table is full.
//!
//! A connection takes the place under the hand. Where that place belongs to a connection that is
//! idle beyond its time-out, both its entries are removed. Where it belongs to a live one the hand
//! goes on, a bounded number of steps; then the one of those seen that matters least gives way, when the
//! new connection has everything else that it needs:
//! closed before unanswered, unanswered before answered, and the longest idle first. Idle tables
//! cost nothing, and a new connection costs a bounded number of lookups.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use weir_common::{
    flow::{self, ConnectionState, FlowKey},
    limits::FLOW_RING_PROBES,
    metrics::{Hook, outcome},
};

use crate::{family::Family, flow as flows, local, maps, scratch, verdict};

/// No place could be had.
pub const NO_PLACE: u32 = u32::MAX;

/// Ends the connection that has the chosen place, if there is one.
#[inline(always)]
pub fn vacate<F: Family>() {
    if let Ok(work) = scratch::decision::<F>()
        && work.candidate != NO_PLACE
    {
        evict::<F>();
    }
}

/// Gives a place for a new connection, under the hand or a few after it. A connection that is alive may still have
/// it, and is the candidate in the scratch room then: [`vacate`] ends it, once everything else that the new one needs is
/// there.
///
/// What was seen so far stands in the scratch room, of which the verifier knows nothing: it then
/// follows one path from step to step.
#[inline(always)]
pub fn choose_place<F: Family>() -> u32 {
    let Ok(work) = scratch::decision::<F>() else {
        return NO_PLACE;
    };
    work.candidate = NO_PLACE;
    let mut i = 0;
    while i < FLOW_RING_PROBES {
        i += 1;
        let place = next_place::<F>();
        if place == NO_PLACE {
            return NO_PLACE;
        }
        if F::examine_place(place) != 0 {
            work.candidate = NO_PLACE;
            return place;
        }
    }
    work.candidate
}

/// Bits of a merit that count idle time, most merit for the least.
const MERIT_AGE_BITS: u32 = 28;

/// Merit that any connection has that is not over.
pub const LEAST_MERIT_UNANSWERED: u32 = 1 << MERIT_AGE_BITS;

/// What speaks for a connection that has been idle for so many ticks: the higher, the longer it stays.
#[inline(always)]
pub fn merit(state: ConnectionState, idle: u32) -> u32 {
    let most = (1 << MERIT_AGE_BITS) - 1;
    let youth = most - if idle > most { most } else { idle };
    state.eviction_rank() << MERIT_AGE_BITS | youth
}

/// Returns 1 if nobody has a place, or nobody any more: an idle connection is removed here. Else
/// the place becomes the candidate for eviction if its connection matters less than the former
/// candidate's. (The body of [`Family::examine_place`].)
#[inline(always)]
pub fn examine_place<F: Family>(place: u32) -> u32 {
    let Ok(config) = local::config() else {
        return 1;
    };
    let Ok(work) = scratch::decision::<F>() else {
        return 1;
    };
    let Some(key) = F::ring().get(place) else {
        return 1;
    };
    if key.protocol == 0 {
        return 1;
    }
    let Some(tenant) = flows::look_at::<F>(key) else {
        return 1;
    };
    if tenant.ring != place {
        return 1;
    }
    let idle = tenant.idle(flows::now());
    if idle
        > config
            .timeouts
            .of(tenant.state)
            .saturating_mul(flow::TICKS_PER_SECOND)
    {
        flows::remove_both::<F>(key, &tenant);
        verdict::count(Hook::FromPod, outcome::FLOW_EXPIRED, 0);
        return 1;
    }
    let merit = merit(tenant.state, idle);
    if work.candidate == NO_PLACE || merit < work.candidate_merit {
        work.candidate = place;
        work.candidate_merit = merit;
    }
    0
}

/// Removes the candidate's connection.
#[inline(never)]
fn evict<F: Family>() {
    let Ok(work) = scratch::decision::<F>() else {
        return;
    };
    let Some(key) = F::ring().get(work.candidate) else {
        return;
    };
    let Some(tenant) = flows::look_at::<F>(key) else {
        return;
    };
    // It may be another's by now, or a former life of the connection that is entered, which is replaced as such.
    let is_former_life = scratch::packet::<F>().is_ok_and(|packet| packet.key == *key);
    if tenant.ring != work.candidate || is_former_life {
        return;
    }
    flows::remove_both::<F>(key, &tenant);
    verdict::count(Hook::FromPod, outcome::FLOW_EVICTED, 0);
}

/// Enters the connection with the forward key `key` at its place.
#[inline(always)]
pub fn enter<F: Family>(place: u32, key: &FlowKey<F::Address>) {
    if let Some(slot) = F::ring().get_ptr_mut(place) {
        // SAFETY: an element of an array. A reader may see a torn key: it then finds no flow, or
        // one that has another place, and takes the place for free.
        unsafe { *slot = *key };
    }
}

/// The place under the hand, which moves on; [`NO_PLACE`] if there is no ring.
#[inline(always)]
fn next_place<F: Family>() -> u32 {
    let Ok(config) = local::config() else {
        return NO_PLACE;
    };
    let Some(state) = maps::FLOW_RING_STATE.get_ptr_mut(F::RING_STATE) else {
        return NO_PLACE;
    };
    if config.connections == 0 {
        return NO_PLACE;
    }
    // Not relaxed: LLVM's BPF back end then takes the instruction that does not fetch, and the hand
    // would seem to stand still.
    // SAFETY: an aligned word of an array that lives as long as the program; every processor
    // changes it by this instruction only.
    let hand =
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::AcqRel }>(&raw mut (*state).hand, 1) };
    (hand % u64::from(config.connections)) as u32
}
