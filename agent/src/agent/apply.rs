//! Works off what is marked: looks up what a row should be and has its owner make it so.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use super::{Agent, Phase, Row, strangers::Strangers};
use crate::{
    datapath::{Hop, HopRef},
    endpoint::EndpointState,
    netlink::pod,
    node::{self, NodePlan},
    objects::Family,
};

/// How long rows are worked off before other work gets its turn.
const SLICE: Duration = Duration::from_millis(5);
/// How long programs of pods are replaced before connections are carried over again.
const CARRYING_EVERY: Duration = Duration::from_millis(20);
/// Ticks after which connections are no longer carried over, though some program could not be replaced.
const CARRYING_TICKS: u32 = 60;

impl Agent {
    /// The row has changed, or is to be tried again.
    pub(super) fn mark(&mut self, row: Row) {
        let phase = self.phase(&row);
        self.rows.mark(row, phase, Instant::now());
    }

    fn phase(&self, row: &Row) -> Phase {
        let either = |wanted, add, remove| if wanted { add } else { remove };
        match row {
            Row::Network => Phase::Look,
            Row::Config | Row::Host | Row::Defrag => Phase::Found,
            Row::Sockets | Row::ServiceRoutes | Row::LocalPorts => Phase::Clear,
            Row::Device(ifindex) => {
                // What pods send by a device that is not known is dropped: a new one is not to wait.
                let wanted = self.plan.devices.contains_key(ifindex)
                    || !self.datapath.is_device_attached(*ifindex);
                either(wanted, Phase::Found, Phase::Clear)
            }
            Row::Hop(node, family) => {
                let wanted = self.plan.hops.contains_key(&(node.clone(), *family));
                either(wanted, Phase::Hops, Phase::Clear)
            }
            Row::Endpoint(_) => Phase::Add,
            Row::Prefix(prefix) => {
                let wanted = self.plan.ipcache.contains_key(prefix);
                either(wanted, Phase::Add, Phase::Remove)
            }
            // A frontend that moves goes to its new owner before the old one lets go.
            Row::Service(key) => {
                let wanted = self.model.service(key).is_some();
                either(wanted, Phase::Add, Phase::Remove)
            }
            Row::Refusals => Phase::Remove,
            Row::Sweep => Phase::Sweep,
        }
    }

    /// Works off rows for a short while.
    pub(super) async fn work(&mut self) {
        let end = Instant::now() + SLICE;
        while Instant::now() < end {
            let Some(row) = self.rows.take() else { break };
            match self.apply(&row).await {
                Ok(()) => self.rows.succeeded(&row),
                Err(error) => self.failed(row, &error),
            }
        }
    }

    fn failed(&mut self, row: Row, error: &anyhow::Error) {
        let (text, name) = (format!("{error:#}"), row.to_string());
        let attempts = self.rows.fail(row, text.clone(), Instant::now());
        // Once for people who read the log; status shows it as long as it lasts.
        if attempts == 1 {
            tracing::warn!(row = name, error = text, "cannot apply; trying again");
        } else {
            tracing::debug!(
                row = name,
                error = text,
                attempts,
                "cannot apply; trying again"
            );
        }
    }

    async fn apply(&mut self, row: &Row) -> anyhow::Result<()> {
        match row {
            Row::Network => self.look_at_network().await,
            Row::Config => self.apply_config(),
            Row::Host => self.apply_host().await,
            Row::Defrag => self.apply_defrag().await,
            Row::Sockets => self.apply_sockets(),
            Row::ServiceRoutes => self.apply_service_routes().await,
            Row::Device(ifindex) => self.apply_device(*ifindex),
            Row::Hop(node, family) => self.apply_hop(node, *family),
            Row::Endpoint(key) => self.apply_flags(key),
            Row::Prefix(prefix) => {
                self.apply_prefix(*prefix)?;
                // An address of Services may have become a node's.
                self.note_service_addresses();
                Ok(())
            }
            Row::Service(key) => {
                self.note_local_ports(key);
                let desired = self.model.service(key);
                let applied = self.datapath.apply_service(key, desired)?;
                if desired.is_some() {
                    self.applied.insert((**key).clone(), applied);
                } else {
                    self.applied.remove(&**key);
                }
                self.note_service_addresses();
                Ok(())
            }
            Row::LocalPorts => {
                self.reserve_local_ports();
                Ok(())
            }
            Row::Refusals => Ok(self.datapath.refuse()?),
            Row::Sweep => self.sweep().await,
        }
    }

