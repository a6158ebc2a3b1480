//! The source `dir:PATH`: a directory of Kubernetes manifests, watched with inotify. It reads
//! the files that changed and sends what differs. It never writes, and never looks into
//! subdirectories. Started by the agent; runs on a thread of its own, so that parsing a large
//! file does not hold the event loop up.
//!
//! A file that somebody is writing to in place counts when it is closed; until then its last
//! content stays in force. So do the objects of documents that have mistakes, and all objects
//! while the directory is gone.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use super::{
    Batch, Rescan, SourceError, SourceHandle,
    catalog::Catalog,
    watch::{Seen, Watch},
    yaml::{self, Format},
};

/// Time from the first sign of a change to reading: changes that belong together arrive together.
const DEBOUNCE: Duration = Duration::from_millis(2);

/// How often a directory that is gone is looked for, beside what inotify says.
const SEARCH_INTERVAL: Duration = Duration::from_secs(1);

/// Batches that the agent has not taken yet; then the source waits.
const BATCHES: usize = 16;

/// Times that files are read again because they changed while they were read.
const ROUNDS_MAX: usize = 8;

/// Largest file that is read, in bytes: tens of thousands of Services and their slices, and what
/// memory parsing it takes is bounded.
const FILE_SIZE_MAX: u64 = 128 << 20;

/// Starts the source for the directory at `path`. The first batch holds all of it.
///
/// # Errors
///
/// When there is no directory, or it cannot be watched.
pub fn spawn(path: &Path) -> Result<SourceHandle, SourceError> {
    let path = path.to_owned();
    let metadata = fs::metadata(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => SourceError::Absent { path: path.clone() },
        _ => SourceError::Unreadable {
            path: path.clone(),
            error,
        },
    })?;
    if !metadata.is_dir() {
        return Err(SourceError::NotADirectory { path });
    }
    if let Err(error) = fs::read_dir(&path) {
        return Err(SourceError::Unreadable { path, error });
    }
    let (batches_to, batches) = mpsc::channel(BATCHES);
    let (rescan, rescans) = mpsc::channel(BATCHES);
    let source = Source {
        directory: Directory::new(&path),
        revision: 0,
        errors: Vec::new(),
        batches: batches_to,
    };
    let (watching, is_watching) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("source-dir".to_owned());
    let started = thread.spawn(move || run_thread(source, rescans, &watching));
    // A thread that ends without a word has panicked.
    let watched = is_watching
        .recv()
        .unwrap_or_else(|_| Err(io::Error::other("the thread of the source has ended")));
    if let Err(error) = started {
        return Err(SourceError::Thread { path, error });
    }
    let name = format!("dir:{}", path.display());
    match watched {
        Ok(()) => Ok(SourceHandle {
            name,
            batches,
            rescan,
        }),
        Err(error) => Err(SourceError::Watch { path, error }),
    }
}

/// The whole life of the thread; says first whether the directory is being watched.
fn run_thread(
    source: Source,
    rescans: mpsc::Receiver<Rescan>,
    watching: &std::sync::mpsc::SyncSender<io::Result<()>>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build();
    let set_up = runtime.and_then(|runtime| {
        let watch = {
            let _context = runtime.enter();
            Watch::new(&source.directory.path)?
        };
        Ok((runtime, watch))
    });
    match set_up {
        Ok((runtime, watch)) => {
            if watching.send(Ok(())).is_ok() {
                runtime.block_on(source.run(watch, rescans));
            }
        }
        Err(error) => {
            // The receiver waits for exactly this message.
            let _ = watching.send(Err(error));
        }
    }
}

/// The agent has dropped its end: nobody listens.
struct Closed;

struct Source {
    directory: Directory,
    /// Of the last batch.
    revision: u64,
    /// As the last batch had them.
    errors: Vec<String>,
    batches: mpsc::Sender<Batch>,
}

