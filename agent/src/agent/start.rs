//! Before the event loop: what the machine must have, and what an earlier agent has left.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use weir_common::{
    Ipv4, Ipv6,
    config::{Config, flag},
    mark,
    metrics::{HOOKS, outcome},
};

use super::{Agent, Late, Row, host};
use crate::{
    datapath::{Datapath, DatapathOptions, NodeConfig},
    endpoint::boot_seconds,
    lock::AgentLock,
    netlink::host_device::{self, HostDevice},
    settings::Settings,
};

/// Checks what nothing works without: root, BTF of the kernel, a bpffs.
///
/// # Errors
///
/// The first thing missing, and how to get it.
pub fn check_machine(settings: &Settings) -> anyhow::Result<()> {
    let uid = nix::unistd::geteuid();
    if !uid.is_root() {
        bail!("weir-agent must run as root to load programs and change routes, not as user {uid}");
    }
    let btf = Path::new("/sys/kernel/btf/vmlinux");
    if !btf.exists() {
        bail!(
            "the kernel has no type information ({} is absent); use a kernel built with \
             CONFIG_DEBUG_INFO_BTF, and mount sysfs at /sys",
            btf.display()
        );
    }
    check_bpffs(&settings.bpf_root)
}

/// The nearest directory that exists must be on a bpffs.
fn check_bpffs(root: &Path) -> anyhow::Result<()> {
    let existing = root.ancestors().find(|path| path.exists());
    let existing = existing.unwrap_or(Path::new("/"));
    let kind =
        statfs(existing).with_context(|| format!("cannot examine {}", existing.display()))?;
    if kind.filesystem_type() != BPF_FS_MAGIC {
        bail!(
            "bpf-root {} is not on a bpffs ({} is not one); mount it with `mount -t bpf bpf \
             /sys/fs/bpf`, or give --bpf-root a directory below another bpffs",
            root.display(),
            existing.display()
        );
    }
    Ok(())
}

/// Makes the directories that are missing, and keeps other agents off. A refused agent leaves
/// nothing behind.
///
/// # Errors
///
/// If a directory cannot be made, or another agent has it or this node.
pub fn lock(settings: &Settings) -> anyhow::Result<AgentLock> {
    let mut made = Made::default();
    let locked = made.directories(settings).and_then(|()| {
        AgentLock::acquire(&settings.run_dir, &settings.bpf_root).map_err(Into::into)
    });
    if locked.is_err() {
        made.take_back(&settings.run_dir);
    }
    locked
}

/// Directories that were not there before, parents first.
#[derive(Debug, Default)]
struct Made(Vec<PathBuf>);

impl Made {
    /// The run directory (0755) and the directory of the pins (0700).
    fn directories(&mut self, settings: &Settings) -> anyhow::Result<()> {
        self.make(&settings.run_dir, 0o755).with_context(|| {
            format!(
                "cannot make the run directory {} (--run-dir)",
                settings.run_dir.display()
            )
        })?;
        self.make(&settings.bpf_root, 0o700).with_context(|| {
            format!(
                "cannot make the directory of pins {} (--bpf-root)",
                settings.bpf_root.display()
            )
        })
    }

