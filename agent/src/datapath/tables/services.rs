//! The writer of the service tables: `FRONTENDS_*`, `SERVICE_STATE`, `SLOTS` and `BACKENDS`.
//!
//! A change is made in this order: rows of new backends, a free region of slots, the word that
//! switches to it, then frontends; what the word no longer leads to is freed last, and used again
//! only after an RCU grace period. Removing goes the other way. So a packet sees the port as it
//! was or as it is, and a frontend never leads to nothing.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::IpAddr,
    sync::atomic::Ordering,
};

use aya::maps::{HashMap as BpfHashMap, MapData};
use weir_common::{
    Ipv4, Ipv6, Port as PortNumber,
    limits::SLOT_CHUNKS_MAX,
    service::{self, Backend, FrontendKey, ServiceState, backend_state},
};

use super::{
    Ipcache, TableError, io_error, is_full, numbers::Numbers, recovery, regions::Regions,
    slots::Slots,
};
use crate::{
    datapath::{
        grace::Quarantine,
        mapped::MappedArray,
        sys::{self, RawMap},
    },
    model::{BackendAddress, BackendState, FrontendKind, ServicePort, ServicePortKey, maglev},
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
    /// Its size.
    pub services_max: u32,
    /// `BACKENDS`.
    pub backends: MappedArray,
    /// Its size.
    pub backends_max: u32,
    /// `SLOTS`.
    pub slots: RawMap,
}

/// What [`Services::apply`] has put into the kernel.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AppliedService {
    /// Number of the Service port.
    pub number: u32,
    /// Slots in its region; 0 without endpoints.
    pub slots: u32,
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
    /// `SERVICE_STATE`.
    pub services: (u32, u32),
    /// `BACKENDS`.
    pub backends: (u32, u32),
    /// Chunks of `SLOTS`.
    pub slot_chunks: (u32, u32),
    /// Rows and regions that wait for a grace period.
    pub quarantined: u32,
}

/// A frontend of either family as its map's key has it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct FrontendAddress {
    pub address: IpAddr,
    pub port: u16,
    pub protocol: u8,
    pub scope: u8,
}

/// A backend that has a row.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Row {
    pub address: BackendAddress,
    pub number: u32,
    pub state: u8,
}

/// A Service port as it stands in the kernel.
#[derive(Debug, Default)]
pub(super) struct Port {
    pub number: u32,
    pub word: ServiceState,
    /// First slot and slots of the region that `word` names and that is this port's own.
    pub region: Option<(u32, u32)>,
    /// By address.
    pub backends: Vec<Row>,
    /// Frontends that this port wants and has claimed.
    pub frontends: BTreeSet<FrontendAddress>,
    /// Frontends found at start that have not been claimed.
    pub found: Vec<FrontendAddress>,
    /// Rows of backends that no slot names any more and that are still to be freed.
    pub leaving: Vec<u32>,
    /// Found at start: the content of the region is not known.
    pub unverified: bool,
}

