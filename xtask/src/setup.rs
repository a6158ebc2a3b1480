//! `cargo xtask setup`: finds or installs every prerequisite. Quick when nothing is missing, so the other commands
//! call it every time.

use std::process::Command;

use anyhow::{Result, bail};
use nix::unistd::Uid;

use crate::{
    build,
    prerequisites::{self, Outcome},
    toolchain::{Missing, Toolchain},
    ui::{self, Colour},
};

/// The version that links with LLVM 22, which both compilers come with.
const BPF_LINKER: &str = "0.10.3";
/// The version whose configuration `deny.toml` is written for.
const CARGO_DENY: &str = "0.20.2";

/// Free disk, GiB, that the first build takes with all tests, and what a later one may add.
const FIRST_BUILD: u64 = 9;
const LATER_BUILD: u64 = 1;

/// What is to be done afterwards; each includes those before it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Scope {
    /// Build.
    Build,
    /// Run what is built, in namespaces of this machine.
    Run,
    /// All that CI runs.
    Ci,
}

/// Finds or installs, and prints a line for each.
pub fn run(scope: Scope) -> Result<()> {
    go(scope, true)
}

/// As [`run`], but prints only what is new.
pub fn ensure(scope: Scope) -> Result<()> {
    go(scope, false)
}

fn go(scope: Scope, verbose: bool) -> Result<()> {
    let show = |outcome: Outcome| match outcome {
        Outcome::Found(text) if verbose => ui::line(Colour::Green, "found", &text),
        Outcome::Found(_) => {}
        Outcome::Installed(text) => ui::line(Colour::Yellow, "installed", &text),
    };
    let is_first = !build::dist().exists();
    let room = if is_first { FIRST_BUILD } else { LATER_BUILD };
    show(prerequisites::room(&build::target_directory(), room)?);
    show(prerequisites::cargo_program(
        "bpf-linker",
        Some(BPF_LINKER),
    )?);
    show(bpf_compiler()?);
    if scope >= Scope::Run {
        if !Uid::effective().is_root() {
            bail!("tests and demo make network namespaces and load BPF programs: run this as root");
        }
        let programs = [
            ("ip", "iproute2"),
            ("ethtool", "ethtool"),
            ("bpftool", "bpftool"),
            ("ping", "iputils-ping"),
            // Tests beside kube-proxy's rules.
            ("iptables-nft-restore", "iptables"),
            ("nft", "nftables"),
        ];
        prerequisites::debian_programs(&programs)?
            .into_iter()
            .for_each(show);
        show(prerequisites::cargo_program("cargo-nextest", None)?);
        show(prerequisites::bpffs()?);
        show(prerequisites::cgroup2()?);
    }
    if scope >= Scope::Ci {
        show(prerequisites::cargo_program(
            "cargo-deny",
            Some(CARGO_DENY),
        )?);
        let programs = [
            ("qemu-system-x86_64", "qemu-system-x86"),
            ("busybox", "busybox-static"),
        ];
        prerequisites::debian_programs(&programs)?
            .into_iter()
            .for_each(show);
    }
    Ok(())
}

/// A compiler for the kernel programs: Debian's, or a nightly of rustup.
fn bpf_compiler() -> Result<Outcome> {
    let missing = match Toolchain::find() {
        Ok(found) => return Ok(Outcome::Found(format!("eBPF compiler: {found}"))),
        Err(missing) => missing,
    };
    // Debian's is offered first: it has core compiled and needs no nightly.
    let debian = if prerequisites::find_program("apt-get").is_some() && Uid::effective().is_root() {
        prerequisites::install_debian(&["rustc-web", "libstd-rust-web-dev-bpf"])
    } else {
        Err(anyhow::anyhow!("not Debian, or not root"))
    };
    if let Err(error) = debian {
        install_nightly(&missing, &error)?;
    }
    match Toolchain::find() {
        Ok(found) => Ok(Outcome::Installed(format!("eBPF compiler: {found}"))),
        Err(missing) => bail!("{missing}"),
    }
}

fn install_nightly(missing: &Missing, debian: &anyhow::Error) -> Result<()> {
    if prerequisites::find_program("rustup").is_none() {
        bail!("{missing}\nDebian's packages: {debian:#}");
    }
    let mut command = Command::new("rustup");
    command.args(["toolchain", "install", "nightly", "--profile", "minimal"]);
    command.args(["--component", "rust-src", "--component", "clippy"]);
    if let Err(rustup) = ui::run_quietly("rustup toolchain install nightly", &mut command) {
        bail!("{missing}\nDebian's packages: {debian:#}\nrustup: {rustup:#}");
    }
    Ok(())
}
