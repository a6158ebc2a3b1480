//! Hands out stretches of slots. The smallest free stretch that is large enough is taken, and
//! freed neighbours are joined, but never over the border of a chunk: a region lies in one inner
//! map. Pure bookkeeping, without I/O.

use std::collections::{BTreeMap, BTreeSet};

use weir_common::limits::SLOTS_PER_CHUNK;

/// Slots of a cache line: regions begin on one, so that no two share a line.
const GRAIN: u32 = 16;

/// Free stretches of slots, counted over all chunks.
#[derive(Debug, Default)]
pub struct Regions {
    by_start: BTreeMap<u32, u32>,
    by_length: BTreeSet<(u32, u32)>,
}

impl Regions {
    /// Adds a chunk, all free.
    pub fn add_chunk(&mut self, chunk: u32) {
        self.insert(chunk * SLOTS_PER_CHUNK, SLOTS_PER_CHUNK);
    }

    /// Takes `slots` slots, or `None` if no chunk has that many in one stretch.
    pub fn allocate(&mut self, slots: u32) -> Option<u32> {
        let wanted = rounded(slots);
        let &(length, start) = self.by_length.range((wanted, 0)..).next()?;
        self.remove(start, length);
        if length > wanted {
            self.insert(start + wanted, length - wanted);
        }
        Some(start)
    }

    /// Takes the region at `start`, found in use at start-up; `false` if it is not free in whole.
    pub fn reserve(&mut self, start: u32, slots: u32) -> bool {
        let wanted = rounded(slots);
        let Some((&free, &length)) = self.by_start.range(..=start).next_back() else {
            return false;
        };
        if !start.is_multiple_of(GRAIN) || slots == 0 || start + wanted > free + length {
            return false;
        }
        self.remove(free, length);
        if start > free {
            self.insert(free, start - free);
        }
        if free + length > start + wanted {
            self.insert(start + wanted, free + length - start - wanted);
        }
        true
    }

    /// Gives back what [`Self::allocate`] or [`Self::reserve`] took.
    pub fn free(&mut self, start: u32, slots: u32) {
        let (mut start, mut length) = (start, rounded(slots));
        if let Some((&before, &size)) = self.by_start.range(..start).next_back()
            && before + size == start
            && chunk(before) == chunk(start)
        {
            self.remove(before, size);
            (start, length) = (before, size + length);
        }
        if let Some(&size) = self.by_start.get(&(start + length))
            && chunk(start + length) == chunk(start)
        {
            self.remove(start + length, size);
            length += size;
        }
        self.insert(start, length);
    }

    #[cfg(test)]
    fn free_slots(&self) -> u64 {
        self.by_start
            .values()
            .map(|&length| u64::from(length))
            .sum()
    }

    fn insert(&mut self, start: u32, length: u32) {
        self.by_start.insert(start, length);
        self.by_length.insert((length, start));
    }

    fn remove(&mut self, start: u32, length: u32) {
        self.by_start.remove(&start);
        self.by_length.remove(&(length, start));
    }
}

fn chunk(slot: u32) -> u32 {
    slot / SLOTS_PER_CHUNK
}

fn rounded(slots: u32) -> u32 {
    slots.next_multiple_of(GRAIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_never_spans_two_chunks() {
        let mut regions = Regions::default();
        regions.add_chunk(0);
        regions.add_chunk(1);
        let big = SLOTS_PER_CHUNK - 32;
        let a = regions.allocate(big).unwrap();
        let b = regions.allocate(big).unwrap();
        assert_ne!(chunk(a), chunk(b));
        assert_eq!(regions.allocate(33), None, "two ends of 32 are no region");
        assert!(regions.allocate(32).is_some());
    }

    #[test]
    fn freed_neighbours_join_in_every_order() {
        for order in [
            [0, 1, 2],
            [0, 2, 1],
            [1, 0, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
        ] {
            let mut regions = Regions::default();
            regions.add_chunk(3);
            let sizes = [251, 1021, 1];
            let starts = sizes.map(|size| regions.allocate(size).unwrap());
            for i in order {
                regions.free(starts[i], sizes[i]);
            }
            assert_eq!(regions.allocate(SLOTS_PER_CHUNK), Some(3 * SLOTS_PER_CHUNK));
        }
    }

    #[test]
    fn the_smallest_stretch_that_fits_is_taken() {
        let mut regions = Regions::default();
        regions.add_chunk(0);
        let small = regions.allocate(256).unwrap();
        let _wall = regions.allocate(16).unwrap();
        regions.free(small, 256);
        assert_eq!(regions.allocate(251), Some(small));
    }

    #[test]
    fn what_is_in_use_is_reserved_once() {
        let mut regions = Regions::default();
        regions.add_chunk(1);
        let start = SLOTS_PER_CHUNK + 1024;
        assert!(regions.reserve(start, 251));
        assert!(!regions.reserve(start + 16, 1), "overlaps");
        assert!(!regions.reserve(5, 1), "no such chunk");
        assert!(
            !regions.reserve(2 * SLOTS_PER_CHUNK - 16, 251),
            "beyond the chunk"
        );
        regions.free(start, 251);
        assert_eq!(regions.free_slots(), u64::from(SLOTS_PER_CHUNK));
        assert!(regions.reserve(SLOTS_PER_CHUNK, SLOTS_PER_CHUNK));
    }
}
