//! Which endpoints serve which frontends: Services and EndpointSlices joined, by the rules of the
//! Service API (KEP-752 EndpointSlices, KEP-1672 terminating endpoints) as kube-proxy applies them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    Backend, BackendAddress, BackendState, Frontend, FrontendKind, Node, ServicePort,
    ServicePortKey, UnusedBackend,
    occupied::{Occupant, Occupied, Purpose},
};
use crate::objects::{
    self, EndpointSlice, Family, ObjectName, Protocol, Service, ServiceType, SliceEndpoint,
};

/// Services with one of these labels are left to somebody else, or to nobody, whatever the value.
const NOT_SERVED_LABELS: [&str; 2] = [
    "service.kubernetes.io/service-proxy-name",
    "service.kubernetes.io/headless",
];

/// The addresses at which a Service is served; empty when it is not.
pub(super) fn served_addresses(service: &Service) -> &[IpAddr] {
    let left_out = service.service_type == ServiceType::ExternalName
        || NOT_SERVED_LABELS
            .iter()
            .any(|label| service.labels.contains_key(*label));
    if left_out { &[] } else { &service.cluster_ips }
}

/// Something in a Service that cannot be served as it stands.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Problem {
    /// The Service.
    pub service: ObjectName,
    /// What is wrong, and what to do about it.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Service {}: {}", self.service, self.text)
    }
}

/// An address, port and protocol that a Service port wants for itself.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Claim {
    address: IpAddr,
    port: u16,
    protocol: Protocol,
}

/// Who makes a claim. The first in order has it: the oldest Service, so that a new one takes
/// nothing from those that are served.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Claimant {
    age: Age,
    service: ObjectName,
    /// Of the Service's ports.
    index: usize,
}

impl Claim {
    /// The smallest in a range.
    fn first(range: IpNet) -> Self {
        Self {
            address: range.network(),
            port: 0,
            protocol: Protocol::Tcp,
        }
    }

    /// The largest in a range.
    fn last(range: IpNet) -> Self {
        Self {
            address: range.broadcast(),
            port: u16::MAX,
            protocol: Protocol::Sctp,
        }
    }
}

/// When a Service was made; the oldest comes first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Age {
    /// In seconds since 1970.
    CreatedAt(i64),
    /// Counts as the youngest.
    Unknown,
}

impl Age {
    fn of(service: &Service) -> Self {
        service.created.map_or(Self::Unknown, Self::CreatedAt)
    }
}

/// What is known of one Service: its slices may be here before it, and after it.
#[derive(Debug, Default)]
struct Entry {
    service: Option<Service>,
    /// By the name of the slice.
    slices: BTreeMap<String, EndpointSlice>,
}

/// Services, their EndpointSlices, and the state that follows from them.
#[derive(Debug, Default)]
pub(super) struct Services {
    entries: HashMap<ObjectName, Entry>,
    /// The Service that a slice belongs to.
    slice_owners: HashMap<ObjectName, ObjectName>,
    /// Sorted; more than one only where Services contradict each other. By address, so that those
    /// in a range are found.
    claims: BTreeMap<Claim, Vec<Claimant>>,
    /// What no Service can have.
    occupied: Occupied,
    /// Services to be looked at by the next [`Services::take_delta`].
    dirty: BTreeSet<ObjectName>,
    desired: BTreeMap<ServicePortKey, ServicePort>,
    problems: BTreeMap<ObjectName, Vec<Problem>>,
    service_count: usize,
}

