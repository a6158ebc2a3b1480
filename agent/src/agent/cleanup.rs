//! `weir-agent cleanup`: takes Weir out of the node. Programs, pins, routes, switches and the
//! state in the run directory go; pods that still run lose their network.

use std::{collections::BTreeSet, fs, io, path::Path};

use anyhow::Context as _;
use aya::programs::{SchedClassifier, TcAttachType};
use weir_common::metrics::Hook;

use super::start::datapath_options;
use crate::{
    datapath::{Datapath, expedite::Expedite},
    netlink::{
        Change, Link, Netlink, NetlinkError, RouteTarget, SERVICE_TABLE, defrag_device,
        host_device, sysctl::Sysctls,
    },
    objects::Family,
    settings::Settings,
};

/// What the run directory may hold that is ours, also with [`QUARANTINE`] behind it.
const FILES: [&str; 7] = [
    "agent.sock",
    "ipam.json",
    "ipam.json.tmp",
    "endpoint.json.tmp",
    "sysctls.json",
    "sysctls.json.new",
    "agent.lock",
];
const DIRECTORIES: [&str; 1] = ["endpoints"];
/// Ends the name of a state file that was set aside.
const QUARANTINE: &str = ".quarantine";

/// Refuses directories that cannot be those of this node's agent: nothing is pinned there, and yet
/// Weir's programs are attached.
///
/// # Errors
///
/// If the directories are probably wrong, or the devices cannot be listed.
pub async fn check_directories(settings: &Settings) -> anyhow::Result<()> {
    if has_entries(&settings.bpf_root.join("links")) {
        return Ok(());
    }
    let netlink = Netlink::new().context("cannot open the netlink sockets")?;
    let links = netlink.links().await.context("cannot list the devices")?;
    let mut pods = links.iter().filter(|link| link.is_pod_device());
    let Some(pod) = pods.find(|pod| has_programs(&pod.name)) else {
        return Ok(());
    };
    anyhow::bail!(
        "Weir's programs are attached to {}, the device of a pod, but nothing is pinned in {}: \
         --bpf-root and --run-dir (now {}) are probably not those of the agent; give both as the \
         agent had them. Nothing has been changed",
        pod.name,
        settings.bpf_root.display(),
        settings.run_dir.display()
    )
}

fn has_entries(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

/// Whether our programs are attached by tcx. With clsact nobody can tell filters of an agent that
/// has its pins elsewhere from those whose pins are lost.
fn has_programs(device: &str) -> bool {
    SchedClassifier::query_tcx(device, TcAttachType::Ingress).is_ok_and(|(_, programs)| {
        let ours = Some(Hook::FromPod.name());
        programs.iter().any(|program| program.name_as_str() == ours)
    })
}

/// Removes everything that can be removed, and says so line by line to `tell`. What is not there
/// is no error: twice is as good as once.
///
/// # Errors
///
/// Everything that could not be removed, after all has been tried.
pub async fn cleanup(settings: &Settings, mut tell: impl FnMut(&str)) -> anyhow::Result<()> {
    let mut errors: Vec<String> = Vec::new();
    let netlink = Netlink::new().context("cannot open the netlink sockets")?;

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
            let rules = [Family::V4, Family::V6].map(Change::RemoveServiceRule);
            let mut failures = netlink.apply(rules.into()).await;
            failures.extend(netlink.apply(changes).await);
            let removed = routes.len().saturating_sub(failures.len());
            if removed > 0 {
                tell(&format!(
                    "removed {removed} routes with their neighbours, and the rules of table {SERVICE_TABLE}"
                ));
            }
            errors.extend(failures.iter().map(ToString::to_string));
        }
        Err(error) => errors.push(error.to_string()),
    }
    // What the routes led to goes after them: nothing is sent to a device that nobody serves.
    let (removed, failed) = remove_pins(settings);
    if removed > 0 {
        let root = settings.bpf_root.display();
        tell(&format!(
            "removed {removed} pins of programs and maps in {root}"
        ));
    }
    errors.extend(failed);
    let links = netlink.links().await;
    errors.extend(remove_devices(&netlink, links, &mut tell).await);
    // Takes back what an agent that was killed has left on.
    let _ = Expedite::new(false);
    let mut sysctls = Sysctls::open(&settings.run_dir);
    let switches = sysctls.changed().join(", ");
    let failed = sysctls.restore();
    if !switches.is_empty() && failed.is_empty() {
        tell(&format!("put back the sysctls {switches}"));
    }
    errors.extend(failed.iter().map(ToString::to_string));
    let had_state = DIRECTORIES.iter().chain(&FILES[..FILES.len() - 1]);
    let had_state = had_state
        .map(|name| settings.run_dir.join(name))
        .any(|path| path.exists());
    let failed = clear_run_dir(&settings.run_dir);
    if had_state && failed.is_empty() {
        let run_dir = settings.run_dir.display();
        tell(&format!(
            "removed the state of endpoints and addresses in {run_dir}"
        ));
    }
    errors.extend(failed.iter().map(ToString::to_string));
    for directory in [&settings.run_dir, &settings.bpf_root] {
        if let Some(left) = left_in(directory) {
            tell(&left);
        }
    }
    anyhow::ensure!(errors.is_empty(), "{}", errors.join("; "));
    Ok(())
}

