//! Worlds of objects: made and changed at random, and what follows from them by a plain reference.
//! Knows the model's types, not the model, and nothing of maps; tests of other parts include this
//! folder with `#[path]`.

#![allow(dead_code, reason = "tests that include this use a part of it")]

pub mod random;
pub mod reference;

use std::collections::BTreeMap;

use ipnet::IpNet;
use weir_agent::{
    model::{HostPort, ModelOptions, PodInterface},
    objects::{LabelSelector, Object, ObjectKey},
    source::Change,
};

/// Everything there is.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub objects: BTreeMap<ObjectKey, Object>,
    /// In the order in which the pods came.
    pub host_ports: Vec<(PodInterface, Vec<HostPort>)>,
    /// Name of this node.
    pub node: String,
    /// Services with this label are left to somebody else.
    pub excluded_label: String,
    pub excluded_cidrs: Vec<IpNet>,
}

/// Name of this node in every random world.
pub const THIS_NODE: &str = "n1";
/// Services with this label are excluded.
pub const EXCLUDED_LABEL: &str = "excluded";

/// What changes a world.
#[derive(Clone, Debug)]
pub enum Step {
    Object(Change),
    HostPorts(PodInterface, Option<Vec<HostPort>>),
}

impl World {
    /// Without objects.
    pub fn random() -> Self {
        Self {
            node: THIS_NODE.to_owned(),
            excluded_label: EXCLUDED_LABEL.to_owned(),
            excluded_cidrs: vec![
                "10.0.0.5/32".parse().unwrap(),
                "fd00::5/128".parse().unwrap(),
            ],
            ..Self::default()
        }
    }

    /// What a model of this world is told.
    pub fn options(&self) -> ModelOptions {
        ModelOptions {
            node_name: self.node.clone(),
            exclude_services: LabelSelector::parse(&self.excluded_label).ok(),
            exclude_cidrs: self.excluded_cidrs.clone(),
            cluster_ips_outside: false,
        }
    }

    pub fn follow(&mut self, step: &Step) {
        match step.clone() {
            Step::Object(Change::Upsert(object)) => {
                self.objects.insert(object.key(), object);
            }
            Step::Object(Change::Delete(key)) => {
                self.objects.remove(&key);
            }
            Step::HostPorts(interface, ports) => {
                let ports = ports.filter(|ports| !ports.is_empty());
                let known = self.host_ports.iter().position(|(i, _)| *i == interface);
                match (known, ports) {
                    (Some(at), Some(ports)) => self.host_ports[at].1 = ports,
                    (Some(at), None) => drop(self.host_ports.remove(at)),
                    (None, Some(ports)) => self.host_ports.push((interface, ports)),
                    (None, None) => {}
                }
            }
        }
    }
}
