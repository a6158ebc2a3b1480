//! Where and when it was measured: figures without that mean nothing.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use crate::report::{Section, Table};

/// The machine, the kernel, the time and the version of the source.
///
/// # Errors
///
/// `/proc` cannot be read.
pub fn section() -> Result<Section> {
    let mut section = Section::new("machine", "The machine");
    let mut table = Table::new("Measured with", &["", ""]);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let memory = fs::read_to_string("/proc/meminfo")?;
    let memory = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.parse::<f64>().ok())
        .context("/proc/meminfo has no line MemTotal")?;
    let load = fs::read_to_string("/proc/loadavg")?;
    let load = load.split_whitespace().next().unwrap_or_default();
    for (name, value) in [
        ("command", format!("weir-bench {}", arguments.join(" "))),
        ("date", output("date", &["-u", "+%Y-%m-%d %H:%M UTC"])),
        (
            "source",
            output("git", &["describe", "--always", "--dirty"]),
        ),
        ("kernel", kernel.trim().to_owned()),
        ("processor", processor()),
        (
            "processors",
            std::thread::available_parallelism()?.to_string(),
        ),
        ("memory", format!("{:.0} GiB", memory / 1024.0 / 1024.0)),
        ("load before", load.to_owned()),
    ] {
        table.row([name.to_owned(), value]);
    }
    section.table(&table);
    Ok(section)
}

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or_else(
            || "unknown".to_owned(),
            |rest| rest.trim_start_matches(['\t', ' ', ':']).to_owned(),
        )
}

/// What a command says, or that it says nothing: no figure depends on it.
fn output(program: &str, arguments: &[&str]) -> String {
    Command::new(program)
        .args(arguments)
        .output()
        .ok()
        .filter(|output| output.status.success())
        .map_or_else(
            || "unknown".to_owned(),
            |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        )
}