impl Services {
    pub(super) fn desired(&self) -> &BTreeMap<ServicePortKey, ServicePort> {
        &self.desired
    }

    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
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
        let old_claims = before.as_ref().map(claims).unwrap_or_default();
        let new_claims = self.service(&name).map(claims).unwrap_or_default();
        self.service_count += usize::from(self.service(&name).is_some());
        self.service_count -= usize::from(before.is_some());
        for (claim, claimant) in old_claims {
            self.withdraw(claim, &claimant);
        }
        for (claim, claimant) in new_claims {
            self.claim(claim, claimant);
        }
        self.forget_if_empty(&name);
        self.dirty.insert(name);
    }

    /// A node has changed. Services are looked at again where it has lost or won addresses.
    pub(super) fn set_node(&mut self, name: &str, before: Option<&Node>, after: Option<&Node>) {
        for range in self.occupied.replace(name, before, after) {
            let claims = self.claims.range(Claim::first(range)..=Claim::last(range));
            let claimants = claims.flat_map(|(_, claimants)| claimants);
            self.dirty
                .extend(claimants.map(|claimant| claimant.service.clone()));
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
        self.dirty.insert(owner);
    }

    pub(super) fn remove_slice(&mut self, name: &ObjectName) {
        let Some(owner) = self.slice_owners.remove(name) else {
            return;
        };
        if let Some(entry) = self.entries.get_mut(&owner) {
            entry.slices.remove(&name.name);
            self.forget_if_empty(&owner);
            self.dirty.insert(owner);
        }
    }

    pub(super) fn take_delta(&mut self) -> BTreeMap<ServicePortKey, Option<ServicePort>> {
        let mut delta = BTreeMap::new();
        for name in std::mem::take(&mut self.dirty) {
            let (mut wanted, problems) = self.desired_state_of(&name);
            let known: Vec<ServicePortKey> = self
                .desired
                .range(first_key(&name)..)
                .map(|(key, _)| key)
                .take_while(|key| key.service == name)
                .cloned()
                .collect();
            for key in known {
                match wanted.remove(&key) {
                    None => {
                        self.desired.remove(&key);
                        delta.insert(key, None);
                    }
                    Some(port) if self.desired.get(&key) != Some(&port) => {
                        self.desired.insert(key.clone(), port.clone());
                        delta.insert(key, Some(port));
                    }
                    Some(_) => {}
                }
            }
            for (key, port) in wanted {
                self.desired.insert(key.clone(), port.clone());
                delta.insert(key, Some(port));
            }
            if problems.is_empty() {
                self.problems.remove(&name);
            } else {
                self.problems.insert(name, problems);
            }
        }
        delta
    }

    /// Enters a claim. Those who claim the same are looked at again: one may have lost it.
    fn claim(&mut self, claim: Claim, claimant: Claimant) {
        let claimants = self.claims.entry(claim).or_default();
        self.dirty
            .extend(claimants.iter().map(|other| other.service.clone()));
        if let Err(place) = claimants.binary_search(&claimant) {
            claimants.insert(place, claimant);
        }
    }

    fn withdraw(&mut self, claim: Claim, claimant: &Claimant) {
        let Some(claimants) = self.claims.get_mut(&claim) else {
            return;
        };
        claimants.retain(|other| other != claimant);
        self.dirty
            .extend(claimants.iter().map(|other| other.service.clone()));
        if claimants.is_empty() {
            self.claims.remove(&claim);
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
        name: &ObjectName,
    ) -> (BTreeMap<ServicePortKey, ServicePort>, Vec<Problem>) {
        let mut ports = BTreeMap::new();
        let mut problems = Vec::new();
        let Some(entry) = self.entries.get(name) else {
            return (ports, problems);
        };
        let Some(service) = &entry.service else {
            return (ports, problems);
        };
        for (claim, claimant) in claims(service) {
            let port = &service.ports[claimant.index];
            if let Some((range, occupant)) = self.occupied.get(claim.address) {
                problems.push(Problem::occupied(name, claim, range, occupant));
                continue;
            }
            match self.claims.get(&claim).and_then(|all| all.first()) {
                Some(winner) if *winner != claimant => {
                    problems.push(Problem::taken(&claimant, claim, port, winner));
                    continue;
                }
                _ => {}
            }
            let family = Family::of(claim.address);
            let key = ServicePortKey {
                service: name.clone(),
                port_name: port.name.clone(),
                protocol: port.protocol,
                family,
                port: port.port,
            };
            ports
                .entry(key)
                .or_insert_with(|| with_endpoints(&entry.slices, port, family))
                .frontends
                .insert(Frontend {
                    address: claim.address,
                    port: port.port,
                    kind: FrontendKind::ClusterIp,
                });
        }
        (ports, problems)
    }
}

impl Problem {
    fn occupied(service: &ObjectName, claim: Claim, range: IpNet, occupant: &Occupant) -> Self {
        let node = &occupant.node;
        let whose = match occupant.purpose {
            Purpose::Address => format!("is an address of node {node}"),
            Purpose::Pods => format!("lies in {range}, the pod range of node {node}"),
        };
        let frontend = std::net::SocketAddr::new(claim.address, claim.port);
        let protocol = claim.protocol.name();
        let text = format!(
            "{frontend} {protocol} is not served: it {whose}, whose traffic it would \
             take. Give the Service another clusterIP, or correct the Node"
        );
        Self {
            service: service.clone(),
            text,
        }
    }

    fn taken(
        claimant: &Claimant,
        claim: Claim,
        port: &objects::ServicePort,
        winner: &Claimant,
    ) -> Self {
        let Claim {
            address, protocol, ..
        } = claim;
        let frontend = std::net::SocketAddr::new(address, claim.port);
        let protocol = protocol.name();
        let text = if winner.service == claimant.service {
            format!(
                "port {frontend} {protocol} (named {:?}) stands twice in it; the first is \
                 served. Remove one",
                port.name
            )
        } else {
            let because = match (winner.age, claimant.age) {
                (Age::Unknown, _) => "comes first by name: neither has a creationTimestamp",
                (age, other) if age == other => "comes first by name: both are equally old",
                (_, Age::Unknown) => "has a creationTimestamp, and this Service has none",
                _ => "is older by its creationTimestamp",
            };
            format!(
                "{frontend} {protocol} belongs to Service {}, which {because}. Give one of them \
                 another clusterIP",
                winner.service
            )
        };
        Self {
            service: claimant.service.clone(),
            text,
        }
    }
}

/// The claims of a Service, each with the port that makes it.
fn claims(service: &Service) -> Vec<(Claim, Claimant)> {
    let mut claims = Vec::with_capacity(service.cluster_ips.len() * service.ports.len());
    let addresses = served_addresses(service);
    for (nth, address) in addresses.iter().enumerate() {
        if addresses[..nth].contains(address) {
            continue;
        }
        for (index, port) in service.ports.iter().enumerate() {
            let claim = Claim {
                address: *address,
                port: port.port,
                protocol: port.protocol,
            };
            let claimant = Claimant {
                age: Age::of(service),
                service: service.name.clone(),
                index,
            };
            claims.push((claim, claimant));
        }
    }
    claims
}

/// The smallest key that a Service can have.
fn first_key(service: &ObjectName) -> ServicePortKey {
    ServicePortKey {
        service: service.clone(),
        port_name: String::new(),
        protocol: Protocol::Tcp,
        family: Family::V4,
        port: 0,
    }
}

/// What an endpoint can be used for; of two entries for one endpoint, as happens while it moves
/// from one slice to another, the better one counts.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Condition {
    Ready,
    ServingTerminating,
    NotReady,
    Terminating,
}

