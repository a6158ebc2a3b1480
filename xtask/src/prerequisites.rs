//! Looks for what the other commands need, and installs it: Debian packages, cargo's tools, mounts. Used by
//! `setup` only.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sys::{
        statfs::{BPF_FS_MAGIC, statfs},
        statvfs::statvfs,
    },
    unistd::Uid,
};

use crate::ui;

/// Where BPF objects are pinned.
const BPFFS: &str = "/sys/fs/bpf";

/// What became of a prerequisite.
#[derive(Debug)]
pub enum Outcome {
    /// It was there; where, or which version.
    Found(String),
    /// It is there now.
    Installed(String),
}

/// Path of a program on `PATH` or among cargo's own. System programs may be outside of an ordinary user's `PATH`.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into(), cargo_bin()])
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

fn cargo_bin() -> PathBuf {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")))
        .unwrap_or_default()
        .join("bin")
}

/// Requires programs that Debian packages hold: (program, package).
pub fn debian_programs(wanted: &[(&str, &str)]) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    let mut missing = Vec::new();
    for (program, package) in wanted {
        match find_program(program) {
            Some(path) => outcomes.push(Outcome::Found(format!("{package} ({})", path.display()))),
            None => missing.push(*package),
        }
    }
    if !missing.is_empty() {
        install_debian(&missing)?;
        outcomes.push(Outcome::Installed(missing.join(", ")));
    }
    Ok(outcomes)
}

/// Installs Debian packages; other users of dpkg are waited for.
pub fn install_debian(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if find_program("apt-get").is_none() {
        bail!(
            "this is not Debian or a system like it: install what Debian calls {list} by hand, \
             then run this again"
        );
    }
    if !Uid::effective().is_root() {
        bail!("{list} missing: run `cargo xtask setup` as root, or `apt-get install {list}`");
    }
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .args(["-q", "-y", "-o", "DPkg::Lock::Timeout=300"])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    let install = [&["install", "--no-install-recommends"], packages].concat();
    let what = format!("apt-get install {list}");
    if ui::run_quietly(&what, &mut apt(&install)).is_ok() {
        return Ok(());
    }
    // Most often the lists are missing or old.
    ui::run_quietly("apt-get update", &mut apt(&["update"]))?;
    ui::run_quietly(&what, &mut apt(&install))
}

/// Requires a program that cargo installs. `version` is required exactly when given.
pub fn cargo_program(program: &str, version: Option<&str>) -> Result<Outcome> {
    if let Some(path) = find_program(program) {
        let found = version_of(&path, program).unwrap_or_default();
        if version.is_none_or(|wanted| found == wanted) {
            return Ok(Outcome::Found(format!("{program} {found}")));
        }
    }
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["install", "--locked", "--force", program]);
    if let Some(version) = version {
        command.args(["--version", version]);
    }
    ui::run_quietly(&format!("cargo install {program}"), &mut command)?;
    let version = version.unwrap_or_default();
    Ok(Outcome::Installed(format!("{program} {version}")))
}

/// The version that a program tells. cargo's own programs want to be called as cargo calls them.
fn version_of(path: &Path, program: &str) -> Option<String> {
    let mut command = Command::new(path);
    if let Some(subcommand) = program.strip_prefix("cargo-") {
        command.arg(subcommand);
    }
    let output = command
        .arg("--version")
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.split_whitespace().nth(1)?;
    Some(version.to_owned())
}

/// Requires a file system for pinned BPF objects.
pub fn bpffs() -> Result<Outcome> {
    let mounted = || statfs(BPFFS).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC);
    if mounted() {
        return Ok(Outcome::Found(format!("bpffs ({BPFFS})")));
    }
    if !Uid::effective().is_root() {
        bail!("no bpffs: run `cargo xtask setup` as root, or `mount -t bpf bpf {BPFFS}`");
    }
    mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("mount -t bpf bpf {BPFFS}; the kernel needs CONFIG_BPF_SYSCALL"))?;
    Ok(Outcome::Installed(format!("bpffs ({BPFFS})")))
}

/// Requires a cgroup v2 hierarchy.
pub fn cgroup2() -> Result<Outcome> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let place = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_device, place, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then_some(place)
    });
    match place {
        Some(place) => Ok(Outcome::Found(format!("cgroup2 ({place})"))),
        None => bail!(
            "no cgroup2 hierarchy is mounted: boot with systemd.unified_cgroup_hierarchy=1, or \
             `mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`"
        ),
    }
}

/// Requires room for what is built: a full disk is met in the middle of a build otherwise, with an error that says little.
pub fn room(target: &Path, wanted_gib: u64) -> Result<Outcome> {
    // The folder, or where it will be made.
    let place = target
        .ancestors()
        .find(|folder| folder.exists())
        .unwrap_or(Path::new("/"));
    let free =
        statvfs(place).with_context(|| format!("look at the disk of {}", place.display()))?;
    let gib = free.blocks_available() * free.fragment_size() / (1 << 30);
    if gib < wanted_gib {
        bail!(
            "only {gib} GiB are free where {} is, and the build needs about {wanted_gib}: free some, or let \
             CARGO_TARGET_DIR name a folder on another disk",
            target.display()
        );
    }
    Ok(Outcome::Found(format!("room to build ({gib} GiB)")))
}
