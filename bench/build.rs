//! Compiles the kernel programs of the benchmark and leaves the object in `OUT_DIR/weir-bench-ebpf`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

#[path = "../ebpf/build/toolchain.rs"]
mod toolchain;

const PACKAGE: &str = "weir-bench-ebpf";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let workspace = variable("CARGO_MANIFEST_DIR")?
        .parent()
        .map(Path::to_path_buf)
        .ok_or("the benchmark's manifest has no parent folder")?;
    for input in [
        "Cargo.toml",
        "Cargo.lock",
        "bench/ebpf",
        "ebpf/build",
        "common/Cargo.toml",
        "common/src",
    ] {
        println!(
            "cargo::rerun-if-changed={}",
            workspace.join(input).display()
        );
    }
    let toolchain = toolchain::Toolchain::find().map_err(|missing| missing.to_string())?;
    // A folder of its own: the outer cargo holds the lock of the usual one, and the agent's build
    // script may hold that of the other kernel programs.
    let target_dir = env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace.join("target"), |dir| workspace.join(dir))
        .join("bpf-bench");
    let mut cargo = toolchain
        .cargo("build", &workspace, &target_dir)
        .map_err(|error| format!("cannot write to {}: {error}", target_dir.display()))?;
    let status = cargo
        .args(["--package", PACKAGE, "--bin", PACKAGE])
        .status()
        .map_err(|error| format!("cannot run {cargo:?}: {error}"))?;
    if !status.success() {
        return Err(format!(
            "the kernel programs of the benchmark do not compile with {toolchain}: {status}"
        ));
    }
    let from = toolchain::artifact(&target_dir, PACKAGE);
    let to = variable("OUT_DIR")?.join(PACKAGE);
    fs::copy(&from, &to).map(drop).map_err(|error| {
        format!(
            "cannot copy {} to {}: {error}",
            from.display(),
            to.display()
        )
    })
}

fn variable(name: &str) -> Result<PathBuf, String> {
    env::var_os(name)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{name} is not set: this is a build script, run by cargo"))
}
