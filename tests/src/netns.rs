//! Network namespaces with a name under `/run/netns`, where `ip netns` and `nsenter --net=` find them.

use std::{
    fs::{self, File},
    os::{
        fd::AsFd as _,
        unix::{fs::MetadataExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

use crate::cgroup::Cgroup;

/// Where names of network namespaces live.
pub const DIRECTORY: &str = "/run/netns";

/// For short commands of the system's own tools.
const TOOL_TIMEOUT: Duration = Duration::from_secs(20);

/// A named network namespace, and the control group of those who enter it. Dropping it keeps the
/// namespace: [`remove`] ends it.
#[derive(Debug)]
pub struct NetNs {
    name: String,
    file: File,
    cgroup: Option<Arc<Cgroup>>,
}

impl NetNs {
    /// Makes a namespace with its loopback up.
    ///
    /// # Errors
    ///
    /// When the name is taken, or the caller lacks `CAP_SYS_ADMIN`.
    pub fn create(name: &str) -> Result<Self> {
        let path = Path::new(DIRECTORY).join(name);
        fs::create_dir_all(DIRECTORY).with_context(|| format!("make {DIRECTORY}"))?;
        File::create_new(&path).with_context(|| format!("make namespace {}", path.display()))?;
        let bound = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    unshare(CloneFlags::CLONE_NEWNET)?;
                    mount(
                        Some("/proc/thread-self/ns/net"),
                        &path,
                        None::<&str>,
                        MsFlags::MS_BIND,
                        None::<&str>,
                    )
                })
                .join()
        });
        bound
            .map_err(|_| anyhow::anyhow!("the thread that makes namespaces panicked"))?
            .with_context(|| format!("make network namespace {name}; are you root?"))?;
        let namespace = Self::open(name)?;
        namespace.ip("link set lo up")?;
        // Clients that make thousands of connections a second to one address must not run out of ports.
        namespace.sysctl("net/ipv4/ip_local_port_range", "10000 65000")?;
        namespace.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
        Ok(namespace)
    }

    /// Opens one that exists.
    ///
    /// # Errors
    ///
    /// When there is none of that name.
    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new(DIRECTORY).join(name);
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        Ok(Self {
            name: name.to_owned(),
            file,
            cgroup: None,
        })
    }

    /// Whoever enters the namespace from now on enters the control group, too: that of the node that
    /// it belongs to.
    #[must_use]
    pub fn in_cgroup(mut self, cgroup: Arc<Cgroup>) -> Self {
        self.cgroup = Some(cgroup);
        self
    }

    /// The control group of those who enter; `None`: they stay where they are.
    #[must_use]
    pub const fn cgroup(&self) -> Option<&Arc<Cgroup>> {
        self.cgroup.as_ref()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its path, as a CNI plugin gets it in `CNI_NETNS`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// Number that tells it from every other namespace.
    ///
    /// # Errors
    ///
    /// When the file cannot be examined.
    pub fn inode(&self) -> Result<u64> {
        Ok(self.file.metadata()?.ino())
    }

    /// Runs a closure on a thread inside the namespace. Mounts stay the caller's; sockets that the
    /// closure makes belong to the namespace also after it.
    ///
    /// # Panics
    ///
    /// When the closure does, or the namespace cannot be entered.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(&self.file, self.cgroup.as_deref());
                f()
            });
            match thread.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Starts a thread inside the namespace.
    ///
    /// # Errors
    ///
    /// When the namespace's file cannot be duplicated.
    pub fn spawn<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> Result<std::thread::JoinHandle<T>> {
        let file = self.file.try_clone()?;
        let cgroup = self.cgroup.clone();
        Ok(std::thread::spawn(move || {
            enter(&file, cgroup.as_deref());
            f()
        }))
    }

    /// A command that will run inside the namespace.
    ///
    /// # Errors
    ///
    /// When the namespace's file cannot be duplicated.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let file = self.file.try_clone()?;
        let cgroup = self.cgroup.clone();
        let mut command = Command::new(program);
        // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                if let Some(cgroup) = &cgroup {
                    cgroup.enter()?;
                }
                Ok(setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?)
            });
        }
        Ok(command)
    }

    /// Runs a tool inside the namespace to its end and returns what it printed.
    ///
    /// # Errors
    ///
    /// When it fails, with what it said.
    pub fn tool(&self, program: &str, arguments: &[&str]) -> Result<String> {
        crate::process::run(self.command(program)?.args(arguments), b"", TOOL_TIMEOUT)
            .with_context(|| format!("in namespace {}", self.name))
    }

    /// Runs `ip` with one command per line.
    ///
    /// # Errors
    ///
    /// At the first line that fails.
    pub fn ip(&self, batch: &str) -> Result<()> {
        crate::process::run(
            self.command("ip")?.args(["-batch", "-"]),
            batch.as_bytes(),
            TOOL_TIMEOUT,
        )
        .with_context(|| format!("in namespace {}: {batch}", self.name))?;
        Ok(())
    }

    /// Sets a sysctl by its path below `/proc/sys`: `net/ipv4/ip_forward`.
    ///
    /// # Errors
    ///
    /// When there is no such sysctl or it does not take the value.
    pub fn sysctl(&self, path: &str, value: &str) -> Result<()> {
        self.run(|| fs::write(format!("/proc/sys/{path}"), value))
            .with_context(|| format!("set {path} to {value} in namespace {}", self.name))
    }

    /// Names of the Ethernet devices inside.
    ///
    /// # Errors
    ///
    /// When `ip` fails.
    pub fn devices(&self) -> Result<Vec<String>> {
        let links: serde_json::Value = serde_json::from_str(&self.tool("ip", &["-json", "link"])?)?;
        Ok(links
            .as_array()
            .into_iter()
            .flatten()
            .filter(|link| link["link_type"] == "ether")
            .filter_map(|link| Some(link["ifname"].as_str()?.to_owned()))
            .collect())
    }

    /// Turns checksum and segmentation offloads of every device on or off. With veth's offloads on,
    /// wrong checksums pass unseen.
    ///
    /// # Errors
    ///
    /// When `ethtool` fails.
    pub fn set_offloads(&self, on: bool) -> Result<()> {
        let state = if on { "on" } else { "off" };
        for device in self.devices()? {
            let mut arguments = vec!["-K", &device];
            for feature in ["rx", "tx", "tso", "gso", "gro"] {
                arguments.extend([feature, state]);
            }
            self.tool("ethtool", &arguments)?;
        }
        Ok(())
    }
}

/// Puts the calling thread into a control group and a namespace for good.
fn enter(file: &File, cgroup: Option<&Cgroup>) {
    if let Some(Err(error)) = cgroup.map(Cgroup::enter) {
        panic!("enter control group: {error}; is the cluster gone?");
    }
    if let Err(error) = setns(file.as_fd(), CloneFlags::CLONE_NEWNET) {
        panic!("enter network namespace: {error}; are you root?");
    }
}

/// Ends the name of a namespace; the namespace itself goes with its last user.
pub fn remove(name: &str) {
    let path = Path::new(DIRECTORY).join(name);
    // Not mounted when making it was interrupted.
    let _ = umount2(&path, MntFlags::MNT_DETACH);
    let _ = fs::remove_file(&path);
}
