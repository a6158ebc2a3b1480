//! Numbers of ports and backends, and regions of slots: given out, retired, and free again after
//! an RCU grace period.

use weir_common::limits::SLOT_CHUNKS_MAX;

use super::{super::TableError, BACKENDS, SERVICE_STATE, SLOTS, Services};

/// Rows and regions that no program can reach any more.
#[derive(Debug)]
pub(super) enum Retired {
    Number(u32),
    Backend(u32),
    Region(u32, u32),
}

impl Services {
    pub(super) fn allocate_number(&mut self) -> Result<u32, TableError> {
        self.numbers
            .allocate()
            .or_else(|| {
                self.wait_for_quarantine();
                self.numbers.allocate()
            })
            .ok_or(TableError::Full {
                map: SERVICE_STATE,
                entries: self.numbers.total() + 1,
                remedy: "raise the setting services-max",
            })
    }

    pub(super) fn allocate_backend(&mut self) -> Result<u32, TableError> {
        self.backend_numbers
            .allocate()
            .or_else(|| {
                self.wait_for_quarantine();
                self.backend_numbers.allocate()
            })
            .ok_or(TableError::Full {
                map: BACKENDS,
                entries: self.backend_numbers.total() + 1,
                remedy: "raise the setting backends-max",
            })
    }

    pub(super) fn allocate_region(&mut self, slots: u32) -> Result<u32, TableError> {
        if let Some(start) = self.regions.allocate(slots) {
            return Ok(start);
        }
        // A new chunk would wait for a grace period too, and cost memory.
        if !self.quarantine.is_empty() {
            self.wait_for_quarantine();
            if let Some(start) = self.regions.allocate(slots) {
                return Ok(start);
            }
        }
        let chunks = self
            .slots
            .grow()
            .map_err(|error| TableError::kernel(SLOTS, "new chunks", error))?;
        for chunk in chunks {
            self.regions.add_chunk(chunk);
        }
        self.regions.allocate(slots).ok_or(TableError::Full {
            map: SLOTS,
            entries: SLOT_CHUNKS_MAX,
            remedy: "the Services of this cluster have more endpoints than it can hold",
        })
    }

    pub(super) fn wait_for_quarantine(&mut self) {
        let free = self.quarantine.release_all();
        self.take_back(free);
    }

    pub(super) fn take_back(&mut self, free: Vec<Retired>) {
        for thing in free {
            match thing {
                Retired::Number(number) => self.numbers.free(number),
                Retired::Backend(number) => self.backend_numbers.free(number),
                Retired::Region(start, slots) => self.regions.free(start, slots),
            }
        }
    }
}
