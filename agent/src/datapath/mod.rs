//! The only module that touches the kernel's BPF objects: it loads the programs, owns the maps,
//! attaches, applies desired state, and reads counters and events. It decides nothing: what
//! should be comes from the model, the endpoint manager and the node manager, through the event
//! loop, which is its only caller.
//!
//! Everything is pinned below BPF-ROOT (`maps/NAME`, `links/PROGRAM-IFINDEX`), so that traffic
//! goes on while no agent runs. At start the writers read what is there: call [`Datapath::open`],
//! apply all desired state, and once the source is synced [`Datapath::prune`].

pub mod attach;
mod attached;
mod configure;
pub mod counters;
pub mod defrag;
mod error;
pub mod events;
pub mod expedite;
mod fill;
pub mod flows;
mod grace;
mod layout;
mod loader;
mod mapped;
mod node_sources;
pub mod object;
#[cfg(feature = "log-packets")]
mod packet_log;
mod probe;
pub mod sockets;
pub mod sys;
pub mod tables;
pub mod verify;

use std::{collections::BTreeSet, io, net::IpAddr, os::fd::AsFd as _, path::PathBuf};

use aya::{Ebpf, maps::RingBuf, programs::SchedClassifier};
use ipnet::IpNet;
use weir_common::{
    ipcache::IpcacheEntry,
    limits,
    mark::{self, DEFAULT_MASK},
    metrics::Hook,
};

pub use attach::{AttachMode, Attachment};
pub use configure::Configure;
pub use counters::{Counters, HookCounter};
pub use error::DatapathError;
pub use events::EventReader;
pub use fill::MapFill;
pub use flows::{FlowSweeper, SweepReport};
pub use layout::Migration;
pub use node_sources::NodeSources;
pub use tables::{
    AppliedService, ConfigTable, DeviceTable, EndpointRow, EndpointTable, Hop, HopRef, Ipcache,
    NextHops, NodeConfig, Services, TableError,
};

use crate::{
    model::{ServicePort, ServicePortKey},
    objects::Family,
};
use attach::Attacher;
use expedite::Expedite;
use sys::RawMap;
use tables::{
    AffinityTable, SourceRangeTable,
    endpoints::{EndpointMaps, LocalAddresses},
    services::ServiceMaps,
};

/// What is fixed when the programs are loaded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DatapathOptions {
    /// Folder of the pins, on a BPF file system.
    pub bpf_root: PathBuf,
    /// Connections of each family.
    pub connections: u32,
    /// Service ports, each of one family. There can be twice as many frontends of each family.
    pub services_max: u32,
    /// Backends of all Service ports together.
    pub backends_max: u32,
    /// Places by which Weir's four bits of the packet mark are shifted, 0 to 28.
    pub mark_shift: u32,
    /// Count table lookups; for tests.
    pub count_lookups: bool,
    /// Shorten RCU grace periods of the machine while programs are attached and detached, see
    /// [`expedite`].
    pub expedite_rcu: bool,
}

impl Default for DatapathOptions {
    fn default() -> Self {
        Self {
            bpf_root: PathBuf::from("/sys/fs/bpf/weir"),
            connections: limits::CONNECTIONS_DEFAULT,
            services_max: limits::SERVICE_PORTS_DEFAULT,
            backends_max: limits::BACKENDS_DEFAULT,
            mark_shift: mark::shift_of(DEFAULT_MASK).unwrap_or_default(),
            count_lookups: false,
            expedite_rcu: false,
        }
    }
}

/// What [`Datapath::prune`] has removed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Pruned {
    /// Service ports.
    pub services: usize,
    /// Prefixes of the ipcache.
    pub prefixes: usize,
    /// Next hops.
    pub next_hops: usize,
}

/// See the module.
pub struct Datapath {
    ebpf: Ebpf,
    attacher: Attacher,
    expedite: Expedite,
    layout: layout::Plan,
    pinned: Vec<String>,
    config: ConfigTable,
    endpoints: EndpointTable,
    ipcache: Ipcache,
    next_hops: NextHops,
    devices: DeviceTable,
    services: Services,
    counters: Counters,
    flows: FlowSweeper,
    sources: NodeSources,
    defrag: RawMap,
    events: Option<RingBuf<aya::maps::MapData>>,
}

impl std::fmt::Debug for Datapath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Datapath")
            .field("attacher", &self.attacher)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

impl Datapath {
    /// Loads the programs, opens or makes the maps, and reads what they hold. Attaches nothing.
    ///
    /// # Errors
    ///
    /// No BPF file system, a program that the kernel refuses, or missing rights.
    pub fn open(options: &DatapathOptions) -> Result<Self, DatapathError> {
        Self::open_with(object::OBJECT, options, None)
    }

