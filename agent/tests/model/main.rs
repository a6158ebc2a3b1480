//! Tests of the model from outside: golden cases (objects in, desired state out) and a comparison
//! with a plain reference after random changes.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod golden;
mod host_ports;
mod property;
mod render;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use weir_agent::{
    model::{BackendAddress, Delta, HealthCheck, Model, Node, ServicePort, ServicePortKey},
    objects::ObjectName,
};

/// What somebody knows who has followed all deltas.
#[derive(Debug, Default, PartialEq)]
struct Mirror {
    services: BTreeMap<ServicePortKey, ServicePort>,
    nodes: BTreeMap<String, Node>,
    health_checks: BTreeMap<ObjectName, HealthCheck>,
}

impl Mirror {
    /// Takes a delta in, and fails when it says nothing new, or other endpoints are said to be gone
    /// than those that are.
    fn follow(&mut self, delta: Delta) {
        assert_eq!(delta.gone_endpoints, self.gone_after(&delta));
        for (key, port) in delta.services {
            assert_ne!(self.services.get(&key), port.as_ref(), "{key:?} is no news");
            match port {
                Some(port) => self.services.insert(key, port),
                None => self.services.remove(&key),
            };
        }
        for (name, node) in delta.nodes {
            assert_ne!(self.nodes.get(&name), node.as_ref(), "{name} is no news");
            match node {
                Some(node) => self.nodes.insert(name, node),
                None => self.nodes.remove(&name),
            };
        }
        for (name, check) in delta.health_checks {
            assert_ne!(self.health_checks.get(&name), check.as_ref(), "{name}");
            match check {
                Some(check) => self.health_checks.insert(name, check),
                None => self.health_checks.remove(&name),
            };
        }
    }

    /// Endpoints that were listed for a Service port before, and are not where it is still there.
    fn gone_after(&self, delta: &Delta) -> BTreeMap<ServicePortKey, Vec<BackendAddress>> {
        let listed = |port: &ServicePort| -> BTreeSet<BackendAddress> {
            let used = port.backends.keys();
            used.chain(port.unused.keys()).copied().collect()
        };
        let mut gone = BTreeMap::new();
        for (key, port) in &delta.services {
            if let (Some(before), Some(after)) = (self.services.get(key), port) {
                let lost: Vec<_> = listed(before).difference(&listed(after)).copied().collect();
                if !lost.is_empty() {
                    gone.insert(key.clone(), lost);
                }
            }
        }
        gone
    }

    /// What the model says when it is asked.
    fn of(model: &Model) -> Self {
        Self {
            services: model
                .services()
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect(),
            nodes: model
                .nodes()
                .map(|(name, node)| (name.to_owned(), node.clone()))
                .collect(),
            health_checks: model.health_checks().clone(),
        }
    }
}
