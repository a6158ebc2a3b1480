//! From objects to desired state, without I/O, clock or maps: this is where Kubernetes semantics
//! live. The cost of a change depends on the change, not on the size of the cluster.
//!
//! The agent's event loop applies every change of the source to a [`Model`] and hands the
//! [`Delta`] to the datapath and to the node manager.

pub mod maglev;
mod names;
mod occupied;
mod service_port;
mod services;

pub use names::AddressOwner;
pub use service_port::{
    Backend, BackendAddress, BackendState, EndpointSet, Frontend, FrontendKind, HostPort, Owner,
    PodInterface, Scope, ServicePort, ServicePortKey, UnusedBackend,
};
pub use services::{HealthCheck, Problem};

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::{
    objects::{self, Kind, LabelSelector, Object, ObjectKey, ObjectName},
    source::Change,
};

/// What the model is told once.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ModelOptions {
    /// Name of this node's Node object.
    pub node_name: String,
    /// Services that are left to somebody else.
    pub exclude_services: Option<LabelSelector>,
    /// Addresses of Services that are left to somebody else.
    pub exclude_cidrs: Vec<IpNet>,
    /// ClusterIPs are served for clients outside, too.
    pub cluster_ips_outside: bool,
}

/// Desired state that belongs to a node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Node {
    /// InternalIPs, then ExternalIPs.
    pub addresses: Vec<IpAddr>,
    /// Pod ranges.
    pub pod_cidrs: Vec<IpNet>,
    /// Label `topology.kubernetes.io/zone`, or empty.
    pub zone: String,
}

/// What has changed since the last [`Model::take_delta`]: `None` means gone.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Delta {
    /// Service ports.
    pub services: BTreeMap<ServicePortKey, Option<ServicePort>>,
    /// Nodes, this one included.
    pub nodes: BTreeMap<String, Option<Node>>,
    /// Endpoints that Service ports which are still served had, used or not, and that no slice has any
    /// more. They follow from `services` and what was there before.
    pub gone_endpoints: BTreeMap<ServicePortKey, Vec<BackendAddress>>,
    /// What load balancers may ask this node for, by Service.
    pub health_checks: BTreeMap<ObjectName, Option<HealthCheck>>,
}

impl Delta {
    /// Whether nothing has changed.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && self.nodes.is_empty() && self.health_checks.is_empty()
    }
}

/// All objects of the source, and the state that they ask for.
///
/// Changes may come in any order: an EndpointSlice before its Service, a Pod before its Node.
#[derive(Debug, Default)]
pub struct Model {
    services: services::Services,
    nodes: BTreeMap<String, Node>,
    /// What was last delivered of the nodes that have changed since.
    nodes_before: BTreeMap<String, Option<Node>>,
    /// Nodes that are being deleted, or will be.
    leaving: BTreeSet<String>,
    pods: BTreeMap<ObjectName, objects::Pod>,
    namespaces: BTreeMap<ObjectName, objects::Namespace>,
    names: names::Names,
}

impl Model {
    /// Without objects.
    pub fn new(options: ModelOptions) -> Self {
        Self {
            services: services::Services::new(options),
            ..Self::default()
        }
    }

