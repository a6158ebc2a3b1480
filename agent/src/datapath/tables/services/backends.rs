//! Rows of `BACKENDS`: the endpoints that slots name by number.

use std::sync::atomic::Ordering;

use weir_common::{
    Ipv6, Port as PortNumber,
    service::{Backend, backend_state},
};

use super::{super::TableError, BACKENDS, Port, Services, numbers::Retired};
use crate::{
    datapath::sys,
    model::{BackendAddress, BackendState, ServicePort},
};

/// A backend that has a row.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in super::super) struct Row {
    pub address: BackendAddress,
    pub number: u32,
    pub state: u8,
}

impl Services {
    /// The rows that `desired` needs, by address: those that stay, with their state brought up to
    /// date, and new ones, written. The numbers of the new ones are the second part.
    pub(super) fn place_backends(
        &mut self,
        port: &mut Port,
        desired: &ServicePort,
    ) -> Result<(Vec<Row>, Vec<u32>), TableError> {
        let mut rows = Vec::with_capacity(desired.backends.len());
        let mut added = Vec::new();
        for (&address, backend) in &desired.backends {
            let state = match backend.state {
                BackendState::Active => backend_state::ACTIVE,
                BackendState::Terminating => backend_state::TERMINATING,
            };
            let present = port
                .backends
                .binary_search_by_key(&address, |row| row.address)
                .ok()
                .map(|at| port.backends[at]);
            let placed = match present {
                Some(row) if row.state == state => Ok(row),
                Some(row) => self
                    .write_backend(row.number, |backend| backend.state = state)
                    .map(|()| Row { state, ..row }),
                None => self.allocate_backend().and_then(|number| {
                    added.push(number);
                    let row = Row {
                        address,
                        number,
                        state,
                    };
                    self.write_backend(number, |backend| {
                        *backend = Backend {
                            address: Ipv6::from_ip(address.address),
                            port: PortNumber::new(address.port),
                            state,
                            generation: backend.generation.wrapping_add(1),
                            service_port: port.number,
                            ..Backend::default()
                        };
                    })
                    .map(|()| row)
                }),
            };
            match placed {
                Ok(row) => rows.push(row),
                Err(error) => {
                    port.leaving.extend(added);
                    // What cannot be freed now is tried again with the rest.
                    let _ = self.free_backends(&mut port.leaving);
                    return Err(error);
                }
            }
        }
        Ok((rows, added))
    }

    /// Frees rows; those that cannot be freed stay in the list.
    pub(super) fn free_backends(&mut self, numbers: &mut Vec<u32>) -> Result<(), TableError> {
        let mut failed = None;
        numbers.retain(|&number| match self.free_backend(number) {
            Ok(()) => false,
            Err(error) => {
                failed.get_or_insert(error);
                true
            }
        });
        failed.map_or(Ok(()), Err)
    }

    /// Flows that point at the row are stale from here on.
    pub(super) fn free_backend(&mut self, number: u32) -> Result<(), TableError> {
        self.write_backend(number, |backend| {
            backend.state = backend_state::FREE;
            backend.generation = backend.generation.wrapping_add(1);
        })?;
        self.quarantine.retire(Retired::Backend(number));
        Ok(())
    }

    /// Changes a row. Port, state and generation share a word, so that a state and a generation
    /// change in one store.
    pub(super) fn write_backend(
        &mut self,
        number: u32,
        edit: impl FnOnce(&mut Backend),
    ) -> Result<(), TableError> {
        let words = self
            .backends
            .words(number)
            .map_err(|error| TableError::kernel(BACKENDS, number, error))?;
        let old: [u64; BACKEND_WORDS] = std::array::from_fn(|i| words[i].load(Ordering::Relaxed));
        let mut row: Backend = sys::from_bytes(sys::bytes_of(&old));
        edit(&mut row);
        let new: [u64; BACKEND_WORDS] = sys::from_bytes(sys::bytes_of(&row));
        for (word, (old, new)) in words.iter().zip(old.into_iter().zip(new)) {
            if old != new {
                word.store(new, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

/// Words of a row of `BACKENDS`.
pub(in super::super) const BACKEND_WORDS: usize = size_of::<Backend>() / 8;
