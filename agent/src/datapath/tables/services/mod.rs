//! The writer of the service tables: `FRONTENDS_*`, `SERVICE_STATE`, `SLOTS` and `BACKENDS`.
//!
//! A Service port has a set of endpoints for each traffic policy that one of its frontends has; a
//! frontend leads to the row of its set in `SERVICE_STATE`.
//!
//! A change is made in this order: rows of new backends, free regions of slots, the words that
//! switch to them, then frontends, then the words of sets that no frontend leads to any more; what
//! no word leads to is freed last, and used again only after an RCU grace period. Removing goes the
//! other way. Ranges of clients stand before the frontends that they restrict, and go after them. So a packet sees each set as it was or as it is, and a frontend never leads to nothing.

mod affinity;
mod backends;
mod frontends;
mod numbers;
mod source_ranges;
mod switch;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use aya::maps::{HashMap as BpfHashMap, MapData};
use weir_common::{
    Ipv4, Ipv6,
    limits::SLOT_CHUNKS_MAX,
    service::{FrontendKey, endpoint_set},
};

pub use self::{affinity::AffinityTable, source_ranges::SourceRangeTable};
pub(super) use self::{
    backends::{BACKEND_WORDS, Row},
    frontends::{FrontendAddress, FrontendMaps, Target},
    switch::Set,
};
use self::{frontends::frontends_of, numbers::Retired};
use super::{Ipcache, TableError, numbers::Numbers, recovery, regions::Regions, slots::Slots};
use crate::{
    datapath::{grace::Quarantine, mapped::MappedArray, sys::RawMap},
    model::{BackendAddress, EndpointSet, ServicePort, ServicePortKey},
};

pub(super) const FRONTENDS_V4: &str = "FRONTENDS_V4";
pub(super) const FRONTENDS_V6: &str = "FRONTENDS_V6";
pub(super) const SERVICE_STATE: &str = "SERVICE_STATE";
pub(super) const SLOTS: &str = "SLOTS";
pub(super) const BACKENDS: &str = "BACKENDS";

/// The maps of the service tables.
#[derive(Debug)]
pub struct ServiceMaps {
    /// `FRONTENDS_V4`.
    pub frontends_v4: BpfHashMap<MapData, FrontendKey<Ipv4>, u32>,
    /// `FRONTENDS_V6`.
    pub frontends_v6: BpfHashMap<MapData, FrontendKey<Ipv6>, u32>,
    /// Size of either.
    pub frontends_max: u32,
    /// `SERVICE_STATE`.
    pub state: MappedArray,
    /// Numbers of Service ports in it.
    pub services_max: u32,
    /// `BACKENDS`.
    pub backends: MappedArray,
    /// Its size.
    pub backends_max: u32,
    /// `SLOTS`.
    pub slots: RawMap,
    /// `AFFINITY` and `AFFINITY_TIMEOUTS`.
    pub affinity: AffinityTable,
    /// `SOURCE_RANGES_V4` and `SOURCE_RANGES_V6`.
    pub source_ranges: SourceRangeTable,
}

/// What [`Services::apply`] has put into the kernel.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AppliedService {
    /// Number of the Service port.
    pub number: u32,
    /// Slots in the region of the set for policy `Cluster`; 0 without endpoints.
    pub slots: u32,
    /// The same of the set for policy `Local`.
    pub local_slots: u32,
    /// Number of each backend.
    pub backends: BTreeMap<BackendAddress, u32>,
}

/// How full the tables are: in use and size.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ServiceFill {
    /// `FRONTENDS_V4`.
    pub frontends_v4: (u32, u32),
    /// `FRONTENDS_V6`.
    pub frontends_v6: (u32, u32),
    /// `SOURCE_RANGES_V4`.
    pub source_ranges_v4: (u32, u32),
    /// `SOURCE_RANGES_V6`.
    pub source_ranges_v6: (u32, u32),
    /// `SERVICE_STATE`.
    pub services: (u32, u32),
    /// `BACKENDS`.
    pub backends: (u32, u32),
    /// Chunks of `SLOTS`.
    pub slot_chunks: (u32, u32),
    /// `AFFINITY`, at the last complete sweep.
    pub affinity: (u32, u32),
    /// Rows and regions that wait for a grace period.
    pub quarantined: u32,
}

/// A Service port as it stands in the kernel.
#[derive(Debug, Default)]
pub(super) struct Port {
    pub number: u32,
    /// By [`EndpointSet::number`].
    pub sets: [Set; endpoint_set::COUNT as usize],
    /// By address.
    pub backends: Vec<Row>,
    /// Frontends that this port wants and has claimed.
    pub frontends: BTreeMap<FrontendAddress, Target>,
    /// Frontends found at start that have not been claimed.
    pub found: Vec<FrontendAddress>,
    /// Rows of backends that no slot names any more and that are still to be freed.
    pub leaving: Vec<u32>,
    /// Seconds in `AFFINITY_TIMEOUTS`.
    pub affinity: u32,
}

