//! Compiles the kernel programs and leaves the object in `OUT_DIR/weir-ebpf`, from where the
//! agent embeds it. `WEIR_EBPF_OBJECT=FILE` uses a ready object instead.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

#[path = "../ebpf/build/toolchain.rs"]
mod toolchain;

const READY_OBJECT: &str = "WEIR_EBPF_OBJECT";
const PACKAGE: &str = "weir-ebpf";

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
    println!("cargo::rerun-if-env-changed={READY_OBJECT}");
    let object = variable("OUT_DIR")?.join(PACKAGE);
    if let Some(ready) = env::var_os(READY_OBJECT).filter(|value| !value.is_empty()) {
        let ready = PathBuf::from(ready);
        println!("cargo::rerun-if-changed={}", ready.display());
        return copy(&ready, &object);
    }

    let workspace = variable("CARGO_MANIFEST_DIR")?
        .parent()
        .map(Path::to_path_buf)
        .ok_or("the agent's manifest has no parent folder")?;
    for input in [
        "Cargo.toml",
        "Cargo.lock",
        "ebpf/Cargo.toml",
        "ebpf/src",
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
    let target_dir = target_dir(&workspace);
    let mut cargo = toolchain
        .cargo("build", &workspace, &target_dir)
        .map_err(|error| format!("cannot write to {}: {error}", target_dir.display()))?;
    cargo.args(["--package", PACKAGE, "--bin", PACKAGE]);
    if env::var_os("CARGO_FEATURE_LOG_PACKETS").is_some() {
        cargo.args(["--features", "log-packets"]);
    }
    let status = cargo
        .status()
        .map_err(|error| format!("cannot run {cargo:?}: {error}"))?;
    if !status.success() {
        return Err(format!(
            "the kernel programs do not compile with {toolchain}: {status}"
        ));
    }
    copy(&toolchain::artifact(&target_dir, PACKAGE), &object)
}

/// A folder of its own, shared by debug, release and check builds: the outer cargo holds the lock
/// of the usual one while it waits for this script.
fn target_dir(workspace: &Path) -> PathBuf {
    env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace.join("target"), |dir| workspace.join(dir))
        .join("bpf")
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    fs::copy(from, to).map(|_| ()).map_err(|error| {
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
