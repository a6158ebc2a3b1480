//! `cargo xtask build`: the release binaries, static, in `target/dist`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    setup,
    ui::{self, Colour},
};

/// What users install.
pub const BINARIES: [&str; 3] = ["weir-agent", "weir-cni", "weir"];
const PACKAGES: [&str; 3] = ["weir-agent", "weir-cni", "weir-cli"];

/// Sets up and builds.
pub fn run() -> Result<()> {
    setup::ensure(setup::Scope::Build)?;
    build()
}

/// Builds without set-up, and prints sizes.
///
/// The binaries are static so that they run on any node and in an image without a C library. They share flags and
/// target, so that what they have in common is compiled once.
pub fn build() -> Result<()> {
    let start = Instant::now();
    let target = host_target()?;
    let mut command = cargo();
    command
        .args(["build", "--release", "--target", &target])
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    ui::line(
        Colour::Cyan,
        "build",
        &format!("release binaries for {target}"),
    );
    let status = command.status().context("run cargo build")?;
    ensure!(status.success(), "cargo build ended with {status}");
    fs::create_dir_all(dist())?;
    for binary in BINARIES {
        let from = target_directory()
            .join(&target)
            .join("release")
            .join(binary);
        let to = dist().join(binary);
        install(&from, &to)
            .with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
        let bytes = fs::read(&to)?;
        check_static(&bytes).with_context(|| format!("check {}", to.display()))?;
        let size = bytes.len() as f64 / 1e6;
        ui::line(
            Colour::Green,
            "built",
            &format!("{:<40} {size:>6.1} MB", to.display()),
        );
    }
    let time = ui::seconds(start.elapsed());
    ui::line(Colour::Grey, "", &format!("in {time}"));
    Ok(())
}

/// A running binary can be replaced by another file, not overwritten.
fn install(from: &Path, to: &Path) -> Result<()> {
    let new = to.with_extension("new");
    fs::copy(from, &new)?;
    Ok(fs::rename(&new, to)?)
}

/// An ELF file without an interpreter needs no shared library.
fn check_static(elf: &[u8]) -> Result<()> {
    const INTERPRETER: u32 = 3;
    let at = |offset: usize, length: usize| {
        elf.get(offset..offset + length)
            .context("the file is cut off")
    };
    ensure!(at(0, 5)? == b"\x7fELF\x02", "not a 64-bit ELF file");
    let headers = usize::try_from(u64::from_le_bytes(at(32, 8)?.try_into()?))?;
    let size = usize::from(u16::from_le_bytes(at(54, 2)?.try_into()?));
    let count = usize::from(u16::from_le_bytes(at(56, 2)?.try_into()?));
    for number in 0..count {
        let kind = u32::from_le_bytes(at(headers + number * size, 4)?.try_into()?);
        if kind == INTERPRETER {
            bail!("it wants shared libraries; it must be static");
        }
    }
    Ok(())
}

/// Where the binaries are put.
pub fn dist() -> PathBuf {
    workspace().join("target/dist")
}

pub fn target_directory() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// Root of the workspace.
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// The cargo that runs this, in the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

fn host_target() -> Result<String> {
    let output = Command::new("rustc")
        .arg("-vV")
        .current_dir(workspace())
        .output()
        .context("run rustc -vV")?;
    let text = String::from_utf8(output.stdout)?;
    let target = text
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .context("rustc -vV does not tell its host")?;
    Ok(target.to_owned())
}
