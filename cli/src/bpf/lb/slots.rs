//! Reads backends and regions of slots: who a backend is, and how many slots it has. Every view that
//! shows backends builds its rows from these.

use std::collections::{BTreeMap, HashMap};

use aya::maps::{Array, ArrayOfMaps, MapData};
use serde::Serialize;
use weir_common::service::{Backend, ServiceState, SlotIndex};

use super::{Pins, names};
use crate::output;

/// A backend as it stands in `BACKENDS`.
#[derive(Clone, Debug, Serialize)]
pub struct BackendRow {
    pub number: u32,
    pub address: String,
    pub port: u16,
    pub state: String,
    pub generation: u32,
}

impl BackendRow {
    /// `address` is the backend's in the form of its family.
    pub fn new(number: u32, backend: &Backend, address: String) -> Self {
        Self {
            number,
            address,
            port: backend.port.get(),
            state: names::backend_state(backend.state),
            generation: backend.generation,
        }
    }

    /// `10.0.1.5:8080`, `[fd00::1]:8080`.
    pub fn place(&self) -> String {
        output::address_port(&self.address, self.port)
    }
}

/// A backend and how many slots it has.
#[derive(Clone, Debug, Serialize)]
pub struct Share {
    #[serde(flatten)]
    pub backend: BackendRow,
    pub slots: u32,
    /// Percent of the region.
    pub share: f64,
}

impl Share {
    /// `slots` of a region of `of`.
    pub fn new(backend: BackendRow, slots: u32, of: u32) -> Self {
        Self {
            backend,
            slots,
            // With two decimals.
            share: (f64::from(slots) * 10_000.0 / f64::from(of.max(1))).round() / 100.0,
        }
    }

    /// `50.20%`.
    pub fn percent(&self) -> String {
        format!("{:.2}%", self.share)
    }
}

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

    /// The backends in the region of `state`; `address` writes the address of one.
    pub fn shares(
        &mut self,
        state: ServiceState,
        backends: &Array<MapData, Backend>,
        address: impl Fn(&Backend) -> String,
    ) -> anyhow::Result<Vec<Share>> {
        let share = |(number, slots): (u32, u32)| {
            let backend = backends.get(&number, 0)?;
            let row = BackendRow::new(number, &backend, address(&backend));
            Ok(Share::new(row, slots, state.slots()))
        };
        self.count(state)?.into_iter().map(share).collect()
    }

    /// Numbers of backends, each with its slots in the region of `state`.
    fn count(&mut self, state: ServiceState) -> anyhow::Result<BTreeMap<u32, u32>> {
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
