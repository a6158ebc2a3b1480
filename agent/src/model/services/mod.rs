//! Which endpoints serve which frontends: Services and EndpointSlices joined, by the rules of the
//! Service API as kube-proxy applies them, and the host ports of this node's pods beside them.

mod claims;
mod endpoints;
mod health_check;
mod host_ports;
mod problem;

pub use health_check::HealthCheck;
pub use problem::Problem;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;

use self::{
    claims::{Claim, Claimant, Policies, Wish},
    endpoints::Place,
    host_ports::HostPorts,
};
use super::{
    BackendAddress, FrontendKind, HostPort, ModelOptions, Node, Owner, PodInterface, ServicePort,
    ServicePortKey,
    occupied::{Occupant, Occupied},
};
use crate::objects::{self, EndpointSlice, Family, ObjectName, Protocol, Service};

/// What is known of one Service: its slices may be here before it, and after it.
#[derive(Debug, Default)]
struct Entry {
    service: Option<Service>,
    /// By the name of the slice.
    slices: BTreeMap<String, EndpointSlice>,
}

/// Service ports that have changed; `None`: gone.
type Ports = BTreeMap<ServicePortKey, Option<ServicePort>>;

/// What [`Services::take_delta`] gives.
#[derive(Debug, Default)]
pub(super) struct ServicesDelta {
    pub ports: Ports,
    /// Endpoints that the ports which are still there have lost.
    pub gone_endpoints: BTreeMap<ServicePortKey, Vec<BackendAddress>>,
    /// `None`: no health check any more.
    pub health_checks: BTreeMap<ObjectName, Option<HealthCheck>>,
}

/// Services, their EndpointSlices, and the state that follows from them.
#[derive(Debug, Default)]
pub(super) struct Services {
    options: ModelOptions,
    /// The zone of this node, or empty.
    zone: String,
    entries: HashMap<ObjectName, Entry>,
    /// The Service that a slice belongs to.
    slice_owners: HashMap<ObjectName, ObjectName>,
    /// Services with endpoints that have hints for zones.
    with_zone_hints: BTreeSet<ObjectName>,
    host_ports: BTreeMap<PodInterface, HostPorts>,
    /// Of the next pod with host ports.
    next_sequence: u64,
    /// Sorted; more than one only where Services contradict each other. By address, so that those
    /// in a range are found.
    claims: BTreeMap<Claim, Vec<Claimant>>,
    /// What no Service can have.
    occupied: Occupied,
    /// What is to be looked at by the next [`Services::take_delta`].
    dirty: BTreeSet<Owner>,
    desired: BTreeMap<ServicePortKey, ServicePort>,
    health_checks: BTreeMap<ObjectName, HealthCheck>,
    problems: BTreeMap<Owner, Vec<Problem>>,
    service_count: usize,
}

impl Services {
    pub(super) fn new(options: ModelOptions) -> Self {
        Self {
            options,
            ..Self::default()
        }
    }

    pub(super) fn desired(&self) -> &BTreeMap<ServicePortKey, ServicePort> {
        &self.desired
    }

    pub(super) fn health_checks(&self) -> &BTreeMap<ObjectName, HealthCheck> {
        &self.health_checks
    }

    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    pub(super) fn problems_of(&self, owner: &Owner) -> &[Problem] {
        self.problems.get(owner).map_or(&[], Vec::as_slice)
    }

    pub(super) fn owners_with_problems(&self) -> impl Iterator<Item = &Owner> {
        self.problems.keys()
    }

    pub(super) fn service_count(&self) -> usize {
        self.service_count
    }

    pub(super) fn slice_count(&self) -> usize {
        self.slice_owners.len()
    }