    /// Takes one change in. Deleting what is not there changes nothing.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Upsert(Object::Service(service)) => {
                let name = service.name.clone();
                self.set_service(name, Some(service));
            }
            Change::Upsert(Object::EndpointSlice(slice)) => self.services.set_slice(slice),
            Change::Upsert(Object::Node(node)) => {
                let name = node.name.name.clone();
                if node.leaving {
                    self.leaving.insert(name.clone());
                } else {
                    self.leaving.remove(&name);
                }
                self.set_node(name, Some(Node::from(node)));
            }
            Change::Upsert(Object::Pod(pod)) => self.set_pod(pod.name.clone(), Some(pod)),
            Change::Upsert(Object::Namespace(namespace)) => {
                self.namespaces.insert(namespace.name.clone(), namespace);
            }
            Change::Delete(ObjectKey { kind, name }) => match kind {
                Kind::Service => self.set_service(name, None),
                Kind::EndpointSlice => self.services.remove_slice(&name),
                Kind::Node => {
                    self.leaving.remove(&name.name);
                    self.set_node(name.name, None);
                }
                Kind::Pod => self.set_pod(name, None),
                Kind::Namespace => {
                    self.namespaces.remove(&name);
                }
            },
        }
    }

    /// The host ports of a pod of this node; `None`: the pod is gone. Ports that a NodePort or an
    /// older pod has are not served, nor those at an address that this node's Node object does not
    /// have and that is no loopback address; both stand among the problems.
    pub fn set_host_ports(&mut self, owner: PodInterface, host_ports: Option<Vec<HostPort>>) {
        self.services.set_host_ports(owner, host_ports);
    }

    /// What differs from the state after the last call; empty when changes undid each other.
    ///
    /// The work is done here, once for a Service however many of its objects have changed.
    pub fn take_delta(&mut self) -> Delta {
        let nodes = std::mem::take(&mut self.nodes_before)
            .into_iter()
            .filter(|(name, before)| self.nodes.get(name) != before.as_ref())
            .map(|(name, _)| {
                let node = self.nodes.get(&name).cloned();
                (name, node)
            })
            .collect();
        let services = self.services.take_delta();
        Delta {
            services: services.ports,
            nodes,
            gone_endpoints: services.gone_endpoints,
            health_checks: services.health_checks,
        }
    }

    /// The desired state of all Service ports as of the last [`Model::take_delta`].
    pub fn services(&self) -> impl Iterator<Item = (&ServicePortKey, &ServicePort)> {
        self.services.desired().iter()
    }

    /// The desired state of one Service port as of the last [`Model::take_delta`].
    pub fn service(&self, key: &ServicePortKey) -> Option<&ServicePort> {
        self.services.desired().get(key)
    }

    /// All nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(name, node)| (name.as_str(), node))
    }

    /// One node.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// Whether a node is being deleted, or will be; false when there is no such Node.
    pub fn is_leaving(&self, node: &str) -> bool {
        self.leaving.contains(node)
    }

    /// What load balancers may ask this node for, by Service, as of the last [`Model::take_delta`].
    pub fn health_checks(&self) -> &BTreeMap<ObjectName, HealthCheck> {
        self.services.health_checks()
    }

    /// All pods, by namespace and name.
    pub fn pods(&self) -> impl Iterator<Item = &objects::Pod> {
        self.pods.values()
    }

    /// One pod.
    pub fn pod(&self, name: &ObjectName) -> Option<&objects::Pod> {
        self.pods.get(name)
    }

    /// All namespaces, by name.
    pub fn namespaces(&self) -> impl Iterator<Item = &objects::Namespace> {
        self.namespaces.values()
    }

    /// Who has an address: a node, else a pod with an address of its own, else a Service that is
    /// served. Where objects contradict each other, the first by name.
    pub fn name_of(&self, address: IpAddr) -> Option<&AddressOwner> {
        self.names.get(address)
    }

    /// What cannot be served as the objects ask for, as of the last [`Model::take_delta`].
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.services.problems()
    }

    /// Those of one Service or pod.
    pub fn problems_of(&self, owner: &Owner) -> &[Problem] {
        self.services.problems_of(owner)
    }

    /// Services and pods of which something cannot be served, in the order of their names.
    pub fn owners_with_problems(&self) -> impl Iterator<Item = &Owner> {
        self.services.owners_with_problems()
    }

    /// Why no port of a Service is served at all, by what its object says; `None` if there is no
    /// such Service.
    pub fn why_not_served(&self, name: &ObjectName) -> Option<&'static str> {
        self.services.why_not_served(name)
    }

    /// How many objects of each kind there are.
    pub fn object_counts(&self) -> BTreeMap<Kind, usize> {
        BTreeMap::from([
            (Kind::Service, self.services.service_count()),
            (Kind::EndpointSlice, self.services.slice_count()),
            (Kind::Node, self.nodes.len()),
            (Kind::Pod, self.pods.len()),
            (Kind::Namespace, self.namespaces.len()),
        ])
    }

    fn set_service(&mut self, name: ObjectName, service: Option<objects::Service>) {
        let owner = AddressOwner::Service(name.clone());
        let addresses = |service: Option<&objects::Service>| {
            service.map_or_else(Vec::new, |service| self.services.addresses(service))
        };
        let before = addresses(self.services.service(&name));
        let after = addresses(service.as_ref());
        self.names.replace(&owner, &before, &after);
        self.services.set_service(name, service);
    }

    fn set_node(&mut self, name: String, node: Option<Node>) {
        let before = match &node {
            Some(node) => self.nodes.insert(name.clone(), node.clone()),
            None => self.nodes.remove(&name),
        };
        self.names.replace(
            &AddressOwner::Node(name.clone()),
            before.as_ref().map_or(&[], |node| &node.addresses),
            node.as_ref().map_or(&[], |node| &node.addresses),
        );
        self.services
            .set_node(&name, before.as_ref(), self.nodes.get(&name));
        self.nodes_before.entry(name).or_insert(before);
    }

    fn set_pod(&mut self, name: ObjectName, pod: Option<objects::Pod>) {
        fn own_addresses(pod: &objects::Pod) -> &[IpAddr] {
            if pod.host_network { &[] } else { &pod.ips }
        }
        self.names.replace(
            &AddressOwner::Pod(name.clone()),
            self.pods.get(&name).map_or(&[], own_addresses),
            pod.as_ref().map_or(&[], own_addresses),
        );
        match pod {
            Some(pod) => self.pods.insert(name, pod),
            None => self.pods.remove(&name),
        };
    }
}

/// Label of a node that names its zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

impl From<objects::Node> for Node {
    fn from(mut node: objects::Node) -> Self {
        let mut addresses = node.internal_ips;
        for address in node.external_ips {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        Self {
            addresses,
            pod_cidrs: node.pod_cidrs,
            zone: node.labels.remove(ZONE_LABEL).unwrap_or_default(),
        }
    }
}
