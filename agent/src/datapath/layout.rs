//! Compares the pinned maps with what the object wants, before it is loaded: a loader takes a pin
//! as it is, and with another layout both sides would read garbage. What differs is made anew.
//! Everything but flows follows from the desired state; flows are carried over where only the
//! size differs, and given up, loudly, where they cannot be understood any more.
//!
//! New maps are pinned beside the old ones, as `NAME~new`, and take their place when they hold
//! everything: [`Plan::commit`]. Until then the old ones are in force, pinned and untouched, so
//! that an agent that dies on the way has changed nothing and the next one begins again. From the
//! appearance of the file `~ready` on the next one goes on instead.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use aya::maps::{MapData, MapInfo};
use weir_common::{
    ABI_VERSION, Ipv4, Ipv6,
    address::Address,
    flow::{FlowEntry, FlowKey},
    metrics::FlowRingState,
};

use super::{
    DatapathError,
    object::MapShape,
    sys::{self, RawMap},
};

const FLOW_MAPS: [&str; 5] = [
    "FLOWS_V4",
    "FLOWS_V6",
    "FLOW_RING_V4",
    "FLOW_RING_V6",
    "FLOW_RING_STATE",
];
/// Without these a number in `SERVICE_STATE` means nothing.
const SERVICE_MAPS: [&str; 6] = [
    "FRONTENDS_V4",
    "FRONTENDS_V6",
    "SERVICE_STATE",
    "SLOTS",
    "AFFINITY",
    "AFFINITY_TIMEOUTS",
];
/// Rows of these have generations that flows refer to.
const GENERATION_MAPS: [&str; 3] = ["ENDPOINTS", "NEXT_HOPS", "BACKENDS"];

/// What has become of a pinned map that did not fit.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Migration {
    /// The map.
    pub map: String,
    /// Why it did not fit.
    pub reason: String,
    /// Whether what it held has been carried over.
    pub kept: bool,
}

/// End of the name of a new map's pin.
const NEW: &str = "~new";
/// While this exists the new maps are those that count.
const READY: &str = "~ready";

/// What is to be made anew, and how far that has come.
#[derive(Debug)]
pub(super) struct Plan {
    pub migrations: Vec<Migration>,
    folder: PathBuf,
    /// Maps of the object that do not fit, and whether their content is carried over.
    anew: BTreeMap<String, bool>,
    /// Pins that nobody knows.
    unknown: Vec<String>,
    pending: bool,
}

/// Ends what an earlier agent began, and compares.
pub(super) fn prepare(folder: &Path, shapes: &[MapShape]) -> Result<Plan, DatapathError> {
    settle(folder)?;
    let mut misfits: BTreeMap<String, Misfit> = BTreeMap::new();
    let pins = names(folder)?;
    if let Some(version) = pinned_version(folder)?.filter(|version| *version != ABI_VERSION) {
        let reason = format!("its layout is version {version}, this agent has {ABI_VERSION}");
        for pin in &pins {
            misfits.insert(pin.clone(), Misfit::dropped(&reason));
        }
    } else {
        for shape in shapes.iter().filter(|shape| pins.contains(&shape.name)) {
            if let Some(misfit) = compare(folder, shape)? {
                misfits.insert(shape.name.clone(), misfit);
            }
        }
        if !pins.is_empty() {
            drop_dependants(&pins, shapes, &mut misfits);
        }
    }
    for pin in &pins {
        if !shapes.iter().any(|shape| shape.name == *pin) {
            misfits.insert(pin.clone(), Misfit::dropped("no program uses it any more"));
        }
    }

    let mut plan = Plan {
        migrations: Vec::new(),
        folder: folder.to_path_buf(),
        anew: BTreeMap::new(),
        unknown: Vec::new(),
        pending: !misfits.is_empty(),
    };
    for (map, misfit) in misfits {
        let flows_lost = !misfit.keep && FLOW_MAPS.contains(&map.as_str());
        if flows_lost {
            tracing::error!(
                map,
                reason = misfit.reason,
                "established connections are forgotten: \
                 the pinned flow table cannot be used by this version"
            );
        } else {
            tracing::warn!(
                map,
                reason = misfit.reason,
                kept = misfit.keep,
                "pinned map is made anew"
            );
        }
        if shapes.iter().any(|shape| shape.name == map) {
            plan.anew.insert(map.clone(), misfit.keep);
        } else {
            plan.unknown.push(map.clone());
        }
        plan.migrations.push(Migration {
            map,
            reason: misfit.reason,
            kept: misfit.keep,
        });
    }
    Ok(plan)
}

