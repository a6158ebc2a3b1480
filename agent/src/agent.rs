//! The event loop that owns everything: it takes changes from the source and the network, asks
//! the model what should be, and has the datapath, the node manager and the endpoint manager make
//! it so. It is the one caller of all of them, so nothing is shared and nothing is locked.
//!
//! What changed is only marked; [`apply`] works the marks off in small pieces, so that a pod that
//! starts does not wait behind ten thousand Services. A row that fails is tried again with
//! growing pauses and shown until it succeeds. Nothing is swept before the source is complete.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::{
    sync::{mpsc, watch},
    time::MissedTickBehavior,
};
use weir_common::event::Event;

use crate::{
    api::{Command, Core, Progress, events::EventHub},
    datapath::{AppliedService, Datapath, EventReader, NodeConfig},
    endpoint::{EndpointManager, boot_seconds},
    health::Health,
    model::{self, Model, ModelOptions, ServicePortKey},
    netlink::{Netlink, NetlinkEvent, sysctl::Sysctls},
    node::{NodeManager, NodePlan, NodeSettings},
    settings::{Settings, SourceSetting},
    source::{Batch, SourceHandle, dir},
};

mod apply;
pub mod cleanup;
mod defrag;
mod drift;
mod endpoints;
mod events;
mod gone_endpoints;
mod host;
mod local_ports;
pub mod names;
mod nat_ports;
mod node_sources;
mod progress;
pub mod rows;
mod services;
mod socket_translation;
pub mod start;
mod status;
mod strangers;
pub mod verify;
mod waiting_commits;
mod wiring;

use gone_endpoints::GoneEndpoints;
use rows::{Phase, Row, Rows};
use socket_translation::SocketTranslations;
use waiting_commits::WaitingCommits;

/// Requests of the API that may wait.
const COMMANDS: usize = 256;
/// Batches of the source taken in before they are applied.
const BATCHES_AT_ONCE: usize = 64;
/// How often flows are aged and endpoints looked after.
const TICK: Duration = Duration::from_secs(1);
/// Ticks between two looks at the endpoints.
const ENDPOINT_TICKS: u32 = 5;
/// Session affinities looked at in one tick.
const AFFINITIES_PER_TICK: u32 = 4096;
/// Entries of the flow table looked at in one tick.
const FLOWS_PER_TICK: u32 = 16_384;

/// What the source has said, beside its objects.
#[derive(Debug, Default)]
struct SourceState {
    revision: u64,
    synced: bool,
    errors: Vec<String>,
}

/// The agent.
#[derive(Debug)]
pub struct Agent {
    settings: Settings,
    started: Instant,
    source: SourceHandle,
    source_state: SourceState,
    model: Model,
    translations: SocketTranslations,
    rows: Rows,
    datapath: Datapath,
    ring: EventReader,
    /// Identifiers of the programs, by the number of their hook.
    program_ids: Vec<u32>,
    config: NodeConfig,
    late: Late,
    host: host::Host,
    defrag: defrag::Defrag,
    /// Ports of the node that lead to pods, as the model knows them.
    host_ports: BTreeMap<model::PodInterface, Vec<model::HostPort>>,
    netlink: Netlink,
    network: mpsc::Receiver<NetlinkEvent>,
    nodes: NodeManager,
    /// As the model has them, in the form that the node manager wants.
    node_objects: BTreeMap<String, model::Node>,
    plan: NodePlan,
    /// The network has been looked at.
    plan_is_made: bool,
    /// The plan was made with the complete list of nodes.
    plan_is_complete: bool,
    swept: bool,
    sysctls: Sysctls,
    endpoints: EndpointManager,
    waiting_commits: WaitingCommits,
    /// Where each Service port stands in the kernel.
    applied: HashMap<ServicePortKey, AppliedService>,
    gone: GoneEndpoints,
    nat_port_drops: nat_ports::RecentDrops,
    local_ports: local_ports::LocalPorts,
    health: Health,
    /// From the first sweep on.
    strangers: Option<strangers::Strangers>,
    /// Problems that came up at the start or outside of any row.
    notes: Notes,
    commands: mpsc::Receiver<Command>,
    progress: watch::Sender<Progress>,
    events: EventHub,
    /// Names of the pods of this node; `None` when they must be gathered anew.
    pod_names: Option<HashMap<IpAddr, String>>,
    device_names: HashMap<u32, String>,
    flow_events: bool,
    events_lost: u64,
    ticks: u32,
    /// Since the last tick.
    network_has_changed: bool,
}

