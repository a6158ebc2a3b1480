//! A file that nobody else can open for a while: what reads it waits, as for a slow disk.

use std::{fs::File, os::fd::AsRawFd as _, path::Path};

use anyhow::Result;

use crate::{traffic, wait_for};

/// Keeps everybody from opening a file, this process apart, while it lives: by a lease, which the kernel takes
/// away 45 s after somebody has tried (`fs.lease-break-time`).
#[derive(Debug)]
pub struct Held(File);

impl Held {
    /// Takes the lease.
    ///
    /// # Errors
    ///
    /// When somebody keeps the file open.
    pub fn new(path: &Path) -> Result<Self> {
        // SAFETY: no handler is installed. The kernel tells of who wants to open the file by this signal.
        unsafe {
            nix::sys::signal::signal(
                nix::sys::signal::Signal::SIGIO,
                nix::sys::signal::SigHandler::SigIgn,
            )
        }?;
        let file = wait_for("a lease", traffic::TIMEOUT, || {
            let file = File::open(path)?;
            // SAFETY: takes no pointer.
            let taken = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
            nix::errno::Errno::result(taken)?;
            Ok(Some(file))
        })?;
        Ok(Self(file))
    }

    /// Whether somebody waits for the file.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        // SAFETY: takes no pointer. A lease that somebody waits for says what it is to become.
        let lease = unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_GETLEASE) };
        lease != libc::F_WRLCK
    }
}
