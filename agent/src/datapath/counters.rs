//! Reads the packet counters and the lookup counters, summed over processors. Never writes.

use std::io;

use weir_common::{
    lookup::{self, Lookup},
    metrics::{self, Counter, HOOKS, Hook},
};

use super::sys::{self, Cursor, RawMap};

/// `METRICS` and `LOOKUPS`.
#[derive(Debug)]
pub struct Counters {
    metrics: RawMap,
    lookups: RawMap,
}

/// A counter that is not zero.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HookCounter {
    /// The hook.
    pub hook: Hook,
    /// One of [`metrics::outcome`], or the number of a drop reason.
    pub outcome: u8,
    /// Packets and bytes.
    pub counter: Counter,
}

impl Counters {
    pub(super) fn new(metrics: RawMap, lookups: RawMap) -> Self {
        Self { metrics, lookups }
    }

    /// Every counter that is not zero, by hook and outcome.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn all(&self) -> io::Result<Vec<HookCounter>> {
        let mut found = Vec::new();
        for (row, value) in (0..metrics::ROWS).zip(read_all(&self.metrics)?) {
            let counter = sum(&value);
            let hook = HOOKS
                .get((row / metrics::OUTCOMES) as usize)
                .copied()
                .filter(|_| counter != Counter::default());
            if let Some(hook) = hook {
                found.push(HookCounter {
                    hook,
                    outcome: (row % metrics::OUTCOMES) as u8,
                    counter,
                });
            }
        }
        Ok(found)
    }

    /// One outcome, summed over all hooks.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn outcome(&self, outcome: u8) -> io::Result<Counter> {
        let mut total = Counter::default();
        let mut value = vec![0; self.metrics.value_size()];
        for hook in HOOKS {
            let row = metrics::index(hook, outcome);
            self.metrics.lookup(&row.to_ne_bytes(), &mut value)?;
            let counter = sum(&value);
            total.packets = total.packets.wrapping_add(counter.packets);
            total.bytes = total.bytes.wrapping_add(counter.bytes);
        }
        Ok(total)
    }

    /// Table lookups by kind; all zero unless the programs were loaded with `count_lookups`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn lookups(&self) -> io::Result<Vec<(Lookup, u64)>> {
        let mut value = vec![0; self.lookups.value_size()];
        lookup::ALL
            .iter()
            .map(|&kind| {
                self.lookups
                    .lookup(&(kind as u32).to_ne_bytes(), &mut value)?;
                let count = value.chunks_exact(8).map(sys::from_bytes::<u64>).sum();
                Ok((kind, count))
            })
            .collect()
    }
}

/// The values of all rows, of all processors each.
fn read_all(map: &RawMap) -> io::Result<Vec<Vec<u8>>> {
    let rows = map.max_entries() as usize;
    let mut keys = vec![0; rows * map.key_size()];
    let mut values = vec![0; rows * map.value_size()];
    match map.lookup_batch(&mut Cursor::default(), &mut keys, &mut values) {
        // Batches for per-CPU arrays came with kernel 5.13.
        Err(error) if sys::is_unsupported(&error) => {
            for (row, value) in (0u32..).zip(values.chunks_exact_mut(map.value_size())) {
                map.lookup(&row.to_ne_bytes(), value)?;
            }
        }
        result => {
            result?;
        }
    }
    Ok(values
        .chunks_exact(map.value_size())
        .map(<[u8]>::to_vec)
        .collect())
}

fn sum(value: &[u8]) -> Counter {
    value
        .chunks_exact(size_of::<Counter>())
        .map(sys::from_bytes::<Counter>)
        .fold(Counter::default(), |total, one| Counter {
            packets: total.packets.wrapping_add(one.packets),
            bytes: total.bytes.wrapping_add(one.bytes),
        })
}
