//! Where and when it was measured: figures without that mean nothing.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

/// The machine, the kernel, the time, the source and the load, in a sentence. It stands at each
/// part of the page, as each can be measured alone.
///
/// # Errors
///
/// `/proc` cannot be read.
pub fn sentence() -> Result<String> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let memory = fs::read_to_string("/proc/meminfo")?;
    let memory = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.parse::<f64>().ok())
        .context("/proc/meminfo has no line MemTotal")?;
    let load = fs::read_to_string("/proc/loadavg")?;
    let load = load.split_whitespace().next().unwrap_or_default();
    // What people type; paths that xtask adds are of this machine only.
    let what: String = std::env::args()
        .filter(|word| {
            matches!(
                word.as_str(),
                "packets" | "pods" | "services" | "outside" | "agent" | "--quick"
            )
        })
        .map(|word| format!(" {word}"))
        .collect();
    Ok(format!(
        "Measured {} with `cargo xtask bench{}` at {}; Linux {}, {} processors ({}), {:.0} GiB, load before {load}.",
        output("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
        what,
        output("git", &["describe", "--always", "--dirty"]),
        kernel.trim(),
        std::thread::available_parallelism()?,
        processor(),
        memory / 1024.0 / 1024.0,
    ))
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
