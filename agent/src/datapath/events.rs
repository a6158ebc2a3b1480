//! Receives the events of the programs from the ring buffer `EVENTS`. There is one reader; what
//! it does not fetch in time is dropped by the kernel side and counted there.

use std::io;

use aya::maps::{MapData, RingBuf};
use tokio::io::{Interest, unix::AsyncFd};
use weir_common::event::Event;

use super::sys;

/// See the module. Must be made and used within a tokio runtime.
#[derive(Debug)]
pub struct EventReader {
    ring: AsyncFd<Ring>,
}

/// `RingBuf` has no `Debug`.
struct Ring(RingBuf<MapData>);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EVENTS")
    }
}

impl std::os::fd::AsRawFd for Ring {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

impl EventReader {
    pub(super) fn new(ring: RingBuf<MapData>) -> io::Result<Self> {
        // SAFETY: the ring owns its file descriptor, never changes it, and is not taken out of
        // the `AsyncFd` before that is dropped.
        let ring = unsafe { AsyncFd::register_with_interest(Ring(ring), Interest::READABLE) }
            .map_err(io::Error::other)?;
        Ok(Self { ring })
    }

    /// The next event; waits for one. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    ///
    /// The runtime's.
    pub async fn next(&mut self) -> io::Result<Event> {
        loop {
            if let Some(event) = self.try_next() {
                return Ok(event);
            }
            let mut guard = self.ring.readable_mut().await?;
            // Cleared before the ring is looked at again, so that an event between the two wakes.
            guard.clear_ready();
            if let Some(event) = take(guard.get_inner_mut()) {
                return Ok(event);
            }
        }
    }

    /// The next event, if one is there.
    pub fn try_next(&mut self) -> Option<Event> {
        take(self.ring.get_mut())
    }
}

/// A record of an unknown length is skipped: it is of another version.
fn take(ring: &mut Ring) -> Option<Event> {
    loop {
        let record = ring.0.next()?;
        if record.len() == size_of::<Event>() {
            return Some(sys::from_bytes(&record));
        }
    }
}