    /// A directory that is there keeps its mode: others may use it, too.
    fn make(&mut self, path: &Path, mode: u32) -> io::Result<()> {
        let missing: Vec<&Path> = path.ancestors().take_while(|path| !path.exists()).collect();
        for directory in missing.into_iter().rev() {
            match fs::create_dir(directory) {
                Ok(()) => self.0.push(directory.to_owned()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            }
            // Whatever the umask is.
            fs::set_permissions(directory, fs::Permissions::from_mode(mode))?;
        }
        if !path.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(())
    }

    /// Removes them again, but for those that somebody uses by now.
    fn take_back(self, run_dir: &Path) {
        if self.0.iter().any(|made| made == run_dir) {
            remove_own_lock(run_dir);
        }
        for directory in self.0.iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}

/// Removes the lock's file if this process was the last to have the lock.
fn remove_own_lock(run_dir: &Path) {
    let path = run_dir.join("agent.lock");
    let own = std::process::id().to_string();
    if fs::read_to_string(&path).is_ok_and(|holder| holder.trim() == own) {
        let _ = fs::remove_file(path);
    }
}

/// What the datapath is told of the settings.
pub(super) fn datapath_options(settings: &Settings) -> DatapathOptions {
    DatapathOptions {
        bpf_root: settings.bpf_root.clone(),
        mark_shift: mark::shift_of(settings.mark_mask).unwrap_or_default(),
        connections: settings.connections,
        services_max: settings.services_max,
        backends_max: settings.backends_max,
        expedite_rcu: settings.expedite_rcu,
        ..DatapathOptions::default()
    }
}

/// Identifiers of the loaded programs, in the order of [`HOOKS`]; 0 where one is not known.
pub(super) fn program_ids(datapath: &mut Datapath) -> Vec<u32> {
    let id = |hook| Some(datapath.program(hook).ok()?.info().ok()?.id());
    HOOKS
        .into_iter()
        .map(id)
        .map(Option::unwrap_or_default)
        .collect()
}

/// Whether programs of an earlier agent are replaced late, see [`Late`].
pub(super) fn late(datapath: &Datapath) -> Late {
    for migration in datapath.migrations() {
        tracing::warn!(
            ?migration,
            "a pinned map did not fit this version or its settings and was made anew"
        );
    }
    let waiting = !datapath.migrations().is_empty();
    Late {
        waiting,
        host: waiting || !datapath.is_host_attached(host::LOOPBACK),
        ..Late::default()
    }
}

impl Agent {
    /// Pods of an earlier agent get the programs of this one, without a gap.
    pub(super) async fn take_over(&mut self) -> anyhow::Result<()> {
        let links = self
            .netlink
            .links()
            .await
            .context("cannot list the devices")?;
        let row = *self.datapath.config().row();
        keep_configured(&mut self.config, &row, host_device::find(&links));
        // Routes to addresses of Services keep their source.
        self.host.node_addresses_are_new(&self.config);
        // Somebody may have watched the earlier agent when it ended: the next tick switches off what nobody
        // wants any more.
        self.flow_events = row.flags & flag::EVENT_NEW_FLOW != 0;
        let report = self
            .endpoints
            .restore(&links, boot_seconds())
            .context("cannot take over the endpoints of an earlier agent")?;
        for problem in &report.problems {
            tracing::warn!(
                problem,
                "while taking over the endpoints of an earlier agent"
            );
        }
        self.notes.start.extend(report.problems);
        for link in &report.orphans {
            let problem = format!(
                "the device {} looks like a pod's, but nothing is known of the pod: it has no \
                 network; delete and recreate the pod",
                link.name
            );
            self.notes.orphans.insert(link.ifindex, problem);
        }
        self.reserve_local_ports();
        self.notes.start.extend(self.settings.nat_ports.problem());
        let ranges: Vec<IpNet> = self.endpoints.pod_ranges().collect();
        if !ranges.is_empty() {
            self.config.pod_ranges = ranges;
        }
        self.datapath
            .config_mut()
            .apply(&self.config)
            .context("cannot write this node's configuration")?;
        let (endpoints, mut wiring) = self.endpoints_and_wiring();
        for error in endpoints.tick(&mut wiring, boot_seconds()).await {
            // Tried again at every tick, and shown in the status meanwhile.
            tracing::warn!(%error, "cannot take over an endpoint of an earlier agent");
        }
        self.endpoints_changed();
        self.mark(Row::Host);
        self.mark(Row::Defrag);
        self.mark(Row::Sockets);
        self.events_lost = self
            .datapath
            .counters()
            .outcome(outcome::EVENT_LOST)
            .map_or(0, |counter| counter.packets);
        tracing::info!(
            endpoints = report.living,
            vanished = report.vanished.len(),
            mode = self.datapath.attach_mode().name(),
            milliseconds = self.started.elapsed().as_millis(),
            "the data path is loaded"
        );
        Ok(())
    }
}

/// Takes over what the agent learns only later, from the Node objects and from its own devices: the
/// programs run with the row of an earlier agent, and must not go without it until then. `device` is the
/// node's own device as it is now; an index of anything else is not kept.
fn keep_configured(config: &mut NodeConfig, row: &Config, device: Option<HostDevice>) {
    config.pod_ranges = configured_ranges(row);
    config.node_v4 = (row.node_v4 != Ipv4::default()).then(|| row.node_v4.into());
    config.node_v6 = (row.node_v6 != Ipv6::default()).then(|| row.node_v6.into());
    let host = device.map(|device| device.host);
    config.host_ifindex = host
        .filter(|host| *host == row.host_ifindex)
        .unwrap_or_default();
}

/// The pod ranges in the kernel: those of an earlier agent.
fn configured_ranges(row: &Config) -> Vec<IpNet> {
    let length = |mask: &[u8]| -> u8 {
        let ones: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
        u8::try_from(ones).unwrap_or(u8::MAX)
    };
    let v4 = row.pod_ranges_v4.iter().filter(|range| range.is_used());
    let v4 = v4.filter_map(|r| Ipv4Net::new(r.base.into(), length(&r.mask.0)).ok());
    let v6 = row.pod_ranges_v6.iter().filter(|range| range.is_used());
    let v6 = v6.filter_map(|r| Ipv6Net::new(r.base.into(), length(&r.mask.0)).ok());
    v4.map(IpNet::V4).chain(v6.map(IpNet::V6)).collect()
}

#[cfg(test)]
mod tests {
    use weir_common::config::PodRange;

    use super::*;

    #[test]
    fn ranges_are_read_back_from_the_kernel() {
        let mut row = Config::default();
        row.pod_ranges_v4[2] = PodRange {
            base: Ipv4([10, 1, 2, 0]),
            mask: Ipv4([255, 255, 255, 0]),
            length: 256,
            first_index: 0,
        };
        let mut mask = [0; 16];
        mask[..8].fill(0xff);
        row.pod_ranges_v6[0] = PodRange {
            base: Ipv6::from("fd00:1::".parse::<std::net::Ipv6Addr>().unwrap()),
            mask: Ipv6(mask),
            length: 9,
            first_index: 0,
        };
        let ranges: Vec<_> = configured_ranges(&row)
            .iter()
            .map(IpNet::to_string)
            .collect();
        assert_eq!(ranges, ["10.1.2.0/24", "fd00:1::/64"]);
    }

    #[test]
    fn what_is_learned_later_is_kept_from_the_earlier_agent() {
        let row = Config {
            node_v4: Ipv4([192, 0, 2, 1]),
            node_v6: Ipv6::from("2001:db8::1".parse::<std::net::Ipv6Addr>().unwrap()),
            host_ifindex: 7,
            ..Config::default()
        };
        let device = |host| Some(HostDevice { host, net: 8 });
        let kept = |row: &Config, device| {
            let mut config = NodeConfig::default();
            keep_configured(&mut config, row, device);
            config
        };
        let config = kept(&row, device(7));
        assert_eq!(config.node_v4, Some([192, 0, 2, 1].into()));
        assert_eq!(config.node_v6, Some("2001:db8::1".parse().unwrap()));
        assert_eq!(config.host_ifindex, 7);
        // Somebody has made the device anew, or removed it: the number may be another device's.
        for other in [device(9), None] {
            assert_eq!(kept(&row, other).host_ifindex, 0, "{other:?}");
        }
        let nothing = kept(&Config::default(), device(7));
        assert_eq!(nothing, NodeConfig::default());
    }

    #[test]
    fn a_root_off_bpffs_is_refused_with_the_remedy() {
        let error = check_bpffs(Path::new("/proc/does/not/exist"))
            .unwrap_err()
            .to_string();
        for part in [
            "/proc/does/not/exist",
            "not on a bpffs",
            "mount -t bpf",
            "--bpf-root",
        ] {
            assert!(error.contains(part), "{part:?}: {error}");
        }
    }
    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_directory_that_is_there_keeps_its_mode() {
        let directory = tempfile::tempdir().unwrap();
        let there = directory.path().join("there");
        fs::create_dir(&there).unwrap();
        fs::set_permissions(&there, fs::Permissions::from_mode(0o1777)).unwrap();
        let mut made = Made::default();
        made.make(&there, 0o755).unwrap();
        let inner = there.join("a/b");
        made.make(&inner, 0o700).unwrap();
        assert_eq!(mode(&there), 0o1777);
        assert_eq!(mode(&inner), 0o700);
        let file = there.join("file");
        fs::write(&file, "").unwrap();
        assert!(made.make(&file, 0o755).is_err());
    }

    #[test]
    fn what_was_made_is_taken_back_unless_it_is_used() {
        let directory = tempfile::tempdir().unwrap();
        let (run_dir, used) = (directory.path().join("a/run"), directory.path().join("b"));
        let mut made = Made::default();
        for path in [&run_dir, &used] {
            made.make(path, 0o755).unwrap();
        }
        let pid = std::process::id();
        fs::write(run_dir.join("agent.lock"), format!("{pid}\n")).unwrap();
        fs::write(used.join("agent.lock"), format!("{pid}\n")).unwrap();
        made.take_back(&run_dir);
        assert!(!directory.path().join("a").exists());
        assert!(used.join("agent.lock").exists());
    }

    #[test]
    fn the_lock_of_another_process_stays() {
        let directory = tempfile::tempdir().unwrap();
        let mut made = Made::default();
        let run_dir = directory.path().join("run");
        made.make(&run_dir, 0o755).unwrap();
        fs::write(run_dir.join("agent.lock"), "0\n").unwrap();
        made.take_back(&run_dir);
        assert!(run_dir.join("agent.lock").exists());
    }
}