/// Problems that belong to no row.
#[derive(Debug, Default)]
struct Notes {
    /// Found while the agent started.
    start: Vec<String>,
    /// Devices of pods of which nothing is known, by interface index, as long as they are there.
    orphans: BTreeMap<u32, String>,
    /// Pod ranges that cannot be used.
    ranges: Vec<String>,
    /// Switches under `/proc/sys` that could not be set.
    sysctls: Vec<String>,
    /// Ports that could not be kept from the node's own connections.
    local_ports: Option<String>,
    /// Endpoints that the kernel refuses.
    endpoints: Vec<String>,
}

impl Notes {
    fn all(&self) -> impl Iterator<Item = &String> {
        [&self.start, &self.ranges, &self.sysctls, &self.endpoints]
            .into_iter()
            .flatten()
            .chain(self.orphans.values())
            .chain(&self.local_ports)
    }
}

/// Programs that are attached when the maps hold everything, and not before.
#[derive(Debug, Default)]
struct Late {
    /// All of them: after pinned maps had to be made anew, those of an earlier agent go on with the
    /// old ones until they are replaced.
    waiting: bool,
    /// Those that serve the node's own processes: until somebody else's Services are all known here, he
    /// goes on serving them (kube-proxy, at the first start).
    host: bool,
    /// Devices of pods, by interface index.
    pods: BTreeMap<u32, String>,
    /// Ticks for which connections are still carried over once nothing waits any more.
    carrying: u32,
}

/// What woke the loop.
enum Wake {
    Batch(Option<Batch>),
    Command(Option<Command>),
    Network(Option<NetlinkEvent>),
    Event(std::io::Result<Event>),
    Sockets(gone_endpoints::Report),
    Watchers,
    Work,
    Retry,
    Tick,
    Stop,
}

impl Agent {
    /// Loads the datapath, takes over what an earlier agent left, and starts the source. Pods and
    /// connections of an earlier agent are not interrupted.
    ///
    /// # Errors
    ///
    /// If anything cannot be started; what is in the kernel by then stays.
    pub async fn start(settings: Settings) -> anyhow::Result<(Self, Core)> {
        let started = Instant::now();
        let netlink = Netlink::new().context("cannot open the netlink sockets")?;
        let network = netlink.watch().await.context("cannot watch the network")?;
        // It takes some seconds on a slow machine, and nothing is served meanwhile.
        tracing::info!("loading the data path");
        let mut datapath = Datapath::open(&start::datapath_options(&settings))
            .context("cannot load the data path")?;
        datapath.refuse_later();
        let ring = datapath
            .take_events()
            .context("cannot read the events of the kernel programs")?;
        #[cfg(feature = "log-packets")]
        tokio::task::spawn_local(
            datapath
                .take_packet_log()
                .context("cannot read the packet log of the kernel programs")?,
        );
        let health = Health::start(settings.healthz_address)
            .context("cannot start the thread that serves health checks")?;
        let SourceSetting::Directory(directory) = &settings.source;
        let source = dir::spawn(directory)?;
        let nodes = NodeManager::new(
            settings.node_name.clone(),
            NodeSettings {
                devices: settings.devices.clone(),
                mtu: settings.mtu.map(u32::from),
                node_port_addresses: settings.node_port_addresses.clone(),
            },
        );
        let endpoints = EndpointManager::new(
            &settings.run_dir,
            settings.address_rest.as_secs(),
            settings.mtu.map_or(1500, u32::from),
        )?;
        let (command_sender, commands) = mpsc::channel(COMMANDS);
        let (progress, progress_receiver) = watch::channel(Progress::default());
        let events = EventHub::new();
        let core = Core {
            commands: command_sender,
            progress: progress_receiver,
            rescan: source.rescan.clone(),
            events: events.clone(),
        };
        let config = NodeConfig {
            timeouts: settings.timeouts,
            netns_cookie: host::netns_cookie()
                .context("cannot tell this network namespace from others (SO_NETNS_COOKIE)")?,
            refusals_per_second: settings.refusals_per_second,
            nat_port_first: settings.nat_ports.first,
            nat_port_count: settings.nat_ports.count(),
            masquerade_v4: settings.masquerade_v4,
            masquerade_v6: settings.masquerade_v6,
            non_masquerade_cidrs: settings.non_masquerade_cidrs.clone(),
            ..NodeConfig::default()
        };
        let mut agent = Self {
            sysctls: Sysctls::open(&settings.run_dir),
            started,
            source,
            source_state: SourceState::default(),
            model: Model::new(ModelOptions {
                node_name: settings.node_name.clone(),
                exclude_services: settings.exclude_services.clone(),
                exclude_cidrs: settings.exclude_cidrs.clone(),
                cluster_ips_outside: settings.cluster_ips_outside,
            }),
            translations: SocketTranslations::default(),
            rows: Rows::default(),
            program_ids: start::program_ids(&mut datapath),
            late: start::late(&datapath),
            host: host::Host::default(),
            defrag: defrag::Defrag::default(),
            host_ports: BTreeMap::new(),
            datapath,
            ring,
            config,
            netlink,
            network,
            nodes,
            node_objects: BTreeMap::new(),
            plan: NodePlan::default(),
            plan_is_made: false,
            plan_is_complete: false,
            swept: false,
            endpoints,
            waiting_commits: WaitingCommits::default(),
            applied: HashMap::new(),
            gone: GoneEndpoints::default(),
            nat_port_drops: nat_ports::RecentDrops::default(),
            local_ports: local_ports::LocalPorts::default(),
            health,
            strangers: None,
            notes: Notes::default(),
            commands,
            progress,
            events,
            pod_names: None,
            device_names: HashMap::new(),
            flow_events: false,
            events_lost: 0,
            ticks: 0,
            network_has_changed: false,
            settings,
        };
        agent.take_over().await?;
        Ok((agent, core))
    }