/// After a crash: pins that were to take the place of others do so if all were ready, and go
/// otherwise.
fn settle(folder: &Path) -> Result<(), DatapathError> {
    let ready = folder.join(READY);
    let is_ready = ready.is_symlink();
    for name in entries(folder)? {
        let Some(map) = name.strip_suffix(NEW) else {
            continue;
        };
        let path = folder.join(&name);
        let result = if is_ready {
            fs::rename(&path, folder.join(map))
        } else {
            fs::remove_file(&path)
        };
        result.map_err(|error| DatapathError::pin(&path, error))?;
    }
    if is_ready {
        fs::remove_file(&ready).map_err(|error| DatapathError::pin(&ready, error))?;
    }
    Ok(())
}

impl Plan {
    /// Where a map of the object is pinned, for the loader to take it or make it.
    pub fn pin(&self, map: &str) -> PathBuf {
        if self.pending && self.anew.contains_key(map) {
            self.folder.join(format!("{map}{NEW}"))
        } else {
            self.folder.join(map)
        }
    }

    /// Carries the content of the old maps over. The programs that are attached still use the
    /// old ones: a connection that begins before they are replaced is not carried over, and is
    /// decided again, by the same hash, at its next packet.
    pub fn carry_over(&self) -> Result<(), DatapathError> {
        let open = |path: PathBuf| {
            MapData::from_pin(&path)
                .map_err(io::Error::other)
                .and_then(|map| RawMap::new(&map))
                .map_err(|error| DatapathError::pin(&path, error))
        };
        let old = |name: &str| open(self.folder.join(name));
        let new = |name: &str| open(self.pin(name));
        let kept = |name: &str| self.anew.get(name) == Some(&true);
        let mut copied = BTreeSet::new();
        for (family, row) in [("V4", 0u32), ("V6", 1)] {
            let (flows, ring) = (format!("FLOWS_{family}"), format!("FLOW_RING_{family}"));
            if !kept(&flows) || !kept(&ring) {
                continue;
            }
            let copy = Flows {
                old: old(&flows)?,
                old_ring: old(&ring)?,
                new: new(&flows)?,
                new_ring: new(&ring)?,
            };
            let result = match family {
                "V4" => copy.run::<Ipv4>(),
                _ => copy.run::<Ipv6>(),
            };
            let (kept, lost) = result.map_err(DatapathError::Migrate)?;
            let state = FlowRingState {
                hand: u64::from(kept),
            };
            new("FLOW_RING_STATE")?
                .update(&row.to_ne_bytes(), sys::bytes_of(&state))
                .map_err(DatapathError::Migrate)?;
            tracing::info!(
                flows,
                kept,
                lost,
                "connections carried over to a table of another size"
            );
            copied.extend([flows, ring]);
        }
        for name in self.anew.keys() {
            if kept(name) && !copied.contains(name) {
                copy_entries(&old(name)?, &new(name)?).map_err(DatapathError::Migrate)?;
            }
        }
        Ok(())
    }

    /// The new maps take the place of the old ones, all or none; again has no effect.
    pub fn commit(&mut self) -> Result<(), DatapathError> {
        if !self.pending {
            return Ok(());
        }
        for name in &self.unknown {
            let path = self.folder.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(DatapathError::pin(&path, error));
                }
                _ => {}
            }
        }
        let ready = self.folder.join(READY);
        match symlink("new", &ready) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(DatapathError::pin(&ready, error));
            }
            _ => {}
        }
        settle(&self.folder)?;
        self.pending = false;
        tracing::info!("the new maps hold everything and have taken the place of the old ones");
        Ok(())
    }
}

/// Why a map does not fit, and whether its content can be carried over.
#[derive(Clone, Debug)]
struct Misfit {
    reason: String,
    keep: bool,
}

impl Misfit {
    fn dropped(reason: &str) -> Self {
        Self {
            reason: reason.to_owned(),
            keep: false,
        }
    }
}

fn compare(folder: &Path, shape: &MapShape) -> Result<Option<Misfit>, DatapathError> {
    let path = folder.join(&shape.name);
    let info = MapInfo::from_pin(&path)
        .map_err(|error| DatapathError::pin(&path, io::Error::other(error)))?;
    let map_type = info.map_type().map_or(u32::MAX, |kind| kind as u32);
    let differences: Vec<String> = [
        ("type", map_type, shape.map_type),
        ("bytes of a key", info.key_size(), shape.key_size),
        ("bytes of a value", info.value_size(), shape.value_size),
        ("flags", info.map_flags(), shape.flags),
    ]
    .into_iter()
    .filter(|(_, is, wanted)| is != wanted)
    .map(|(what, is, wanted)| format!("{what} {is} instead of {wanted}"))
    .collect();
    if !differences.is_empty() {
        return Ok(Some(Misfit::dropped(&differences.join(", "))));
    }
    if info.max_entries() == shape.max_entries {
        return Ok(None);
    }
    let grows = shape.max_entries > info.max_entries();
    let name = shape.name.as_str();
    let keep = match name {
        "METRICS" | "LOOKUPS" | "EVENTS" | "CONFIG" | "SLOTS" => false,
        "FRAGMENTS_V4" | "FRAGMENTS_V6" => false,
        _ if FLOW_MAPS.contains(&name) || GENERATION_MAPS.contains(&name) => true,
        _ => grows,
    };
    Ok(Some(Misfit {
        reason: format!(
            "size {} instead of {}",
            info.max_entries(),
            shape.max_entries
        ),
        keep,
    }))
}

