//! Running commands with a deadline, and finding processes by their network namespace.

use std::{
    fs,
    io::{Read, Write as _},
    os::unix::fs::MetadataExt as _,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Runs a command to its end and returns its status and output.
///
/// # Errors
///
/// When it cannot be started, or is not done after `timeout`: it is killed then.
pub fn output(command: &mut Command, input: &[u8], timeout: Duration) -> Result<Output> {
    let shown = show(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {shown}"))?;
    // Pipes are served by threads, so that neither a large input nor a large output can stall the child.
    let mut stdin = child.stdin.take().context("child without stdin")?;
    let input = input.to_vec();
    let writer = thread::spawn(move || {
        // A child that does not read its input is not an error of ours.
        let _ = stdin.write_all(&input);
    });
    let stdout = collect(child.stdout.take().context("child without stdout")?);
    let stderr = collect(child.stderr.take().context("child without stderr")?);
    let deadline = Instant::now() + timeout;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("{shown} was not done after {timeout:?}");
        }
        thread::sleep(Duration::from_millis(1));
    };
    // Joined after the exit: a grandchild that inherited the pipes must not be waited for here.
    let _ = writer.join();
    Ok(Output {
        status,
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
    })
}

/// As [`output`], and returns standard output as text.
///
/// # Errors
///
/// As [`output`], and when the command fails: with its standard error.
pub fn run(command: &mut Command, input: &[u8], timeout: Duration) -> Result<String> {
    let output = output(command, input, timeout)?;
    if !output.status.success() {
        bail!(
            "{} ended with {}: {}{}",
            show(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim(),
            String::from_utf8_lossy(&output.stdout).trim(),
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn collect(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = Vec::new();
        let _ = from.read_to_end(&mut all);
        all
    })
}

fn show(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Time at which a process started, in clock ticks since boot; `None` when there is no such process or
/// it is a zombie. With the number it identifies a process for good.
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the fields after it are plain.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    if *fields.first()? == "Z" {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// Kills every process, but this one, whose network namespace is one of `inodes`, and waits until they are gone.
pub fn kill_in_namespaces(inodes: &[u64]) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let found = processes_in(inodes);
        if found.is_empty() || Instant::now() >= deadline {
            return;
        }
        for pid in found {
            // It may be gone already.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn processes_in(inodes: &[u64]) -> Vec<i32> {
    let own = i32::try_from(std::process::id()).unwrap_or(-1);
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own && start_time(*pid).is_some())
        .filter(|pid| {
            fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| inodes.contains(&m.ino()))
        })
        .collect()
}
