//! Arrays with `BPF_F_MMAPABLE` through the agent's own memory: a store is visible to the
//! programs at once, without a system call. A mapping counts as memory of the agent in full, so
//! an array is mapped in windows, the least recently used of which is given back. Used by the
//! service tables.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::atomic::{AtomicU32, AtomicU64},
};

use aya::maps::MapData;
use memmap2::{MmapOptions, MmapRaw};

/// Bytes of a window: 32,768 rows of `SERVICE_STATE`, 8,192 of `BACKENDS`.
const WINDOW: usize = 256 * 1024;

/// One mapped stretch of an array.
#[derive(Debug)]
struct Window {
    index: usize,
    memory: MmapRaw,
}

/// An array whose elements are whole words of eight bytes.
#[derive(Debug)]
pub struct MappedArray {
    fd: OwnedFd,
    words_per_element: usize,
    bytes: usize,
    windows: VecDeque<Window>,
    most_windows: usize,
}

impl MappedArray {
    /// An array of which at most `most_windows` of 256 KiB are mapped at once.
    ///
    /// # Errors
    ///
    /// The map has no `BPF_F_MMAPABLE`, or the kernel refuses to describe it.
    pub fn new(map: &MapData, most_windows: usize) -> io::Result<Self> {
        let info = map.info().map_err(io::Error::other)?;
        if info.map_flags() & aya_obj::generated::BPF_F_MMAPABLE == 0 || info.value_size() % 8 != 0
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "map {} cannot be mapped: flags {:#x}, value of {} bytes",
                    info.name_as_str().unwrap_or_default(),
                    info.map_flags(),
                    info.value_size()
                ),
            ));
        }
        let page = page_size();
        Ok(Self {
            fd: map.fd().as_fd().try_clone_to_owned()?,
            words_per_element: info.value_size() as usize / 8,
            bytes: (info.max_entries() as usize * info.value_size() as usize)
                .next_multiple_of(page),
            windows: VecDeque::new(),
            most_windows: most_windows.max(1),
        })
    }

    /// The words of element `index`; the first is at the lowest address.
    ///
    /// # Errors
    ///
    /// The element does not exist, or its window cannot be mapped.
    pub fn words(&mut self, index: u32) -> io::Result<&[AtomicU64]> {
        let words = self.words_per_element;
        let first = index as usize * words;
        let memory = self.window(first * 8)?;
        let offset = (first * 8) % WINDOW;
        // SAFETY: the window holds the whole element (elements do not span windows, as both are
        // powers of two) and lives as long as the borrow of `self`. The kernel shares the
        // memory; all access on this side is atomic.
        Ok(unsafe {
            std::slice::from_raw_parts(memory.as_ptr().add(offset).cast::<AtomicU64>(), words)
        })
    }

    /// `count` half words from half word `first` on. On the little-endian machines that the
    /// programs are built for, half `n` is bits `32 * (n % 2)` of word `n / 2`.
    ///
    /// # Errors
    ///
    /// The stretch is not within one window, or cannot be mapped.
    pub fn halves(&mut self, first: u32, count: u32) -> io::Result<&[AtomicU32]> {
        const { assert!(cfg!(target_endian = "little")) };
        let start = first as usize * 4;
        let length = count as usize * 4;
        let memory = self.window(start)?;
        let offset = start % WINDOW;
        if offset + length > memory.len() {
            return Err(out_of_bounds(start + length));
        }
        // SAFETY: within the window, as checked; otherwise as in `words`.
        Ok(unsafe {
            std::slice::from_raw_parts(
                memory.as_ptr().add(offset).cast::<AtomicU32>(),
                count as usize,
            )
        })
    }

    /// Gives all windows back.
    pub fn unmap(&mut self) {
        self.windows.clear();
    }

    /// The window with the byte at `offset`, mapped if need be. The most recently used is last.
    fn window(&mut self, offset: usize) -> io::Result<&MmapRaw> {
        let index = offset / WINDOW;
        if offset >= self.bytes {
            return Err(out_of_bounds(offset));
        }
        if self.windows.back().is_none_or(|last| last.index != index) {
            let window = match self.windows.iter().position(|w| w.index == index) {
                Some(at) => self.windows.remove(at),
                None => {
                    while self.windows.len() >= self.most_windows {
                        self.windows.pop_front();
                    }
                    let start = index * WINDOW;
                    let memory = MmapOptions::new()
                        .offset(start as u64)
                        .len(WINDOW.min(self.bytes - start))
                        .map_raw(self.fd.as_raw_fd())?;
                    Some(Window { index, memory })
                }
            };
            self.windows.extend(window);
        }
        self.windows
            .back()
            .map(|window| &window.memory)
            .ok_or_else(|| out_of_bounds(offset))
    }
}

fn out_of_bounds(offset: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("byte {offset} is beyond the mapped array"),
    )
}

fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}