    /// Runs until `stop` is ready. The kernel keeps everything then.
    ///
    /// # Errors
    ///
    /// If the source or the events of the kernel end, which they never should.
    pub async fn run(&mut self, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        let mut stop = std::pin::pin!(stop);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let due = self.rows.next_due().into_iter();
            let due = due.chain(self.waiting_commits.next_due()).min();
            let events = self.events.clone();
            let wake = tokio::select! {
                () = &mut stop => Wake::Stop,
                command = self.commands.recv() => Wake::Command(command),
                batch = self.source.batches.recv() => Wake::Batch(batch),
                event = self.network.recv() => Wake::Network(event),
                event = self.ring.next() => Wake::Event(event),
                report = self.gone.next() => Wake::Sockets(report),
                () = events.watchers_changed() => Wake::Watchers,
                () = std::future::ready(()), if self.rows.is_waiting() => Wake::Work,
                () = sleep_until(due) => Wake::Retry,
                _ = tick.tick() => Wake::Tick,
            };
            let is_tick = matches!(wake, Wake::Tick);
            match wake {
                Wake::Stop | Wake::Command(None) => return Ok(()),
                Wake::Command(Some(command)) => self.command(command).await,
                Wake::Batch(batch) => {
                    let batch = batch.context("the source of objects has stopped")?;
                    self.take_batches(batch);
                }
                Wake::Network(event) => {
                    let event = event.context("the watch of the network has stopped")?;
                    self.network_changed(event).await;
                }
                Wake::Event(event) => {
                    let event = event.context("cannot read the events of the kernel programs")?;
                    self.tell(event);
                }
                Wake::Sockets(report) => self.take_report(report),
                Wake::Watchers => self.switch_flow_events(),
                Wake::Work => self.work().await,
                Wake::Retry => {
                    for row in self.rows.due(Instant::now()) {
                        self.mark(row);
                    }
                }
                Wake::Tick => self.tick().await,
            }
            self.settle_commits().await;
            self.publish_progress();
            self.publish_health(is_tick);
        }
    }

    fn take_batches(&mut self, first: Batch) {
        let was_synced = self.source_state.synced;
        let mut translations_changed = false;
        let mut batch = first;
        for _ in 0..BATCHES_AT_ONCE {
            for change in batch.changes {
                translations_changed |= self.translations.take(&change);
                self.model.apply(change);
            }
            self.source_state.revision = batch.revision;
            self.source_state.synced |= batch.synced;
            self.source_state.errors = batch.errors;
            match self.source.batches.try_recv() {
                Ok(next) => batch = next,
                Err(_) => break,
            }
        }
        self.model_has_changed(was_synced);
        let synced = self.source_state.synced;
        if synced && (translations_changed || !was_synced) {
            self.mark_changed_flags();
        }
    }

    /// Marks what the model wants otherwise than before. `was_synced`: the source was complete
    /// before this change.
    fn model_has_changed(&mut self, was_synced: bool) {
        let delta = self.model.take_delta();
        for (name, node) in delta.nodes {
            if name == self.settings.node_name {
                // Its addresses are where the programs' ICMP errors come from.
                self.mark(Row::Config);
            }
            match node {
                Some(node) => self.node_objects.insert(name, node),
                None => self.node_objects.remove(&name),
            };
            self.mark(Row::Network);
        }
        if !self.source_state.synced {
            // Services wait until all their endpoints are known; the model keeps them.
            return;
        }
        if self.settings.end_sockets_of_gone_endpoints {
            self.gone.note(delta.gone_endpoints);
        }
        let mut services: Vec<_> = delta.services.into_keys().collect();
        if !was_synced {
            services = self.model.services().map(|(key, _)| key.clone()).collect();
            // Once more, now with the complete list, even if no node has changed.
            self.mark(Row::Network);
            self.mark(Row::Config);
            self.mark(Row::LocalPorts);
            self.mark(Row::Sweep);
            let checks = self.model.health_checks().clone().into_iter();
            self.health
                .change(checks.map(|(name, check)| (name, Some(check))).collect());
            tracing::info!(
                revision = self.source_state.revision,
                "the source is complete"
            );
        }
        for key in services {
            self.mark(Row::Service(Box::new(key)));
        }
        if was_synced {
            self.health.change(delta.health_checks);
        }
    }

    async fn network_changed(&mut self, event: NetlinkEvent) {
        self.device_names.clear();
        self.network_has_changed = true;
        self.host_changed(&event);
        self.defrag_changed(&event);
        match event {
            NetlinkEvent::Changed => self.mark(Row::Network),
            NetlinkEvent::LinkRemoved(ifindex) => {
                self.notes.orphans.remove(&ifindex);
                if self.plan.sources.contains_key(&ifindex) {
                    self.mark(Row::Network);
                }
                let (endpoints, mut wiring) = self.endpoints_and_wiring();
                match endpoints
                    .link_removed(ifindex, &mut wiring, boot_seconds())
                    .await
                {
                    Ok(None) => {}
                    Ok(Some(spec)) => {
                        tracing::info!(
                            pod = spec.display_name(),
                            device = spec.host_ifname,
                            "the pod's device is gone, and so is the endpoint"
                        );
                        self.endpoints_changed();
                    }
                    // The endpoint manager keeps it and tries again.
                    Err(error) => {
                        tracing::warn!(%error, ifindex, "cannot remove the endpoint of a removed device");
                    }
                }
            }
        }
    }

    async fn tick(&mut self) {
        self.ticks = self.ticks.wrapping_add(1);
        self.watch_nat_ports();
        self.carry_over();
        // A change of the network has put those in doubt that were lost: the sweep is to know.
        self.ask_for_sources().await;
        match self.datapath.sweep_flows(FLOWS_PER_TICK) {
            Ok(report) => {
                if report.removed > 0 {
                    tracing::debug!(removed = report.removed, "aged flows");
                }
                self.look_after_sources(&report).await;
            }
            Err(error) => tracing::warn!(%error, "cannot age the flow table"),
        }
        match self.datapath.sweep_affinity(AFFINITIES_PER_TICK) {
            Ok(removed @ 1..) => tracing::debug!(removed, "session affinities are over"),
            Ok(0) => {}
            Err(error) => tracing::warn!(%error, "cannot sweep the session affinities"),
        }
        self.switch_flow_events();
        self.tell_lost_events();
        self.look_for_gone_endpoints();
        let is_due = self.ticks.is_multiple_of(ENDPOINT_TICKS);
        if is_due {
            // Somebody may have put a list of his own in its place. Rows that wait have their turn first.
            self.mark(Row::LocalPorts);
        }
        // A change seen while nothing may be repaired yet is kept for later.
        let changed = !self.late.waiting && std::mem::take(&mut self.network_has_changed);
        let drifted = if is_due || changed {
            self.find_drift(changed).await
        } else {
            0
        };
        if is_due || drifted > 0 {
            let before = self.endpoints.list().len();
            let (endpoints, mut wiring) = self.endpoints_and_wiring();
            let errors = endpoints.tick(&mut wiring, boot_seconds()).await;
            self.notes.endpoints = errors.into_iter().map(|error| error.message).collect();
            if self.endpoints.list().len() != before {
                self.endpoints_changed();
            }
        }
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
