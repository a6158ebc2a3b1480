//! What the build scripts share that compile kernel programs: the agent's and the benchmark's. They
//! include this file by its path.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

#[path = "toolchain.rs"]
mod toolchain;

/// One object of kernel programs.
pub struct Object<'a> {
    /// Package and binary; the object is left as a file of this name in `OUT_DIR`.
    pub package: &'a str,
    /// Folder in the target folder, of its own: the outer cargo holds the lock of the usual one while
    /// it waits for a build script, and build scripts of several packages may run at once.
    pub target: &'a str,
    /// Files and folders of the workspace that it is made of, beside those that all are made of.
    pub inputs: &'a [&'a str],
    /// Features of the package.
    pub features: &'a [&'a str],
}

/// What every object is made of.
const INPUTS: [&str; 5] = [
    "Cargo.toml",
    "Cargo.lock",
    "ebpf/build",
    "common/Cargo.toml",
    "common/src",
];

impl Object<'_> {
    /// Compiles it.
    pub fn compile(&self) -> Result<(), String> {
        let workspace = variable("CARGO_MANIFEST_DIR")?
            .parent()
            .map(Path::to_path_buf)
            .ok_or("the manifest has no parent folder")?;
        for input in INPUTS.iter().chain(self.inputs) {
            println!(
                "cargo::rerun-if-changed={}",
                workspace.join(input).display()
            );
        }
        let toolchain = toolchain::Toolchain::find().map_err(|missing| missing.to_string())?;
        let target_dir = env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| workspace.join("target"), |dir| workspace.join(dir))
            .join(self.target);
        let mut cargo = toolchain
            .cargo("build", &workspace, &target_dir)
            .map_err(|error| format!("cannot write to {}: {error}", target_dir.display()))?;
        cargo.args(["--package", self.package, "--bin", self.package]);
        if !self.features.is_empty() {
            cargo.args(["--features", &self.features.join(",")]);
        }
        let status = cargo
            .status()
            .map_err(|error| format!("cannot run {cargo:?}: {error}"))?;
        if !status.success() {
            return Err(format!(
                "the kernel programs of {} do not compile with {toolchain}: {status}",
                self.package
            ));
        }
        self.take(&toolchain::artifact(&target_dir, self.package))
    }

    /// Takes a ready object.
    pub fn take(&self, from: &Path) -> Result<(), String> {
        let to = variable("OUT_DIR")?.join(self.package);
        fs::copy(from, &to).map(drop).map_err(|error| {
            format!(
                "cannot copy {} to {}: {error}",
                from.display(),
                to.display()
            )
        })
    }
}

fn variable(name: &str) -> Result<PathBuf, String> {
    env::var_os(name)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{name} is not set: this is a build script, run by cargo"))
}
