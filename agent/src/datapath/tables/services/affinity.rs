//! Session affinity: how long it lasts for each Service port (`AFFINITY_TIMEOUTS`), and what the
//! programs have remembered of clients (`AFFINITY`), as far as it has lost its meaning. The programs
//! compare times themselves; what is removed here only frees memory early, but for ports that have
//! affinity no more: nothing of it is to be found when it is switched on again.

use std::{collections::HashSet, io};

use weir_common::{
    affinity::{Affinity, AffinityKey},
    flow::{self, TICKS_PER_SECOND},
};

use super::super::TableError;
use crate::datapath::sys::{self, Cursor, RawMap};

const AFFINITY: &str = "AFFINITY";
const AFFINITY_TIMEOUTS: &str = "AFFINITY_TIMEOUTS";

/// Entries read with one call. The kernel gives whole buckets of the hash, which hold few.
const BATCH: usize = 512;

/// See the module.
#[derive(Debug)]
pub struct AffinityTable {
    entries: RawMap,
    timeouts: RawMap,
    /// A Service port has, or has had, a time: before that there is nothing to be found.
    is_used: bool,
    /// A sweep has been completed since the start.
    is_swept: bool,
    /// Ports that have lost their affinity, whose entries the sweep under way will have removed.
    leaving: HashSet<u32>,
    /// The same of the sweep after that one.
    leaving_later: HashSet<u32>,
    /// Of the sweep under way.
    cursor: Cursor,
    room: usize,
    seen: u32,
    /// Entries at the end of the last complete sweep.
    count: u32,
}

impl AffinityTable {
    /// The tables as they are.
    #[must_use]
    pub fn new(entries: RawMap, timeouts: RawMap) -> Self {
        Self {
            entries,
            timeouts,
            is_used: false,
            is_swept: false,
            leaving: HashSet::new(),
            leaving_later: HashSet::new(),
            cursor: Cursor::default(),
            room: BATCH,
            seen: 0,
            count: 0,
        }
    }

    /// Seconds of a Service port, 0 if it has no affinity.
    pub(in super::super) fn timeout(&mut self, number: u32) -> Result<u32, TableError> {
        self.is_used = true;
        self.read_timeout(number)
            .map_err(|error| TableError::kernel(AFFINITY_TIMEOUTS, number, error))
    }

    /// The port, which had none, has affinity from here on, of `seconds`. Nothing remembered of an
    /// earlier time is found: what is left of it is removed here, of all ports at once, as that means
    /// to walk the whole table.
    pub(super) fn begin(&mut self, number: u32, seconds: u32) -> Result<(), TableError> {
        // Before the first sweep is complete nobody knows what an earlier agent has left.
        if !self.is_swept || self.leaving.contains(&number) || self.leaving_later.contains(&number)
        {
            self.walk()
                .map_err(|error| TableError::kernel(AFFINITY, number, error))?;
        }
        self.set_timeout(number, seconds)
    }

    /// The port has no affinity any more.
    pub(super) fn end(&mut self, number: u32) -> Result<(), TableError> {
        self.set_timeout(number, 0)?;
        self.leaving_later.insert(number);
        Ok(())
    }

    pub(super) fn set_timeout(&mut self, number: u32, seconds: u32) -> Result<(), TableError> {
        self.is_used = true;
        self.timeouts
            .update(&number.to_ne_bytes(), &seconds.to_ne_bytes())
            .map_err(|error| TableError::kernel(AFFINITY_TIMEOUTS, number, error))
    }

    fn read_timeout(&self, number: u32) -> io::Result<u32> {
        let mut seconds = [0; 4];
        self.timeouts.lookup(&number.to_ne_bytes(), &mut seconds)?;
        Ok(u32::from_ne_bytes(seconds))
    }

    /// Removes what all ports without affinity have left.
    fn walk(&mut self) -> io::Result<()> {
        let mut place = (Cursor::default(), BATCH);
        let is_left = |key: &AffinityKey, _: &Affinity| {
            self.read_timeout(key.service_port).unwrap_or_default() == 0
        };
        while !self.step(&mut place, is_left)?.2 {}
        self.leaving.clear();
        self.leaving_later.clear();
        self.is_swept = true;
        Ok(())
    }

    /// Looks at about `budget` entries from where the last call ended, and removes those whose time
    /// is over at `now`, in ticks. Gives the number removed. As long as no Service has affinity nothing
    /// is read.
    ///
    /// # Errors
    ///
    /// The kernel's; the next call begins anew.
    pub fn sweep(&mut self, now: u32, budget: u32) -> io::Result<u32> {
        if !self.is_used {
            return Ok(0);
        }
        let mut walk = (std::mem::take(&mut self.cursor), self.room);
        let (mut visited, mut removed) = (0, 0);
        while visited < budget {
            let result = self.step(&mut walk, |key, entry| {
                // Of a port that has none any more it is 0.
                let seconds = self.read_timeout(key.service_port).unwrap_or_default();
                flow::age(now, entry.last_used) >= seconds.saturating_mul(TICKS_PER_SECOND)
            });
            let (looked_at, gone, done) = result.inspect_err(|_| self.seen = 0)?;
            visited += looked_at;
            removed += gone;
            self.seen += looked_at - gone;
            if done {
                self.count = std::mem::take(&mut self.seen);
                self.room = walk.1;
                self.leaving = std::mem::take(&mut self.leaving_later);
                self.is_swept = true;
                return Ok(removed);
            }
        }
        (self.cursor, self.room) = walk;
        Ok(removed)
    }

    /// Entries at the end of the last complete sweep, and the size of the table.
    #[must_use]
    pub fn fill(&self) -> (u32, u32) {
        (self.count, self.entries.max_entries())
    }

    /// One batch from the cursor on: entries looked at, entries removed, and whether the walk is at
    /// its end.
    fn step(
        &self,
        (cursor, room): &mut (Cursor, usize),
        is_over: impl Fn(&AffinityKey, &Affinity) -> bool,
    ) -> io::Result<(u32, u32, bool)> {
        let (key_size, value_size) = (self.entries.key_size(), self.entries.value_size());
        let mut keys = vec![0; *room * key_size];
        let mut values = vec![0; *room * value_size];
        let batch = match self.entries.lookup_batch(cursor, &mut keys, &mut values) {
            Ok(batch) => batch,
            // A bucket that holds more than fits.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                *room *= 2;
                return Ok((0, 0, false));
            }
            Err(error) => return Err(error),
        };
        let mut removed = 0;
        let pairs = keys
            .chunks_exact(key_size)
            .zip(values.chunks_exact(value_size));
        for (key, value) in pairs.take(batch.count) {
            if is_over(&sys::from_bytes(key), &sys::from_bytes(value)) {
                removed += u32::from(self.entries.delete(key)?);
            }
        }
        Ok((batch.count as u32, removed, batch.done))
    }
}
