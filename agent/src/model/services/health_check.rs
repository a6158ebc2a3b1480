//! What a load balancer may ask a node for a Service with `externalTrafficPolicy: Local`
//! (`spec.healthCheckNodePort`): how many endpoints are ready there. Counted as kube-proxy does.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    super::ModelOptions,
    claims::{has_family, is_served},
};
use crate::objects::{EndpointSlice, Family, Service, ServiceType, TrafficPolicy};

/// The health check of a Service on this node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`, 1 to 65535.
    pub port: u16,
    /// Endpoints of this node that are ready, each address once; `None` if the Service is not in
    /// IPv4. Those that terminate do not count, though traffic goes on to them.
    pub v4: Option<usize>,
    /// As `v4`, of IPv6.
    pub v6: Option<usize>,
}

impl HealthCheck {
    /// The count of a family; of the other one where the Service is in that alone.
    #[must_use]
    pub fn ready_endpoints(&self, family: Family) -> usize {
        let (first, second) = match family {
            Family::V4 => (self.v4, self.v6),
            Family::V6 => (self.v6, self.v4),
        };
        first.or(second).unwrap_or_default()
    }

    /// `None` if the Service has none (`NeedsHealthCheck` of Kubernetes' API helpers), or is left
    /// to somebody else.
    pub(super) fn of(
        service: &Service,
        slices: &BTreeMap<String, EndpointSlice>,
        node: &str,
        options: &ModelOptions,
    ) -> Option<Self> {
        let asked = service.service_type == ServiceType::LoadBalancer
            && service.external_policy == TrafficPolicy::Local
            && service.health_check_node_port != 0
            && !service.cluster_ips.is_empty();
        if !asked || !is_served(service, options) {
            return None;
        }
        let count = |family| has_family(service, family).then(|| ready(slices, family, node));
        Some(Self {
            port: service.health_check_node_port,
            v4: count(Family::V4),
            v6: count(Family::V6),
        })
    }
}

/// Addresses of ready endpoints on a node (`EndpointsMap.LocalReadyEndpoints` of kube-proxy).
fn ready(slices: &BTreeMap<String, EndpointSlice>, family: Family, node: &str) -> usize {
    slices
        .values()
        // Without ports nothing is served.
        .filter(|slice| slice.family == Some(family) && !slice.ports.is_empty())
        .flat_map(|slice| &slice.endpoints)
        .filter(|endpoint| endpoint.ready && !node.is_empty() && endpoint.node == node)
        .filter_map(|endpoint| endpoint.address)
        .collect::<BTreeSet<_>>()
        .len()
}
