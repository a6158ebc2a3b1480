//! Compares the pinned maps with what the object wants, before it is loaded: a loader takes a pin
//! as it is, and with another layout both sides would read garbage. What differs is made anew.
//! Everything but flows follows from the desired state; flows are carried over where only the
//! size differs, and given up, loudly, where they cannot be understood any more. What they refer to by number and
//! generation stays as long as its own layout does, whatever becomes of the rest ([`versions`]).
//!
//! New maps are pinned beside the old ones, as `NAME~new`, and take their place when they hold
//! everything: [`Plan::commit`]. Until then the old ones are in force, pinned and untouched, so
//! that an agent that dies on the way has changed nothing and the next one begins again. From the
//! appearance of the file `~ready` on the next one goes on instead.

mod carry;
mod versions;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use aya::maps::{MapData, MapInfo};
use weir_common::{Ipv4, Ipv6, metrics::FlowRingState};

use self::versions::Pinned;
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
/// Which endpoints have entries in these.
const HAS_FLOWS: &str = "ENDPOINT_FLOWS";
/// Without these a number in `SERVICE_STATE` means nothing.
const SERVICE_MAPS: [&str; 8] = [
    "FRONTENDS_V4",
    "FRONTENDS_V6",
    "SOURCE_RANGES_V4",
    "SOURCE_RANGES_V6",
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
    /// The flow tables stay, but nobody knows which endpoints have entries in them.
    flows_are_anyones: bool,
    pending: bool,
    /// Old tables of flows, as long as programs may use them.
    carrying: Option<carry::Carrying>,
}

/// Ends what an earlier agent began, and compares.
pub(super) fn prepare(folder: &Path, shapes: &[MapShape]) -> Result<Plan, DatapathError> {
    settle(folder)?;
    let mut misfits: BTreeMap<String, Misfit> = BTreeMap::new();
    let pins = names(folder)?;
    let pinned = Pinned::read(folder)?;
    for shape in shapes.iter().filter(|shape| pins.contains(&shape.name)) {
        if let Some(misfit) = compare(folder, shape, &pinned)? {
            misfits.insert(shape.name.clone(), misfit);
        }
    }
    if !pins.is_empty() {
        drop_dependants(&pins, shapes, &mut misfits);
    }
    let flows_are_anyones = keep_has_flows(&pins, &mut misfits);
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
        flows_are_anyones,
        pending: !misfits.is_empty(),
        carrying: None,
    };
    if !plan.pending {
        versions::note(folder)?;
    }
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

    /// Carries the content of the old maps over. The programs that are attached still use the old ones, and enter
    /// connections there until they are replaced: those are added, with their ports, by [`Self::commit`] and
    /// [`Self::catch_up`].
    pub fn carry_over(&mut self) -> Result<(), DatapathError> {
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
        let mut carrying = carry::Carrying::default();
        for (family, row) in [("V4", 0u32), ("V6", 1)] {
            let (flows, ring) = (format!("FLOWS_{family}"), format!("FLOW_RING_{family}"));
            if !kept(&flows) {
                continue;
            }
            let new_ring = kept(&ring).then(|| new(&ring)).transpose()?;
            let has_own_ring = new_ring.is_some();
            let mut copy = carry::Flows::new(old(&flows)?, old(&ring)?, new(&flows)?, new_ring);
            let begun = match family {
                "V4" => copy.begin::<Ipv4>(),
                _ => copy.begin::<Ipv6>(),
            };
            let (kept, lost) = begun.map_err(DatapathError::Migrate)?;
            if has_own_ring {
                let state = FlowRingState {
                    hand: u64::from(kept),
                };
                new("FLOW_RING_STATE")?
                    .update(&row.to_ne_bytes(), sys::bytes_of(&state))
                    .map_err(DatapathError::Migrate)?;
                copied.insert(ring);
            }
            tracing::info!(
                flows,
                kept,
                lost,
                "connections carried over to a table of another size"
            );
            match family {
                "V4" => carrying.v4 = Some(copy),
                _ => carrying.v6 = Some(copy),
            }
            copied.insert(flows);
        }
        for name in self.anew.keys() {
            let is_filled = copied.contains(name) || (name == HAS_FLOWS && self.flows_are_anyones);
            if kept(name) && !is_filled {
                carry::copy_entries(&old(name)?, &new(name)?).map_err(DatapathError::Migrate)?;
            }
        }
        if self.flows_are_anyones {
            carry::note_flows_everywhere(&new(HAS_FLOWS)?).map_err(DatapathError::Migrate)?;
        } else if kept(HAS_FLOWS) {
            carrying.has_flows = Some((old(HAS_FLOWS)?, new(HAS_FLOWS)?));
        }
        self.carrying = Some(carrying).filter(carry::Carrying::has_flows);
        Ok(())
    }

    /// Whether connections begin in tables that the programs of this agent do not see, and are used there.
    pub fn is_carrying(&self) -> bool {
        self.carrying.is_some()
    }

    /// Carries over what the programs of an earlier agent have entered since the last time.
    pub fn catch_up(&mut self) -> Result<(), DatapathError> {
        let Some(carrying) = &mut self.carrying else {
            return Ok(());
        };
        let caught = carrying
            .catch_up(!self.pending)
            .map_err(DatapathError::Migrate)?;
        if caught != carry::Caught::default() {
            tracing::info!(
                added = caught.added,
                refreshed = caught.refreshed,
                removed = caught.removed,
                lost = caught.lost,
                "connections of the old table carried over"
            );
        }
        Ok(())
    }

    /// The last program of an earlier agent is gone: lets go of its maps.
    pub fn end_carrying(&mut self) {
        self.carrying = None;
    }

    /// The new maps take the place of the old ones, all or none; again has no effect.
    pub fn commit(&mut self) -> Result<(), DatapathError> {
        if !self.pending {
            return Ok(());
        }
        // Nothing but what this agent has carried over is in the new tables yet.
        self.catch_up()?;
        for name in &self.unknown {
            let path = self.folder.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(DatapathError::pin(&path, error));
                }
                _ => {}
            }
        }
        versions::note_later(&self.folder)?;
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

