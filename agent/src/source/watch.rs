//! Watches a directory, and the name that leads to it, with inotify. Says which files may have
//! changed; reads none of them. Used by the directory source alone.

use std::{
    collections::{BTreeSet, HashSet},
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
};

use inotify::{Event, EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::{Interest, unix::AsyncFd};

/// Room for several hundred events.
const BUFFER_BYTES: usize = 16 * 1024;

/// What may have changed.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Files that are to be read again.
    pub(super) files: BTreeSet<String>,
    /// Files that were written to and are not closed yet.
    pub(super) writing: HashSet<String>,
    /// All files are to be read again.
    pub(super) everything: bool,
    /// The path may lead to another directory now, or to none.
    pub(super) directory: bool,
}

impl Seen {
    /// Whether there is anything to read.
    pub(super) fn any(&self) -> bool {
        self.everything || self.directory || !self.files.is_empty()
    }
}

/// A watched path.
pub(super) struct Watch {
    inotify: AsyncFd<Inotify>,
    path: PathBuf,
    directory: Option<WatchDescriptor>,
    parent: Option<WatchDescriptor>,
    buffer: Vec<u8>,
}

impl Watch {
    /// Watches the directory at `path`. Called in the context of a tokio runtime.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        // SAFETY: `Inotify` owns its descriptor and returns the same one until it is dropped, and
        // nobody takes it out of the `AsyncFd`.
        let inotify =
            unsafe { AsyncFd::register_with_interest(Inotify::init()?, Interest::READABLE) }
                .map_err(io::Error::from)?;
        let mut watch = Self {
            inotify,
            path: path.to_owned(),
            directory: None,
            parent: None,
            buffer: vec![0; BUFFER_BYTES],
        };
        watch.renew()?;
        Ok(watch)
    }

    /// Watches the directory that the path leads to now. Whether that is another one than before.
    pub(super) fn renew(&mut self) -> io::Result<bool> {
        let mut watches = self.inotify.get_ref().watches();
        if let Some(parent) = self.path.parent() {
            let parent = if parent.as_os_str().is_empty() {
                Path::new(".")
            } else {
                parent
            };
            // Without it a directory that is replaced is found a little later, by looking.
            self.parent = watches.add(parent, PARENT_MASK | WatchMask::ONLYDIR).ok();
        }
        // The same directory gets the same descriptor again.
        let result = watches.add(&self.path, DIRECTORY_MASK | WatchMask::ONLYDIR);
        let before = self.directory.take();
        self.directory = result.as_ref().ok().cloned();
        if before == self.directory {
            return result.map(|_| false);
        }
        if let Some(before) = before {
            // The kernel has removed it already if the directory is gone.
            let _ = watches.remove(before);
        }
        result.map(|_| true)
    }

    /// Waits for events, and notes them.
    pub(super) async fn wait(&mut self, seen: &mut Seen) -> io::Result<()> {
        // Cleared first: what comes while the queue is read makes it ready again.
        self.inotify.readable_mut().await?.clear_ready();
        self.drain(seen);
        Ok(())
    }

    /// Notes all events that are in the queue. Never waits.
    pub(super) fn drain(&mut self, seen: &mut Seen) {
        loop {
            let events = match self.inotify.get_mut().read_events(&mut self.buffer) {
                Ok(events) => events,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        seen.everything = true;
                    }
                    return;
                }
            };
            for event in events {
                if event.mask.contains(EventMask::Q_OVERFLOW) {
                    seen.writing.clear();
                    seen.everything = true;
                    seen.directory = true;
                } else if self.directory.as_ref() == Some(&event.wd) {
                    seen.note(&event);
                } else if self.parent.as_ref() == Some(&event.wd) {
                    // Names with two dots are those that the kubelet switches volumes with.
                    seen.directory |= event.name.is_some_and(|name| {
                        Some(name) == self.path.file_name() || is_volume_link(name)
                    });
                }
            }
        }
    }
}

const DIRECTORY_MASK: WatchMask = WatchMask::ATTRIB
    .union(WatchMask::CLOSE_WRITE)
    .union(WatchMask::CREATE)
    .union(WatchMask::DELETE)
    .union(WatchMask::DELETE_SELF)
    .union(WatchMask::MODIFY)
    .union(WatchMask::MOVE)
    .union(WatchMask::MOVE_SELF);

const PARENT_MASK: WatchMask = WatchMask::CREATE
    .union(WatchMask::DELETE)
    .union(WatchMask::MOVE);

/// A ConfigMap volume holds links to `..data/NAME`, and `..data` is replaced as a whole.
fn is_volume_link(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b"..")
}

impl Seen {
    /// Notes an event of the directory itself.
    fn note(&mut self, event: &Event<&OsStr>) {
        let Some(name) = event.name else {
            // The directory itself was removed, moved, unmounted, or its permissions changed.
            self.directory = true;
            self.everything = true;
            return;
        };
        if is_volume_link(name) {
            self.everything = true;
            return;
        }
        let Some(name) = name.to_str().filter(|name| super::dir::is_read(name)) else {
            return;
        };
        if event.mask.contains(EventMask::MODIFY) {
            self.writing.insert(name.to_owned());
            return;
        }
        let ends_writing = EventMask::CLOSE_WRITE
            | EventMask::DELETE
            | EventMask::MOVED_FROM
            | EventMask::MOVED_TO;
        if event.mask.intersects(ends_writing) {
            self.writing.remove(name);
        }
        self.files.insert(name.to_owned());
    }
}
