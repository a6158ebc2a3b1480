//! `cargo xtask`: everything a developer of Weir runs, the same here and in CI.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod build;
mod demo;
mod lint;
mod prerequisites;
mod setup;
mod test;
#[path = "../../ebpf/build/toolchain.rs"]
#[allow(dead_code, reason = "the agent's build script uses the rest")]
mod toolchain;
mod ui;
mod vm;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Set up, build, test and show Weir")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Finds or installs every prerequisite. The other commands do it too.
    Setup {
        /// Also what only .ci/run and verify-kernel need: cargo-deny, QEMU.
        #[arg(long)]
        ci: bool,
    },
    /// Builds weir-agent, weir-cni and weir, static, into target/dist.
    Build,
    /// Checks format, clippy on host and BPF target, and licences; any warning is an error.
    Lint,
    /// Runs every test; needs root, as the tests make network namespaces.
    Test {
        /// Only tests whose name contains this.
        filter: Vec<String>,
        /// The long version of the tests that have one (hours instead of minutes).
        #[arg(long)]
        long: bool,
    },
    /// Measures Weir beside its rivals and writes docs/performance.md; needs root.
    Bench {
        /// What to measure: packets, pods, services, outside, agent; everything if nothing is named.
        what: Vec<String>,
        /// Three minutes instead of fifteen, printed only.
        #[arg(long)]
        quick: bool,
    },
    /// Shows a two-node cluster at work in under a minute; needs root.
    Demo {
        /// Leave the cluster up and say how to enter it.
        #[arg(long)]
        keep: bool,
        /// Only remove kept clusters: all of this machine, whichever clone or run made them.
        #[arg(long, conflicts_with = "keep")]
        clean: bool,
        /// Show the binaries that are there, those of target/dist or of the directory WEIR_DIST, and build none.
        #[arg(long, conflicts_with = "clean")]
        no_build: bool,
    },
    /// Loads every kernel program on one of Debian's kernels in a virtual machine.
    VerifyKernel {
        /// Series of the kernel.
        #[arg(value_parser = vm::SERIES, default_value = vm::SERIES[0])]
        series: String,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Setup { ci } => setup::run(if ci {
            setup::Scope::Ci
        } else {
            setup::Scope::Run
        }),
        Command::Build => build::run(),
        Command::Lint => lint::run(),
        Command::Test { filter, long } => test::run(&filter, long),
        Command::Bench { what, quick } => bench::run(&what, quick),
        Command::Demo { clean: true, .. } => demo::clean(),
        Command::Demo { keep, no_build, .. } => demo::run(keep, !no_build),
        Command::VerifyKernel { series } => vm::verify(&series),
    }
}