/// Maps whose content means nothing without one that is lost, or missing, are lost with it.
fn drop_dependants(
    pins: &BTreeSet<String>,
    shapes: &[MapShape],
    misfits: &mut BTreeMap<String, Misfit>,
) {
    let groups: [(&[&str], &[&str]); 4] = [
        (&["SERVICE_STATE", "SLOTS"], &SERVICE_MAPS),
        (&FLOW_MAPS, &FLOW_MAPS),
        (&GENERATION_MAPS, &FLOW_MAPS),
        (&["BACKENDS"], &["AFFINITY"]),
    ];
    for (leaders, followers) in groups {
        let lost = leaders.iter().find(|name| {
            shapes.iter().any(|shape| shape.name == **name)
                && (!pins.contains(**name)
                    || misfits.get(**name).is_some_and(|misfit| !misfit.keep))
        });
        let Some(lost) = lost else {
            continue;
        };
        for name in followers.iter().filter(|name| pins.contains(**name)) {
            misfits
                .entry((*name).to_owned())
                .or_insert_with(|| Misfit::dropped(&format!("it means nothing without {lost}")))
                .keep = false;
        }
    }
}

/// The version of the layout, which every version of `CONFIG` has as its first four bytes; `None`
/// if there is none or nothing has been written yet.
fn pinned_version(folder: &Path) -> Result<Option<u32>, DatapathError> {
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

/// Every pin of a map.
fn names(folder: &Path) -> Result<BTreeSet<String>, DatapathError> {
    let mut names = entries(folder)?;
    names.retain(|name| name != READY && !name.ends_with(NEW));
    Ok(names)
}

fn entries(folder: &Path) -> Result<BTreeSet<String>, DatapathError> {
    fs::read_dir(folder)
        .and_then(|entries| {
            entries
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect()
        })
        .map_err(|error| DatapathError::pin(folder, error))
}

/// Copies what fits; rows of an array beyond the size of the new one are left out.
fn copy_entries(old: &RawMap, new: &RawMap) -> io::Result<()> {
    let mut value = vec![0; old.value_size()];
    for key in old.keys()? {
        if old.lookup(&key, &mut value)?
            && let Err(error) = new.update(&key, &value)
            && error.raw_os_error() != Some(libc::E2BIG)
        {
            return Err(error);
        }
    }
    Ok(())
}

/// The flow tables of one family, old and new.
struct Flows {
    old: RawMap,
    old_ring: RawMap,
    new: RawMap,
    new_ring: RawMap,
}

impl Flows {
    /// Gives each connection a new place, in the order of their old ones. Connections carried
    /// over, and those for which there is no room.
    fn run<A>(&self) -> io::Result<(u32, u32)>
    where
        A: Address,
        FlowKey<A>: aya::Pod,
        FlowEntry<A>: aya::Pod,
    {
        let (mut kept, mut lost) = (0, 0);
        let mut key_bytes = vec![0; self.old_ring.value_size()];
        let mut bytes = vec![0; self.old.value_size()];
        for place in 0..self.old_ring.max_entries() {
            self.old_ring.lookup(&place.to_ne_bytes(), &mut key_bytes)?;
            let key: FlowKey<A> = sys::from_bytes(&key_bytes);
            if key == FlowKey::default() || !self.old.lookup(&key_bytes, &mut bytes)? {
                continue;
            }
            let mut entry: FlowEntry<A> = sys::from_bytes(&bytes);
            if entry.ring != place {
                continue;
            }
            if kept == self.new_ring.max_entries() {
                lost += 1;
                continue;
            }
            let partner_key = entry.partner_key(key.protocol);
            if self.old.lookup(sys::bytes_of(&partner_key), &mut bytes)? {
                let mut partner: FlowEntry<A> = sys::from_bytes(&bytes);
                partner.ring = kept;
                self.new
                    .update(sys::bytes_of(&partner_key), sys::bytes_of(&partner))?;
            }
            entry.ring = kept;
            self.new.update(&key_bytes, sys::bytes_of(&entry))?;
            self.new_ring.update(&kept.to_ne_bytes(), &key_bytes)?;
            kept += 1;
        }
        Ok((kept, lost))
    }
}