    pub(super) fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.entries.get(name)?.service.as_ref()
    }

    pub(super) fn why_not_served(&self, name: &ObjectName) -> Option<&'static str> {
        let service = self.service(name)?;
        Some(claims::why_not_served(service, &self.options))
    }

    /// The addresses at which a Service is served; none when it is not.
    pub(super) fn addresses(&self, service: &Service) -> Vec<IpAddr> {
        let addresses = claims::addresses(service, &self.options);
        addresses.into_iter().map(|(_, address)| address).collect()
    }

    pub(super) fn set_service(&mut self, name: ObjectName, service: Option<Service>) {
        let before = match &service {
            Some(_) => {
                let entry = self.entries.entry(name.clone()).or_default();
                std::mem::replace(&mut entry.service, service)
            }
            None => self
                .entries
                .get_mut(&name)
                .and_then(|entry| entry.service.take()),
        };
        let wishes = |service: Option<&Service>| {
            service.map_or_else(Vec::new, |s| claims::wishes_of_service(s, &self.options))
        };
        let old = wishes(before.as_ref());
        let new = wishes(self.service(&name));
        self.service_count += usize::from(self.service(&name).is_some());
        self.service_count -= usize::from(before.is_some());
        self.replace_claims(old, new);
        self.forget_if_empty(&name);
        self.dirty.insert(Owner::Service(name));
    }

    pub(super) fn set_host_ports(&mut self, interface: PodInterface, ports: Option<Vec<HostPort>>) {
        let before = self.host_ports.remove(&interface);
        let old = before.as_ref();
        let old = old.map_or_else(Vec::new, |h| claims::wishes_of_pod(&interface, h));
        let mut new = Vec::new();
        if let Some(mappings) = ports.filter(|mappings| !mappings.is_empty()) {
            let sequence = before.map_or(self.next_sequence, |before| before.sequence);
            self.next_sequence += u64::from(sequence == self.next_sequence);
            let host_ports = HostPorts { sequence, mappings };
            new = claims::wishes_of_pod(&interface, &host_ports);
            self.host_ports.insert(interface.clone(), host_ports);
        }
        self.replace_claims(old, new);
        self.dirty.insert(Owner::HostPort(Box::new(interface)));
    }

    /// A node has changed. Services are looked at again where it has lost or won addresses, and
    /// those with hints when this node is in another zone now.
    pub(super) fn set_node(&mut self, name: &str, before: Option<&Node>, after: Option<&Node>) {
        for range in self.occupied.replace(name, before, after) {
            let claims = self.claims.range(Claim::first(range)..=Claim::last(range));
            let claimants = claims.flat_map(|(_, claimants)| claimants);
            self.dirty
                .extend(claimants.map(|claimant| claimant.owner.clone()));
        }
        let zone = after.map_or("", |node| node.zone.as_str());
        if name == self.options.node_name && zone != self.zone {
            self.zone = zone.to_owned();
            let hinted = self.with_zone_hints.iter().cloned();
            self.dirty.extend(hinted.map(Owner::Service));
        }
    }

    pub(super) fn set_slice(&mut self, slice: EndpointSlice) {
        let owner = ObjectName::new(slice.name.namespace.as_str(), slice.service.as_str());
        let name = slice.name.clone();
        if self
            .slice_owners
            .get(&name)
            .is_some_and(|old| *old != owner)
        {
            self.remove_slice(&name);
        }
        self.slice_owners.insert(name.clone(), owner.clone());
        // A slice without the label belongs to no Service; it is counted, no more.
        if owner.name.is_empty() {
            return;
        }
        let entry = self.entries.entry(owner.clone()).or_default();
        entry.slices.insert(name.name, slice);
        self.slices_changed(owner);
    }

    pub(super) fn remove_slice(&mut self, name: &ObjectName) {
        let Some(owner) = self.slice_owners.remove(name) else {
            return;
        };
        if let Some(entry) = self.entries.get_mut(&owner) {
            entry.slices.remove(&name.name);
            self.slices_changed(owner);
        }
    }

    fn slices_changed(&mut self, service: ObjectName) {
        let slices = self
            .entries
            .get(&service)
            .map(|entry| entry.slices.values());
        let mut endpoints = slices.into_iter().flatten().flat_map(|s| &s.endpoints);
        let has_hints = |e: &objects::SliceEndpoint| {
            e.hints
                .as_ref()
                .is_some_and(|hints| !hints.zones.is_empty())
        };
        if endpoints.any(has_hints) {
            self.with_zone_hints.insert(service.clone());
        } else {
            self.with_zone_hints.remove(&service);
        }
        self.forget_if_empty(&service);
        self.dirty.insert(Owner::Service(service));
    }

    /// What differs from the state after the last call.
    pub(super) fn take_delta(&mut self) -> ServicesDelta {
        let ServicesDelta {
            ports: mut delta,
            gone_endpoints: mut gone,
            mut health_checks,
        } = ServicesDelta::default();
        for owner in std::mem::take(&mut self.dirty) {
            let (mut wanted, problems) = self.desired_state_of(&owner);
            let known: Vec<ServicePortKey> = self
                .desired
                .range(first_key(&owner)..)
                .map(|(key, _)| key)
                .take_while(|key| key.owner == owner)
                .cloned()
                .collect();
            for key in known {
                match wanted.remove(&key) {
                    None => {
                        self.desired.remove(&key);
                        delta.insert(key, None);
                    }
                    Some(port) if self.desired.get(&key) != Some(&port) => {
                        let before = self.desired.insert(key.clone(), port.clone());
                        let mut lost: Vec<_> = before
                            .iter()
                            .flat_map(ServicePort::endpoints)
                            .filter(|endpoint| !port.has_endpoint(endpoint))
                            .copied()
                            .collect();
                        lost.sort_unstable();
                        if !lost.is_empty() {
                            gone.insert(key.clone(), lost);
                        }
                        delta.insert(key, Some(port));
                    }
                    Some(_) => {}
                }
            }
            for (key, port) in wanted {
                self.desired.insert(key.clone(), port.clone());
                delta.insert(key, Some(port));
            }
            if let Owner::Service(name) = &owner
                && let Some(check) = self.update_health_check(name)
            {
                health_checks.insert(name.clone(), check);
            }
            if problems.is_empty() {
                self.problems.remove(&owner);
            } else {
                self.problems.insert(owner, problems);
            }
        }
        ServicesDelta {
            ports: delta,
            gone_endpoints: gone,
            health_checks,
        }
    }

    /// The health check that a Service asks for, if that is news.
    fn update_health_check(&mut self, name: &ObjectName) -> Option<Option<HealthCheck>> {
        let check = self.entries.get(name).and_then(|entry| {
            let service = entry.service.as_ref()?;
            let node = &self.options.node_name;
            HealthCheck::of(service, &entry.slices, node, &self.options)
        });
        let before = match check {
            Some(check) => self.health_checks.insert(name.clone(), check),
            None => self.health_checks.remove(name),
        };
        (before != check).then_some(check)
    }

    /// Withdraws claims and enters others. Those who claim the same are looked at again: one may
    /// have won or lost it.
    fn replace_claims(&mut self, old: Vec<Wish>, new: Vec<Wish>) {
        for Wish { claim, claimant } in old {
            let Some(claimants) = self.claims.get_mut(&claim) else {
                continue;
            };
            claimants.retain(|other| *other != claimant);
            self.dirty
                .extend(claimants.iter().map(|other| other.owner.clone()));
            if claimants.is_empty() {
                self.claims.remove(&claim);
            }
        }
        for Wish { claim, claimant } in new {
            let claimants = self.claims.entry(claim).or_default();
            self.dirty
                .extend(claimants.iter().map(|other| other.owner.clone()));
            if let Err(place) = claimants.binary_search(&claimant) {
                claimants.insert(place, claimant);
            }
        }
    }

    fn forget_if_empty(&mut self, name: &ObjectName) {
        if let Some(Entry { service, slices }) = self.entries.get(name)
            && service.is_none()
            && slices.is_empty()
        {
            self.entries.remove(name);
        }
    }

    fn desired_state_of(
        &self,
        owner: &Owner,
    ) -> (BTreeMap<ServicePortKey, ServicePort>, Vec<Problem>) {
        match owner {
            Owner::Service(name) => self.state_of_service(owner, name),
            Owner::HostPort(interface) => self.state_of_pod(owner, interface),
        }
    }

    fn state_of_service(
        &self,
        owner: &Owner,
        name: &ObjectName,
    ) -> (BTreeMap<ServicePortKey, ServicePort>, Vec<Problem>) {
        let mut ports: BTreeMap<ServicePortKey, ServicePort> = BTreeMap::new();
        let mut problems = Vec::new();
        let Some(entry) = self.entries.get(name) else {
            return (ports, problems);
        };
        let Some(service) = &entry.service else {
            return (ports, problems);
        };
        let policies = claims::policies(service, &self.options);
        for wish in claims::wishes_of_service(service, &self.options) {
            let port = &service.ports[wish.claimant.index];
            if let Err(problem) = self.grant(&wish, &port.name) {
                problems.push(problem);
                continue;
            }
            let key = ServicePortKey {
                owner: owner.clone(),
                port_name: port.name.clone(),
                protocol: port.protocol,
                family: Family::of(wish.claim.address),
                port: port.port,
            };
            add_frontends(ports.entry(key).or_default(), &wish, policies);
        }
        let place = Place {
            node: &self.options.node_name,
            zone: &self.zone,
        };
        for (key, port) in &mut ports {
            port.affinity = service.affinity;
            if has_load_balancer(port) {
                port.source_ranges = service.source_ranges.of_family(key.family);
            }
            endpoints::fill(port, key, &entry.slices, place);
            problems.extend(Problem::changed_sctp_ports(key, port));
        }
        let others = claims::of_missing_families(service, &self.options);
        problems.extend(others.into_iter().map(|a| Problem::other_family(owner, a)));
        if ports.values().any(has_load_balancer) {
            let invalid = service.source_ranges.invalid.iter();
            problems.extend(invalid.map(|text| Problem::source_range(owner, text)));
            let restricts = ports.values().any(|port| port.source_ranges.is_some());
            if let (false, Some(range)) = (restricts, service.source_ranges.ranges.first()) {
                problems.push(Problem::ranges_of_other_family(owner, *range));
            }
        }
        (ports, problems)
    }

    fn state_of_pod(
        &self,
        owner: &Owner,
        interface: &PodInterface,
    ) -> (BTreeMap<ServicePortKey, ServicePort>, Vec<Problem>) {
        let mut ports: BTreeMap<ServicePortKey, ServicePort> = BTreeMap::new();
        let mut problems = Vec::new();
        let Some(host_ports) = self.host_ports.get(interface) else {
            return (ports, problems);
        };
        for wish in claims::wishes_of_pod(interface, host_ports) {
            if let Err(problem) = self.grant(&wish, "") {
                problems.push(problem);
                continue;
            }
            let mapping = &host_ports.mappings[wish.claimant.index];
            let family = Family::of(wish.claim.address);
            let (key, port) = host_ports::service_port(owner, mapping, family);
            add_frontends(ports.entry(key).or_insert(port), &wish, Policies::all());
        }
        for (key, port) in &ports {
            problems.extend(Problem::changed_sctp_ports(key, port));
        }
        (ports, problems)
    }

    /// Whether the wish's owner may have what it asks for.
    fn grant(&self, wish: &Wish, port_name: &str) -> Result<(), Problem> {
        if let Some((range, occupant)) = self.occupant(wish.claim, wish.claimant.kind) {
            return Err(Problem::occupied(wish, range, occupant));
        }
        if !self.is_here(wish.claim, wish.claimant.kind) {
            return Err(Problem::not_here(wish, &self.options.node_name));
        }
        let mut claimants = self.claims.get(&wish.claim).into_iter().flatten();
        // Those who may not have it do not keep others from it.
        let may_have =
            |kind| self.occupant(wish.claim, kind).is_none() && self.is_here(wish.claim, kind);
        let winner = claimants.find(|claimant| may_have(claimant.kind));
        match winner {
            Some(winner) if !winner.is_same_port(&wish.claimant) => {
                Err(Problem::taken(wish, port_name, winner))
            }
            _ => Ok(()),
        }
    }

    /// Who has the address of a claim, so that a frontend of this kind cannot have it. Addresses of
    /// nodes are often meant: as `externalIPs`, by a load balancer that gives out nodes' addresses,
    /// and as `hostIP`.
    fn occupant(&self, claim: Claim, kind: FrontendKind) -> Option<(IpNet, &Occupant)> {
        if claim.address.is_unspecified() {
            return None;
        }
        match kind {
            FrontendKind::ClusterIp => self.occupied.get(claim.address),
            _ => self.occupied.pods(claim.address),
        }
    }

    /// Whether a frontend of this kind may stand at the address of a claim, as far as this node is
    /// concerned. Whoever may make pods chooses their `hostIP`: at any other address than the node's
    /// own it would take what the node's clients send elsewhere.
    fn is_here(&self, claim: Claim, kind: FrontendKind) -> bool {
        let (address, node) = (claim.address, &self.options.node_name);
        kind != FrontendKind::HostPort
            || address.is_unspecified()
            || address.is_loopback()
            || self.occupied.is_address_of(address, node)
    }
}

/// Adds what a wish asks for. Where the port has two kinds of frontends at one address, the first
/// one stands for both.
fn add_frontends(port: &mut ServicePort, wish: &Wish, policies: Policies) {
    for frontend in wish.frontends(policies) {
        let is_same = |other: &super::Frontend| {
            other.address == frontend.address
                && other.port == frontend.port
                && other.scope == frontend.scope
        };
        if !port.frontends.iter().any(is_same) {
            port.frontends.insert(frontend);
        }
    }
}

fn has_load_balancer(port: &ServicePort) -> bool {
    let mut frontends = port.frontends.iter();
    frontends.any(|frontend| frontend.kind == FrontendKind::LoadBalancer)
}

/// The smallest key that an owner can have.
fn first_key(owner: &Owner) -> ServicePortKey {
    ServicePortKey {
        owner: owner.clone(),
        port_name: String::new(),
        protocol: Protocol::Tcp,
        family: Family::V4,
        port: 0,
    }
}
