//! Reads regions of slots: how many of them each backend has.

use std::collections::{BTreeMap, HashMap};

use aya::maps::{Array, ArrayOfMaps, MapData};
use weir_common::service::{ServiceState, SlotIndex};

use super::Pins;

/// The slots of all Service ports, whose chunks are opened as they are needed.
pub struct Slots {
    outer: ArrayOfMaps<MapData, Array<MapData, u64>>,
    chunks: HashMap<u32, Array<MapData, u64>>,
}

impl Slots {
    pub fn open(pins: &Pins) -> anyhow::Result<Self> {
        Ok(Self {
            outer: pins.map("SLOTS")?,
            chunks: HashMap::new(),
        })
    }

    /// Numbers of backends, each with its slots in the region of `state`.
    pub fn count(&mut self, state: ServiceState) -> anyhow::Result<BTreeMap<u32, u32>> {
        let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
        for offset in 0..state.slots() {
            let place = SlotIndex::new(state.first_slot().wrapping_add(offset));
            let backend = self.element(place.chunk, place.element)? >> place.shift;
            #[expect(
                clippy::cast_possible_truncation,
                reason = "the half that was shifted down"
            )]
            let backend = backend as u32;
            *counts.entry(backend).or_default() += 1;
        }
        Ok(counts)
    }

    fn element(&mut self, chunk: u32, element: u32) -> anyhow::Result<u64> {
        let inner = match self.chunks.entry(chunk) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.outer.get(&chunk, 0)?)
            }
        };
        Ok(inner.get(&element, 0)?)
    }
}

/// Percent, with two decimals.
pub fn share(slots: u32, of: u32) -> f64 {
    (f64::from(slots) * 10_000.0 / f64::from(of.max(1))).round() / 100.0
}