    /// As [`Self::open`], with another object and a given way of attaching.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_with(
        object: &[u8],
        options: &DatapathOptions,
        mode: Option<AttachMode>,
    ) -> Result<Self, DatapathError> {
        let mut loaded = loader::load(object, options)?;
        let mode = match mode {
            Some(mode) => mode,
            None => detect_mode(&mut loaded.ebpf)?,
        };

        let config = ConfigTable::open(loaded.map("CONFIG")?, options.connections)?;
        let raw = loaded.raw("ENDPOINTS")?;
        let endpoints = EndpointTable::open(
            EndpointMaps {
                local_v4: local_addresses(&mut loaded, "LOCAL_ADDRESSES_V4")?,
                local_v6: local_addresses(&mut loaded, "LOCAL_ADDRESSES_V6")?,
                endpoints: loaded.map("ENDPOINTS")?,
                has_flows: loaded.map("ENDPOINT_FLOWS")?,
                by_ifindex: loaded.map("ENDPOINT_BY_IFINDEX")?,
                by_cookie: loaded.map("ENDPOINT_BY_COOKIE")?,
            },
            &raw,
        )?;
        let ipcache_max = loaded.raw("IPCACHE_V4")?.max_entries();
        let ipcache = Ipcache::open(
            loaded.map("IPCACHE_V4")?,
            loaded.map("IPCACHE_V6")?,
            ipcache_max,
        )?;
        let raw = loaded.raw("NEXT_HOPS")?;
        let next_hops = NextHops::open(loaded.map("NEXT_HOPS")?, &raw, &ipcache)?;
        let devices = DeviceTable::open(loaded.map("DEVICE_ADDRESSES")?)?;
        let source_ranges_max = loaded.raw("SOURCE_RANGES_V4")?.max_entries();
        let services = Services::open(ServiceMaps {
            frontends_max: loaded.raw("FRONTENDS_V4")?.max_entries(),
            frontends_v4: loaded.map("FRONTENDS_V4")?,
            frontends_v6: loaded.map("FRONTENDS_V6")?,
            source_ranges: SourceRangeTable::open(
                loaded.map("SOURCE_RANGES_V4")?,
                loaded.map("SOURCE_RANGES_V6")?,
                source_ranges_max,
            )?,
            state: loaded.with_data("SERVICE_STATE", |map| mapped::MappedArray::new(map, 2))?,
            services_max: options.services_max,
            backends: loaded.with_data("BACKENDS", |map| mapped::MappedArray::new(map, 4))?,
            backends_max: options.backends_max,
            slots: loaded.raw("SLOTS")?,
            affinity: AffinityTable::new(loaded.raw("AFFINITY")?, loaded.raw("AFFINITY_TIMEOUTS")?),
        })?;
        Ok(Self {
            attacher: Attacher {
                folder: loaded.links.clone(),
                mode,
            },
            expedite: Expedite::new(options.expedite_rcu && mode == AttachMode::Tcx),
            config,
            endpoints,
            ipcache,
            next_hops,
            devices,
            services,
            counters: Counters::new(loaded.raw("METRICS")?, loaded.raw("LOOKUPS")?),
            flows: FlowSweeper::new(loaded.raw("FLOWS_V4")?, loaded.raw("FLOWS_V6")?),
            sources: NodeSources::default(),
            defrag: loaded.raw("DEFRAG")?,
            events: Some(loaded.map("EVENTS")?),
            pinned: std::mem::take(&mut loaded.pinned),
            layout: loaded.layout,
            ebpf: loaded.ebpf,
        })
    }

    /// Pinned maps that did not fit and were made anew. The programs that an earlier agent
    /// attached use the old ones until they are replaced: apply all desired state before
    /// attaching if this is not empty. The first of them that is replaced, or [`Self::prune`],
    /// makes the new maps those that the next agent finds; an agent that dies before has changed
    /// nothing, and the next one sees the same migrations.
    #[must_use]
    pub fn migrations(&self) -> &[Migration] {
        &self.layout.migrations
    }

    /// Whether connections may begin and go on in tables that were made anew since, in which the programs of an earlier
    /// agent look for them: from a migration to [`Self::end_carrying_over`]. No flow is aged meanwhile.
    #[must_use]
    pub fn is_carrying_over(&self) -> bool {
        self.layout.is_carrying()
    }

    /// Carries over the connections that the programs of an earlier agent have entered in tables which were made anew.
    /// The first replacement of a program has it done before; call it again after each few of them, as later
    /// ones still use the old tables. What programs of this agent have entered stays as it is.
    ///
    /// # Errors
    ///
    /// The kernel's; the call can be repeated.
    pub fn carry_over(&mut self) -> Result<(), DatapathError> {
        self.layout.catch_up()
    }

    /// Every program of an earlier agent has been replaced or detached.
    pub fn end_carrying_over(&mut self) {
        self.layout.end_carrying();
    }

    /// Maps whose pins somebody has removed: the programs go on with them, the next agent cannot.
    pub fn missing_pins(&self) -> impl Iterator<Item = &str> {
        self.pinned
            .iter()
            .map(String::as_str)
            .filter(|name| !self.layout.pin(name).exists())
    }

    /// A loaded program, for test runs.
    ///
    /// # Errors
    ///
    /// The object has no such program.
    pub fn program(&mut self, hook: Hook) -> Result<&mut SchedClassifier, DatapathError> {
        loader::program(&mut self.ebpf, hook.name())
    }

    /// The configuration in force.
    #[must_use]
    pub fn config(&self) -> &ConfigTable {
        &self.config
    }

    /// For changes of the configuration.
    pub fn config_mut(&mut self) -> Configure<'_> {
        Configure {
            config: &mut self.config,
            ipcache: &mut self.ipcache,
        }
    }

    /// The endpoints in the kernel.
    #[must_use]
    pub fn endpoints(&self) -> &EndpointTable {
        &self.endpoints
    }

    /// See [`EndpointTable::insert`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn insert_endpoint(&mut self, row: &EndpointRow) -> Result<(), TableError> {
        self.endpoints.insert(row, &self.config)
    }

    /// See [`EndpointTable::remove`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn remove_endpoint(&mut self, number: u32) -> Result<(), TableError> {
        self.endpoints.remove(number, &self.config)
    }

    /// See [`EndpointTable::set_flags`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn set_endpoint_flags(&mut self, number: u32, flags: u16) -> Result<(), TableError> {
        self.endpoints.set_flags(number, flags)
    }

    /// See [`EndpointTable::prune`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn prune_endpoints(&mut self, keep: &BTreeSet<u32>) -> Result<usize, TableError> {
        self.endpoints.prune(keep, &self.config)
    }

    /// The ways to other nodes.
    #[must_use]
    pub fn next_hops(&self) -> &NextHops {
        &self.next_hops
    }

    /// See [`NextHops::set`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn set_hop(
        &mut self,
        node: &str,
        family: Family,
        prefixes: &[IpNet],
        hop: Option<Hop>,
    ) -> Result<u32, TableError> {
        self.next_hops
            .set(node, family, prefixes, hop, &self.ipcache)
    }

    /// See [`NextHops::remove`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn remove_hop(&mut self, node: &str, family: Family) -> Result<(), TableError> {
        self.next_hops.remove(node, family)
    }

    /// What addresses are.
    #[must_use]
    pub fn ipcache(&self) -> &Ipcache {
        &self.ipcache
    }

    /// See [`Ipcache::refuse_later`].
    pub fn refuse_later(&mut self) {
        self.ipcache.refuse_later();
    }

    /// See [`Ipcache::refuse`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn refuse(&mut self) -> Result<(), TableError> {
        self.ipcache.refuse()
    }

    /// See [`Ipcache::take_service_addresses`].
    pub fn take_service_addresses(&mut self) -> BTreeSet<IpAddr> {
        self.ipcache.take_service_addresses()
    }

    /// Says what a prefix is: `class` is one of [`weir_common::ipcache::class`], `flags` are of
    /// [`weir_common::ipcache::flag`], those of frontends apart, which follow from the Services.
    ///
    /// # Errors
    ///
    /// The hop's node has no row, the map is full, or the kernel's.
    pub fn set_ipcache(
        &mut self,
        prefix: IpNet,
        class: u8,
        flags: u8,
        hop: HopRef<'_>,
    ) -> Result<(), TableError> {
        let entry = IpcacheEntry {
            class,
            flags,
            next_hop: self.next_hops.number(hop)?,
            ..IpcacheEntry::default()
        };
        self.ipcache.set(prefix, entry)
    }

    /// Takes back what [`Self::set_ipcache`] said.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn remove_ipcache(&mut self, prefix: IpNet) -> Result<(), TableError> {
        self.ipcache.remove(prefix)
    }

    /// The Service ports in the kernel.
    #[must_use]
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// See [`Services::apply`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn apply_service(
        &mut self,
        key: &ServicePortKey,
        desired: Option<&ServicePort>,
    ) -> Result<AppliedService, TableError> {
        self.services.apply(&mut self.ipcache, key, desired)
    }

    /// Removes what an earlier agent left in the tables of Services and nodes and nobody has
    /// asked for since. Only once every list of the source is complete and applied. Endpoints and
    /// attachments have their own sweeps, which depend on pods instead of the source.
    ///
    /// # Errors
    ///
    /// The kernel's; the call can be repeated.
    pub fn prune(&mut self) -> Result<Pruned, DatapathError> {
        self.layout.commit()?;
        Ok(Pruned {
            services: self.services.prune()?,
            prefixes: self.ipcache.prune()?,
            next_hops: self.next_hops.prune()?,
        })
    }

    /// Packet and lookup counters.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Ages the flow table a little, with the time-outs in force; see [`FlowSweeper::sweep`]. Does nothing while
    /// [`Self::is_carrying_over`]: packets may be seen in the old table only.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn sweep_flows(&mut self, budget: u32) -> io::Result<SweepReport> {
        self.sweep_flows_at(flows::now()?, budget)
    }

    /// As [`Self::sweep_flows`], at the time `now` in ticks.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn sweep_flows_at(&mut self, now: u32, budget: u32) -> io::Result<SweepReport> {
        if self.is_carrying_over() {
            return Ok(SweepReport::default());
        }
        let mut rules = flows::Rules {
            now,
            timeouts: self.config.row().timeouts,
            endpoints: &self.endpoints,
            sources: &mut self.sources,
        };
        self.flows.sweep(budget, &mut rules, &self.counters)
    }

    /// Addresses of the node that connections are translated to.
    #[must_use]
    pub fn node_sources(&self) -> &NodeSources {
        &self.sources
    }

    /// See [`NodeSources::set_own`].
    pub fn set_node_addresses(&mut self, addresses: BTreeSet<IpAddr>) {
        self.sources.set_own(addresses);
    }

    /// See [`NodeSources::settle`].
    ///
    /// # Errors
    ///
    /// As [`flows::now`].
    pub fn settle_source(&mut self, address: IpAddr, is_local: bool) -> io::Result<()> {
        self.sources.settle(address, is_local, flows::now()?);
        Ok(())
    }

    /// Removes what session affinity has remembered for longer than it lasts, a bounded piece at a
    /// time; see [`AffinityTable::sweep`].
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn sweep_affinity(&mut self, budget: u32) -> io::Result<u32> {
        self.sweep_affinity_at(flows::now()?, budget)
    }

    /// As [`Self::sweep_affinity`], at the time `now` in ticks.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn sweep_affinity_at(&mut self, now: u32, budget: u32) -> io::Result<u32> {
        self.services.sweep_affinity(now, budget)
    }

    /// The reader of events; there is one. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// It has been taken already, or cannot be registered with the runtime.
    pub fn take_events(&mut self) -> io::Result<EventReader> {
        let ring = self.events.take().ok_or_else(|| {
            io::Error::new(io::ErrorKind::AlreadyExists, "the event reader is in use")
        })?;
        EventReader::new(ring)
    }

    /// What reads the packet log; there is one. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// It has been taken already, the object has none, or it cannot be registered with the runtime.
    #[cfg(feature = "log-packets")]
    pub fn take_packet_log(&mut self) -> io::Result<impl Future<Output = ()> + use<>> {
        packet_log::reader(&mut self.ebpf)
    }

    /// Connections of IPv4 and IPv6 that hold a port of the NAT range, as the sweep of the flow table found them
    /// last; see [`FlowSweeper::nat_ports`].
    #[must_use]
    pub fn nat_ports(&self) -> (u32, u32) {
        self.flows.nat_ports()
    }
}

fn detect_mode(ebpf: &mut Ebpf) -> Result<AttachMode, DatapathError> {
    let name = Hook::FromPod.name();
    let program = loader::program(ebpf, name)?;
    let has_tcx = program
        .fd()
        .map_err(io::Error::other)
        .and_then(|fd| probe::has_tcx(fd.as_fd()))
        .map_err(|source| DatapathError::Attach {
            program: name,
            device: "a device that does not exist, to see whether tcx does".into(),
            ifindex: 0,
            source,
        })?;
    Ok(if has_tcx {
        AttachMode::Tcx
    } else {
        AttachMode::Clsact
    })
}

fn local_addresses(
    loaded: &mut loader::Loaded,
    name: &'static str,
) -> Result<LocalAddresses, DatapathError> {
    Ok(LocalAddresses {
        name,
        raw: loaded.raw(name)?,
        map: loaded.map(name)?,
    })
}
