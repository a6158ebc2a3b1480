//! `cargo xtask bench`: builds what is shipped and what measures it, and runs the latter.
//!
//! What measures is a package of its own (`weir-bench`): it contains the agent's library and so the kernel programs,
//! which xtask must not need before set-up has installed a compiler for them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    build, prerequisites, setup,
    ui::{self, Colour},
};

/// Debian's package of the CNI plugins that are measured beside Weir's.
const RIVALS: &str = "containernetworking-plugins";
/// Where it puts them.
const RIVALS_FOLDER: &str = "usr/lib/cni";

/// What loads kube-proxy's rules, and Debian's packages of it.
const RIVAL_PROGRAMS: [(&str, &str); 3] = [
    ("iptables-nft-restore", "iptables"),
    ("iptables-legacy-restore", "iptables"),
    ("nft", "nftables"),
];

/// Sets up, builds and measures; a quick run is printed only.
pub fn run(what: &[String], quick: bool) -> Result<()> {
    setup::ensure(setup::Scope::Run)?;
    build::build()?;
    let mut command = build::cargo();
    command
        .args([
            "run",
            "--quiet",
            "--profile",
            "measure",
            "--package",
            "weir-bench",
            "--",
        ])
        .args(what)
        .env("WEIR_DIST", build::dist());
    if quick {
        command.arg("--quick");
    } else {
        command
            .arg("--page")
            .arg(build::workspace().join("docs/performance.md"));
    }
    let wanted = |name: &str| what.is_empty() || what.iter().any(|part| part == name);
    if (wanted("services") || wanted("outside"))
        && let Err(error) = prerequisites::debian_programs(&RIVAL_PROGRAMS)
    {
        ui::line(
            Colour::Yellow,
            "rival",
            &format!("programs for kube-proxy's rules are missing: {error:#}"),
        );
    }
    if wanted("agent") {
        match rival_plugins() {
            Ok(folder) => {
                command.arg("--rival-cni").arg(folder);
            }
            Err(error) => ui::line(
                Colour::Yellow,
                "rival",
                &format!("CNI plugins to compare with are missing: {error:#}"),
            ),
        }
    }
    let status = command.status().context("run weir-bench")?;
    ensure!(status.success(), "weir-bench ended with {status}");
    Ok(())
}

/// A folder with `bridge` and `host-local`: the system's, or unpacked below `target` without being installed.
fn rival_plugins() -> Result<PathBuf> {
    let installed = Path::new("/").join(RIVALS_FOLDER);
    if installed.join("bridge").exists() {
        return Ok(installed);
    }
    let folder = build::workspace().join("target/rivals");
    let unpacked = folder.join(RIVALS_FOLDER);
    if unpacked.join("bridge").exists() {
        return Ok(unpacked);
    }
    fs::create_dir_all(&folder)?;
    let mut download = Command::new("apt-get");
    download
        .args(["-q", "download", RIVALS])
        .current_dir(&folder);
    ui::run_quietly(&format!("download {RIVALS}"), &mut download)?;
    let package = fs::read_dir(&folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get left no package in {}", folder.display()))?;
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("--extract").arg(&package).arg(&folder);
    ui::run_quietly(&format!("unpack {RIVALS}"), &mut unpack)?;
    Ok(unpacked)
}