impl Source {
    async fn run(mut self, mut watch: Watch, mut rescans: mpsc::Receiver<Rescan>) {
        self.directory.seen.everything = true;
        let mut deadline = Some(Instant::now());
        loop {
            let due = deadline.unwrap_or_else(|| Instant::now() + SEARCH_INTERVAL);
            let reply = tokio::select! {
                biased;
                () = self.batches.closed() => return,
                Some(reply) = rescans.recv() => Some(reply),
                () = sleep_until(due), if deadline.is_some() => None,
                result = watch.wait(&mut self.directory.seen) => {
                    if let Err(error) = result {
                        warn!(%error, "cannot read events of the source directory");
                        self.directory.seen.everything = true;
                    }
                    if self.directory.seen.any() {
                        let soon = Instant::now() + DEBOUNCE;
                        deadline = Some(deadline.map_or(soon, |due| due.min(soon)));
                    }
                    continue;
                }
            };
            if reply.is_some() {
                self.directory.seen.everything = true;
                self.directory.seen.directory = true;
            }
            self.directory.read(&mut watch);
            if self.send().await.is_err() {
                return;
            }
            if let Some(reply) = reply {
                // Whoever asked may have stopped waiting.
                let _ = reply.send(self.revision);
            }
            deadline = if self.directory.seen.any() {
                Some(Instant::now() + DEBOUNCE)
            } else if self.directory.is_gone() {
                self.directory.seen.directory = true;
                Some(Instant::now() + SEARCH_INTERVAL)
            } else {
                None
            };
        }
    }

    /// Sends a batch if there is anything new to say.
    async fn send(&mut self) -> Result<(), Closed> {
        let changes = self.directory.catalog.take_changes();
        let errors = self.directory.errors();
        if self.revision > 0 && changes.is_empty() && errors == self.errors {
            return Ok(());
        }
        for error in errors.iter().filter(|error| !self.errors.contains(error)) {
            warn!("{error}");
        }
        self.revision += 1;
        self.errors.clone_from(&errors);
        let batch = Batch {
            revision: self.revision,
            changes,
            synced: true,
            errors,
        };
        self.batches.send(batch).await.map_err(|_| Closed)
    }
}

/// The directory as it was last read.
struct Directory {
    path: PathBuf,
    catalog: Catalog,
    /// Hash of each file's bytes when it was last parsed.
    digests: BTreeMap<String, u64>,
    /// What the watch has seen and is not read yet.
    seen: Seen,
    /// Why the directory itself cannot be read or watched.
    trouble: Option<String>,
    /// Kinds of objects that were said to be ignored.
    ignored: HashSet<String>,
}

