//! `weir-bench`, which `cargo xtask bench` builds and runs: measures Weir beside its rivals in one
//! run and writes docs/performance.md. It judges nothing; packets that took another way than the
//! one that is measured are an error, times never are.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, ValueEnum};

mod agent;
mod machine;
mod outside;
mod packets;
mod pods;
mod report;
mod services;
mod statistics;
mod threads;

/// What can be measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Part {
    /// Nanoseconds per packet in the programs.
    Packets,
    /// Pods beside a plain veth pair.
    Pods,
    /// Connections through Services, by their number, beside kube-proxy's rules.
    Services,
    /// Connections and datagrams from outside to an endpoint on another node, beside kube-proxy's rules.
    Outside,
    /// Start, memory, CNI calls and changes.
    Agent,
}

/// How long it may take.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Effort {
    /// Five minutes for everything: to see that it works, and roughly where things stand.
    Quick,
    /// Half an hour for everything.
    Full,
}

#[derive(Debug, Parser)]
#[command(name = "weir-bench", about = "Measures Weir beside its rivals")]
struct Arguments {
    /// What to measure; everything if nothing is named.
    #[arg(value_name = "WHAT")]
    what: Vec<Part>,
    /// Fewer and shorter rounds.
    #[arg(long)]
    quick: bool,
    /// Write the figures into this page.
    #[arg(long)]
    page: Option<PathBuf>,
    /// Folder with the CNI plugins `bridge` and `host-local`, to compare with.
    #[arg(long)]
    rival_cni: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let effort = if arguments.quick {
        Effort::Quick
    } else {
        Effort::Full
    };
    let all = Part::value_variants();
    let parts = if arguments.what.is_empty() {
        all
    } else {
        &arguments.what
    };
    let mut sections = Vec::new();
    for part in all.iter().filter(|part| parts.contains(part)) {
        sections.push(match part {
            Part::Packets => packets::run(effort)?,
            Part::Pods => pods::run(effort)?,
            Part::Services => services::run(effort)?,
            Part::Outside => outside::run(effort)?,
            Part::Agent => agent::run(effort, arguments.rival_cni.as_deref())?,
        });
    }
    if let Some(page) = &arguments.page {
        report::write(page, &sections)?;
    }
    Ok(())
}