/// Removes the devices of the node among all `links`, and tells of those of pods. Gives what failed.
async fn remove_devices(
    netlink: &Netlink,
    links: Result<Vec<Link>, NetlinkError>,
    tell: &mut impl FnMut(&str),
) -> Vec<String> {
    let mut errors = Vec::new();
    let links = match links {
        Ok(links) => links,
        Err(error) => {
            return vec![format!(
                "{error}: the devices weir-host, weir-net and weir-defrag stay if they are there"
            )];
        }
    };
    // A device of somebody else's that only has the name stays.
    if let Some(device) = host_device::find(&links) {
        match netlink.remove_link(device.host).await {
            Ok(()) => tell("removed the devices weir-host and weir-net"),
            Err(error) => errors.push(error.to_string()),
        }
    }
    if let Some(device) = defrag_device::find(&links) {
        match netlink.remove_link(device).await {
            Ok(()) => tell("removed the device weir-defrag"),
            Err(error) => errors.push(error.to_string()),
        }
    }
    let pods = links.iter().filter(|link| link.is_pod_device()).count();
    if pods > 0 {
        tell(&format!(
            "{pods} pods still have a device of Weir and no network any more; delete them"
        ));
    }
    errors
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
        let detached = Datapath::open(&datapath_options(settings)).and_then(|datapath| {
            datapath.detach_sockets()?;
            datapath.detach_defrag()?;
            datapath.sweep_attachments(&BTreeSet::new())
        });
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
        for suffix in ["", QUARANTINE] {
            let path = run_dir.join(format!("{name}{suffix}"));
            errors.extend(gone(fs::remove_file(&path), &path));
        }
    }
    // Someone else's files may be there: see `left_in`.
    let _ = fs::remove_dir(run_dir);
    errors
}

/// What to say of a directory that is not empty.
fn left_in(directory: &Path) -> Option<String> {
    const SHOWN: usize = 5;
    let entries = fs::read_dir(directory).ok()?.flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let more = match names.len() {
        0 => return None,
        all if all > SHOWN => format!(" and {} more", all - SHOWN),
        _ => String::new(),
    };
    names.truncate(SHOWN);
    Some(format!(
        "{} stays, as it holds what is not Weir's or could not be removed: {}{more}",
        directory.display(),
        names.join(", ")
    ))
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
        let left = left_in(&run_dir).unwrap();
        assert!(left.ends_with(": other"), "{left}");
        fs::remove_file(run_dir.join("other")).unwrap();
        assert!(clear_run_dir(&run_dir).is_empty());
        assert!(!run_dir.exists());
        assert!(clear_run_dir(&run_dir).is_empty());
    }

    #[test]
    fn what_was_set_aside_goes_too() {
        let directory = tempfile::tempdir().unwrap();
        let run_dir = directory.path().join("weir");
        fs::create_dir_all(run_dir.join("endpoints")).unwrap();
        for name in [
            "ipam.json.quarantine",
            "sysctls.json.quarantine",
            "sysctls.json.new",
            "endpoints/c-eth0.json.quarantine",
        ] {
            fs::write(run_dir.join(name), "{").unwrap();
        }
        assert!(clear_run_dir(&run_dir).is_empty());
        assert!(!run_dir.exists());
        assert_eq!(left_in(&run_dir), None);
    }

    #[tokio::test]
    async fn devices_that_cannot_be_listed_are_an_error() {
        let netlink = Netlink::new().unwrap();
        let broken = Err(io::Error::other("broken").into());
        let errors = remove_devices(&netlink, broken, &mut |_| {}).await;
        assert_eq!(errors.len(), 1);
        for part in ["broken", "weir-host"] {
            assert!(errors[0].contains(part), "{errors:?}");
        }
        let none = remove_devices(&netlink, Ok(Vec::new()), &mut |_| {}).await;
        assert!(none.is_empty());
    }

    #[test]
    fn many_files_left_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        for name in 0..7 {
            fs::write(directory.path().join(name.to_string()), "").unwrap();
        }
        let left = left_in(directory.path()).unwrap();
        assert!(left.ends_with(": 0, 1, 2, 3, 4 and 2 more"), "{left}");
    }
}