    async fn look_at_network(&mut self) -> anyhow::Result<()> {
        let synced = self.source_state.synced;
        let plan = self
            .nodes
            .reconcile(&self.node_objects, synced, &self.netlink)
            .await?;
        let changes = plan.changes_since(&self.plan);
        let failing = plan.failing;
        let before = std::mem::replace(&mut self.plan, plan);
        self.plan_is_made = true;
        let was_complete = std::mem::replace(&mut self.plan_is_complete, synced);
        self.plan_is_complete |= was_complete;
        self.adopt_plan(&before);
        let mut devices: BTreeSet<u32> = changes.sources.into_keys().collect();
        devices.extend(changes.attach.into_keys().chain(changes.detach.into_keys()));
        if self.plan_is_complete && !was_complete {
            // Those that are left to others, which could not be told before, and those that have gone while no
            // agent ran.
            devices.extend(self.plan.sources.keys());
            devices.extend(self.datapath.devices().devices());
        }
        for ifindex in devices {
            self.mark(Row::Device(ifindex));
        }
        for (node, family) in changes.hops.into_keys() {
            self.mark(Row::Hop(node, family));
        }
        for change in changes.ipcache {
            self.mark(Row::Prefix(change.prefix));
        }
        anyhow::ensure!(
            failing == 0,
            "{failing} routes could not be entered; see the problems"
        );
        Ok(())
    }

    /// What a plan says besides rows: addresses, pod ranges, MTU, switches.
    fn adopt_plan(&mut self, before: &NodePlan) {
        self.datapath
            .set_node_addresses(self.plan.addresses.clone());
        if self.plan.mtu != 0 {
            self.endpoints.set_mtu(self.plan.mtu);
        }
        if self.plan.mtu != before.mtu {
            self.mark(Row::Host);
        }
        if self.plan.pod_cidrs != before.pod_cidrs {
            // A node object that is not here yet is no reason to forget the ranges.
            if self.source_state.synced || !self.plan.pod_cidrs.is_empty() {
                let refused = self.endpoints.set_ranges(&self.plan.pod_cidrs);
                self.notes.ranges = refused.iter().map(ToString::to_string).collect();
                tracing::info!(ranges = ?self.plan.pod_cidrs, "pod ranges of this node");
            }
            self.mark(Row::Config);
        }
        if self.plan.devices != before.devices {
            let names = self.plan.devices.values().map(String::as_str);
            let set = self.sysctls.set_node(names);
            self.notes.sysctls = set.err().iter().map(ToString::to_string).collect();
            tracing::info!(devices = ?self.plan.devices, mtu = self.plan.mtu, "devices of this node");
        }
    }

    /// The row of `CONFIG`: the ranges of the allocator, those of older pods included.
    pub(super) fn apply_config(&mut self) -> anyhow::Result<()> {
        let own = self.node_objects.get(&self.settings.node_name);
        // Until the Node object is here, the addresses that an earlier agent knew are good.
        if own.is_some() || self.source_state.synced {
            let addresses = || own.into_iter().flat_map(|node| &node.addresses);
            self.config.node_v4 = addresses().find_map(|address| match address {
                IpAddr::V4(v4) => Some(*v4),
                IpAddr::V6(_) => None,
            });
            self.config.node_v6 = addresses().find_map(|address| match address {
                IpAddr::V6(v6) => Some(*v6),
                IpAddr::V4(_) => None,
            });
        }
        self.config.pod_ranges = self.endpoints.pod_ranges().collect();
        self.datapath.config_mut().apply(&self.config)?;
        if self.host.node_addresses_are_new(&self.config) {
            self.mark(Row::ServiceRoutes);
        }
        Ok(())
    }

    fn apply_device(&mut self, ifindex: u32) -> anyhow::Result<()> {
        let sources = self.plan.sources.get(&ifindex).copied();
        if let Some(name) = self.plan.devices.get(&ifindex) {
            if !self.late.waiting {
                self.datapath
                    .attach_device(ifindex, name, sources.unwrap_or_default())?;
            }
        } else if sources.is_none() || self.plan_is_complete {
            self.datapath.leave_device(ifindex, sources)?;
        }
        Ok(())
    }

    fn apply_hop(&mut self, node: &str, family: Family) -> anyhow::Result<()> {
        let Some(outcome) = self.plan.hops.get(&(node.to_owned(), family)) else {
            self.datapath.remove_hop(node, family)?;
            return Ok(());
        };
        let hop = outcome.as_ref().ok().map(|hop| Hop {
            ifindex: hop.ifindex,
            gateway: hop.gateway,
            mtu: hop.mtu,
            source: hop.source,
        });
        let of_node = node::HopRef::Node(node.to_owned(), family);
        let prefixes: Vec<_> = self
            .plan
            .ipcache
            .iter()
            .filter(|(_, target)| target.hop == of_node)
            .map(|(prefix, _)| *prefix)
            .collect();
        self.datapath.set_hop(node, family, &prefixes, hop)?;
        Ok(())
    }

    fn apply_prefix(&mut self, prefix: ipnet::IpNet) -> anyhow::Result<()> {
        let Some(target) = self.plan.ipcache.get(&prefix) else {
            self.datapath.remove_ipcache(prefix)?;
            return Ok(());
        };
        let hop = match &target.hop {
            node::HopRef::None => HopRef::None,
            node::HopRef::Host => HopRef::Host,
            node::HopRef::Node(node, family) => HopRef::Node(node, *family),
        };
        self.datapath
            .set_ipcache(prefix, target.class, target.flags, hop)?;
        Ok(())
    }