/// Rows and regions that no program can reach any more.
#[derive(Debug)]
enum Retired {
    Number(u32),
    Backend(u32),
    Region(u32, u32),
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
    /// The port that a frontend leads to in the kernel.
    owners: HashMap<FrontendAddress, u32>,
    /// Other ports that want the same frontend; normally empty.
    waiting: HashMap<FrontendAddress, Vec<u32>>,
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
            None => Port {
                number: self.allocate_number()?,
                ..Port::default()
            },
        };
        let result = self
            .update_backends(&mut port, desired)
            .and_then(|()| self.update_frontends(&mut port, wanted, ipcache));
        let applied = AppliedService {
            number: port.number,
            slots: port.word.slots(),
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
                .drop_found(&mut port, &BTreeSet::new())
                .and_then(|()| self.dissolve(&mut port));
            match result {
                Ok(()) => removed += 1,
                Err(error) => {
                    self.orphans.insert(number, port);
                    failed = failed.or(Some(error));
                }
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
        ServiceFill {
            frontends_v4: (v4, self.frontends.max),
            frontends_v6: (v6, self.frontends.max),
            services: (self.numbers.used(), self.numbers.total()),
            backends: (self.backend_numbers.used(), self.backend_numbers.total()),
            slot_chunks: (self.slots.len(), SLOT_CHUNKS_MAX),
            quarantined: self.quarantine.len() as u32,
        }
    }

    fn remove(&mut self, ipcache: &mut Ipcache, key: &ServicePortKey) -> Result<(), TableError> {
        let Some(mut port) = self.ports.remove(key) else {
            return Ok(());
        };
        let result = self
            .update_frontends(&mut port, BTreeSet::new(), ipcache)
            .and_then(|()| self.dissolve(&mut port));
        if result.is_err() {
            self.ports.insert(key.clone(), port);
        }
        result
    }

    /// Frees all of a port that no frontend leads to. A port of which something could not be
    /// freed still has just that.
    fn dissolve(&mut self, port: &mut Port) -> Result<(), TableError> {
        self.store_state(port.number, ServiceState::default())?;
        port.word = ServiceState::default();
        if let Some((start, slots)) = port.region.take() {
            self.quarantine.retire(Retired::Region(start, slots));
        }
        let backends = std::mem::take(&mut port.backends);
        port.leaving.extend(backends.iter().map(|row| row.number));
        self.free_backends(&mut port.leaving)?;
        self.quarantine.retire(Retired::Number(port.number));
        Ok(())
    }

    /// A port found at start that one of the frontends leads to.
    fn adopt(&mut self, wanted: &BTreeSet<FrontendAddress>) -> Option<Port> {
        wanted
            .iter()
            .filter_map(|frontend| self.owners.get(frontend).copied())
            .find_map(|number| self.orphans.remove(&number))
    }

    fn update_backends(
        &mut self,
        port: &mut Port,
        desired: &ServicePort,
    ) -> Result<(), TableError> {
        let (backends, added) = self.place_backends(port, desired)?;
        let same_members = added.is_empty() && backends.len() == port.backends.len();
        if !same_members || port.unverified || port.word.flags() == 0 {
            let current = port.word.slots() as usize;
            let size = maglev::table_size(backends.len(), current);
            let endpoints: Vec<(BackendAddress, u32)> =
                backends.iter().map(|b| (b.address, b.number)).collect();
            self.scratch.resize(size, 0);
            maglev::fill(&endpoints, &mut self.scratch);
            match self.place_slots(port) {
                Ok((word, region)) => {
                    port.word = word;
                    if let Some((start, slots)) = port.region.filter(|_| port.region != region) {
                        self.quarantine.retire(Retired::Region(start, slots));
                    }
                    port.region = region;
                    port.unverified = false;
                }
                Err(error) => {
                    port.leaving.extend(added);
                    // What cannot be freed now is tried again with the rest.
                    let _ = self.free_backends(&mut port.leaving);
                    return Err(error);
                }
            }
        }
        let kept: BTreeSet<u32> = backends.iter().map(|b| b.number).collect();
        let before = std::mem::replace(&mut port.backends, backends);
        let gone = before.iter().map(|row| row.number);
        port.leaving
            .extend(gone.filter(|number| !kept.contains(number)));
        self.free_backends(&mut port.leaving)
    }

    /// Writes the table in `scratch` to a free region and switches to it; a region found at start
    /// that holds just this table is kept. Gives the word and the region that it names.
    fn place_slots(
        &mut self,
        port: &Port,
    ) -> Result<(ServiceState, Option<(u32, u32)>), TableError> {
        let size = self.scratch.len() as u32;
        if size == 0 {
            let word = ServiceState::new(0, 0, service::flag::IN_USE);
            if word != port.word {
                self.store_state(port.number, word)?;
            }
            return Ok((word, None));
        }
        if let Some((start, slots)) = port.region
            && port.unverified
            && slots == size
            && self
                .slots
                .holds(start, &self.scratch)
                .map_err(|error| TableError::kernel(SLOTS, start, error))?
        {
            return Ok((port.word, port.region));
        }
        let start = self.allocate_region(size)?;
        let word = ServiceState::new(start, size, service::flag::IN_USE);
        let switched = self
            .slots
            .write(start, &self.scratch)
            .map_err(|error| TableError::kernel(SLOTS, start, error))
            .and_then(|()| self.store_state(port.number, word));
        match switched {
            Ok(()) => Ok((word, Some((start, size)))),
            Err(error) => {
                self.regions.free(start, size);
                Err(error)
            }
        }
    }

    /// The rows that `desired` needs, by address: those that stay, with their state brought up to
    /// date, and new ones, written. The numbers of the new ones are the second part.
    fn place_backends(
        &mut self,
        port: &mut Port,
        desired: &ServicePort,
    ) -> Result<(Vec<Row>, Vec<u32>), TableError> {
        let mut rows = Vec::with_capacity(desired.backends.len());
        let mut added = Vec::new();
        for (&address, backend) in &desired.backends {
            let state = match backend.state {
                BackendState::Active => backend_state::ACTIVE,
                BackendState::Terminating => backend_state::TERMINATING,
            };
            let present = port
                .backends
                .binary_search_by_key(&address, |row| row.address)
                .ok()
                .map(|at| port.backends[at]);
            let placed = match present {
                Some(row) if row.state == state => Ok(row),
                Some(row) => self
                    .write_backend(row.number, |backend| backend.state = state)
                    .map(|()| Row { state, ..row }),
                None => self.allocate_backend().and_then(|number| {
                    added.push(number);
                    let row = Row {
                        address,
                        number,
                        state,
                    };
                    self.write_backend(number, |backend| {
                        *backend = Backend {
                            address: Ipv6::from_ip(address.address),
                            port: PortNumber::new(address.port),
                            state,
                            generation: backend.generation.wrapping_add(1),
                            service_port: port.number,
                            ..Backend::default()
                        };
                    })
                    .map(|()| row)
                }),
            };
            match placed {
                Ok(row) => rows.push(row),
                Err(error) => {
                    port.leaving.extend(added);
                    // What cannot be freed now is tried again with the rest.
                    let _ = self.free_backends(&mut port.leaving);
                    return Err(error);
                }
            }
        }
        Ok((rows, added))
    }

    fn update_frontends(
        &mut self,
        port: &mut Port,
        wanted: BTreeSet<FrontendAddress>,
        ipcache: &mut Ipcache,
    ) -> Result<(), TableError> {
        for &frontend in &wanted {
            if !port.frontends.contains(&frontend) {
                self.claim(frontend, port.number, ipcache)?;
                port.frontends.insert(frontend);
            }
        }
        self.drop_found(port, &wanted)?;
        let unwanted: Vec<FrontendAddress> = port.frontends.difference(&wanted).copied().collect();
        for frontend in unwanted {
            self.release(frontend, port.number, ipcache)?;
            port.frontends.remove(&frontend);
        }
        Ok(())
    }

    /// Deletes the frontends that were found at start and that the port does not want. Those that
    /// cannot be deleted stay noted, and so are tried again.
    fn drop_found(
        &mut self,
        port: &mut Port,
        wanted: &BTreeSet<FrontendAddress>,
    ) -> Result<(), TableError> {
        let (number, claimed) = (port.number, &port.frontends);
        let mut failed = None;
        port.found.retain(|frontend| {
            if wanted.contains(frontend) || claimed.contains(frontend) {
                return false;
            }
            if self.owners.get(frontend) != Some(&number) {
                // Another port has claimed it; it is not to come back.
                if let Some(others) = self.waiting.get_mut(frontend) {
                    others.retain(|&other| other != number);
                }
                return false;
            }
            match self.frontends.delete(*frontend) {
                Ok(()) => {
                    self.owners.remove(frontend);
                    false
                }
                Err(error) => {
                    failed.get_or_insert(error);
                    true
                }
            }
        });
        failed.map_or(Ok(()), Err)
    }

    /// Makes a frontend lead to port `number`. Another port that wants it too waits.
    fn claim(
        &mut self,
        frontend: FrontendAddress,
        number: u32,
        ipcache: &mut Ipcache,
    ) -> Result<(), TableError> {
        ipcache.add_frontend(frontend.address)?;
        let owner = self.owners.get(&frontend).copied();
        if owner == Some(number) {
            return Ok(());
        }
        if let Err(error) = self.frontends.insert(frontend, number) {
            ipcache.undo_add_frontend(frontend.address);
            return Err(error);
        }
        self.owners.insert(frontend, number);
        if let Some(owner) = owner.filter(|owner| !self.orphans.contains_key(owner)) {
            self.waiting.entry(frontend).or_default().push(owner);
        }
        Ok(())
    }

    /// Gives a frontend up; a port that waits for it gets it in the same update.
    fn release(
        &mut self,
        frontend: FrontendAddress,
        number: u32,
        ipcache: &mut Ipcache,
    ) -> Result<(), TableError> {
        let mut others = self.waiting.remove(&frontend).unwrap_or_default();
        if self.owners.get(&frontend) == Some(&number) {
            let (result, owner) = match others.last().copied() {
                Some(next) => (self.frontends.insert(frontend, next), Some(next)),
                None => (self.frontends.delete(frontend), None),
            };
            if result.is_err() {
                if !others.is_empty() {
                    self.waiting.insert(frontend, others);
                }
                return result;
            }
            match owner {
                Some(owner) => {
                    others.pop();
                    self.owners.insert(frontend, owner);
                }
                None => {
                    self.owners.remove(&frontend);
                }
            }
        } else {
            others.retain(|&other| other != number);
        }
        if !others.is_empty() {
            self.waiting.insert(frontend, others);
        }
        ipcache.remove_frontend(frontend.address)
    }

    fn allocate_number(&mut self) -> Result<u32, TableError> {
        self.numbers
            .allocate()
            .or_else(|| {
                self.wait_for_quarantine();
                self.numbers.allocate()
            })
            .ok_or(TableError::Full {
                map: SERVICE_STATE,
                entries: self.numbers.total() + 1,
                remedy: "raise the setting services-max",
            })
    }

    fn allocate_backend(&mut self) -> Result<u32, TableError> {
        self.backend_numbers
            .allocate()
            .or_else(|| {
                self.wait_for_quarantine();
                self.backend_numbers.allocate()
            })
            .ok_or(TableError::Full {
                map: BACKENDS,
                entries: self.backend_numbers.total() + 1,
                remedy: "raise the setting backends-max",
            })
    }

    fn allocate_region(&mut self, slots: u32) -> Result<u32, TableError> {
        if let Some(start) = self.regions.allocate(slots) {
            return Ok(start);
        }
        // A new chunk would wait for a grace period too, and cost memory.
        if !self.quarantine.is_empty() {
            self.wait_for_quarantine();
            if let Some(start) = self.regions.allocate(slots) {
                return Ok(start);
            }
        }
        let chunks = self
            .slots
            .grow()
            .map_err(|error| TableError::kernel(SLOTS, "new chunks", error))?;
        for chunk in chunks {
            self.regions.add_chunk(chunk);
        }
        self.regions.allocate(slots).ok_or(TableError::Full {
            map: SLOTS,
            entries: SLOT_CHUNKS_MAX,
            remedy: "the Services of this cluster have more endpoints than it can hold",
        })
    }

    fn wait_for_quarantine(&mut self) {
        let free = self.quarantine.release_all();
        self.take_back(free);
    }

    fn take_back(&mut self, free: Vec<Retired>) {
        for thing in free {
            match thing {
                Retired::Number(number) => self.numbers.free(number),
                Retired::Backend(number) => self.backend_numbers.free(number),
                Retired::Region(start, slots) => self.regions.free(start, slots),
            }
        }
    }

    /// Frees rows; those that cannot be freed stay in the list.
    fn free_backends(&mut self, numbers: &mut Vec<u32>) -> Result<(), TableError> {
        let mut failed = None;
        numbers.retain(|&number| match self.free_backend(number) {
            Ok(()) => false,
            Err(error) => {
                failed.get_or_insert(error);
                true
            }
        });
        failed.map_or(Ok(()), Err)
    }

    /// Flows that point at the row are stale from here on.
    fn free_backend(&mut self, number: u32) -> Result<(), TableError> {
        self.write_backend(number, |backend| {
            backend.state = backend_state::FREE;
            backend.generation = backend.generation.wrapping_add(1);
        })?;
        self.quarantine.retire(Retired::Backend(number));
        Ok(())
    }

    /// Changes a row. Port, state and generation share a word, so that a state and a generation
    /// change in one store.
    fn write_backend(
        &mut self,
        number: u32,
        edit: impl FnOnce(&mut Backend),
    ) -> Result<(), TableError> {
        let words = self
            .backends
            .words(number)
            .map_err(|error| TableError::kernel(BACKENDS, number, error))?;
        let old: [u64; BACKEND_WORDS] = std::array::from_fn(|i| words[i].load(Ordering::Relaxed));
        let mut row: Backend = sys::from_bytes(sys::bytes_of(&old));
        edit(&mut row);
        let new: [u64; BACKEND_WORDS] = sys::from_bytes(sys::bytes_of(&row));
        for (word, (old, new)) in words.iter().zip(old.into_iter().zip(new)) {
            if old != new {
                word.store(new, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// The switch: everything stored before is seen by whoever sees the new word.
    fn store_state(&mut self, number: u32, word: ServiceState) -> Result<(), TableError> {
        let words = self
            .state
            .words(number)
            .map_err(|error| TableError::kernel(SERVICE_STATE, number, error))?;
        words[0].store(word.0, Ordering::Release);
        Ok(())
    }
}

/// Words of a row of `BACKENDS`.
pub(super) const BACKEND_WORDS: usize = size_of::<Backend>() / 8;

fn frontends_of(key: &ServicePortKey, desired: &ServicePort) -> BTreeSet<FrontendAddress> {
    desired
        .frontends
        .iter()
        .map(|frontend| FrontendAddress {
            address: frontend.address,
            port: frontend.port,
            protocol: key.protocol.number(),
            scope: match frontend.kind {
                FrontendKind::ClusterIp => service::scope::INSIDE,
            },
        })
        .collect()
}

/// Both maps of frontends.
#[derive(Debug)]
pub(super) struct FrontendMaps {
    pub v4: BpfHashMap<MapData, FrontendKey<Ipv4>, u32>,
    pub v6: BpfHashMap<MapData, FrontendKey<Ipv6>, u32>,
    pub max: u32,
}

impl FrontendMaps {
    fn insert(&mut self, frontend: FrontendAddress, number: u32) -> Result<(), TableError> {
        let (map, result) = match frontend.address {
            IpAddr::V4(v4) => {
                let key = frontend.key(Ipv4::from(v4));
                (FRONTENDS_V4, self.v4.insert(key, number, 0))
            }
            IpAddr::V6(v6) => {
                let key = frontend.key(Ipv6::from(v6));
                (FRONTENDS_V6, self.v6.insert(key, number, 0))
            }
        };
        result.map_err(io_error).map_err(|error| {
            if is_full(&error) {
                TableError::Full {
                    map,
                    entries: self.max,
                    remedy: "raise the setting services-max",
                }
            } else {
                TableError::kernel(map, frontend, error)
            }
        })
    }

    fn delete(&mut self, frontend: FrontendAddress) -> Result<(), TableError> {
        let (map, result) = match frontend.address {
            IpAddr::V4(v4) => {
                let key = frontend.key(Ipv4::from(v4));
                (FRONTENDS_V4, self.v4.remove(&key))
            }
            IpAddr::V6(v6) => {
                let key = frontend.key(Ipv6::from(v6));
                (FRONTENDS_V6, self.v6.remove(&key))
            }
        };
        match result.map_err(io_error) {
            Err(error) if !is_absent(&error) => Err(TableError::kernel(map, frontend, error)),
            _ => Ok(()),
        }
    }
}

fn is_absent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

impl FrontendAddress {
    fn key<A>(self, address: A) -> FrontendKey<A> {
        FrontendKey {
            address,
            port: PortNumber::new(self.port),
            protocol: self.protocol,
            scope: self.scope,
        }
    }
}

impl std::fmt::Display for FrontendAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let protocol = weir_common::protocol::name(self.protocol).unwrap_or("?");
        match self.address {
            IpAddr::V4(v4) => write!(f, "{v4}:{}/{protocol}", self.port),
            IpAddr::V6(v6) => write!(f, "[{v6}]:{}/{protocol}", self.port),
        }
    }
}
