//! Control groups: the kernel knows by them which sockets live on which node. Programs that an agent
//! attaches to a cgroup see the sockets of the threads in it and below, whatever their network
//! namespace is, so each node of a test has a cgroup of its own.
//!
//! All nodes of a test live in one process, so theirs are *threaded* cgroups (kernel documentation,
//! `admin-guide/cgroup-v2.rst`, "Threads") below one domain, `weir-test-PID`, that the process moves
//! itself into for as long as it has clusters. [`NetNs`](crate::netns::NetNs) lets threads and child
//! processes enter; [`reaper`](crate::reaper) removes.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// How a process's domain begins; its number follows.
const PREFIX: &str = "weir-test-";
/// How long threads and processes that end may take to leave their cgroup.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A cgroup that threads of this process, and processes that it starts, can enter.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    threads: File,
}

impl Cgroup {
    fn open(path: PathBuf) -> Result<Self> {
        let file = path.join("cgroup.threads");
        let threads = File::options()
            .write(true)
            .open(&file)
            .with_context(|| format!("open {}", file.display()))?;
        Ok(Self { path, threads })
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its name as `/proc/thread-self/cgroup` shows it to those inside: the path below the mount.
    ///
    /// # Errors
    ///
    /// When there is no cgroup2 hierarchy.
    pub fn name(&self) -> Result<String> {
        let below = self.path.strip_prefix(mount_point()?)?;
        Ok(format!("/{}", below.display()))
    }

    /// Puts the calling thread into it for good. Allocates nothing: fit for the time between fork and
    /// exec.
    ///
    /// # Errors
    ///
    /// When the cgroup is gone, or of another process's domain.
    pub fn enter(&self) -> io::Result<()> {
        // 0 is the caller, and spares the kernel the lock that it takes to move others.
        (&self.threads).write_all(b"0")
    }
}

/// What this process's clusters share.
#[derive(Debug)]
struct Domain {
    /// The folder of the cgroup where the process was before.
    home: PathBuf,
    /// Ids of the clusters.
    clusters: BTreeSet<String>,
}

static DOMAIN: Mutex<Option<Domain>> = Mutex::new(None);

fn domain() -> MutexGuard<'static, Option<Domain>> {
    DOMAIN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the cgroup2 hierarchy is mounted.
///
/// # Errors
///
/// When it is not.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
    let points: Vec<&str> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (point, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup2").then_some(point)
        })
        .collect();
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .find(|usual| points.contains(usual))
        .or_else(|| points.first().copied())
        .map(PathBuf::from)
        .context("no cgroup2 hierarchy is mounted; see `cargo xtask setup`")
}

/// The cgroup of the calling thread, as the kernel names it.
///
/// # Errors
///
/// When it cannot be read.
pub fn of_this_thread() -> Result<String> {
    of("/proc/thread-self/cgroup")
}

