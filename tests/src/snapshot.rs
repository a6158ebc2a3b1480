//! What there is on a node, to be compared before and after: tests for leftovers.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::Node;

/// Devices, addresses, routes, neighbours, files, pins, endpoints and rows of maps of a node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Snapshot(BTreeMap<&'static str, BTreeSet<String>>);

/// The kernel gives devices their link-local addresses in its own time.
fn is_lasting(line: &str) -> bool {
    !line.contains("fe80:")
}

impl Snapshot {
    /// Looks at a node whose agent runs.
    ///
    /// # Errors
    ///
    /// When a tool or `weir` fails.
    pub fn take(node: &Node) -> Result<Self> {
        let mut all = BTreeMap::new();
        for (what, arguments) in [
            ("devices", ["-br", "link"].as_slice()),
            ("addresses", &["-o", "address"]),
            ("routes", &["-o", "route", "show", "table", "all"]),
            (
                "IPv6 routes",
                &["-6", "-o", "route", "show", "table", "all"],
            ),
            (
                "permanent neighbours",
                &["neigh", "show", "nud", "permanent"],
            ),
        ] {
            let text = node.netns.tool("ip", arguments)?;
            all.insert(
                what,
                text.lines()
                    .map(|line| line.trim().to_owned())
                    .filter(|line| is_lasting(line))
                    .collect(),
            );
        }
        let mut run_files = files(&node.run_dir);
        // What switches were set is of the node, not of its pods, and a reboot of a namespace keeps them.
        // Spare files are there once the first pod was.
        run_files.retain(|file| !file.ends_with("/sysctls.json") && !file.ends_with(".json.tmp"));
        all.insert("files", run_files);
        let devices = device_names(node)?;
        let pins = files(&node.bpf_root);
        let pins = pins.into_iter().map(|pin| with_device_name(pin, &devices));
        all.insert("pins", pins.collect());
        all.insert("endpoints", rows(&node.weir_json(&["endpoint", "list"])?));
        for (map, what) in [
            ("endpoint", "endpoint rows"),
            ("lb", "Service rows"),
            ("nexthop", "next hops"),
            ("ipcache", "prefixes"),
            ("flow", "connections"),
        ] {
            all.insert(what, rows(&node.weir_json(&["bpf", map, "list"])?));
        }
        let status = node.weir_json(&["status"])?;
        let attachments = status["attachments"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|a| format!("{} at {} of {}", a["program"], a["hook"], a["device"]))
            .collect();
        all.insert("attachments", attachments);
        let used = format!(
            "{}",
            crate::node::number(&status["addresses_used"]).unwrap_or(0)
        );
        all.insert("addresses in use", BTreeSet::from([used]));
        Ok(Self(all))
    }

    /// Requires that `later` is the same.
    ///
    /// # Errors
    ///
    /// With what was added (+) and what is missing (-).
    pub fn check_same(&self, later: &Self) -> Result<()> {
        let mut text = String::new();
        for (what, before) in &self.0 {
            let nothing = BTreeSet::new();
            let after = later.0.get(what).unwrap_or(&nothing);
            for line in after.difference(before) {
                text.push_str(&format!("\n  {what}: +{line}"));
            }
            for line in before.difference(after) {
                text.push_str(&format!("\n  {what}: -{line}"));
            }
        }
        ensure!(text.is_empty(), "the node is not as it was:{text}");
        Ok(())
    }
}

fn rows(list: &Value) -> BTreeSet<String> {
    match list {
        Value::Array(rows) => rows.iter().map(ToString::to_string).collect(),
        other => BTreeSet::from([other.to_string()]),
    }
}

/// Paths of all files below a directory.
fn files(directory: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                directories.push(entry.path());
            } else {
                found.insert(entry.path().display().to_string());
            }
        }
    }
    found
}

/// Names of the node's devices by interface index.
fn device_names(node: &Node) -> Result<BTreeMap<String, String>> {
    let links: Value = serde_json::from_str(&node.netns.tool("ip", &["-json", "link"])?)?;
    Ok(links
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|link| {
            let name = link["ifname"].as_str()?.to_owned();
            Some((link["ifindex"].to_string(), name))
        })
        .collect())
}

/// `links/PROGRAM-IFINDEX` with the device's name: one that is made anew has another index.
fn with_device_name(pin: String, devices: &BTreeMap<String, String>) -> String {
    match pin.rsplit_once('-') {
        Some((program, index)) if pin.contains("/links/") => match devices.get(index) {
            Some(name) => format!("{program} of {name}"),
            None => pin,
        },
        _ => pin,
    }
}