fn compare(
    folder: &Path,
    shape: &MapShape,
    pinned: &Pinned,
) -> Result<Option<Misfit>, DatapathError> {
    if let Some(reason) = pinned.misfit(&shape.name) {
        return Ok(Some(Misfit::dropped(&reason)));
    }
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
    if matches!(shape.name.as_str(), "FLOWS_V4" | "FLOWS_V6")
        && let Some(reason) = versions::misfit_of_entries(&path)?
    {
        return Ok(Some(Misfit::dropped(&reason)));
    }
    if info.max_entries() == shape.max_entries {
        return Ok(None);
    }
    let grows = shape.max_entries > info.max_entries();
    let name = shape.name.as_str();
    let keep = match name {
        "METRICS" | "LOOKUPS" | "EVENTS" | "CONFIG" | "SLOTS" => false,
        "FRAGMENTS_V4" | "FRAGMENTS_V6" => false,
        HAS_FLOWS => true,
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
    let groups: [(&[&str], &[&str]); 5] = [
        (&["BACKENDS"], &SERVICE_MAPS),
        (&["SERVICE_STATE", "SLOTS"], &SERVICE_MAPS),
        (&GENERATION_MAPS, &FLOW_MAPS),
        (&FLOW_MAPS, &FLOW_MAPS),
        // Nobody has entries in a table that is empty.
        (&FLOW_MAPS, &[HAS_FLOWS]),
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

/// Where the flow tables stay, sees to it that no endpoint is taken for one without entries. Gives whether it is not
/// known which have some: nothing tells, or the programs of the earlier agent go on to enter connections in these very
/// tables, and note them in the old map only.
fn keep_has_flows(pins: &BTreeSet<String>, misfits: &mut BTreeMap<String, Misfit>) -> bool {
    let is_kept = |name: &str| {
        pins.contains(name) && misfits.get(name).is_none_or(|misfit: &Misfit| misfit.keep)
    };
    if !FLOW_MAPS.into_iter().all(is_kept) {
        return false;
    }
    let tables = ["FLOWS_V4", "FLOWS_V6"];
    let in_place = tables.iter().any(|name| !misfits.contains_key(*name));
    match misfits.get_mut(HAS_FLOWS) {
        None => !pins.contains(HAS_FLOWS),
        Some(misfit) if misfit.keep && !in_place => false,
        Some(misfit) => {
            misfit
                .reason
                .push_str("; every endpoint counts as one with connections");
            misfit.keep = true;
            true
        }
    }
}

/// Every pin of a map.
fn names(folder: &Path) -> Result<BTreeSet<String>, DatapathError> {
    let mut names = entries(folder)?;
    names.retain(|name| !name.starts_with('~') && !name.ends_with(NEW));
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
