//! The chunks of `SLOTS`: inner maps that are made as they are needed and filled through the
//! agent's memory. Knows nothing of Services; the service writer decides which slots are free.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::atomic::Ordering,
};

use aya::maps::MapData;
use aya_obj::generated::{BPF_F_MMAPABLE, bpf_map_type};
use weir_common::{
    limits::{SLOT_CHUNKS_MAX, SLOTS_PER_CHUNK},
    service::ELEMENTS_PER_CHUNK,
};

use crate::datapath::{
    mapped::MappedArray,
    sys::{self, RawMap},
};

/// Chunks that are mapped at once, 256 KiB each.
const MAPPED_CHUNKS: usize = 8;
/// Chunks made in one step at most.
const GROWTH_MAX: u32 = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct Slots {
    outer: RawMap,
    chunks: BTreeMap<u32, MappedArray>,
    /// Numbers of the chunks that are mapped, the most recently used last.
    mapped: VecDeque<u32>,
}

impl Slots {
    /// Finds the chunks that exist. One of another size or without `BPF_F_MMAPABLE` is taken for
    /// absent; it is replaced when that chunk is made.
    pub fn open(outer: RawMap) -> io::Result<Self> {
        let mut chunks = BTreeMap::new();
        for number in 0..SLOT_CHUNKS_MAX {
            let mut id = [0; 4];
            if !outer.lookup(&number.to_ne_bytes(), &mut id)? {
                continue;
            }
            let map = MapData::from_id(u32::from_ne_bytes(id)).map_err(io::Error::other)?;
            let info = map.info().map_err(io::Error::other)?;
            if info.value_size() == 8 && info.max_entries() == ELEMENTS_PER_CHUNK {
                chunks.insert(number, MappedArray::new(&map, 1)?);
            }
        }
        Ok(Self {
            outer,
            chunks,
            mapped: VecDeque::new(),
        })
    }

    /// The chunks there are.
    pub fn chunks(&self) -> impl Iterator<Item = u32> {
        self.chunks.keys().copied()
    }

    /// Number of chunks.
    pub fn len(&self) -> u32 {
        self.chunks.len() as u32
    }

    /// Makes more chunks, half as many as there are: each step waits for an RCU grace period.
    /// Gives their numbers; none if all are in use.
    pub fn grow(&mut self) -> io::Result<Vec<u32>> {
        let wanted = (self.len() / 2).clamp(1, GROWTH_MAX) as usize;
        let numbers: Vec<u32> = (0..SLOT_CHUNKS_MAX)
            .filter(|number| !self.chunks.contains_key(number))
            .take(wanted)
            .collect();
        let fds: Vec<OwnedFd> = numbers
            .iter()
            .map(|_| {
                sys::create_map(
                    bpf_map_type::BPF_MAP_TYPE_ARRAY,
                    8,
                    ELEMENTS_PER_CHUNK,
                    BPF_F_MMAPABLE,
                    None,
                )
            })
            .collect::<io::Result<_>>()?;
        self.publish(&numbers, &fds)?;
        for (&number, fd) in numbers.iter().zip(fds) {
            let map = MapData::from_fd(fd).map_err(io::Error::other)?;
            self.chunks.insert(number, MappedArray::new(&map, 1)?);
        }
        Ok(numbers)
    }

    fn publish(&self, numbers: &[u32], fds: &[OwnedFd]) -> io::Result<()> {
        let keys: Vec<u8> = numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
        let values: Vec<u8> = fds
            .iter()
            .flat_map(|fd| fd.as_raw_fd().to_ne_bytes())
            .collect();
        match self.outer.update_batch(&keys, &values) {
            // Batches for maps of maps came with kernel 5.16.
            Err(error) if sys::is_unsupported(&error) => {
                for (key, value) in keys.chunks_exact(4).zip(values.chunks_exact(4)) {
                    self.outer.update(key, value)?;
                }
                Ok(())
            }
            result => result,
        }
    }

    /// Writes a region, which must be within one chunk and free.
    pub fn write(&mut self, first: u32, backends: &[u32]) -> io::Result<()> {
        let (chunk, offset) = self.chunk(first)?;
        let slots = chunk.halves(offset, backends.len() as u32)?;
        for (slot, &backend) in slots.iter().zip(backends) {
            slot.store(backend, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether a region holds exactly `backends`.
    pub fn holds(&mut self, first: u32, backends: &[u32]) -> io::Result<bool> {
        let (chunk, offset) = self.chunk(first)?;
        let slots = chunk.halves(offset, backends.len() as u32)?;
        Ok(slots
            .iter()
            .zip(backends)
            .all(|(slot, &backend)| slot.load(Ordering::Relaxed) == backend))
    }

    fn chunk(&mut self, slot: u32) -> io::Result<(&mut MappedArray, u32)> {
        let number = slot / SLOTS_PER_CHUNK;
        if self.mapped.back() != Some(&number) {
            self.mapped.retain(|&other| other != number);
            if self.mapped.len() >= MAPPED_CHUNKS
                && let Some(oldest) = self.mapped.pop_front()
                && let Some(chunk) = self.chunks.get_mut(&oldest)
            {
                chunk.unmap();
            }
            self.mapped.push_back(number);
        }
        let chunk = self.chunks.get_mut(&number).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("there is no chunk {number}"),
            )
        })?;
        Ok((chunk, slot % SLOTS_PER_CHUNK))
    }
}
