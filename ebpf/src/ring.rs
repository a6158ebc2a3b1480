//! The flow ring: a place for every connection, handed out in turn. It ages the flow table without
//! the agent and decides who gives way when the table is full.
//!
//! A connection takes the place under the hand. Where that place belongs to a connection that is
//! idle beyond its time-out, both its entries are removed. Where it belongs to a live one the hand
//! goes on, a bounded number of steps; then the one of those seen that matters least gives way:
//! closed before unanswered, unanswered before answered, and the longest idle first. Idle tables
//! cost nothing, and a new connection costs a bounded number of lookups.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use weir_common::{
    DropReason,
    config::Config,
    flow::{self, ConnectionState, FlowKey},
    limits::FLOW_RING_PROBES,
    metrics::{Hook, outcome},
};

use crate::{family::Family, flow as flows, maps, verdict};

/// No place could be had.
const NO_PLACE: u32 = u32::MAX;

/// Hands out a place for a new connection; its former tenant, if any, is gone when this returns.
#[inline(always)]
pub fn claim<F: Family>(config: &Config, now: u32) -> Result<u32, DropReason> {
    match find_place::<F>(config, now) {
        NO_PLACE => Err(DropReason::FlowTableFull),
        place => Ok(place),
    }
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

#[inline(never)]
fn find_place<F: Family>(config: &Config, now: u32) -> u32 {
    let mut best = NO_PLACE;
    let mut best_rank = u32::MAX;
    let mut best_age = 0;
    let mut i = 0;
    while i < FLOW_RING_PROBES {
        i += 1;
        let Some(place) = next_place::<F>(config.connections) else {
            return NO_PLACE;
        };
        let Some(key) = tenant_key::<F>(place) else {
            return place;
        };
        let Some(tenant) = flows::look_at::<F>(&key) else {
            return place;
        };
        if tenant.ring != place {
            return place;
        }
        if tenant.idle(now)
            > config
                .timeouts
                .of(tenant.state)
                .saturating_mul(flow::TICKS_PER_SECOND)
        {
            flows::remove_pair::<F>(&key);
            verdict::count(Hook::FromPod, outcome::FLOW_EXPIRED, 0);
            return place;
        }
        let (rank, age) = (
            ConnectionState::eviction_rank(tenant.state),
            tenant.idle(now),
        );
        if rank < best_rank || (rank == best_rank && age > best_age) || best == NO_PLACE {
            best = place;
            best_rank = rank;
            best_age = age;
        }
    }
    if best != NO_PLACE
        && let Some(key) = tenant_key::<F>(best)
    {
        flows::remove_pair::<F>(&key);
        verdict::count(Hook::FromPod, outcome::FLOW_EVICTED, 0);
    }
    best
}

/// The place under the hand, which moves on.
#[inline(always)]
fn next_place<F: Family>(connections: u32) -> Option<u32> {
    let state = maps::FLOW_RING_STATE.get_ptr_mut(F::RING_STATE)?;
    if connections == 0 {
        return None;
    }
    // SAFETY: an aligned word of an array that lives as long as the program; every processor
    // changes it by this instruction only.
    let hand =
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*state).hand, 1) };
    Some((hand % u64::from(connections)) as u32)
}

/// Key of the connection that has a place, `None` if it is free.
#[inline(always)]
fn tenant_key<F: Family>(place: u32) -> Option<FlowKey<F::Address>> {
    let key = *F::ring().get(place)?;
    if key.protocol == 0 { None } else { Some(key) }
}