impl Directory {
    fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            catalog: Catalog::new(path),
            digests: BTreeMap::new(),
            seen: Seen::default(),
            trouble: None,
            ignored: HashSet::new(),
        }
    }

    fn is_gone(&self) -> bool {
        self.trouble.is_some()
    }

    fn errors(&self) -> Vec<String> {
        let trouble = self.trouble.iter().map(|trouble| {
            format!(
                "{}: {trouble}; its last objects stay in force",
                self.path.display()
            )
        });
        trouble.chain(self.catalog.errors()).collect()
    }

    /// Reads what has changed, until nothing changes while it is being read.
    fn read(&mut self, watch: &mut Watch) {
        for _ in 0..ROUNDS_MAX {
            watch.drain(&mut self.seen);
            // After trouble everything has to be looked at: events were missed.
            self.seen.everything |= self.trouble.is_some();
            if std::mem::take(&mut self.seen.directory) || self.trouble.is_some() {
                match watch.renew() {
                    Ok(another) => self.seen.everything |= another,
                    Err(error) => return self.give_up(&error),
                }
            }
            let mut names = std::mem::take(&mut self.seen.files);
            if std::mem::take(&mut self.seen.everything) {
                match self.list() {
                    Ok(found) => names.extend(found),
                    Err(error) => return self.give_up(&error),
                }
                names.extend(self.catalog.files().map(str::to_owned));
            }
            self.trouble = None;
            let (_, absent): (Vec<_>, Vec<_>) = names
                .into_iter()
                .partition(|name| self.read_file(name, watch));
            if let Err(error) = self.remove_files(&absent, watch) {
                return self.give_up(&error);
            }
            if !self.seen.any() {
                return;
            }
        }
    }

    /// Takes out files that are not there any more.
    fn remove_files(&mut self, names: &[String], watch: &mut Watch) -> io::Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        if !self.path.is_dir() {
            // The directory went away with them: their objects stay.
            self.seen.directory = true;
            self.seen.everything = true;
            return Ok(());
        }
        // A file may have been given another name, of which the event is only now coming: its
        // objects must not go and come again.
        let mut others = self.list()?;
        others.retain(|name| !self.digests.contains_key(name));
        watch.drain(&mut self.seen);
        others.append(&mut self.seen.files);
        let (present, absent): (BTreeSet<_>, BTreeSet<_>) = others
            .into_iter()
            .partition(|name| self.read_file(name, watch));
        self.seen.files.extend(absent);
        for name in names.iter().filter(|name| !present.contains(*name)) {
            self.digests.remove(name);
            self.catalog.remove(name);
        }
        Ok(())
    }

    /// The directory cannot be read now; what it held stays in force.
    fn give_up(&mut self, error: &io::Error) {
        self.seen = Seen::default();
        self.trouble = Some(match error.kind() {
            io::ErrorKind::NotFound => "the directory is gone".to_owned(),
            _ => format!("the directory cannot be read: {error}"),
        });
    }

    /// Names of all files that may hold objects.
    fn list(&self) -> io::Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&self.path)? {
            if let Ok(name) = entry?.file_name().into_string()
                && is_read(&name)
            {
                names.insert(name);
            }
        }
        Ok(names)
    }

    /// Reads one file, unless it is being written to. Whether there is such a file.
    fn read_file(&mut self, name: &str, watch: &mut Watch) -> bool {
        let Some(format) = format_of(name) else {
            return true;
        };
        // The event of its closing brings it back.
        if self.seen.writing.contains(name) {
            return true;
        }
        let content = read_bytes(&self.path.join(name));
        watch.drain(&mut self.seen);
        if self.seen.writing.contains(name) || self.seen.files.contains(name) {
            return true;
        }
        match content {
            Ok(None) => return false,
            Ok(Some(bytes)) => {
                let digest = digest(&bytes);
                if self.digests.insert(name.to_owned(), digest) != Some(digest) {
                    self.parse_file(name, format, bytes);
                }
            }
            Err(error) => {
                self.digests.remove(name);
                self.catalog
                    .set_unreadable(name, &format!("cannot be read: {error}"));
            }
        }
        true
    }

    fn parse_file(&mut self, name: &str, format: Format, bytes: Vec<u8>) {
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let place = error.utf8_error().valid_up_to();
                let cause = format!("is not UTF-8: see byte {place}");
                return self.catalog.set_unreadable(name, &cause);
            }
        };
        let manifest = yaml::parse(&text, format);
        for what in &manifest.ignored {
            if self.ignored.insert(what.clone()) {
                info!(file = name, "objects of kind {what} are not used by Weir");
            }
        }
        self.catalog.set(name, manifest);
    }
}

/// The content of a file; `None` if there is none or it is no regular file.
fn read_bytes(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
        Ok(_) => {}
    }
    // Follows symbolic links: one that leads nowhere is an error.
    if !fs::metadata(path)?.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    // One byte more tells a file that is too large, even when it grows meanwhile.
    let mut file = fs::File::open(path)?.take(FILE_SIZE_MAX + 1);
    file.read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_SIZE_MAX {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!(
                "it is larger than {} MiB; split it into several files",
                FILE_SIZE_MAX >> 20
            ),
        ));
    }
    Ok(Some(bytes))
}

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// The format of a file by its name; `None` for files that are not read: hidden ones, those
/// that editors make beside the file, and all that do not end in .yaml, .yml or .json.
fn format_of(name: &str) -> Option<Format> {
    if name.starts_with(['.', '#', '~']) {
        return None;
    }
    match name.rsplit_once('.')?.1 {
        "yaml" | "yml" => Some(Format::Yaml),
        "json" => Some(Format::Json),
        _ => None,
    }
}

/// Whether a file of this name is read.
pub(super) fn is_read(name: &str) -> bool {
    format_of(name).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_read() {
        for name in ["a.yaml", "a.yml", "a.b.json", "web service.yaml"] {
            assert!(is_read(name), "{name}");
        }
        for name in [
            ".a.yaml",
            "a.yaml~",
            "#a.yaml#",
            ".#a.yaml",
            ".a.yaml.swp",
            "a.yaml.bak",
            "4913",
            "yaml",
            "a.txt",
            "..data",
        ] {
            assert!(!is_read(name), "{name}");
        }
    }
}
