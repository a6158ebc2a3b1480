//! Tests of the model from outside: golden cases (objects in, desired state out) and a comparison
//! with a plain reference after random changes.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod golden;
mod host_ports;
mod property;
mod render;
mod world;

use std::collections::BTreeMap;

use weir_agent::model::{Delta, Model, Node, ServicePort, ServicePortKey};

/// What somebody knows who has followed all deltas.
#[derive(Debug, Default, PartialEq)]
struct Mirror {
    services: BTreeMap<ServicePortKey, ServicePort>,
    nodes: BTreeMap<String, Node>,
}

impl Mirror {
    /// Takes a delta in, and fails when it says nothing new.
    fn follow(&mut self, delta: Delta) {
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
        }
    }
}
