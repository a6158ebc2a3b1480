//! Keeps a second agent off the node: two agents that write the same maps, attach to the same
//! devices or serve the same socket would undo each other's work.
//!
//! Three locks, none of which outlives its process: an abstract unix socket, which exists once
//! in a network namespace (that is: on a node); a lock on `RUN-DIR/agent.lock`; and one on the
//! directory `BPF-ROOT`, for agents that share it from different network namespaces.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::{
        fd::AsFd as _,
        linux::net::SocketAddrExt as _,
        unix::{
            fs::{MetadataExt as _, OpenOptionsExt as _},
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::socket::{getsockopt, sockopt::PeerCredentials},
};

/// Name of the abstract socket.
const ABSTRACT_NAME: &str = "weir-agent";

/// How long a lock may outlive its process: a program that the agent was just about to start has copies of all that was
/// open until it really starts, also when the agent is killed in that moment.
const LEFT_BEHIND: Duration = Duration::from_secs(3);

/// Held while the agent lives.
#[derive(Debug)]
pub struct AgentLock {
    _node: UnixListener,
    _run_dir: Flock<File>,
    _bpf_root: Flock<File>,
}

/// Why the lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent has it.
    #[error(
        "another weir-agent ({holder}) {what}; stop it first, or give this one a network namespace, --run-dir and --bpf-root of its own"
    )]
    Held {
        /// Process of the other agent.
        holder: Holder,
        /// What both would use.
        what: String,
    },
    /// The lock cannot be made.
    #[error("cannot lock {what}: {cause}")]
    Io {
        /// What should be locked.
        what: String,
        /// Cause.
        cause: io::Error,
    },
}

impl AgentLock {
    /// Takes all three locks. Both directories must exist. Those of an agent that is dead are waited for.
    ///
    /// # Errors
    ///
    /// [`LockError::Held`] if another agent has one of them, [`LockError::Io`] if one cannot be made.
    pub fn acquire(run_dir: &Path, bpf_root: &Path) -> Result<Self, LockError> {
        let deadline = Instant::now() + LEFT_BEHIND;
        loop {
            match Self::try_acquire(run_dir, bpf_root) {
                Err(LockError::Held { holder, .. })
                    if holder.is_dead() && Instant::now() < deadline =>
                {
                    thread::sleep(Duration::from_millis(20));
                }
                result => return result,
            }
        }
    }

    fn try_acquire(run_dir: &Path, bpf_root: &Path) -> Result<Self, LockError> {
        let node = lock_node()?;
        let path = run_dir.join("agent.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path);
        let mut run_dir_lock = lock_file(file, &path, "uses the run directory")?;
        // For people; the lock itself does not depend on it.
        let _ = run_dir_lock
            .set_len(0)
            .and_then(|()| writeln!(run_dir_lock, "{}", std::process::id()));
        let bpf_root_lock = lock_file(File::open(bpf_root), bpf_root, "uses the bpf-root")?;
        Ok(Self {
            _node: node,
            _run_dir: run_dir_lock,
            _bpf_root: bpf_root_lock,
        })
    }
}

fn lock_node() -> Result<UnixListener, LockError> {
    let what = || format!("this node (the abstract socket @{ABSTRACT_NAME})");
    let failure = |cause| LockError::Io {
        what: what(),
        cause,
    };
    let address = SocketAddr::from_abstract_name(ABSTRACT_NAME).map_err(failure)?;
    match UnixListener::bind_addr(&address) {
        Ok(listener) => Ok(listener),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let pid = UnixStream::connect_addr(&address)
                .ok()
                .and_then(|stream| getsockopt(&stream.as_fd(), PeerCredentials).ok())
                .map(|credentials| credentials.pid());
            Err(LockError::Held {
                holder: Holder(pid),
                what: "runs on this node (in this network namespace)".to_owned(),
            })
        }
        Err(cause) => Err(failure(cause)),
    }
}

fn lock_file(file: io::Result<File>, path: &Path, use_of: &str) -> Result<Flock<File>, LockError> {
    let failure = |cause| LockError::Io {
        what: path.display().to_string(),
        cause,
    };
    let file = file.map_err(failure)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, nix::errno::Errno::EWOULDBLOCK)) => Err(LockError::Held {
            holder: Holder(owner_of_lock(&file)),
            what: format!("{use_of} {}", path.display()),
        }),
        Err((_, errno)) => Err(failure(errno.into())),
    }
}

/// The process that made a lock, if it can be told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Holder(Option<i32>);

impl Holder {
    /// Whether it is known, and lives no longer. (That of another PID namespace is 0.)
    fn is_dead(self) -> bool {
        let Some(pid @ 1..) = self.0 else {
            return false;
        };
        // A zombie has closed everything.
        match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat
                .rsplit(") ")
                .next()
                .is_some_and(|rest| rest.starts_with('Z')),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(pid) => write!(f, "pid {pid}"),
            None => f.write_str("pid unknown"),
        }
    }
}

/// The process that has a lock on the file, from `/proc/locks`
/// (`1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`).
fn owner_of_lock(file: &File) -> Option<i32> {
    let inode = file.metadata().ok()?.ino().to_string();
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let &[_, "FLOCK", _, _, pid, place, ..] = words.as_slice() else {
            return None;
        };
        (place.rsplit(':').next() == Some(inode.as_str())).then(|| pid.parse().ok())?
    })
}

/// Removes a socket that nobody serves any more.
///
/// # Errors
///
/// If somebody answers there, or if it cannot be removed.
pub fn remove_stale_socket(path: &Path) -> io::Result<()> {
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("another process serves {}", path.display()),
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(_) => fs::remove_file(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_locked_once_and_the_holder_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let open = || File::open(directory.path());
        let first = lock_file(open(), directory.path(), "uses").unwrap();
        let error = lock_file(open(), directory.path(), "uses").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(&format!("pid {}", std::process::id())),
            "{text}"
        );
        assert!(
            text.contains(&directory.path().display().to_string()),
            "{text}"
        );
        drop(first);
        lock_file(open(), directory.path(), "uses").unwrap();
    }

    #[test]
    fn a_process_is_dead_when_it_is_gone_or_a_zombie() {
        let own = i32::try_from(std::process::id()).unwrap();
        for alive in [None, Some(0), Some(own)] {
            assert!(!Holder(alive).is_dead(), "{alive:?}");
        }
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !Holder(Some(pid)).is_dead() {
            assert!(Instant::now() < deadline, "a zombie");
            thread::sleep(Duration::from_millis(5));
        }
        child.wait().unwrap();
        assert!(Holder(Some(pid)).is_dead(), "gone");
    }

    #[test]
    fn a_stale_socket_is_removed_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        remove_stale_socket(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert!(remove_stale_socket(&path).is_err());
        drop(listener);
        assert!(path.exists());
        remove_stale_socket(&path).unwrap();
        assert!(!path.exists());
    }
}
