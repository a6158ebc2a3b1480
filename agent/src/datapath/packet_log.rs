//! For developers, behind the feature `log-packets`: what the programs log of every packet goes to
//! the agent's own log, at level `debug` of `weir_ebpf`. What is not fetched in time is lost.

use std::io;

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::{Interest, unix::AsyncFd};

/// Gives what reads the log of these programs until the runtime ends.
pub(super) fn reader(ebpf: &mut Ebpf) -> io::Result<impl Future<Output = ()> + use<>> {
    let ring = EbpfLogger::init(ebpf).map_err(io::Error::other)?;
    // SAFETY: the logger owns its file descriptor, never changes it, and is not taken out of the
    // `AsyncFd` before that is dropped.
    let mut ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }
        .map_err(io::Error::other)?;
    Ok(async move {
        while let Ok(mut guard) = ring.readable_mut().await {
            // Cleared before the ring is looked at, so that a line between the two wakes.
            guard.clear_ready();
            guard.get_inner_mut().flush();
        }
    })
}
