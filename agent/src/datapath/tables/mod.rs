//! One writer for each group of maps that belong together. Every operation states what should
//! be, may be repeated, and leaves a consistent table when it fails; rows are written before the
//! entry that publishes them and removed after it. At start each writer reads what the pinned
//! maps hold, so that numbers and generations, which live flows refer to, keep their meaning;
//! what nobody asks for again is swept by `prune`, once the source is synced.

pub mod config;
pub mod device_addresses;
pub mod endpoints;
pub mod ipcache;
pub mod next_hops;
mod numbers;
mod recovery;
mod regions;
pub mod services;
mod slots;

use std::io;

use aya::{Pod, maps::MapError};

pub use config::{ConfigTable, NodeConfig, usable_addresses};
pub use device_addresses::DeviceTable;
pub use endpoints::{EndpointRow, EndpointTable};
pub use ipcache::Ipcache;
pub use next_hops::{Hop, HopRef, NextHops};
pub use services::{AffinityTable, AppliedService, Services, SourceRangeTable};

use super::sys::{self, Cursor, RawMap};

/// Why a row is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The table has no room. Everything that needs no new row goes on.
    #[error("map {map} is full ({entries} entries): {remedy}")]
    Full {
        /// Name of the map.
        map: &'static str,
        /// Its size.
        entries: u32,
        /// The setting that enlarges it, or what else helps.
        remedy: &'static str,
    },
    /// The request cannot be expressed in the table.
    #[error("{0}")]
    Invalid(String),
    /// The kernel refused.
    #[error("map {map}, {row}: {source}")]
    Kernel {
        /// Name of the map.
        map: &'static str,
        /// The row or entry.
        row: String,
        /// Its answer.
        source: io::Error,
    },
}

impl TableError {
    fn kernel(map: &'static str, row: impl ToString, source: io::Error) -> Self {
        Self::Kernel {
            map,
            row: row.to_string(),
            source,
        }
    }
}

/// The error of the kernel inside of aya's.
fn io_error(error: MapError) -> io::Error {
    match error {
        MapError::SyscallError(error) => error.io_error,
        other => io::Error::other(other),
    }
}

/// Whether the kernel says that a hash or trie holds `max_entries` entries.
fn is_full(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM)
    )
}

/// All rows of an array, from the first on.
fn read_array<V: Pod>(map: &RawMap) -> io::Result<Vec<V>> {
    let rows = map.max_entries() as usize;
    let mut values = vec![0; rows * map.value_size()];
    let mut keys = vec![0; rows * map.key_size()];
    let mut cursor = Cursor::default();
    let mut read = 0;
    while read < rows {
        let (keys, values) = (
            &mut keys[read * map.key_size()..],
            &mut values[read * map.value_size()..],
        );
        match map.lookup_batch(&mut cursor, keys, values) {
            Ok(batch) => {
                read += batch.count;
                if batch.done {
                    break;
                }
            }
            Err(error) if sys::is_unsupported(&error) && read == 0 => {
                for (row, value) in values.chunks_exact_mut(map.value_size()).enumerate() {
                    map.lookup(&(row as u32).to_ne_bytes(), value)?;
                }
                break;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(values
        .chunks_exact(map.value_size())
        .map(sys::from_bytes)
        .collect())
}
