//! The sets of endpoints of a port: fills regions of slots and switches to them, each with its one
//! word in `SERVICE_STATE`.

use std::{collections::BTreeSet, sync::atomic::Ordering};

use weir_common::service::{self, ServiceState, flag};

use super::{super::TableError, Port, Row, SERVICE_STATE, SLOTS, Services, numbers::Retired};
use crate::model::{BackendAddress, EndpointSet, ServicePort, maglev};

/// A set of endpoints as it stands in the kernel.
#[derive(Clone, Copy, Debug, Default)]
pub(in super::super) struct Set {
    pub word: ServiceState,
    /// First slot and slots of the region that `word` names and that is this set's own.
    pub region: Option<(u32, u32)>,
    /// Found at start, or a change of it failed: what the region holds is not known.
    pub unverified: bool,
}

/// What a set is to become, with its region filled.
#[derive(Clone, Copy, Debug)]
struct Prepared {
    set: EndpointSet,
    word: ServiceState,
    region: Option<(u32, u32)>,
}

impl Services {
    /// Brings the sets that frontends are to lead to in force. What the others hold stays until
    /// [`Self::clear_sets`], when no frontend leads there any more.
    pub(super) fn update_backends(
        &mut self,
        port: &mut Port,
        desired: &ServicePort,
    ) -> Result<(), TableError> {
        let (rows, added) = self.place_backends(port, desired)?;
        let prepared = match self.prepare_sets(port, desired, &rows) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.give_up(port, added);
                return Err(error);
            }
        };
        let kept: BTreeSet<u32> = rows.iter().map(|row| row.number).collect();
        let before = std::mem::replace(&mut port.backends, rows);
        let gone = before.iter().map(|row| row.number);
        port.leaving
            .extend(gone.filter(|number| !kept.contains(number)));
        self.switch(port, prepared)?;
        self.leave_sets(port)?;
        if has_cleared_sets(port, desired) {
            self.free_backends(&mut port.leaving)?;
        }
        Ok(())
    }

    /// Empties the sets that no frontend leads to, and frees what only they named.
    pub(super) fn clear_sets(
        &mut self,
        port: &mut Port,
        desired: &ServicePort,
    ) -> Result<(), TableError> {
        for set in EndpointSet::ALL {
            if !desired.uses(set) {
                self.clear_set(port, set)?;
            }
        }
        self.free_backends(&mut port.leaving)
    }

    pub(super) fn clear_set(
        &mut self,
        port: &mut Port,
        set: EndpointSet,
    ) -> Result<(), TableError> {
        let state = &mut port.sets[set.number() as usize];
        if state.word != ServiceState::default() {
            self.store_state(port.number, set, ServiceState::default())?;
        }
        if let Some((start, slots)) = state.region {
            self.quarantine.retire(Retired::Region(start, slots));
        }
        *state = Set::default();
        Ok(())
    }

    /// Regions for the sets that change, filled, and the words for them.
    fn prepare_sets(
        &mut self,
        port: &Port,
        desired: &ServicePort,
        rows: &[Row],
    ) -> Result<Vec<Prepared>, TableError> {
        let mut prepared = Vec::new();
        for set in EndpointSet::ALL
            .into_iter()
            .filter(|set| desired.uses(*set))
        {
            match self.prepare_set(port, desired, rows, set) {
                Ok(change) => prepared.extend(change),
                Err(error) => {
                    for Prepared { set, region, .. } in prepared {
                        self.take_region_back(port, set, region);
                    }
                    return Err(error);
                }
            }
        }
        Ok(prepared)
    }

    /// `None` if the set is as it should be.
    fn prepare_set(
        &mut self,
        port: &Port,
        desired: &ServicePort,
        rows: &[Row],
        set: EndpointSet,
    ) -> Result<Option<Prepared>, TableError> {
        let state = port.set(set);
        let flags = match desired.affinity {
            None => flag::IN_USE,
            Some(_) => flag::IN_USE | flag::AFFINITY,
        };
        let members = |rows: &[Row]| -> Vec<(BackendAddress, u32)> {
            let members = rows.iter().filter(|row| row.is_in(set));
            members.map(|row| (row.address, row.number)).collect()
        };
        let wanted = members(rows);
        let is_filled = !state.unverified
            && state.word.flags() & flag::IN_USE != 0
            && wanted == members(&port.backends);
        if is_filled && state.word.flags() == flags {
            return Ok(None);
        }
        let region = if is_filled {
            state.region
        } else {
            self.fill_region(state, &wanted)?
        };
        let (start, slots) = region.unwrap_or_default();
        Ok(Some(Prepared {
            set,
            word: ServiceState::new(start, slots, flags),
            region,
        }))
    }

    /// A region that holds the table of `members`: a free one, filled, or the one in force, if it was
    /// found at start and holds just this table. `None` without members.
    fn fill_region(
        &mut self,
        state: Set,
        members: &[(BackendAddress, u32)],
    ) -> Result<Option<(u32, u32)>, TableError> {
        let size = maglev::table_size(members.len(), state.word.slots() as usize);
        self.scratch.resize(size, 0);
        maglev::fill(members, &mut self.scratch);
        let size = self.scratch.len() as u32;
        if size == 0 {
            return Ok(None);
        }
        if let Some((start, slots)) = state.region
            && state.unverified
            && slots == size
            && self
                .slots
                .holds(start, &self.scratch)
                .map_err(|error| TableError::kernel(SLOTS, start, error))?
        {
            return Ok(state.region);
        }
        let start = self.allocate_region(size)?;
        match self.slots.write(start, &self.scratch) {
            Ok(()) => Ok(Some((start, size))),
            Err(error) => {
                self.regions.free(start, size);
                Err(TableError::kernel(SLOTS, start, error))
            }
        }
    }

    /// Stores the words. A set whose word could not be stored is looked at again by the next
    /// attempt.
    fn switch(&mut self, port: &mut Port, prepared: Vec<Prepared>) -> Result<(), TableError> {
        let mut failed = None;
        for Prepared { set, word, region } in prepared {
            let state = port.set(set);
            if word != state.word
                && let Err(error) = self.store_state(port.number, set, word)
            {
                self.take_region_back(port, set, region);
                port.sets[set.number() as usize].unverified = true;
                failed.get_or_insert(error);
                continue;
            }
            if let Some((start, slots)) = state.region.filter(|_| state.region != region) {
                self.quarantine.retire(Retired::Region(start, slots));
            }
            port.sets[set.number() as usize] = Set {
                word,
                region,
                unverified: false,
            };
        }
        failed.map_or(Ok(()), Err)
    }

    /// Frees a region that was filled and that no word has come to name.
    fn take_region_back(&mut self, port: &Port, set: EndpointSet, region: Option<(u32, u32)>) {
        if let Some((start, slots)) = region.filter(|_| port.set(set).region != region) {
            self.regions.free(start, slots);
        }
    }

    /// The switch: everything stored before is seen by whoever sees the new word.
    pub(super) fn store_state(
        &mut self,
        number: u32,
        set: EndpointSet,
        word: ServiceState,
    ) -> Result<(), TableError> {
        let row = service::state_row(number, set.number());
        let words = self
            .state
            .words(row)
            .map_err(|error| TableError::kernel(SERVICE_STATE, row, error))?;
        words[0].store(word.0, Ordering::Release);
        Ok(())
    }
}

/// Whether every set in force is one that frontends are to lead to.
fn has_cleared_sets(port: &Port, desired: &ServicePort) -> bool {
    EndpointSet::ALL
        .into_iter()
        .all(|set| desired.uses(set) || port.set(set).word == ServiceState::default())
}
