//! The `weir-agent` processes of a cluster and the `weir` commands that ask them.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{netns::NetNs, process, wait_until};

/// How long an agent may take to start or stop, on a busy machine.
pub const AGENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Path of one of the built binaries: below `WEIR_DIST`, or the workspace's `target/dist`.
///
/// # Errors
///
/// When it has not been built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let directory = std::env::var_os("WEIR_DIST").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/dist"),
        PathBuf::from,
    );
    let path = directory.join(name);
    ensure!(
        path.exists(),
        "there is no {}: run `cargo xtask build`, or `cargo xtask test`, which does it first",
        path.display()
    );
    path.canonicalize()
        .with_context(|| format!("resolve {}", path.display()))
}

/// How the agent of a node is run.
#[derive(Debug)]
pub struct Agent {
    node: String,
    binary: PathBuf,
    source: PathBuf,
    run_dir: PathBuf,
    bpf_root: PathBuf,
    cgroup_root: PathBuf,
    log: PathBuf,
    arguments: Vec<String>,
    child: Option<Child>,
}

impl Agent {
    /// Prepares an agent; [`Agent::start`] runs it. Its log is `LOG-DIRECTORY/NODE.log`.
    ///
    /// # Errors
    ///
    /// When it has not been built.
    pub fn new(
        node: &str,
        source: &Path,
        run_dir: &Path,
        bpf_root: &Path,
        cgroup_root: &Path,
        log_directory: &Path,
        arguments: &[String],
    ) -> Result<Self> {
        Ok(Self {
            node: node.to_owned(),
            binary: binary("weir-agent")?,
            source: source.to_owned(),
            run_dir: run_dir.to_owned(),
            bpf_root: bpf_root.to_owned(),
            cgroup_root: cgroup_root.to_owned(),
            log: log_directory.join(format!("{node}.log")),
            arguments: arguments.to_vec(),
            child: None,
        })
    }

    /// The command line of the agent, to be run in `netns`.
    ///
    /// # Errors
    ///
    /// When the namespace is gone.
    pub fn command(&self, netns: &NetNs) -> Result<Command> {
        let mut command = netns.command(&self.binary)?;
        command
            .arg("--node-name")
            .arg(&self.node)
            .arg("--source")
            .arg(format!("dir:{}", self.source.display()))
            .arg("--run-dir")
            .arg(&self.run_dir)
            .arg("--bpf-root")
            .arg(&self.bpf_root)
            .arg("--cgroup-root")
            .arg(&self.cgroup_root)
            .args(&self.arguments)
            .env_remove("RUST_LOG");
        Ok(command)
    }

    /// Starts the process without waiting for anything.
    ///
    /// # Errors
    ///
    /// When it cannot be started, or runs already.
    pub fn start(&mut self, netns: &NetNs) -> Result<()> {
        ensure!(self.child.is_none(), "the agent of {} runs", self.node);
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("open {}", self.log.display()))?;
        let mut command = self.command(netns)?;
        command
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command
            .spawn()
            .with_context(|| format!("start the agent of {}", self.node))?;
        self.child = Some(child);
        Ok(())
    }

    /// Waits until the agent answers.
    ///
    /// # Errors
    ///
    /// When it ends instead, or takes longer than [`AGENT_TIMEOUT`].
    pub fn wait_ready(&mut self) -> Result<()> {
        let what = format!("the agent of {} to answer", self.node);
        let mut ended = None;
        wait_until(&what, AGENT_TIMEOUT, || {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                ended = Some(status);
                return Ok(true);
            }
            Ok(self.weir(&["status"])?.status.success())
        })?;
        if let Some(status) = ended {
            self.child = None;
            bail!(
                "the agent of {} ended with {status}:\n{}",
                self.node,
                self.log_tail(30)
            );
        }
        Ok(())
    }

    /// Sends `signal` and waits for the end.
    ///
    /// # Errors
    ///
    /// When no agent runs, or it does not end within [`AGENT_TIMEOUT`].
    pub fn stop(&mut self, signal: Signal) -> Result<()> {
        let mut child = self
            .child
            .take()
            .with_context(|| format!("the agent of {} does not run", self.node))?;
        kill(Pid::from_raw(i32::try_from(child.id())?), signal)?;
        let what = format!("the agent of {} to end after {signal}", self.node);
        let waited = wait_until(&what, AGENT_TIMEOUT, || Ok(child.try_wait()?.is_some()));
        if waited.is_err() {
            child.kill()?;
            child.wait()?;
        }
        waited
    }

    /// Lets the next start use another file with the same content, as an upgrade does.
    ///
    /// # Errors
    ///
    /// When it cannot be copied.
    pub fn use_copy_of_binary(&mut self) -> Result<()> {
        let copy = self.log.with_extension("copied-agent");
        fs::copy(&self.binary, &copy).with_context(|| format!("copy to {}", copy.display()))?;
        self.binary = copy;
        Ok(())
    }

    /// Lets the next start have other arguments than the cluster's.
    pub fn use_arguments(&mut self, arguments: &[&str]) {
        self.arguments = arguments
            .iter()
            .map(|&argument| argument.to_owned())
            .collect();
    }

    /// Lets the next start attach to another cgroup.
    pub fn use_cgroup(&mut self, folder: &Path) {
        folder.clone_into(&mut self.cgroup_root);
    }

    /// Number of the process, when it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Path of the agent's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// Runs `weir` against this agent.
    ///
    /// # Errors
    ///
    /// When it cannot be run or hangs; that it fails is for the caller to see.
    pub fn weir(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(binary("weir")?);
        command.arg("--socket").arg(self.socket()).args(arguments);
        if arguments.first() == Some(&"bpf") {
            command.arg("--bpf-root").arg(&self.bpf_root);
        }
        process::output(&mut command, b"", AGENT_TIMEOUT)
    }

    /// Runs `weir … -o json` and returns what it says.
    ///
    /// # Errors
    ///
    /// When it fails or prints no JSON.
    pub fn weir_json(&self, arguments: &[&str]) -> Result<Value> {
        let all = [arguments, &["-o", "json"]].concat();
        let output = self.weir(&all)?;
        let shown = arguments.join(" ");
        ensure!(
            output.status.success(),
            "`weir {shown}` on {} ended with {}: {}",
            self.node,
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("`weir {shown} -o json` on {}", self.node))
    }

    /// Last lines of the log.
    #[must_use]
    pub fn log_tail(&self, lines: usize) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// What `weir status` says when a test has failed: drops and problems above all.
    pub(crate) fn last_status(&self) -> String {
        if self.child.is_none() {
            return "no agent runs\n".to_owned();
        }
        match self.weir(&["status"]) {
            Ok(output) => String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into(),
            Err(error) => format!("no status: {error:#}\n"),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
