//! Which endpoints of a Service port take new connections on this node: conditions (KEP-752,
//! KEP-1672), topology hints (KEP-2433, KEP-3015) and traffic policies (KEP-2086), as kube-proxy
//! applies them.

use std::collections::BTreeMap;

use super::super::{
    Backend, BackendAddress, BackendState, EndpointSet, ServicePort, ServicePortKey, UnusedBackend,
};
use crate::objects::{EndpointSlice, Hints, SliceEndpoint};

/// Where this node is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub node: &'a str,
    /// Empty: unknown.
    pub zone: &'a str,
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

/// One entry for an endpoint.
#[derive(Clone, Copy, Debug)]
struct Candidate<'a> {
    condition: Condition,
    /// It is on this node.
    local: bool,
    endpoint: &'a SliceEndpoint,
}

impl<'a> Candidate<'a> {
    fn new(endpoint: &'a SliceEndpoint, place: Place<'_>) -> Self {
        Self {
            condition: Condition::of(endpoint),
            local: !endpoint.node.is_empty() && endpoint.node == place.node,
            endpoint,
        }
    }

    /// The lesser one counts. An entry that says that the endpoint is here is preferred, as by
    /// kube-proxy.
    fn rank(&self) -> (Condition, bool) {
        (self.condition, !self.local)
    }

    fn hints(&self) -> Option<&Hints> {
        self.endpoint.hints.as_deref()
    }

    fn is_for_node(&self, place: Place<'_>) -> bool {
        self.hints()
            .is_some_and(|hints| hints.nodes.iter().any(|node| node == place.node))
    }

    fn is_for_zone(&self, place: Place<'_>) -> bool {
        self.hints()
            .is_some_and(|hints| hints.zones.iter().any(|zone| zone == place.zone))
    }
}

/// Which hints are followed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Topology {
    Ignored,
    Node,
    Zone,
}

impl Topology {
    /// Hints are followed only if every ready endpoint has them and one is for us: else some
    /// would be used by nobody, or we would have none.
    fn of(found: &BTreeMap<BackendAddress, Candidate<'_>>, place: Place<'_>) -> Self {
        let ready = || {
            found
                .values()
                .filter(|candidate| candidate.condition == Condition::Ready)
        };
        let all = |has: fn(&Hints) -> bool| ready().all(|c| c.hints().is_some_and(has));
        if all(|hints| !hints.nodes.is_empty()) && ready().any(|c| c.is_for_node(place)) {
            Self::Node
        } else if all(|hints| !hints.zones.is_empty()) && ready().any(|c| c.is_for_zone(place)) {
            Self::Zone
        } else {
            Self::Ignored
        }
    }

    fn allows(self, candidate: &Candidate<'_>, place: Place<'_>) -> bool {
        match self {
            Self::Ignored => true,
            Self::Node => candidate.is_for_node(place),
            Self::Zone => candidate.is_for_zone(place),
        }
    }
}

/// Gives a Service port the endpoints that the slices have for it. Its frontends say which sets
/// are used.
pub(super) fn fill(
    port: &mut ServicePort,
    key: &ServicePortKey,
    slices: &BTreeMap<String, EndpointSlice>,
    place: Place<'_>,
) {
    let found = candidates(key, slices, place);
    let (uses_cluster, uses_local) = (
        port.uses(EndpointSet::Cluster),
        port.uses(EndpointSet::Local),
    );
    let topology = Topology::of(&found, place);
    // The best there is, of all endpoints and of those on this node; the worse conditions serve
    // nobody.
    let best = |local: bool| {
        found
            .values()
            .filter(|candidate| candidate.local || !local)
            .map(|candidate| candidate.condition)
            .min()
            .filter(|c| matches!(c, Condition::Ready | Condition::ServingTerminating))
    };
    let (best, best_local) = (best(false), best(true));
    for (address, candidate) in &found {
        let Candidate {
            condition,
            local,
            endpoint,
        } = *candidate;
        let is_best = best == Some(condition);
        let allowed = condition != Condition::Ready || topology.allows(candidate, place);
        let backend = Backend {
            state: match condition {
                Condition::Ready | Condition::NotReady => BackendState::Active,
                Condition::ServingTerminating | Condition::Terminating => BackendState::Terminating,
            },
            cluster: uses_cluster && is_best && allowed,
            local: uses_local && local && best_local == Some(condition),
            node: endpoint.node.clone(),
            zone: endpoint.zone.clone(),
            target: endpoint.target.clone(),
        };
        if backend.cluster || backend.local {
            port.backends.insert(*address, backend);
            continue;
        }
        let elsewhere = !uses_cluster && !local;
        let reason = match (condition, topology) {
            (Condition::NotReady, _) => "not ready",
            (Condition::Terminating, _) => "terminating, not serving",
            _ if elsewhere => "not on this node (traffic policy Local)",
            (Condition::ServingTerminating, _) => "terminating",
            (Condition::Ready, Topology::Node) => "another node (hints)",
            (Condition::Ready, _) => "another zone (hints)",
        };
        port.unused
            .insert(*address, UnusedBackend { backend, reason });
    }
}

/// The endpoints of a Service port, each once.
fn candidates<'a>(
    key: &ServicePortKey,
    slices: &'a BTreeMap<String, EndpointSlice>,
    place: Place<'_>,
) -> BTreeMap<BackendAddress, Candidate<'a>> {
    let mut found: BTreeMap<BackendAddress, Candidate<'a>> = BTreeMap::new();
    for slice in slices.values().filter(|s| s.family == Some(key.family)) {
        let numbers = slice
            .ports
            .iter()
            .filter(|p| p.name == key.port_name && p.protocol == key.protocol);
        for number in numbers {
            for endpoint in &slice.endpoints {
                let Some(address) = endpoint.address else {
                    continue;
                };
                let address = BackendAddress {
                    address,
                    port: number.port,
                };
                let candidate = Candidate::new(endpoint, place);
                match found.get(&address) {
                    Some(known) if known.rank() <= candidate.rank() => {}
                    _ => {
                        found.insert(address, candidate);
                    }
                }
            }
        }
    }
    found
}
