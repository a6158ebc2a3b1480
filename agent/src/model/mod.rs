//! From objects to desired state, without I/O, clock or maps: this is where Kubernetes semantics
//! live. The cost of a change depends on the change, not on the size of the cluster.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::objects::{Family, ObjectName, Protocol};

/// Identity of a Service port in one family: what one row of `SERVICE_STATE` stands for.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ServicePortKey {
    /// The Service.
    pub service: ObjectName,
    /// Name of the port, or empty.
    pub port_name: String,
    /// Protocol.
    pub protocol: Protocol,
    /// Family.
    pub family: Family,
    /// Port of the Service: tells unnamed ports apart.
    pub port: u16,
}

/// What a frontend is.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[allow(missing_docs, reason = "the names are Kubernetes' own")]
pub enum FrontendKind {
    ClusterIp,
}

/// An address and port that clients of a Service port use.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Frontend {
    /// Address, of the key's family.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// Kind.
    pub kind: FrontendKind,
}

/// State of an endpoint that is used.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum BackendState {
    /// Ready.
    Active,
    /// Serving and terminating, used because nothing is ready.
    Terminating,
}

/// Address and port of an endpoint: its identity within a Service port.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BackendAddress {
    /// Address, of the key's family.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
}

/// An endpoint that takes new connections.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Backend {
    /// State.
    pub state: BackendState,
    /// Node, or empty.
    pub node: String,
    /// Zone, or empty.
    pub zone: String,
    /// Pod behind it (namespace/name), or empty.
    pub target: String,
}

/// An endpoint that takes no new connections, and why.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UnusedBackend {
    /// As a used one would be.
    pub backend: Backend,
    /// For people: "not ready", "terminating" …
    pub reason: &'static str,
}

/// Desired state of one Service port.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ServicePort {
    /// Frontends; never empty in a desired state.
    pub frontends: BTreeSet<Frontend>,
    /// Endpoints for new connections, ordered by address and port: the order is the same on every node.
    pub backends: BTreeMap<BackendAddress, Backend>,
    /// Endpoints that are not used. Not part of what reaches the kernel.
    pub unused: BTreeMap<BackendAddress, UnusedBackend>,
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
}
