//! Which version the layout of each pinned map has: with the same sizes a map may mean something else. `ABI_VERSION`
//! stands for all maps together and rises with any of them; what established connections depend on has versions
//! of its own, so that it outlives changes of the rest, up and down.
//!
//! They are noted beside the pins, in a symbolic link `~layouts` that leads nowhere: its text is `GROUP=VERSION`,
//! separated by commas, and first `abi=VERSION`, the `ABI_VERSION` of the agent that noted them. An agent that knows of no
//! note makes maps anew without changing it: with another version in `CONFIG` the note is of other maps, and says
//! nothing. Flow entries carry theirs as well.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use aya::maps::MapData;
use weir_common::{ABI_VERSION, flow};

use super::{
    super::{
        DatapathError,
        sys::{self, Cursor, RawMap},
    },
    FLOW_MAPS, NEW, SERVICE_MAPS,
};

/// The symbolic link.
const NOTE: &str = "~layouts";
/// What the version of all layouts together is called there.
const ABI: &str = "abi";

/// Maps whose layouts change together, apart from those of others.
struct Group {
    name: &'static str,
    /// Raised when the key or value of one of the maps changes its layout or its meaning, also with the same size.
    version: u32,
    maps: &'static [&'static str],
}

/// What is in none of them is judged by `ABI_VERSION`, and follows from the desired state.
const GROUPS: [Group; 7] = [
    Group {
        name: "flows",
        version: flow::VERSION as u32,
        maps: &FLOW_MAPS,
    },
    Group {
        name: "endpoint-flows",
        version: 1,
        maps: &["ENDPOINT_FLOWS"],
    },
    // Flows refer to rows of these by number and generation.
    Group {
        name: "endpoints",
        version: 1,
        maps: &["ENDPOINTS"],
    },
    Group {
        name: "next-hops",
        version: 1,
        maps: &["NEXT_HOPS"],
    },
    Group {
        name: "backends",
        version: 1,
        maps: &["BACKENDS"],
    },
    // These tell which row a node or an endpoint of a Service has. Without the first a node's row is known by the way
    // there; without the second endpoints get new rows, which TCP does not mind and UDP does.
    Group {
        name: "ipcache",
        version: 1,
        maps: &["IPCACHE_V4", "IPCACHE_V6"],
    },
    Group {
        name: "services",
        version: 1,
        maps: &SERVICE_MAPS,
    },
];

/// The `ABI_VERSION` of the agents that had versions of groups, all 1, but did not note them.
const ABI_WITHOUT_NOTE: u32 = 3;

/// The versions of the maps that are pinned.
#[derive(Debug)]
pub(super) struct Pinned {
    /// `None`: nothing has been written yet.
    abi: Option<u32>,
    groups: Option<BTreeMap<String, u32>>,
}

impl Pinned {
    /// Reads what an earlier agent has noted.
    pub fn read(folder: &Path) -> Result<Self, DatapathError> {
        let text = noted(folder)?;
        Ok(Self::new(abi_version(folder)?, text.as_deref()))
    }

    fn new(abi: Option<u32>, note: Option<&str>) -> Self {
        let groups = note.map(parse).filter(|noted| {
            let of = noted.get(ABI);
            abi.is_none_or(|abi| of.is_none_or(|of| *of == abi))
        });
        Self { abi, groups }
    }

    /// Why a map is of another layout than this agent's, whatever its sizes are; `None` if it is not.
    pub fn misfit(&self, map: &str) -> Option<String> {
        let Some(group) = GROUPS.iter().find(|group| group.maps.contains(&map)) else {
            return self
                .abi
                .filter(|abi| *abi != ABI_VERSION)
                .map(|abi| another(abi, ABI_VERSION));
        };
        match (&self.groups, self.abi) {
            (None, None) => None,
            (Some(groups), _) => match groups.get(group.name) {
                Some(version) if *version == group.version => None,
                Some(version) => Some(another(*version, group.version)),
                None => Some("the version of its layout is not noted".to_owned()),
            },
            (None, Some(ABI_WITHOUT_NOTE)) if group.version == 1 => None,
            (None, Some(ABI_WITHOUT_NOTE)) => Some(another(1, group.version)),
            (None, Some(abi)) => Some(another(abi, ABI_VERSION)),
        }
    }
}

fn another(version: u32, own: u32) -> String {
    format!("its layout is version {version}, this agent has {own}")
}

