//! Why the data path cannot be opened, or a program not attached.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::tables::TableError;

/// Why the data path cannot be opened, or a program not attached.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// Nothing is mounted there.
    #[error(
        "{} is not on a BPF file system: mount one with `mount -t bpf bpf /sys/fs/bpf`, or set \
         bpf-root to a folder of one",
        root.display()
    )]
    NoBpffs {
        /// The setting bpf-root.
        root: PathBuf,
    },
    /// The embedded object is not what this agent expects.
    #[error("the eBPF object {0}: build the agent again")]
    Object(String),
    /// aya cannot load the object.
    #[error(
        "the eBPF object cannot be loaded: {0}; it needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
    )]
    Load(#[source] Box<aya::EbpfError>),
    /// The kernel refuses a program.
    #[error("the kernel refuses program {program}: {source}\n{log}")]
    Verifier {
        /// Its name.
        program: &'static str,
        /// The kernel's answer.
        source: io::Error,
        /// The end of the verifier's log.
        log: String,
    },
    /// A file below bpf-root.
    #[error("{}: {source}", path.display())]
    Pin {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// What a pinned map held cannot be carried over.
    #[error("cannot carry the content of a pinned map over to one of another size: {0}")]
    Migrate(#[source] io::Error),
    /// A map cannot be used.
    #[error("map {name}: {source}")]
    Map {
        /// Its name.
        name: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A map cannot be read at start.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A program cannot be attached.
    #[error("cannot attach {program} to {device} (index {ifindex}): {source}")]
    Attach {
        /// The program.
        program: &'static str,
        /// The device.
        device: String,
        /// Its interface index.
        ifindex: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A program of sockets cannot be attached.
    #[error(
        "cannot attach {program} to the cgroup {cgroup}: {source}; {}",
        cgroup_remedy(source)
    )]
    AttachCgroup {
        /// The program.
        program: &'static str,
        /// Folder of the cgroup.
        cgroup: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What helps against an answer of the kernel to the attachment of a program to a cgroup.
fn cgroup_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM) => {
            "somebody has attached a program there, or above, that allows no other beside it \
             (bpftool cgroup tree): detach it, or give the setting cgroup-root another folder"
        }
        Some(libc::E2BIG) => {
            "as many programs as the kernel allows are attached there (bpftool cgroup tree): \
             detach those that nobody needs"
        }
        Some(libc::ENOMEM) => "the node has no memory left for it",
        // Not there, no folder, or of another file system.
        _ => "give the setting cgroup-root a folder of a cgroup2 file system",
    }
}

impl DatapathError {
    pub(super) fn pin(path: &Path, source: io::Error) -> Self {
        Self::Pin {
            path: path.to_path_buf(),
            source,
        }
    }
}