impl Port {
    pub fn set(&self, set: EndpointSet) -> Set {
        self.sets[set.number() as usize]
    }
}

/// See the module.
#[derive(Debug)]
pub struct Services {
    frontends: FrontendMaps,
    state: MappedArray,
    backends: MappedArray,
    slots: Slots,
    numbers: Numbers,
    backend_numbers: Numbers,
    regions: Regions,
    quarantine: Quarantine<Retired>,
    ports: HashMap<ServicePortKey, Port>,
    /// Found at start and not claimed yet, by number.
    orphans: HashMap<u32, Port>,
    /// Backends found at start that belong to no Service port.
    stray_backends: Vec<u32>,
    /// The row of `SERVICE_STATE` that a frontend leads to in the kernel.
    owners: HashMap<FrontendAddress, u32>,
    /// Rows of other ports that want the same frontend; normally empty.
    waiting: HashMap<FrontendAddress, Vec<u32>>,
    affinity: AffinityTable,
    source_ranges: SourceRangeTable,
    scratch: Vec<u32>,
}

impl Services {
    /// Reads what the maps hold. Ports found there stay in force until they are claimed by
    /// [`Self::apply`] or swept by [`Self::prune`].
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn open(mut maps: ServiceMaps) -> Result<Self, TableError> {
        let mut slots =
            Slots::open(maps.slots).map_err(|e| TableError::kernel(SLOTS, "all chunks", e))?;
        let frontends = FrontendMaps {
            v4: maps.frontends_v4,
            v6: maps.frontends_v6,
            max: maps.frontends_max,
        };
        let found = recovery::recover(recovery::Source {
            frontends: &frontends,
            state: &mut maps.state,
            services_max: maps.services_max,
            backends: &mut maps.backends,
            backends_max: maps.backends_max,
            slots: &mut slots,
            affinity: &mut maps.affinity,
        })?;
        Ok(Self {
            frontends,
            state: maps.state,
            backends: maps.backends,
            slots,
            numbers: found.numbers,
            backend_numbers: found.backend_numbers,
            regions: found.regions,
            quarantine: Quarantine::new()
                .map_err(|error| TableError::kernel(SLOTS, "grace periods", error))?,
            ports: HashMap::new(),
            orphans: found.ports,
            stray_backends: found.stray_backends,
            owners: found.owners,
            waiting: HashMap::new(),
            affinity: maps.affinity,
            source_ranges: maps.source_ranges,
            scratch: Vec::new(),
        })
    }

    /// Makes a Service port what `desired` says; `None` removes it. When a frontend moves from
    /// one port to another, apply the new owner first: the frontend is then replaced in one
    /// update and never missing.
    ///
    /// # Errors
    ///
    /// A table is full, or the kernel's. What stood before stays in force as far as it was not
    /// replaced yet, and the call can be repeated.
    pub fn apply(
        &mut self,
        ipcache: &mut Ipcache,
        key: &ServicePortKey,
        desired: Option<&ServicePort>,
    ) -> Result<AppliedService, TableError> {
        let free = self.quarantine.release();
        self.take_back(free);
        let Some(desired) = desired else {
            return self
                .remove(ipcache, key)
                .map(|()| AppliedService::default());
        };
        let wanted = frontends_of(key, desired);
        let known = self.ports.remove(key).or_else(|| self.adopt(&wanted));
        let mut port = match known {
            Some(port) => port,
            None => self.new_port()?,
        };
        // What finds no room is not let in; all else goes on.
        let nobody = BTreeSet::new();
        let clients = desired.source_ranges.as_ref().unwrap_or(&nobody);
        let entered = self.source_ranges.add(port.number, clients);
        let result = self
            .begin_affinity(&mut port, desired)
            .and_then(|()| self.update_backends(&mut port, desired))
            .and_then(|()| self.update_frontends(&mut port, &wanted, ipcache))
            .and_then(|()| self.clear_sets(&mut port, desired))
            .and_then(|()| self.source_ranges.retain(port.number, clients))
            .and_then(|()| match desired.affinity {
                Some(_) => Ok(()),
                None => self.end_affinity(&mut port),
            })
            .and(entered);
        let applied = AppliedService {
            number: port.number,
            slots: port.set(EndpointSet::Cluster).word.slots(),
            local_slots: port.set(EndpointSet::Local).word.slots(),
            backends: port
                .backends
                .iter()
                .map(|b| (b.address, b.number))
                .collect(),
        };
        self.ports.insert(key.clone(), port);
        result.map(|()| applied)
    }

