//! Latency of CNI ADD, beside the plugins that Kubernetes' own documentation uses.

use std::{
    io::Write as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use weir_tests::{Cluster, agent::binary, cni, netns::NetNs, reaper};

use crate::{
    report::{Section, Table},
    statistics::{Spread, quantile},
};

/// A plugin with its configuration, called in the namespace of a node.
struct Plugin<'a> {
    name: &'a str,
    binary: PathBuf,
    configuration: String,
    folder: PathBuf,
    node: &'a NetNs,
}

/// ADDs one after another and at once, and DELs; `rival` is a folder with `bridge` and
/// `host-local`.
///
/// # Errors
///
/// A call fails.
pub fn run(
    section: &mut Section,
    cluster: &Cluster,
    rival: Option<&std::path::Path>,
    pods: usize,
) -> Result<()> {
    let node = cluster.node("node1");
    let socket = node.run_dir.join("agent.sock");
    let binary = binary("weir-cni")?;
    let mut plugins = vec![Plugin {
        name: "Weir, both families",
        folder: binary.parent().context("no folder")?.to_path_buf(),
        binary,
        configuration: cni::configuration(&socket.to_string_lossy()).to_string(),
        node: &node.netns,
    }];
    let rival_node;
    if let Some(folder) = rival {
        rival_node = NetNs::create(&reaper::namespace_name(cluster.id(), "rival"))?;
        let data = reaper::state_directory(cluster.id()).join("host-local");
        let configuration = json!({
            "cniVersion": "1.0.0",
            "name": "rival",
            "type": "bridge",
            "bridge": "rival0",
            "isGateway": true,
            "ipam": {
                "type": "host-local",
                "dataDir": data,
                "ranges": [[{"subnet": "10.250.0.0/16"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        });
        plugins.push(Plugin {
            name: "bridge + host-local, IPv4 only",
            binary: folder.join("bridge"),
            configuration: configuration.to_string(),
            folder: folder.to_path_buf(),
            node: &rival_node,
        });
    }

    let sets = plugins
        .iter()
        .enumerate()
        .map(|(number, _)| namespaces(cluster, number, 2 * pods))
        .collect::<Result<Vec<_>>>()?;
    // One of each in turn, so that both see the same machine.
    let mut alone = vec![Vec::new(); plugins.len()];
    for turn in 0..pods {
        for ((plugin, set), times) in plugins.iter().zip(&sets).zip(&mut alone) {
            let begin = Instant::now();
            plugin.finish(plugin.start("ADD", &set[turn])?)?;
            times.push(begin.elapsed().as_secs_f64());
        }
    }
    let mut table = Table::new(
        &format!("CNI calls, milliseconds; {pods} pods one after another, then {pods} at once"),
        &[
            "",
            "ADD p50",
            "ADD p99",
            "ADD, all at once: all done",
            "the slowest",
            "DEL p50",
        ],
    );
    for (number, plugin) in plugins.iter().enumerate() {
        let (all, slowest) = plugin.at_once(&sets[number][pods..])?;
        let deleted = sets[number]
            .iter()
            .map(|netns| {
                let begin = Instant::now();
                plugin.finish(plugin.start("DEL", netns)?)?;
                Ok(begin.elapsed().as_secs_f64())
            })
            .collect::<Result<Vec<_>>>()?;
        alone[number].sort_by(f64::total_cmp);
        let deleted = Spread::of(deleted).context("no pods")?;
        let milliseconds = |seconds: f64| format!("{:.1}", seconds * 1e3);
        table.row([
            plugin.name.to_owned(),
            milliseconds(quantile(&alone[number], 0.5)),
            milliseconds(quantile(&alone[number], 0.99)),
            milliseconds(all),
            milliseconds(slowest),
            milliseconds(deleted.median),
        ]);
    }
    section.table(&table);
    if rival.is_none() {
        section.paragraph(
            "The rival, `bridge` with `host-local`, was not on this machine (Debian: containernetworking-plugins).",
        );
    }
    Ok(())
}

fn namespaces(cluster: &Cluster, plugin: usize, count: usize) -> Result<Vec<NetNs>> {
    (0..count)
        .map(|number| {
            NetNs::create(&reaper::namespace_name(
                cluster.id(),
                &format!("c{plugin}-{number}"),
            ))
        })
        .collect()
}

impl Plugin<'_> {
    /// Starts a call; the configuration is written already.
    fn start(&self, command: &str, pod: &NetNs) -> Result<Child> {
        let mut call: Command = self.node.command(&self.binary)?;
        let mut child = call
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", pod.name())
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", self.binary.display()))?;
        let mut stdin = child.stdin.take().context("no standard input")?;
        stdin.write_all(self.configuration.as_bytes())?;
        Ok(child)
    }

    fn finish(&self, child: Child) -> Result<()> {
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "{} ended with {}: {}{}",
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }

    /// Seconds until all are done, and of the slowest call.
    fn at_once(&self, pods: &[NetNs]) -> Result<(f64, f64)> {
        let begin = Instant::now();
        let times: Vec<Result<f64>> = std::thread::scope(|scope| {
            let threads: Vec<_> = pods
                .iter()
                .map(|pod| {
                    scope.spawn(move || {
                        let begin = Instant::now();
                        self.finish(self.start("ADD", pod)?)?;
                        Ok(begin.elapsed().as_secs_f64())
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| bail!("a caller of the plugin panicked"))
                })
                .collect()
        });
        let all = begin.elapsed().as_secs_f64();
        let mut slowest = 0.0f64;
        for time in times {
            slowest = slowest.max(time?);
        }
        Ok((all, slowest))
    }
}
