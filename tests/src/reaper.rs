//! Removes what clusters leave: called when a cluster is dropped, on Ctrl-C, and at the start of every
//! cluster for those whose process died without the chance to do it.
//!
//! A cluster's id is `PID-NUMBER`. Namespaces are named `weir-ID-…`, the state directory is
//! `/run/weir-test/ID`, pins are in `/sys/fs/bpf/weir-test-ID`, control groups are
//! `weir-test-PID/ID-…` ([`cgroup`]).

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Once,
        atomic::{AtomicI32, Ordering},
    },
    time::Duration,
};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::{cgroup, netns, process};

/// Parent of all state directories.
pub const STATE: &str = "/run/weir-test";
/// Where BPF objects are pinned.
pub const BPF: &str = "/sys/fs/bpf";
/// In the state directory: start time of the process that made it.
const OWNER: &str = "owner";

/// State directory of a cluster.
#[must_use]
pub fn state_directory(id: &str) -> PathBuf {
    Path::new(STATE).join(id)
}

/// Directory of a cluster's pins.
#[must_use]
pub fn bpf_directory(id: &str) -> PathBuf {
    Path::new(BPF).join(format!("weir-test-{id}"))
}

/// Full name of one of a cluster's namespaces.
#[must_use]
pub fn namespace_name(id: &str, name: &str) -> String {
    format!("weir-{id}-{name}")
}

/// Enters this process as the owner of a cluster, before anything of it is made.
///
/// # Errors
///
/// When the state directory cannot be made.
pub fn claim(id: &str) -> std::io::Result<()> {
    // Under its name only when it has an owner: another process may look for the dead just now.
    let new = Path::new(STATE).join(format!(".new-{id}"));
    fs::create_dir_all(&new)?;
    fs::write(new.join(OWNER), own_start_time())?;
    fs::rename(new, state_directory(id))
}

/// Removes all that belongs to one cluster: processes, namespaces, control groups, pins and files.
pub fn remove(id: &str) {
    let prefix = namespace_name(id, "");
    let names: Vec<String> = names_in(netns::DIRECTORY)
        .filter(|name| name.starts_with(&prefix))
        .collect();
    let inodes: Vec<u64> = names
        .iter()
        .filter_map(|name| fs::metadata(Path::new(netns::DIRECTORY).join(name)).ok())
        .map(|m| m.ino())
        .collect();
    process::kill_in_namespaces(&inodes);
    for name in names {
        netns::remove(&name);
    }
    cgroup::remove(id);
    // Neither need exist.
    let _ = fs::remove_dir_all(bpf_directory(id));
    let _ = fs::remove_dir_all(state_directory(id));
}

/// From now on SIGINT and SIGTERM remove this process's clusters before they end it.
pub fn remove_on_signal() {
    static SIGNAL: AtomicI32 = AtomicI32::new(0);
    static ONCE: Once = Once::new();
    extern "C" fn note(signal: i32) {
        SIGNAL.store(signal, Ordering::Relaxed);
    }
    ONCE.call_once(|| {
        let action = SigAction::new(
            SigHandler::Handler(note),
            SaFlags::SA_RESTART,
            SigSet::empty(),
        );
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            // SAFETY: the handler stores to an atomic, nothing else.
            if let Err(error) = unsafe { sigaction(signal, &action) } {
                eprintln!("{signal} will leave clusters behind: {error}");
            }
        }
        std::thread::spawn(|| {
            loop {
                match SIGNAL.load(Ordering::Relaxed) {
                    0 => std::thread::sleep(Duration::from_millis(50)),
                    signal => {
                        remove_own();
                        std::process::exit(128 + signal);
                    }
                }
            }
        });
    });
}

/// Removes what belongs to clusters whose process is gone.
pub fn remove_dead() {
    for id in all_ids().filter(|id| !owner_lives(id)) {
        remove(&id);
    }
    // What is left of those whose state directory went, but not all of the rest.
    cgroup::remove_dead(|pid| {
        all_ids().any(|id| id.split_once('-').is_some_and(|(p, _)| p == pid))
    });
}

/// Removes what belongs to clusters of this process.
pub fn remove_own() {
    let own = format!("{}-", std::process::id());
    for id in all_ids().filter(|id| id.starts_with(&own)) {
        remove(&id);
    }
}

fn all_ids() -> impl Iterator<Item = String> {
    names_in(STATE).filter(|id| owner_pid(id).is_some())
}

fn names_in(directory: &str) -> impl Iterator<Item = String> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}

fn owner_pid(id: &str) -> Option<i32> {
    id.split_once('-')?.0.parse().ok()
}

fn owner_lives(id: &str) -> bool {
    if state_directory(id).join(KEEP).exists() {
        return true;
    }
    let Some(now) = owner_pid(id).and_then(process::start_time) else {
        return false;
    };
    // Without the file the owner is between making the directory and writing it.
    fs::read_to_string(state_directory(id).join(OWNER)).map_or(true, |then| then == now.to_string())
}

fn own_start_time() -> String {
    i32::try_from(std::process::id())
        .ok()
        .and_then(process::start_time)
        .unwrap_or_default()
        .to_string()
}

/// In the state directory of a cluster that is to outlive its process.
const KEEP: &str = "keep";

/// Marks a cluster as one that is to outlive its process.
///
/// # Errors
///
/// When the mark cannot be written.
pub fn keep(id: &str) -> std::io::Result<()> {
    fs::write(state_directory(id).join(KEEP), "")
}

/// Ids of clusters that were kept.
#[must_use]
pub fn kept() -> Vec<String> {
    all_ids()
        .filter(|id| state_directory(id).join(KEEP).exists())
        .collect()
}
