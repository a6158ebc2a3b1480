//! Rows of `BACKENDS`: the endpoints that slots name by number.

use std::sync::atomic::Ordering;

use weir_common::{
    Ipv6, Port as PortNumber,
    service::{Backend, backend_state},
};

use super::{super::TableError, BACKENDS, Port, Services, numbers::Retired};
use crate::{
    datapath::sys,
    model::{self, BackendAddress, BackendState, EndpointSet, ServicePort},
};

/// A backend that has a row.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in super::super) struct Row {
    pub address: BackendAddress,
    pub number: u32,
    pub state: u8,
    /// The sets whose slots name it, a bit for each.
    pub sets: u8,
    /// As the row says in the kernel: for a while it is in the sets before and after a change.
    pub written_sets: u8,
}

impl Row {
    pub fn is_in(&self, set: EndpointSet) -> bool {
        self.sets & set_bit(set) != 0
    }
}

const fn set_bit(set: EndpointSet) -> u8 {
    1 << set.number()
}

fn sets_of(backend: &model::Backend) -> u8 {
    let sets = EndpointSet::ALL.into_iter();
    sets.filter(|set| backend.is_in(*set))
        .fold(0, |bits, set| bits | set_bit(set))
}

impl Services {
    /// The rows that `desired` needs, by address: those that stay, with their state brought up to
    /// date and the sets that they come to added, and new ones, written. The numbers of the new ones
    /// are the second part.
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
            let sets = sets_of(backend);
            let present = port
                .backends
                .binary_search_by_key(&address, |row| row.address);
            let placed = match present {
                Ok(at) => {
                    let row = &mut port.backends[at];
                    let written_sets = row.written_sets | sets;
                    let is_written = row.state == state && row.written_sets == written_sets;
                    let result = if is_written {
                        Ok(())
                    } else {
                        self.write_backend(row.number, |backend| {
                            backend.state = state;
                            backend.sets = written_sets;
                        })
                    };
                    result.map(|()| {
                        (row.state, row.written_sets) = (state, written_sets);
                        Row { sets, ..*row }
                    })
                }
                Err(_) => self.allocate_backend().and_then(|number| {
                    added.push(number);
                    let row = Row {
                        address,
                        number,
                        state,
                        sets,
                        written_sets: sets,
                    };
                    self.write_backend(number, |backend| {
                        *backend = Backend {
                            address: Ipv6::from_ip(address.address),
                            port: PortNumber::new(address.port),
                            state,
                            sets,
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
                    self.give_up(port, added);
                    return Err(error);
                }
            }
        }
        Ok((rows, added))
    }

    /// Frees new rows that nothing has come to lead to.
    pub(super) fn give_up(&mut self, port: &mut Port, added: Vec<u32>) {
        port.leaving.extend(added);
        // What cannot be freed now is tried again with the rest.
        let _ = self.free_backends(&mut port.leaving);
    }

    /// Takes the rows out of the sets that they have left.
    pub(super) fn leave_sets(&mut self, port: &mut Port) -> Result<(), TableError> {
        for row in &mut port.backends {
            if row.written_sets != row.sets {
                let sets = row.sets;
                self.write_backend(row.number, |backend| backend.sets = sets)?;
                row.written_sets = sets;
            }
        }
        Ok(())
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
            backend.sets = 0;
            backend.generation = backend.generation.wrapping_add(1);
        })?;
        self.quarantine.retire(Retired::Backend(number));
        Ok(())
    }

    /// Changes a row. Port, state, sets and generation share a word, so that they change in one
    /// store.
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