    /// Removes every Service port that was found at start and that nobody has applied since. Only
    /// once the source is synced. Gives the number removed.
    ///
    /// # Errors
    ///
    /// The first of the kernel's, after all have been tried. What failed is kept: the call can be
    /// repeated.
    pub fn prune(&mut self) -> Result<usize, TableError> {
        let stale: Vec<u32> = self.orphans.keys().copied().collect();
        let (mut removed, mut failed) = (0, None);
        for number in stale {
            let Some(mut port) = self.orphans.remove(&number) else {
                continue;
            };
            let result = self
                .drop_found(&mut port, &BTreeMap::new())
                .and_then(|()| self.dissolve(&mut port));
            match result {
                Ok(()) => removed += 1,
                Err(error) => {
                    self.orphans.insert(number, port);
                    failed = failed.or(Some(error));
                }
            }
        }
        let used: BTreeSet<u32> = self
            .ports
            .values()
            .chain(self.orphans.values())
            .map(|port| port.number)
            .collect();
        for number in self.source_ranges.numbers() {
            if !used.contains(&number)
                && let Err(error) = self.source_ranges.retain(number, &BTreeSet::new())
            {
                failed = failed.or(Some(error));
            }
        }
        let mut strays = std::mem::take(&mut self.stray_backends);
        let freed = self.free_backends(&mut strays);
        self.stray_backends = strays;
        self.state.unmap();
        self.backends.unmap();
        failed.map_or(freed.map(|()| removed), Err)
    }

    /// How full the tables are.
    #[must_use]
    pub fn fill(&self) -> ServiceFill {
        let v4 = self.owners.keys().filter(|f| f.address.is_ipv4()).count() as u32;
        let v6 = self.owners.len() as u32 - v4;
        let [source_ranges_v4, source_ranges_v6] = self.source_ranges.fill();
        ServiceFill {
            frontends_v4: (v4, self.frontends.max),
            frontends_v6: (v6, self.frontends.max),
            source_ranges_v4,
            source_ranges_v6,
            services: (self.numbers.used(), self.numbers.total()),
            backends: (self.backend_numbers.used(), self.backend_numbers.total()),
            slot_chunks: (self.slots.len(), SLOT_CHUNKS_MAX),
            affinity: self.affinity.fill(),
            quarantined: self.quarantine.len() as u32,
        }
    }

    fn remove(&mut self, ipcache: &mut Ipcache, key: &ServicePortKey) -> Result<(), TableError> {
        let Some(mut port) = self.ports.remove(key) else {
            return Ok(());
        };
        let result = self
            .update_frontends(&mut port, &BTreeMap::new(), ipcache)
            .and_then(|()| self.dissolve(&mut port));
        if result.is_err() {
            self.ports.insert(key.clone(), port);
        }
        result
    }

    /// Frees all of a port that no frontend leads to. A port of which something could not be
    /// freed still has just that.
    fn dissolve(&mut self, port: &mut Port) -> Result<(), TableError> {
        for set in EndpointSet::ALL {
            self.clear_set(port, set)?;
        }
        self.end_affinity(port)?;
        self.source_ranges.retain(port.number, &BTreeSet::new())?;
        let backends = std::mem::take(&mut port.backends);
        port.leaving.extend(backends.iter().map(|row| row.number));
        self.free_backends(&mut port.leaving)?;
        self.quarantine.retire(Retired::Number(port.number));
        Ok(())
    }

    /// A port with a number of its own, to which nothing leads yet.
    fn new_port(&mut self) -> Result<Port, TableError> {
        let number = self.allocate_number()?;
        // An agent that died may have left ranges at a number that no frontend led to.
        if let Err(error) = self.source_ranges.retain(number, &BTreeSet::new()) {
            self.numbers.free(number);
            return Err(error);
        }
        Ok(Port {
            number,
            ..Port::default()
        })
    }

    /// A port found at start that one of the frontends leads to.
    fn adopt(&mut self, wanted: &BTreeMap<FrontendAddress, Target>) -> Option<Port> {
        wanted
            .keys()
            .filter_map(|frontend| self.owner(*frontend))
            .collect::<Vec<_>>()
            .into_iter()
            .find_map(|number| self.orphans.remove(&number))
    }

    /// The time stands before the words say that there is one.
    fn begin_affinity(&mut self, port: &mut Port, desired: &ServicePort) -> Result<(), TableError> {
        if let Some(seconds) = desired.affinity.filter(|seconds| *seconds != port.affinity) {
            if port.affinity == 0 {
                self.affinity.begin(port.number, seconds)?;
            } else {
                self.affinity.set_timeout(port.number, seconds)?;
            }
            port.affinity = seconds;
        }
        Ok(())
    }

    /// No word says any more that the port has affinity.
    fn end_affinity(&mut self, port: &mut Port) -> Result<(), TableError> {
        if port.affinity != 0 {
            self.affinity.end(port.number)?;
            port.affinity = 0;
        }
        Ok(())
    }

    /// See [`AffinityTable::sweep`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn sweep_affinity(&mut self, now: u32, budget: u32) -> std::io::Result<u32> {
        self.affinity.sweep(now, budget)
    }
}
