//! `weir cleanup`: takes away what kube-proxy or Cilium have left on this node, in the network namespace that it
//! runs in. It needs no agent, and touches nothing of Weir.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use weir_strangers::{BPFFS, Owner, Report, Request, cleanup};

use crate::{Format, output};

/// Options of `weir cleanup`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("owners").required(true).multiple(true))]
pub struct Arguments {
    /// kube-proxy: its chains of iptables, its tables of nftables and the device kube-ipvs0.
    #[arg(long, group = "owners")]
    kube_proxy: bool,
    /// Cilium: its programs on devices, pins, devices and chains of iptables.
    #[arg(long, group = "owners")]
    cilium: bool,
    /// Shows what would be removed, and removes nothing.
    #[arg(long)]
    dry_run: bool,
    /// Also while kube-proxy or cilium-agent runs, which makes everything anew.
    #[arg(long)]
    force: bool,
    /// Where bpffs is mounted, for Cilium's pins.
    #[arg(long, value_name = "PATH", default_value = BPFFS)]
    bpffs: PathBuf,
}

/// Removes, and says what was removed and what stays.
pub fn run(arguments: &Arguments, format: Format) -> anyhow::Result<()> {
    let asked = [
        (arguments.kube_proxy, Owner::KubeProxy),
        (arguments.cilium, Owner::Cilium),
    ];
    let request = Request {
        owners: asked
            .into_iter()
            .filter_map(|(asked, owner)| asked.then_some(owner))
            .collect(),
        dry_run: arguments.dry_run,
        force: arguments.force,
        bpffs: arguments.bpffs.clone(),
    };
    if arguments.cilium {
        require_bpffs(&arguments.bpffs)?;
    }
    let uid = nix::unistd::geteuid();
    ensure!(
        uid.is_root(),
        "only root may look at rules and programs and remove them, not user {uid}"
    );
    let report = cleanup(&request)?;
    match format {
        Format::Json => output::json(&report)?,
        Format::Yaml => output::yaml(&report)?,
        Format::Table => output::text(&text(&report, request.dry_run))?,
    }
    ensure!(
        report.failed.is_empty(),
        "not all could be removed: {}",
        report.failed.join("; ")
    );
    Ok(())
}

/// Another folder holds no pins: without this a slip would look like a clean node. (Where the usual one is none,
/// nobody has pinned anything.)
fn require_bpffs(folder: &Path) -> anyhow::Result<()> {
    let is_bpffs = || statfs(folder).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC);
    ensure!(
        folder == Path::new(BPFFS) || is_bpffs(),
        "--bpffs {} is no bpffs: give the folder where it is mounted (`findmnt -t bpf`), usually {BPFFS}",
        folder.display()
    );
    Ok(())
}

fn text(report: &Report, dry_run: bool) -> String {
    let verb = if dry_run { "would remove" } else { "removed" };
    if report.removed.is_empty() && report.failed.is_empty() {
        return "nothing is left\n".to_owned();
    }
    let lines = report.removed.iter();
    lines.map(|what| format!("{verb} {what}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thing_has_a_line() {
        let mut report = Report::default();
        assert_eq!(text(&report, false), "nothing is left\n");
        report.removed = vec!["device a".to_owned(), "pins b".to_owned()];
        assert_eq!(text(&report, false), "removed device a\nremoved pins b\n");
        assert_eq!(
            text(&report, true),
            "would remove device a\nwould remove pins b\n"
        );
        report.removed.clear();
        report.failed = vec!["x: y".to_owned()];
        assert_eq!(text(&report, false), "");
    }

    #[test]
    fn a_folder_without_bpffs_is_refused_but_the_usual_one() {
        let folder = tempfile::tempdir().unwrap();
        for wrong in [folder.path(), &folder.path().join("missing")] {
            let error = require_bpffs(wrong).unwrap_err().to_string();
            assert!(
                error.contains("--bpffs") && error.contains("findmnt"),
                "{error}"
            );
        }
        require_bpffs(Path::new(BPFFS)).unwrap();
    }
}
