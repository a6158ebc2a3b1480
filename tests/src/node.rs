//! A node of a cluster: a network namespace with an agent in it.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    agent::Agent, cgroup::Cgroup, netns::NetNs, objects::Objects, pod::Host, traffic::Server,
};

/// How long `wait_applied` waits, on a busy machine.
const APPLY_TIMEOUT: Duration = Duration::from_secs(20);

/// A node.
#[derive(Debug)]
pub struct Node {
    /// Name.
    pub name: String,
    /// Its network namespace.
    pub netns: Arc<NetNs>,
    /// Its control group: that of its own threads and processes and of those of its pods.
    pub cgroup: Arc<Cgroup>,
    /// Its addresses on the underlay, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Its pod ranges, IPv4 first.
    pub pod_cidrs: Vec<String>,
    /// The agent's run directory.
    pub run_dir: PathBuf,
    /// Where the agent pins.
    pub bpf_root: PathBuf,
    pub(crate) agent: Mutex<Agent>,
}

impl Node {
    /// The agent.
    pub fn agent(&self) -> MutexGuard<'_, Agent> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the agent and waits until it answers.
    ///
    /// # Errors
    ///
    /// When it runs already or does not start.
    pub fn start_agent(&self) -> Result<()> {
        let mut agent = self.agent();
        agent.start(&self.netns)?;
        agent.wait_ready()
    }

    /// Kills the agent with SIGKILL.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn kill9_agent(&self) -> Result<()> {
        self.agent().stop(Signal::SIGKILL)
    }

    /// Waits until the agent has all objects in the kernel.
    ///
    /// # Errors
    ///
    /// With what `weir wait --applied` says.
    pub fn wait_applied(&self) -> Result<()> {
        let timeout = format!("{}s", APPLY_TIMEOUT.as_secs());
        let output = self
            .agent()
            .weir(&["wait", "--applied", "--timeout", &timeout])?;
        ensure!(
            output.status.success(),
            "`weir wait --applied` on {} ended with {}: {}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Runs `weir … -o json` against the node's agent.
    ///
    /// # Errors
    ///
    /// When it fails.
    pub fn weir_json(&self, arguments: &[&str]) -> Result<Value> {
        self.agent().weir_json(arguments)
    }

    /// Its address of a family on the underlay.
    ///
    /// # Errors
    ///
    /// When it has none.
    pub fn address(&self, v6: bool) -> Result<IpAddr> {
        self.addresses
            .iter()
            .copied()
            .find(|address| address.is_ipv6() == v6)
            .with_context(|| format!("{} has no such address", self.name))
    }

    /// Runs a closure on a thread in the node's network namespace.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.netns.run(f)
    }

    /// Starts a server in the node's own network on each of its addresses, named after the node.
    ///
    /// # Errors
    ///
    /// When the port is taken.
    pub fn serve(&self, port: u16) -> Result<Vec<Server>> {
        self.addresses
            .iter()
            .map(|address| Server::start(&self.netns, SocketAddr::new(*address, port), &self.name))
            .collect()
    }

    /// Packets dropped for a reason since the agent's maps were made, over all hooks.
    ///
    /// # Errors
    ///
    /// When `weir status` fails.
    pub fn drops(&self, reason: &str) -> Result<u64> {
        let status = self.weir_json(&["status"])?;
        let counters = status["counters"]
            .as_array()
            .context("`weir status -o json` has no counters")?;
        Ok(counters
            .iter()
            .filter(|counter| counter["drop"] == true && counter["name"] == reason)
            .filter_map(|counter| number(&counter["packets"]))
            .sum())
    }

    /// Packets, or calls of sockets, that ended in an outcome at a hook since the agent's maps were made.
    ///
    /// # Errors
    ///
    /// When `weir bpf metrics list` fails.
    pub fn outcomes(&self, hook: &str, name: &str) -> Result<u64> {
        let rows = self.weir_json(&["bpf", "metrics", "list"])?;
        let rows = rows
            .as_array()
            .context("`weir bpf metrics list -o json` is no list")?;
        // Counters of zero are left out.
        Ok(rows
            .iter()
            .filter(|row| row["hook"] == hook && row["name"] == name)
            .filter_map(|row| number(&row["packets"]))
            .sum())
    }

    /// What a reboot does: the agent is gone, its directories are empty, devices of pods are gone.
    ///
    /// # Errors
    ///
    /// When devices cannot be removed.
    pub fn reboot(&self) -> Result<()> {
        if self.agent().pid().is_some() {
            self.kill9_agent()?;
        }
        for directory in [&self.run_dir, &self.bpf_root] {
            // An agent that never started has made none.
            let _ = fs::remove_dir_all(directory);
        }
        for device in self.netns.devices()? {
            if device != "eth0" {
                // The other half of a pair may have gone with the first.
                let _ = self.netns.ip(&format!("link del {device}"));
            }
        }
        for family in ["-4", "-6"] {
            self.netns
                .tool("ip", &[family, "route", "flush", "proto", "157"])?;
        }
        Ok(())
    }

    pub(crate) fn host(&self, objects: &Objects) -> Host {
        Host {
            node: self.name.clone(),
            netns: self.netns.clone(),
            cgroup: self.cgroup.clone(),
            socket: self.run_dir.join("agent.sock"),
            objects: objects.clone(),
        }
    }
}

/// A number in JSON, written as number or (64-bit numbers, as protobuf's mapping does) as text.
#[must_use]
pub fn number(value: &Value) -> Option<u64> {
    value
        .as_u64()
        .or_else(|| value.as_str().and_then(|text| text.parse().ok()))
}
