//! `cargo xtask test`: every test, against the release binaries.

use anyhow::{Context as _, Result, ensure};

use crate::{build, setup};

/// Sets up, builds, and runs the tests whose names contain one of `filters`, or all.
pub fn run(filters: &[String], long: bool) -> Result<()> {
    setup::ensure(setup::Scope::Run)?;
    build::build()?;
    let profile = if long { "long" } else { "default" };
    let mut command = build::cargo();
    command
        .args(["nextest", "run", "--profile", profile])
        .args(filters)
        .env("WEIR_DIST", build::dist())
        .env("WEIR_LONG", if long { "1" } else { "0" });
    let status = command.status().context("run cargo nextest")?;
    ensure!(status.success(), "cargo nextest ended with {status}");
    Ok(())
}