/// Why the entries of a flow table, whose sizes fit, cannot be understood. All are of the agent that made the table:
/// the first are looked at.
pub(super) fn misfit_of_entries(path: &Path) -> Result<Option<String>, DatapathError> {
    /// Where each version of a flow entry has its version: the byte behind the tag.
    const OFFSET: usize = 4;
    const FIRST: usize = 512;
    let read = || {
        let flows = RawMap::new(&MapData::from_pin(path).map_err(io::Error::other)?)?;
        let size = flows.value_size();
        let (mut keys, mut values) = (vec![0; FIRST * flows.key_size()], vec![0; FIRST * size]);
        let batch = flows.lookup_batch(&mut Cursor::default(), &mut keys, &mut values)?;
        let mut versions = values.chunks_exact(size).take(batch.count);
        Ok(versions
            .find_map(|entry| (entry[OFFSET] != flow::VERSION).then(|| u32::from(entry[OFFSET]))))
    };
    let other = read().map_err(|error| DatapathError::pin(path, error))?;
    Ok(other.map(|version| {
        format!(
            "its entries are of version {version}, this agent has {}",
            flow::VERSION
        )
    }))
}

/// Notes the versions of this agent at once.
pub(super) fn note(folder: &Path) -> Result<(), DatapathError> {
    if let Some(new) = note_later(folder)? {
        fs::rename(&new, folder.join(NOTE)).map_err(|error| DatapathError::pin(&new, error))?;
    }
    Ok(())
}

/// Puts a note of the versions beside the new maps, to take its place together with them, unless the one that is
/// there says the same; gives it.
pub(super) fn note_later(folder: &Path) -> Result<Option<PathBuf>, DatapathError> {
    let text = own();
    if noted(folder)?.as_ref() == Some(&text) {
        return Ok(None);
    }
    let new = folder.join(format!("{NOTE}{NEW}"));
    match symlink(&text, &new) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(DatapathError::pin(&new, error))
        }
        _ => Ok(Some(new)),
    }
}

fn own() -> String {
    let versions = GROUPS.map(|group| format!("{}={}", group.name, group.version));
    format!("{ABI}={ABI_VERSION},{}", versions.join(","))
}

