//! From a Service's address and port to one of its backends.

use weir_common::{
    DropReason,
    lookup::Lookup,
    service::{Backend, FrontendKey, backend_state, flag},
};

use crate::{family::Family, maps, packet::Packet};

/// A backend that was chosen.
#[derive(Clone, Copy)]
pub struct Chosen {
    /// Number of the backend.
    pub number: u32,
    /// Its row.
    pub row: &'static Backend,
}

/// Chooses a backend for a packet to an address that belongs to a Service. The choice is a
/// function of the packet and the set of endpoints.
#[inline(always)]
pub fn choose<F: Family>(packet: &Packet<F::Address>, scope: u8) -> Result<Chosen, DropReason> {
    let key = FrontendKey {
        address: packet.key.destination,
        port: packet.key.destination_port,
        protocol: packet.key.protocol,
        scope,
    };
    maps::count_lookup(Lookup::Frontend);
    // SAFETY: the value is a word, copied at once.
    let service_port = unsafe { F::frontends().get(&key) }
        .copied()
        .ok_or(DropReason::NoServicePort)?;
    // One read of one aligned word: the whole set of endpoints of this moment.
    let state = *maps::SERVICE_STATE
        .get(service_port)
        .ok_or(DropReason::NoServicePort)?;
    if state.flags() & flag::IN_USE == 0 {
        return Err(DropReason::NoServicePort);
    }
    let slot = state
        .slot_for(F::hash_tuple(packet))
        .ok_or(DropReason::NoBackend)?;
    let element = *maps::SLOTS
        .get_value(slot.chunk, &slot.element)
        .ok_or(DropReason::NoBackend)?;
    let number = (element >> slot.shift) as u32;
    let row = maps::BACKENDS.get(number).ok_or(DropReason::NoBackend)?;
    if number == 0 || row.state == backend_state::FREE {
        return Err(DropReason::NoBackend);
    }
    Ok(Chosen { number, row })
}
