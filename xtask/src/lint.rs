//! `cargo xtask lint`: format, clippy on host and BPF target, licences and sources of dependencies. Any warning is an
//! error.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    build, prerequisites, setup,
    toolchain::{Compiler, Toolchain},
    ui::{self, Colour},
};

/// The linter of Debian's compiler.
const DEBIAN_CLIPPY: &str = "/usr/bin/clippy-driver";

/// Runs them all; the first that finds something ends it.
pub fn run() -> Result<()> {
    setup::ensure(setup::Scope::Ci)?;
    step("format", build::cargo().args(["fmt", "--all", "--check"]))?;
    step(
        "clippy, host",
        build::cargo()
            .args(["clippy", "--all-targets"])
            .args(["--", "-D", "warnings"]),
    )?;
    step("clippy, BPF", &mut clippy_bpf()?)?;
    // Nobody ships it, so nobody else would notice that it no longer compiles.
    step(
        "clippy, host, with the packet log",
        build::cargo()
            .args(["clippy", "--package", "weir-agent", "--all-targets"])
            .args(["--features", "log-packets", "--", "-D", "warnings"]),
    )?;
    step(
        "clippy, BPF, with the packet log",
        clippy_bpf()?.args(["--features", "weir-ebpf/log-packets"]),
    )?;
    // cargo-deny reads the manifests of every platform's dependencies.
    step(
        "fetch",
        build::cargo().args(["fetch", "--locked", "--quiet"]),
    )?;
    step(
        "licences and sources",
        build::cargo().args(["deny", "--offline", "check", "licenses", "bans", "sources"]),
    )
}

fn step(what: &str, command: &mut Command) -> Result<()> {
    ui::line(Colour::Cyan, "lint", what);
    let status = command
        .status()
        .with_context(|| format!("{what}: cannot run {command:?}"))?;
    ensure!(status.success(), "{what}: {command:?} ended with {status}");
    Ok(())
}

/// Clippy for the kernel programs has to be of the compiler that `core` was compiled with, which `cargo
/// clippy` of the host's toolchain is not: so its driver is named.
fn clippy_bpf() -> Result<Command> {
    let toolchain = Toolchain::find()?;
    let driver = match &toolchain.compiler {
        Compiler::Debian { .. } => {
            if !Path::new(DEBIAN_CLIPPY).exists() {
                prerequisites::install_debian(&["rust-web-clippy"])?;
            }
            PathBuf::from(DEBIAN_CLIPPY)
        }
        Compiler::Rustup { sysroot } => sysroot.join("bin/clippy-driver"),
    };
    let target_directory = build::workspace().join("target/bpf-clippy");
    let mut command = toolchain
        .cargo("check", &build::workspace(), &target_directory)
        .context("cannot prepare the BPF build")?;
    command
        .args(["--package", "weir-ebpf", "--package", "weir-bench-ebpf"])
        .env("RUSTC_WORKSPACE_WRAPPER", driver)
        // As cargo-clippy hands its arguments to the driver.
        .env("CLIPPY_ARGS", "-Dwarnings__CLIPPY_HACKERY__");
    Ok(command)
}
