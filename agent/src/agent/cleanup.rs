//! `weir-agent cleanup`: takes Weir out of the node. Programs, pins, routes, switches and the
//! state in the run directory go; pods that still run lose their network.

use std::{collections::BTreeSet, fs, io, path::Path};

use anyhow::Context as _;

use super::start::datapath_options;
use crate::{
    datapath::{Datapath, expedite::Expedite},
    netlink::{Change, Netlink, RouteTarget, sysctl::Sysctls},
    settings::Settings,
};

/// What the run directory may hold that is ours.
const FILES: [&str; 5] = [
    "agent.sock",
    "ipam.json",
    "ipam.json.tmp",
    "endpoint.json.tmp",
    "agent.lock",
];
const DIRECTORIES: [&str; 1] = ["endpoints"];

/// Removes everything that can be removed, and says so line by line to `tell`. What is not there
/// is no error: twice is as good as once.
///
/// # Errors
///
/// Everything that could not be removed, after all has been tried.
pub async fn cleanup(settings: &Settings, mut tell: impl FnMut(&str)) -> anyhow::Result<()> {
    let mut errors: Vec<String> = Vec::new();
    let netlink = Netlink::new().context("cannot open the netlink sockets")?;

    let (removed, failed) = remove_pins(settings);
    if removed > 0 {
        let root = settings.bpf_root.display();
        tell(&format!(
            "removed {removed} pins of programs and maps in {root}"
        ));
    }
    errors.extend(failed);
    match netlink.own_routes().await {
        Ok(routes) => {
            let mut changes = Vec::new();
            for route in &routes {
                changes.push(Change::RemoveRoute(*route));
                if let (true, RouteTarget::Link { ifindex }) = (route.is_to_pod(), route.target) {
                    let address = route.destination.addr();
                    changes.push(Change::RemoveNeighbour { ifindex, address });
                }
            }
            let failures = netlink.apply(changes).await;
            let removed = routes.len().saturating_sub(failures.len());
            if removed > 0 {
                tell(&format!("removed {removed} routes"));
            }
            errors.extend(failures.iter().map(ToString::to_string));
        }
        Err(error) => errors.push(error.to_string()),
    }
    if let Ok(links) = netlink.links().await {
        let pods = links.iter().filter(|link| link.is_pod_device()).count();
        if pods > 0 {
            tell(&format!(
                "{pods} pods still have a device of Weir and no network any more; delete them"
            ));
        }
    }
    // Takes back what an agent that was killed has left on.
    let _ = Expedite::new(false);
    let switches = Sysctls::open(&settings.run_dir).restore();
    errors.extend(switches.iter().map(ToString::to_string));
    errors.extend(
        clear_run_dir(&settings.run_dir)
            .iter()
            .map(ToString::to_string),
    );
    anyhow::ensure!(errors.is_empty(), "{}", errors.join("; "));
    Ok(())
}

/// Detaches all programs, then removes the pins and their directories. Gives the number of pins
/// removed, and what could not be.
fn remove_pins(settings: &Settings) -> (usize, Vec<String>) {
    let (links, maps) = (
        settings.bpf_root.join("links"),
        settings.bpf_root.join("maps"),
    );
    let (mut removed, mut errors) = (0, Vec::new());
    let attached = fs::read_dir(&links).map_or(0, Iterator::count);
    if attached > 0 {
        // Filters of a clsact qdisc do not go with their pin: the data path detaches them. If it
        // cannot be loaded, removing the pins still detaches tcx links.
        let detached = Datapath::open(&datapath_options(settings))
            .and_then(|datapath| datapath.sweep_attachments(&BTreeSet::new()));
        match detached {
            Ok(_) => removed += attached,
            Err(error) => errors.push(format!("cannot detach in the usual way: {error}")),
        }
    }
    for folder in [links, maps] {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            match fs::remove_file(entry.path()) {
                Ok(()) => removed += 1,
                Err(error) => {
                    errors.push(format!("cannot remove {}: {error}", entry.path().display()));
                }
            }
        }
        // Not there, or not empty: then the files above have been reported.
        let _ = fs::remove_dir(folder);
    }
    let _ = fs::remove_dir(&settings.bpf_root);
    (removed, errors)
}

/// Removes our files, and the directory if nothing else is in it.
fn clear_run_dir(run_dir: &Path) -> Vec<io::Error> {
    let gone = |result: io::Result<()>, path: &Path| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Some(io::Error::new(
            error.kind(),
            format!("cannot remove {}: {error}", path.display()),
        )),
        _ => None,
    };
    let mut errors = Vec::new();
    for name in DIRECTORIES {
        let path = run_dir.join(name);
        errors.extend(gone(fs::remove_dir_all(&path), &path));
    }
    for name in FILES {
        let path = run_dir.join(name);
        errors.extend(gone(fs::remove_file(&path), &path));
    }
    // Someone else's files may be there.
    let _ = fs::remove_dir(run_dir);
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_run_directory_goes_unless_someone_else_uses_it() {
        let directory = tempfile::tempdir().unwrap();
        let run_dir = directory.path().join("weir");
        fs::create_dir_all(run_dir.join("endpoints")).unwrap();
        fs::write(run_dir.join("ipam.json"), "{}").unwrap();
        fs::write(run_dir.join("other"), "").unwrap();
        assert!(clear_run_dir(&run_dir).is_empty());
        assert!(run_dir.join("other").exists() && !run_dir.join("endpoints").exists());
        fs::remove_file(run_dir.join("other")).unwrap();
        assert!(clear_run_dir(&run_dir).is_empty());
        assert!(!run_dir.exists());
        assert!(clear_run_dir(&run_dir).is_empty());
    }
}