fn noted(folder: &Path) -> Result<Option<String>, DatapathError> {
    let path = folder.join(NOTE);
    match fs::read_link(&path) {
        Ok(text) => Ok(Some(text.to_string_lossy().into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(DatapathError::pin(&path, error)),
    }
}

/// What makes no sense is left out: then the version is not known.
fn parse(text: &str) -> BTreeMap<String, u32> {
    text.split(',')
        .filter_map(|part| part.split_once('='))
        .filter_map(|(name, version)| Some((name.to_owned(), version.parse().ok()?)))
        .collect()
}

/// The version of all layouts together, which every version of `CONFIG` has as its first four bytes; `None`
/// if there is none or nothing has been written yet.
fn abi_version(folder: &Path) -> Result<Option<u32>, DatapathError> {
    let path = folder.join("CONFIG");
    if !path.exists() {
        return Ok(None);
    }
    let read = || {
        let config = RawMap::new(&MapData::from_pin(&path).map_err(io::Error::other)?)?;
        let mut row = vec![0; config.value_size()];
        config.lookup(&0u32.to_ne_bytes(), &mut row)?;
        Ok((row.len() >= 4).then(|| sys::from_bytes::<u32>(&row)))
    };
    let version = read().map_err(|error| DatapathError::pin(&path, error))?;
    Ok(version.filter(|version| *version != 0))
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use weir_common::{
        Ipv6,
        endpoint::Endpoint,
        flow::{FlowEntry, FlowKey},
        ipcache::IpcacheEntry,
        next_hop::NextHop,
        service::Backend,
    };

    use super::*;

    #[test]
    fn maps_that_connections_depend_on_are_judged_by_versions_of_their_own() {
        let own = own();
        let of_other = own.replace(
            &format!("abi={ABI_VERSION}"),
            &format!("abi={}", ABI_VERSION + 1),
        );
        let newer_of_other = of_other.replace("backends=1", "backends=2");
        let without_abi = own.replace(&format!("abi={ABI_VERSION},"), "");
        let newer = own.replace("backends=1", "backends=2");
        let nothing_noted = own.replace("backends=1,", "");
        let garbage = own.replace("backends=1", "backends=x");
        let (now, other) = (Some(ABI_VERSION), Some(ABI_VERSION + 1));
        let unnoted = Some(ABI_WITHOUT_NOTE);
        for (abi, note, config, flows, backends) in [
            (None, None, true, true, true),
            (now, Some(&own), true, true, true),
            (other, Some(&of_other), false, true, true),
            (other, Some(&newer_of_other), false, true, false),
            (other, Some(&without_abi), false, true, true),
            // Somebody who knows of no note has made the maps anew since it was written.
            (other, Some(&own), false, false, false),
            (Some(2), Some(&own), false, false, false),
            (None, Some(&of_other), true, true, true),
            (now, Some(&newer), true, true, false),
            (now, Some(&nothing_noted), true, true, false),
            (now, Some(&garbage), true, true, false),
            (unnoted, None, ABI_VERSION == ABI_WITHOUT_NOTE, true, true),
            (Some(2), None, false, false, false),
            (other, None, false, false, false),
        ] {
            let pinned = Pinned::new(abi, note.map(String::as_str));
            let fits = ["CONFIG", "FLOWS_V6", "BACKENDS"].map(|map| pinned.misfit(map).is_none());
            assert_eq!(fits, [config, flows, backends], "{pinned:?}");
        }
        let reason = Pinned::new(now, Some(&newer)).misfit("BACKENDS").unwrap();
        assert_eq!(reason, "its layout is version 2, this agent has 1");
    }

    #[test]
    fn a_map_is_in_one_group_at_most() {
        let mut maps: Vec<&str> = GROUPS
            .iter()
            .flat_map(|group| group.maps)
            .copied()
            .collect();
        let all = maps.len();
        maps.sort_unstable();
        maps.dedup();
        assert_eq!(maps.len(), all);
    }

    /// Who changes one of these layouts raises the version of its group (of flow entries: `flow::VERSION`), then this
    /// test.
    #[test]
    fn the_layouts_are_those_of_the_versions() {
        let version = |name: &str| {
            GROUPS
                .iter()
                .find(|group| group.name == name)
                .unwrap()
                .version
        };
        type Entry = FlowEntry<Ipv6>;
        assert_eq!(version("flows"), 1);
        assert_eq!(
            [
                offset_of!(Entry, version),
                offset_of!(Entry, flags),
                offset_of!(Entry, new_source),
                offset_of!(Entry, new_source_port),
                offset_of!(Entry, address_difference),
                offset_of!(Entry, next_hop),
                offset_of!(Entry, next_hop_generation),
                offset_of!(Entry, ifindex),
                offset_of!(Entry, source_endpoint),
                offset_of!(Entry, source_generation),
                offset_of!(Entry, egress_set),
                offset_of!(Entry, backend),
                offset_of!(Entry, backend_generation),
                offset_of!(Entry, ring),
                offset_of!(Entry, last_seen),
                offset_of!(Entry, packets),
                size_of::<Entry>(),
            ],
            [
                4, 6, 8, 40, 44, 52, 56, 60, 64, 68, 72, 80, 84, 88, 92, 104, 120
            ]
        );
        type Key = FlowKey<Ipv6>;
        assert_eq!(
            [
                offset_of!(Key, destination),
                offset_of!(Key, source_port),
                offset_of!(Key, protocol),
                offset_of!(Key, scope),
                size_of::<Key>()
            ],
            [16, 32, 36, 37, 40]
        );
        assert_eq!(version("endpoints"), 1);
        assert_eq!(
            [
                offset_of!(Endpoint, netns_cookie),
                offset_of!(Endpoint, ifindex),
                offset_of!(Endpoint, generation),
                offset_of!(Endpoint, ipv4),
                offset_of!(Endpoint, ipv6),
                offset_of!(Endpoint, pod_mac),
                offset_of!(Endpoint, host_mac),
                offset_of!(Endpoint, egress_set),
                offset_of!(Endpoint, ingress_set),
                offset_of!(Endpoint, identity),
                offset_of!(Endpoint, mtu),
                offset_of!(Endpoint, flags),
                size_of::<Endpoint>(),
            ],
            [0, 8, 12, 16, 20, 36, 42, 48, 52, 56, 60, 62, 64]
        );
        assert_eq!(version("next-hops"), 1);
        assert_eq!(
            [
                offset_of!(NextHop, kind),
                offset_of!(NextHop, gateway_family),
                offset_of!(NextHop, mtu),
                offset_of!(NextHop, ifindex),
                offset_of!(NextHop, generation),
                offset_of!(NextHop, gateway),
                offset_of!(NextHop, source),
                size_of::<NextHop>(),
            ],
            [0, 1, 2, 4, 8, 12, 28, 44]
        );
        assert_eq!(version("ipcache"), 1);
        assert_eq!(
            [
                offset_of!(IpcacheEntry, class),
                offset_of!(IpcacheEntry, flags),
                offset_of!(IpcacheEntry, next_hop),
            ],
            [0, 1, 4]
        );
        assert_eq!(version("backends"), 1);
        assert_eq!(
            [
                offset_of!(Backend, address),
                offset_of!(Backend, port),
                offset_of!(Backend, state),
                offset_of!(Backend, sets),
                offset_of!(Backend, generation),
                offset_of!(Backend, service_port),
                size_of::<Backend>(),
            ],
            [0, 16, 18, 19, 20, 24, 32]
        );
    }
}
