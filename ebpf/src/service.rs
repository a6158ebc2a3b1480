//! From a Service's address and port to one of its backends.

use weir_common::{
    DropReason, Port,
    lookup::Lookup,
    service::{BackendWord, FrontendKey, ServiceState, backend_state, flag},
};

use crate::{access, family::Family, maps, packet::Packet};

/// A backend that was chosen, as its row was at one moment.
#[derive(Clone, Copy)]
pub struct Chosen<A> {
    /// Number of the backend.
    pub number: u32,
    /// Its address.
    pub address: A,
    /// Its port.
    pub port: Port,
    /// Its generation.
    pub generation: u32,
}

/// Looks at the set of endpoints when the first one seen has just been replaced.
const ATTEMPTS: u32 = 2;

/// Chooses a backend for a packet to an address that belongs to a Service. The choice is a
/// function of the packet and the set of endpoints.
#[inline(always)]
pub fn choose<F: Family>(
    packet: &Packet<F::Address>,
    scope: u8,
) -> Result<Chosen<F::Address>, DropReason> {
    let key = FrontendKey {
        address: packet.key.destination,
        port: packet.key.destination_port,
        protocol: packet.key.protocol,
        scope,
    };
    maps::count_lookup(Lookup::Frontend);
    // SAFETY: the value is a word, copied at once.
    let row = unsafe { F::frontends().get(&key) }
        .copied()
        .ok_or(DropReason::NoServicePort)?;
    let hash = F::hash_tuple(packet);
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        attempt += 1;
        if let Some(chosen) = look::<F>(row, hash)? {
            return Ok(chosen);
        }
    }
    Err(DropReason::NoBackend)
}

/// One look at the set of endpoints. `None`: the word was read before a change and the row after
/// it; the next look sees the whole change.
#[inline(always)]
fn look<F: Family>(state_row: u32, hash: u32) -> Result<Option<Chosen<F::Address>>, DropReason> {
    let state = maps::SERVICE_STATE
        .get_ptr(state_row)
        .ok_or(DropReason::NoServicePort)?;
    // One read of one aligned word: the whole set of endpoints of this moment.
    // SAFETY: an element of an array.
    let state = ServiceState(unsafe { access::read_word(state.cast()) });
    if state.flags() & flag::IN_USE == 0 {
        return Err(DropReason::NoServicePort);
    }
    let slot = state.slot_for(hash).ok_or(DropReason::NoBackend)?;
    let element = *maps::SLOTS
        .get_value(slot.chunk, &slot.element)
        .ok_or(DropReason::NoBackend)?;
    let number = (element >> slot.shift) as u32;
    let row = maps::BACKENDS
        .get_ptr(number)
        .ok_or(DropReason::NoBackend)?;
    // Address and Service port change only after a grace period; what can change under this
    // program is read last and at once.
    // SAFETY: an element of an array.
    let (address, owner, word) = unsafe {
        let word = row.cast::<u8>().add(BackendWord::OFFSET).cast::<u64>();
        (
            (*row).address(),
            (*row).service_port,
            access::read_word(word),
        )
    };
    let word = BackendWord::from_word(word);
    if number == 0
        || word.state == backend_state::FREE
        || owner != weir_common::service::service_port_of_row(state_row)
    {
        return Ok(None);
    }
    Ok(Some(Chosen {
        number,
        address,
        port: word.port,
        generation: word.generation,
    }))
}
