//! From a Service's address and port to one of its backends.

use weir_common::{
    DropReason, Ipv6, Port,
    address::Address as _,
    ipcache::flag as address_flag,
    lookup::Lookup,
    service::{
        Backend, BackendWord, FrontendKey, ServiceState, backend_state, flag, frontend,
        service_port_of_row,
    },
};

use crate::{access, affinity, family::Family, maps};

/// No frontend has the address and port: rows 0 and 1 of `SERVICE_STATE` are those of number 0,
/// which no Service port has.
pub const NO_ROW: u32 = 0;

/// A backend that was chosen, as its row was at one moment.
#[derive(Clone, Copy, Default)]
pub struct Chosen<A> {
    /// Number of the backend.
    pub number: u32,
    /// Its address.
    pub address: A,
    /// Its port.
    pub port: Port,
    /// Its generation.
    pub generation: u32,
    /// 1: the client is to be led there again, see [`affinity::remember`].
    pub affinity: u32,
}

/// Looks at the set of endpoints when the first one seen has just been replaced.
const ATTEMPTS: u32 = 2;

/// What `FRONTENDS_*` has for an address and port: a row of `SERVICE_STATE` with the bits of [`frontend`], or
/// [`NO_ROW`]. `flags` are those that the ipcache has for the address.
#[inline(always)]
pub fn find_frontend<F: Family>(
    address: F::Address,
    port: Port,
    protocol: u8,
    scope: u8,
    flags: u8,
) -> u32 {
    let mut key = FrontendKey {
        address,
        port,
        protocol,
        scope,
    };
    if flags & address_flag::FRONTENDS != 0 {
        let row = row_of::<F>(&key);
        if row != NO_ROW {
            return row;
        }
    }
    if flags & (address_flag::NODE_PORTS | address_flag::HOST_PORTS) == 0 {
        return NO_ROW;
    }
    key.address = F::Address::default();
    let row = row_of::<F>(&key);
    let needed = if row & frontend::NODE_PORT != 0 {
        address_flag::NODE_PORTS
    } else {
        address_flag::HOST_PORTS
    };
    if flags & needed != 0 { row } else { NO_ROW }
}

/// Whether a frontend serves a client (`loadBalancerSourceRanges`). `client` is its address; that of the
/// node is the one of its Node object, whatever source a packet of it has.
#[inline(always)]
pub fn check_source_range<F: Family>(found: u32, client: F::Address) -> Result<(), DropReason> {
    if found & frontend::SOURCE_RANGES == 0 {
        return Ok(());
    }
    if F::is_in_source_ranges(service_port_of_row(found), client) {
        Ok(())
    } else {
        Err(DropReason::NotInSourceRange)
    }
}

#[inline(always)]
fn row_of<F: Family>(key: &FrontendKey<F::Address>) -> u32 {
    maps::count_lookup(Lookup::Frontend);
    // SAFETY: the value is a word, copied at once.
    unsafe { F::frontends().get(key) }
        .copied()
        .unwrap_or(NO_ROW)
}

/// Chooses a backend of a set of endpoints for `client` (zero is the node). Without session
/// affinity the choice is a function of `hash` and the set.
#[inline(always)]
pub fn choose<F: Family>(
    state_row: u32,
    hash: u32,
    client: &Ipv6,
) -> Result<Chosen<F::Address>, DropReason> {
    let has_affinity = state_of(state_row)?.flags() & flag::AFFINITY != 0;
    let service_port = service_port_of_row(state_row);
    if has_affinity {
        let number = affinity::find(state_row, client);
        if number != 0
            && let Some(mut chosen) = backend_of::<F>(number, service_port)
        {
            chosen.affinity = 1;
            return Ok(chosen);
        }
    }
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        attempt += 1;
        if let Some(mut chosen) = look::<F>(state_row, hash)? {
            chosen.affinity = u32::from(has_affinity);
            return Ok(chosen);
        }
    }
    Err(DropReason::NoBackend)
}

/// One read of one aligned word: the whole set of endpoints of this moment.
#[inline(always)]
fn state_of(state_row: u32) -> Result<ServiceState, DropReason> {
    let state = maps::SERVICE_STATE
        .get_ptr(state_row)
        .ok_or(DropReason::NoServicePort)?;
    // SAFETY: an element of an array.
    let state = ServiceState(unsafe { access::read_word(state.cast()) });
    if state.flags() & flag::IN_USE == 0 {
        return Err(DropReason::NoServicePort);
    }
    Ok(state)
}

/// One look at the set of endpoints. `None`: the word was read before a change and the row after
/// it; the next look sees the whole change.
#[inline(always)]
fn look<F: Family>(state_row: u32, hash: u32) -> Result<Option<Chosen<F::Address>>, DropReason> {
    let state = state_of(state_row)?;
    let slot = state.slot_for(hash).ok_or(DropReason::NoBackend)?;
    let element = *maps::SLOTS
        .get_value(slot.chunk, &slot.element)
        .ok_or(DropReason::NoBackend)?;
    let number = (element >> slot.shift) as u32;
    Ok(backend_of::<F>(number, service_port_of_row(state_row)))
}

/// Backend `number` of a Service port; `None` if the row is free or another's.
#[inline(always)]
fn backend_of<F: Family>(number: u32, service_port: u32) -> Option<Chosen<F::Address>> {
    let (row, word) = backend_row(number, service_port)?;
    Some(Chosen {
        number,
        address: row.address(),
        port: word.port,
        generation: word.generation,
        affinity: 0,
    })
}

/// The row of backend `number` and what in it can change under this program, read at once. `None`
/// if the row is free or another Service port's.
#[inline(always)]
pub fn backend_row(number: u32, service_port: u32) -> Option<(&'static Backend, BackendWord)> {
    let row = maps::BACKENDS.get_ptr(number)?;
    // Address and Service port change only after a grace period.
    // SAFETY: an element of an array.
    let (row, word) = unsafe {
        let word = row.cast::<u8>().add(BackendWord::OFFSET).cast::<u64>();
        (&*row, access::read_word(word))
    };
    let word = BackendWord::from_word(word);
    if number == 0 || word.state == backend_state::FREE || row.service_port != service_port {
        return None;
    }
    Some((row, word))
}

/// The client of a connection as session affinity knows it.
#[inline(always)]
pub fn client_of<F: Family>(source: F::Address, from_node: bool) -> Ipv6 {
    if from_node {
        Ipv6::default()
    } else {
        source.to_shared()
    }
}