    /// Removes what nobody asked for since the start. Its turn comes after everything else of
    /// the complete source.
    async fn sweep(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.plan_is_complete,
            "waits until the state of the network could be read"
        );
        let endpoints = || self.endpoints.list().filter(|e| e.spec.host_ifindex != 0);
        let ready = || endpoints().filter(|e| !matches!(e.state, EndpointState::Removing(_)));
        let numbers = ready().map(|e| e.spec.number).collect();
        let addresses = ready()
            .flat_map(|e| e.spec.addresses.iter().copied())
            .collect();
        let pods = endpoints().map(|e| e.spec.host_ifindex);
        let own = self.host.programs().chain(self.defrag.program());
        let devices = self.plan.devices.keys().copied();
        let devices = devices.chain(pods).chain(own).collect();

        self.attach_late()?;
        let refused = self.attach_late_pods()?;
        let pruned = self.datapath.prune()?;
        self.host.forget_routes();
        self.mark(Row::ServiceRoutes);
        let endpoints = self.datapath.prune_endpoints(&numbers)?;
        let attachments = self.datapath.sweep_attachments(&devices)?.len();
        let routes = pod::sweep(&self.netlink, &addresses).await?.len();
        self.swept = true;
        self.look_for_strangers();
        give_memory_back();
        tracing::info!(
            services = pruned.services,
            prefixes = pruned.prefixes,
            next_hops = pruned.next_hops,
            endpoints,
            attachments,
            routes,
            "the source is applied; leftovers removed"
        );
        anyhow::ensure!(
            refused.is_empty(),
            "pods that an earlier agent's programs still serve: {}",
            refused.join("; ")
        );
        Ok(())
    }

    /// Once there is time.
    fn look_for_strangers(&mut self) {
        if self.strangers.is_some() {
            return;
        }
        let bpf_root = &self.settings.bpf_root;
        let places = weir_strangers::Places {
            bpffs: bpf_root.parent().unwrap_or(bpf_root).to_owned(),
            cni: self.settings.cni_conf_dir.clone(),
        };
        match Strangers::start(places) {
            Ok(strangers) => self.strangers = Some(strangers),
            Err(error) => tracing::warn!(%error, "cannot look for what others have on this node"),
        }
    }

    /// The new maps hold everything: now the programs of an earlier agent give way.
    fn attach_late(&mut self) -> anyhow::Result<()> {
        if std::mem::take(&mut self.late.host) {
            self.mark(Row::Host);
            self.mark(Row::Sockets);
        }
        if !self.late.waiting {
            return Ok(());
        }
        let mut failed = Vec::new();
        for (ifindex, name) in &self.plan.devices {
            let sources = self.plan.sources.get(ifindex).copied().unwrap_or_default();
            // One device that refuses its programs is a problem of its own: the rest goes on.
            if self
                .datapath
                .attach_device(*ifindex, name, sources)
                .is_err()
            {
                failed.push(*ifindex);
            }
        }
        self.late.waiting = false;
        self.late.carrying = CARRYING_TICKS;
        for ifindex in failed {
            self.mark(Row::Device(ifindex));
        }
        self.mark(Row::Defrag);
        self.datapath.carry_over()?;
        Ok(())
    }

    /// The programs of pods give way too. A pod whose device refuses keeps those that it has, and is tried again with
    /// the sweep: the others go on. Gives what was refused.
    fn attach_late_pods(&mut self) -> anyhow::Result<Vec<String>> {
        let mut refused = Vec::new();
        let mut carried = Instant::now();
        for (ifindex, name) in self.late.pods.clone() {
            match self.datapath.attach_endpoint(ifindex, &name) {
                Ok(()) => {
                    self.late.pods.remove(&ifindex);
                }
                // The device may be gone, with the pod: then nobody waits for it.
                Err(error) => match nix::net::if_::if_nametoindex(name.as_str()) {
                    Ok(now) if now == ifindex => refused.push(error.to_string()),
                    _ => {
                        self.late.pods.remove(&ifindex);
                    }
                },
            }
            if carried.elapsed() >= CARRYING_EVERY {
                self.datapath.carry_over()?;
                carried = Instant::now();
            }
        }
        self.datapath.carry_over()?;
        Ok(refused)
    }
}

impl Agent {
    /// Connections that programs of an earlier agent have entered in tables made anew since, until the last of those
    /// programs is replaced.
    pub(super) fn carry_over(&mut self) {
        if self.late.waiting || !self.datapath.is_carrying_over() {
            return;
        }
        if let Err(error) = self.datapath.carry_over() {
            tracing::warn!(%error, "cannot carry over connections of an earlier agent");
        }
        self.late.carrying = self.late.carrying.saturating_sub(1);
        if self.late.carrying == 0 || !self.rows.is_attaching() {
            self.datapath.end_carrying_over();
        }
    }
}

/// Reading the tables and the first lists took memory that is not needed again.
fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}
