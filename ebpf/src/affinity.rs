//! Session affinity (`sessionAffinity: ClientIP`): the endpoint that a client of a Service port was
//! given last. Packets and sockets ask and tell here alike, so that both get one answer.

use aya_ebpf::bindings::BPF_ANY;
use weir_common::{
    Ipv6,
    affinity::{Affinity, AffinityKey},
    flow,
    lookup::Lookup,
    service::{endpoint_set, service_port_of_row},
};

use crate::{flow::now, maps, service};

/// Number of the backend that `client` was given, if that is not too long ago and the backend still
/// belongs to the set that `state_row` stands for; else 0. (Not inlined for the sake of the stack.)
#[inline(never)]
pub fn find(state_row: u32, client: &Ipv6) -> u32 {
    let service_port = service_port_of_row(state_row);
    let key = AffinityKey {
        client: *client,
        service_port,
    };
    maps::count_lookup(Lookup::Affinity);
    // SAFETY: words, read at once; a recycled entry names a backend that is checked below.
    let Some(entry) = (unsafe { maps::AFFINITY.get(&key) }) else {
        return 0;
    };
    let (number, generation, last_used) = (entry.backend, entry.generation, entry.last_used);
    let Some(timeout) = maps::AFFINITY_TIMEOUTS.get(service_port) else {
        return 0;
    };
    if flow::age(now(), last_used) >= timeout.saturating_mul(flow::TICKS_PER_SECOND) {
        return 0;
    }
    let Some((_, word)) = service::backend_row(number, service_port) else {
        return 0;
    };
    let in_set = word.sets >> (state_row % endpoint_set::COUNT) & 1 != 0;
    if word.generation == generation && in_set {
        number
    } else {
        0
    }
}

/// Notes that `client` was given a backend now. A table that is full gives up the entry used
/// longest ago.
#[inline(never)]
pub fn remember(client: &Ipv6, service_port: u32, backend: u32, generation: u32) {
    let key = AffinityKey {
        client: *client,
        service_port,
    };
    let entry = Affinity {
        backend,
        generation,
        last_used: now(),
        reserved: 0,
    };
    maps::count_lookup(Lookup::Affinity);
    // Without memory for the entry the next connection is balanced anew.
    let _ = maps::AFFINITY.insert(&key, &entry, u64::from(BPF_ANY));
}
