//! The set of endpoints of a port: fills a region of slots and switches to it with the one word in
//! `SERVICE_STATE`.

use std::{collections::BTreeSet, sync::atomic::Ordering};

use weir_common::service::{self, ServiceState};

use super::{super::TableError, Port, SERVICE_STATE, SLOTS, Services, numbers::Retired};
use crate::model::{BackendAddress, ServicePort, maglev};

impl Services {
    pub(super) fn update_backends(
        &mut self,
        port: &mut Port,
        desired: &ServicePort,
    ) -> Result<(), TableError> {
        let (backends, added) = self.place_backends(port, desired)?;
        let same_members = added.is_empty() && backends.len() == port.backends.len();
        if !same_members || port.unverified || port.word.flags() == 0 {
            let current = port.word.slots() as usize;
            let size = maglev::table_size(backends.len(), current);
            let endpoints: Vec<(BackendAddress, u32)> =
                backends.iter().map(|b| (b.address, b.number)).collect();
            self.scratch.resize(size, 0);
            maglev::fill(&endpoints, &mut self.scratch);
            match self.place_slots(port) {
                Ok((word, region)) => {
                    port.word = word;
                    if let Some((start, slots)) = port.region.filter(|_| port.region != region) {
                        self.quarantine.retire(Retired::Region(start, slots));
                    }
                    port.region = region;
                    port.unverified = false;
                }
                Err(error) => {
                    port.leaving.extend(added);
                    // What cannot be freed now is tried again with the rest.
                    let _ = self.free_backends(&mut port.leaving);
                    return Err(error);
                }
            }
        }
        let kept: BTreeSet<u32> = backends.iter().map(|b| b.number).collect();
        let before = std::mem::replace(&mut port.backends, backends);
        let gone = before.iter().map(|row| row.number);
        port.leaving
            .extend(gone.filter(|number| !kept.contains(number)));
        self.free_backends(&mut port.leaving)
    }

    /// Writes the table in `scratch` to a free region and switches to it; a region found at start
    /// that holds just this table is kept. Gives the word and the region that it names.
    pub(super) fn place_slots(
        &mut self,
        port: &Port,
    ) -> Result<(ServiceState, Option<(u32, u32)>), TableError> {
        let size = self.scratch.len() as u32;
        if size == 0 {
            let word = ServiceState::new(0, 0, service::flag::IN_USE);
            if word != port.word {
                self.store_state(port.number, word)?;
            }
            return Ok((word, None));
        }
        if let Some((start, slots)) = port.region
            && port.unverified
            && slots == size
            && self
                .slots
                .holds(start, &self.scratch)
                .map_err(|error| TableError::kernel(SLOTS, start, error))?
        {
            return Ok((port.word, port.region));
        }
        let start = self.allocate_region(size)?;
        let word = ServiceState::new(start, size, service::flag::IN_USE);
        let switched = self
            .slots
            .write(start, &self.scratch)
            .map_err(|error| TableError::kernel(SLOTS, start, error))
            .and_then(|()| self.store_state(port.number, word));
        match switched {
            Ok(()) => Ok((word, Some((start, size)))),
            Err(error) => {
                self.regions.free(start, size);
                Err(error)
            }
        }
    }

    /// The switch: everything stored before is seen by whoever sees the new word.
    pub(super) fn store_state(
        &mut self,
        number: u32,
        word: ServiceState,
    ) -> Result<(), TableError> {
        let words = self
            .state
            .words(service::state_row(number, service::endpoint_set::CLUSTER))
            .map_err(|error| TableError::kernel(SERVICE_STATE, number, error))?;
        words[0].store(word.0, Ordering::Release);
        Ok(())
    }
}