impl Condition {
    fn of(endpoint: &SliceEndpoint) -> Self {
        match endpoint {
            SliceEndpoint { ready: true, .. } => Self::Ready,
            SliceEndpoint {
                serving: true,
                terminating: true,
                ..
            } => Self::ServingTerminating,
            SliceEndpoint {
                terminating: true, ..
            } => Self::Terminating,
            _ => Self::NotReady,
        }
    }
}

/// A Service port with the endpoints that the slices have for it, without frontends.
fn with_endpoints(
    slices: &BTreeMap<String, EndpointSlice>,
    port: &objects::ServicePort,
    family: Family,
) -> ServicePort {
    let mut found: BTreeMap<BackendAddress, (Condition, &SliceEndpoint)> = BTreeMap::new();
    for slice in slices.values().filter(|s| s.family == Some(family)) {
        let numbers = slice
            .ports
            .iter()
            .filter(|p| p.name == port.name && p.protocol == port.protocol);
        for number in numbers {
            for endpoint in &slice.endpoints {
                let Some(address) = endpoint.address else {
                    continue;
                };
                let address = BackendAddress {
                    address,
                    port: number.port,
                };
                let condition = Condition::of(endpoint);
                match found.get(&address) {
                    Some((known, _)) if *known <= condition => {}
                    _ => {
                        found.insert(address, (condition, endpoint));
                    }
                }
            }
        }
    }
    let best = match found.values().map(|(condition, _)| *condition).min() {
        Some(best @ (Condition::Ready | Condition::ServingTerminating)) => Some(best),
        _ => None,
    };
    let mut result = ServicePort::default();
    for (address, (condition, endpoint)) in found {
        let backend = Backend {
            state: match condition {
                Condition::Ready | Condition::NotReady => BackendState::Active,
                Condition::ServingTerminating | Condition::Terminating => BackendState::Terminating,
            },
            node: endpoint.node.clone(),
            zone: endpoint.zone.clone(),
            target: endpoint.target.clone(),
        };
        if Some(condition) == best {
            result.backends.insert(address, backend);
            continue;
        }
        let reason = match condition {
            // The ready ones are all in use.
            Condition::Ready | Condition::NotReady => "not ready",
            Condition::ServingTerminating => "terminating",
            Condition::Terminating => "terminating, not serving",
        };
        result
            .unused
            .insert(address, UnusedBackend { backend, reason });
    }
    result
}
