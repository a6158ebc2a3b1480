//! Where objects come from: one stream of typed changes and a 'synced' mark.

mod catalog;
pub mod dir;
mod watch;
pub mod yaml;

use std::{io, path::PathBuf};

use tokio::sync::{mpsc, oneshot};

use crate::objects::{Object, ObjectKey};

/// A change of one object.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// The object is new or different.
    Upsert(Object),
    /// The object is gone.
    Delete(ObjectKey),
}

/// Changes that were seen together.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Batch {
    /// Revision of the source after these changes; rises by one with each batch.
    pub revision: u64,
    /// The changes, at most one for an object.
    pub changes: Vec<Change>,
    /// Every list of the source has been delivered completely, with this batch or before.
    pub synced: bool,
    /// All documents that cannot be read now, each with place and cause; they keep their last
    /// good state in force.
    pub errors: Vec<String>,
}

/// A request for the revision that holds everything the source holds at this moment.
pub type Rescan = oneshot::Sender<u64>;

/// A running source.
#[derive(Debug)]
pub struct SourceHandle {
    /// As the setting has it, for `weir status`.
    pub name: String,
    /// Its changes.
    pub batches: mpsc::Receiver<Batch>,
    /// Ask it to look again now; the answer is sent after the batch of that revision was queued.
    pub rescan: mpsc::Sender<Rescan>,
}

/// Why a source cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The directory is not there.
    #[error("source dir:{}: there is no such directory; create it or correct --source", path.display())]
    Absent {
        /// The directory.
        path: PathBuf,
    },
    /// The path leads to something else.
    #[error("source dir:{}: is not a directory", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// The directory cannot be looked at.
    #[error("source dir:{}: cannot read the directory: {error}", path.display())]
    Unreadable {
        /// The directory.
        path: PathBuf,
        /// As the system has it.
        error: io::Error,
    },
    /// The directory cannot be watched.
    #[error(
        "source dir:{}: cannot watch the directory: {error}; if this is a limit, raise the sysctls \
         fs.inotify.max_user_instances and fs.inotify.max_user_watches",
        path.display()
    )]
    Watch {
        /// The directory.
        path: PathBuf,
        /// As the system has it.
        error: io::Error,
    },
    /// The thread of the source cannot be started.
    #[error("source dir:{}: cannot start its thread: {error}", path.display())]
    Thread {
        /// The directory.
        path: PathBuf,
        /// As the system has it.
        error: io::Error,
    },
}