fn of(file: &str) -> Result<String> {
    let text = fs::read_to_string(file).with_context(|| format!("read {file}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("0::"))
        .map(str::to_owned)
        .with_context(|| format!("{file} names no cgroup2"))
}

fn domain_path(mount: &Path, pid: &str) -> PathBuf {
    mount.join(format!("{PREFIX}{pid}"))
}

/// The process that a cluster's id begins with.
fn pid_of(id: &str) -> &str {
    id.split_once('-').map_or(id, |(pid, _)| pid)
}

/// Moves this process into its domain, for the cluster `id`. Gives the domain: for what is on no node.
///
/// # Errors
///
/// When there is no cgroup2 hierarchy, or its folders cannot be made.
pub fn claim(id: &str) -> Result<Cgroup> {
    let mut domain = domain();
    let mount = mount_point()?;
    let path = domain_path(&mount, pid_of(id));
    if domain.is_none() {
        let home = of("/proc/self/cgroup")?;
        let home = mount.join(home.trim_start_matches('/'));
        fs::create_dir_all(&path)
            .with_context(|| format!("make the cgroup {}; are you root?", path.display()))?;
        move_process(&path)?;
        *domain = Some(Domain {
            home,
            clusters: BTreeSet::new(),
        });
    }
    if let Some(domain) = domain.as_mut() {
        domain.clusters.insert(id.to_owned());
    }
    Cgroup::open(path)
}

fn move_process(to: &Path) -> Result<()> {
    fs::write(to.join("cgroup.procs"), "0")
        .with_context(|| format!("move this process into the cgroup {}", to.display()))
}

/// Makes the cgroup of a node.
///
/// # Errors
///
/// When the cluster's domain was not claimed.
pub fn create(id: &str, node: &str) -> Result<Cgroup> {
    let path = domain_path(&mount_point()?, pid_of(id)).join(format!("{id}-{node}"));
    fs::create_dir(&path).with_context(|| format!("make the cgroup {}", path.display()))?;
    fs::write(path.join("cgroup.type"), "threaded")
        .with_context(|| format!("make the cgroup {} threaded", path.display()))?;
    Cgroup::open(path)
}

/// Removes the cgroups of a cluster, after all its processes were killed, and with the last cluster of
/// its process the domain. Tells on standard error what could not be removed.
pub fn remove(id: &str) {
    if let Err(error) = try_remove(id) {
        eprintln!("the control groups of cluster {id} stay: {error:#}");
    }
}

fn try_remove(id: &str) -> Result<()> {
    let mut domain = domain();
    let Ok(mount) = mount_point() else {
        return Ok(());
    };
    let path = domain_path(&mount, pid_of(id));
    let prefix = format!("{id}-");
    for node in folders(&path).filter(|name| name.starts_with(&prefix)) {
        remove_empty(&path.join(node), &path)?;
    }
    if let Some(own) = domain.as_mut()
        && own.clusters.remove(id)
        && own.clusters.is_empty()
    {
        // The old cgroup may be gone; the root of the hierarchy is always there.
        move_process(&own.home).or_else(|_| move_process(&mount))?;
        *domain = None;
    }
    if domain.is_none() && path.exists() && folders(&path).next().is_none() {
        remove_empty(&path, &mount)?;
    }
    Ok(())
}

/// Removes the domains that no cluster belongs to: `lives` tells by a process's number.
pub fn remove_dead(lives: impl Fn(&str) -> bool) {
    let Ok(mount) = mount_point() else {
        return;
    };
    for name in folders(&mount) {
        let Some(pid) = name.strip_prefix(PREFIX).filter(|pid| !lives(pid)) else {
            continue;
        };
        let path = domain_path(&mount, pid);
        let nodes = folders(&path).map(|node| path.join(node));
        for folder in nodes.chain([path.clone()]) {
            if let Err(error) = remove_empty(&folder, &mount) {
                eprintln!("a control group of a dead test stays: {error:#}");
            }
        }
    }
}

fn folders(directory: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
}

/// Removes a cgroup: threads of this process that are still in it go to `parent`, processes are killed.
fn remove_empty(path: &Path, parent: &Path) -> Result<()> {
    let deadline = Instant::now() + LEAVE_TIMEOUT;
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::ResourceBusy => {
                return Err(error).with_context(|| format!("remove {}", path.display()));
            }
            Err(_) => {}
        }
        ensure!(
            Instant::now() < deadline,
            "{} is in use after {LEAVE_TIMEOUT:?}",
            path.display()
        );
        empty(path, parent)?;
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Asks all that is in a cgroup to go. What is on its way out already shows no more.
fn empty(path: &Path, parent: &Path) -> Result<()> {
    let threads = match fs::read_to_string(path.join("cgroup.threads")) {
        Ok(threads) => threads,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => bail!("read the threads of {}: {error}", path.display()),
    };
    for thread in threads.split_whitespace() {
        if Path::new("/proc/self/task").join(thread).exists() {
            // It may have ended meanwhile.
            let _ = fs::write(parent.join("cgroup.threads"), thread);
        } else if let Ok(thread) = thread.parse() {
            let _ = kill(Pid::from_raw(thread), Signal::SIGKILL);
        }
    }
    Ok(())
}
