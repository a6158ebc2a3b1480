//! The thread that finds translated sockets in the network namespaces of the node and of its pods,
//! and ends those of which the event loop says so. It enters the namespaces itself, and ends with the
//! walk: no other work gets a thread that is in some pod's namespace.

use std::{
    collections::{BTreeSet, HashSet},
    fs::File,
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
};
use tokio::sync::{mpsc, oneshot};

use crate::{
    datapath::sockets,
    model::BackendAddress,
    netlink::sock_diag::{Ended, SockDiag, SocketId},
    objects::Family,
};

/// Sockets that the event loop is asked about at once.
const AT_ONCE: usize = 256;

/// A socket that was translated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in super::super) struct Translated {
    /// What its process asked for.
    pub frontend: SocketAddr,
    /// What it talks to.
    pub backend: BackendAddress,
}

/// What the thread says to the event loop.
#[derive(Debug)]
pub(in super::super) enum Report {
    /// Sockets that may be meant. The answer says of each whether it is to be ended.
    Found(Vec<Translated>, oneshot::Sender<Vec<bool>>),
    /// The last word.
    Done(Outcome),
}

/// What has come of a walk.
#[derive(Debug, Default)]
pub(in super::super) struct Outcome {
    /// Sockets ended.
    pub ended: u64,
    /// Sockets that could not be ended.
    pub failed: u64,
    /// Namespaces looked at.
    pub namespaces: u32,
    /// For people.
    pub problems: Vec<String>,
    /// How long it took.
    pub took: Duration,
}

/// What to look for, and where.
#[derive(Debug)]
pub(super) struct Plan {
    /// `SOCKET_FRONTENDS`.
    pub map: OwnedFd,
    /// Only sockets that talk to these; `None`: all that were translated.
    pub only: Option<HashSet<BackendAddress>>,
    /// Namespaces of pods; that of the calling thread comes first by itself.
    pub namespaces: BTreeSet<PathBuf>,
}

/// Starts the thread, in the network namespace of the caller: the node's.
///
/// # Errors
///
/// There is no room for another thread.
pub(super) fn start(plan: Plan, reports: mpsc::Sender<Report>) -> io::Result<()> {
    let run = move || {
        let begin = Instant::now();
        let mut walk = Walk {
            plan,
            reports,
            outcome: Outcome::default(),
        };
        walk.run();
        walk.outcome.took = begin.elapsed();
        // Without an event loop the agent ends, and nobody wants to know.
        let _ = walk.reports.blocking_send(Report::Done(walk.outcome));
    };
    let thread = thread::Builder::new().name("weir-sockets".to_owned());
    thread.spawn(run).map(drop)
}

struct Walk {
    plan: Plan,
    reports: mpsc::Sender<Report>,
    outcome: Outcome,
}

impl Walk {
    fn run(&mut self) {
        let node = SockDiag::open().map_err(|error| error.to_string());
        let node = node.and_then(|mut node| examine(&mut node).map(|()| node));
        match node {
            Ok(node) => self.look(node, "of the node"),
            Err(problem) => {
                self.problem(problem);
                return;
            }
        }
        let paths = std::mem::take(&mut self.plan.namespaces);
        for path in &paths {
            match enter(path) {
                Ok(Some(pod)) => self.look(pod, &path.display().to_string()),
                // The pod is gone, and its sockets with it.
                Ok(None) => {}
                Err(error) => {
                    self.problem(format!("network namespace {}: {error}", path.display()));
                }
            }
        }
        if let Some(first) = paths.first().filter(|_| self.outcome.namespaces == 1) {
            self.problem(format!(
                "none of the network namespaces of {} pods is there, the first is {}: the agent must \
                 see the container runtime's paths, with those that appear later",
                paths.len(),
                first.display()
            ));
        }
    }

    fn problem(&mut self, cause: impl std::fmt::Display) {
        let problem = format!("cannot end sockets of gone endpoints: {cause}");
        self.outcome.problems.push(problem);
    }

    /// Finds and ends sockets of one namespace.
    fn look(&mut self, mut diag: SockDiag, namespace: &str) {
        self.outcome.namespaces += 1;
        for family in [Family::V4, Family::V6] {
            let mut found = Vec::new();
            let only = self.plan.only.as_ref();
            let listed = diag.list(family, self.plan.map.as_fd(), |id, value| {
                if let Some(translated) = translated(&id, value)
                    && only.is_none_or(|only| only.contains(&translated.backend))
                {
                    found.push((id, translated));
                }
            });
            if let Err(error) = listed {
                let family = family.name();
                self.problem(format!(
                    "network namespace {namespace}: cannot list {family} sockets: {error}"
                ));
            }
            for chunk in found.chunks(AT_ONCE) {
                self.end(&mut diag, chunk, namespace);
            }
        }
    }

    fn end(&mut self, diag: &mut SockDiag, found: &[(SocketId, Translated)], namespace: &str) {
        let (sender, answer) = oneshot::channel();
        let sockets = found.iter().map(|(_, translated)| *translated).collect();
        let asked = self.reports.blocking_send(Report::Found(sockets, sender));
        let Ok(gone) = asked
            .map_err(drop)
            .and_then(|()| answer.blocking_recv().map_err(drop))
        else {
            return;
        };
        for ((id, translated), is_gone) in found.iter().zip(gone) {
            if !is_gone {
                continue;
            }
            match diag.end(id) {
                Ok(Ended::Now) => self.outcome.ended += 1,
                Ok(Ended::Before) => {}
                Err(error) => {
                    // One line for all: they fail for the same reason.
                    if self.outcome.failed == 0 {
                        let Translated { frontend, .. } = translated;
                        self.problem(format!(
                            "network namespace {namespace}: a socket from {frontend}: {error}"
                        ));
                    }
                    self.outcome.failed += 1;
                }
            }
        }
    }
}

/// Whether the kernel can do what is needed; if not, why, and the remedy.
fn examine(diag: &mut SockDiag) -> Result<(), String> {
    const REMEDY: &str =
        "use a kernel that has it, or switch the setting end-sockets-of-gone-endpoints off";
    match diag.tells_storage() {
        Ok(true) => {}
        Ok(false) => {
            return Err(format!(
                "the kernel does not tell which sockets were translated \
                 (INET_DIAG_REQ_SK_BPF_STORAGES, 5.7); {REMEDY}"
            ));
        }
        Err(error) => {
            return Err(format!(
                "the kernel does not list TCP sockets: {error} (CONFIG_INET_DIAG and \
                 CONFIG_INET_TCP_DIAG, perhaps the modules inet_diag and tcp_diag); {REMEDY}"
            ));
        }
    }
    match diag.can_end() {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!(
            "the kernel is built without CONFIG_INET_DIAG_DESTROY; {REMEDY}"
        )),
        Err(error) => Err(format!("the kernel refuses to end sockets: {error}")),
    }
}

/// A handle in the namespace at `path`, with the calling thread; `None` if there is none any more.
fn enter(path: &Path) -> io::Result<Option<SockDiag>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match setns(&file, CloneFlags::CLONE_NEWNET) {
        Ok(()) => SockDiag::open().map(Some),
        // A name that was a mount of a namespace, and is a plain file now.
        Err(Errno::EINVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What a socket was translated from and to, if it still talks to that.
fn translated(id: &SocketId, value: &[u8]) -> Option<Translated> {
    let peer = id.peer();
    Some(Translated {
        frontend: sockets::frontend_of(value, peer)?,
        backend: BackendAddress {
            address: peer.ip(),
            port: peer.port(),
        },
    })
}
