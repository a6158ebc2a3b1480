//! A container's network namespace: found, checked, entered.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
};

use nix::sched::{CloneFlags, setns};

use crate::error::{CniError, code};

/// `NS_GET_NSTYPE` of `linux/nsfs.h`: `_IO(0xb7, 0x3)`.
const NS_GET_NSTYPE: u64 = 0xb703;
/// The namespace of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";

/// An open network namespace that is not the plugin's own.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: String,
}

/// Why a path is no use.
#[derive(Debug)]
pub enum NetnsError {
    /// Nothing is there.
    Gone(CniError),
    /// Something is, but no network namespace of a container.
    Wrong(CniError),
}

impl From<NetnsError> for CniError {
    fn from(error: NetnsError) -> Self {
        match error {
            NetnsError::Gone(error) | NetnsError::Wrong(error) => error,
        }
    }
}

impl Netns {
    /// Opens the namespace that `CNI_NETNS` names.
    ///
    /// # Errors
    ///
    /// Code 3 if nothing is there, 4 if it is no network namespace or the plugin's own.
    pub fn open(path: &str) -> Result<Self, NetnsError> {
        let wrong = |why: &str| {
            NetnsError::Wrong(CniError::new(
                code::INVALID_ENVIRONMENT,
                format!("CNI_NETNS {path:?} {why}"),
            ))
        };
        // Non-blocking: a FIFO would wait for its writer.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|cause| match cause.kind() {
                io::ErrorKind::NotFound => NetnsError::Gone(CniError::new(
                    code::CONTAINER_UNKNOWN,
                    format!("CNI_NETNS {path:?} does not exist"),
                )),
                _ => wrong(&format!("cannot be opened: {cause}")),
            })?;
        // SAFETY: this request takes no argument and only reads the kind of the open file.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE as _) };
        if kind != libc::CLONE_NEWNET {
            return Err(wrong("is no network namespace"));
        }
        let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let here = std::fs::metadata(OWN)
            .map_err(|cause| wrong(&format!("cannot be compared with {OWN}: {cause}")))?;
        let there = file
            .metadata()
            .map_err(|cause| wrong(&format!("cannot be examined: {cause}")))?;
        if identity(here) == identity(there) {
            return Err(wrong(
                "is the network namespace of weir-cni itself, not a container's",
            ));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    /// Its path, for messages.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Its descriptor, for messages to the kernel.
    pub fn descriptor(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// Runs `work` in the namespace, on a thread of its own that ends with it: there is no way back
    /// that could fail.
    ///
    /// # Errors
    ///
    /// Those of `work`; code 5 if the namespace cannot be entered.
    pub fn within<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, CniError> + Send,
    ) -> Result<T, CniError> {
        let failed = |cause: &dyn std::fmt::Display| {
            CniError::io(
                format!("cannot enter the network namespace {}", self.path),
                cause,
            )
        };
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .spawn_scoped(scope, || {
                    setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|cause| failed(&cause))?;
                    work()
                })
                .map_err(|cause| failed(&cause))?
                .join()
                .unwrap_or_else(|_| Err(failed(&"the thread panicked")))
        })
    }
}
