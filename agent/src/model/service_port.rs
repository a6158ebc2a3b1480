//! The desired state of Service ports: what the model says and the service tables hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;
use weir_common::service::{endpoint_set, scope};

use crate::objects::{Family, ObjectName, Protocol};

/// Whose a Service port is.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Owner {
    /// A Service.
    Service(ObjectName),
    /// A pod of this node with a `hostPort`.
    HostPort(Box<PodInterface>),
}

impl Owner {
    /// The Service, if it is one.
    pub const fn service(&self) -> Option<&ObjectName> {
        match self {
            Self::Service(name) => Some(name),
            Self::HostPort(_) => None,
        }
    }

    /// Name of the Service or the pod.
    pub fn name(&self) -> &ObjectName {
        match self {
            Self::Service(name) => name,
            Self::HostPort(interface) => &interface.pod,
        }
    }
}

impl From<ObjectName> for Owner {
    fn from(service: ObjectName) -> Self {
        Self::Service(service)
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "Service {name}"),
            Self::HostPort(interface) => write!(f, "HostPort of {interface}"),
        }
    }
}

/// An interface of a pod of this node, as the CNI calls name it. A pod that takes the place of
/// another of the same name has another container.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PodInterface {
    /// The pod; its parts are empty where the runtime does not tell them.
    pub pod: ObjectName,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

impl fmt::Display for PodInterface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pod.name.is_empty() {
            write!(f, "container {}", self.container_id)
        } else {
            write!(f, "pod {}", self.pod)
        }
    }
}

/// A port of the node that leads to a pod (`ports[].hostPort` of a container, `portMappings` of the
/// CNI).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostPort {
    /// Address of the node; `None`: all. The unspecified address stands for all of its family.
    pub host_ip: Option<IpAddr>,
    /// Port of the node, not 0.
    pub host_port: u16,
    /// Protocol.
    pub protocol: Protocol,
    /// Addresses of the pod, one of each family that it has.
    pub addresses: Vec<IpAddr>,
    /// Port of the pod, not 0.
    pub container_port: u16,
}

/// Identity of a Service port in one family: what one number in `SERVICE_STATE` stands for.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ServicePortKey {
    /// Whose it is.
    pub owner: Owner,
    /// Name of the port, or empty. Of a HostPort the `hostIP`, or empty.
    pub port_name: String,
    /// Protocol.
    pub protocol: Protocol,
    /// Family.
    pub family: Family,
    /// Port of the Service, or host port: tells unnamed ports apart.
    pub port: u16,
}

/// What a frontend is. The order is that in which kinds with the same address take precedence.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[allow(missing_docs, reason = "the names are Kubernetes' own")]
pub enum FrontendKind {
    ClusterIp,
    NodePort,
    ExternalIp,
    LoadBalancer,
    HostPort,
}

impl FrontendKind {
    /// As Kubernetes writes it: ClusterIP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::ExternalIp => "ExternalIP",
            Self::LoadBalancer => "LoadBalancer",
            Self::HostPort => "HostPort",
        }
    }
}

/// Where the clients of a frontend are.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Scope {
    /// On this node: its pods and its own processes.
    Inside,
    /// Elsewhere; also pods and processes of other nodes.
    Outside,
}

impl Scope {
    /// Its number in `FRONTENDS_*`.
    pub const fn number(self) -> u8 {
        match self {
            Self::Inside => scope::INSIDE,
            Self::Outside => scope::OUTSIDE,
        }
    }

    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inside => "inside",
            Self::Outside => "outside",
        }
    }
}

/// The endpoints that a traffic policy asks for.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum EndpointSet {
    /// Policy `Cluster`.
    Cluster,
    /// Policy `Local`.
    Local,
}

impl EndpointSet {
    /// All, in the order of their numbers.
    pub const ALL: [Self; endpoint_set::COUNT as usize] = [Self::Cluster, Self::Local];

    /// Its number in `SERVICE_STATE`.
    pub const fn number(self) -> u32 {
        match self {
            Self::Cluster => endpoint_set::CLUSTER,
            Self::Local => endpoint_set::LOCAL,
        }
    }

    /// As Kubernetes writes the policy.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        }
    }
}

/// An address and port that clients of a Service port use.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Frontend {
    /// Address, of the key's family; `None`: every address of this node.
    pub address: Option<IpAddr>,
    /// Port.
    pub port: u16,
    /// Kind.
    pub kind: FrontendKind,
    /// For whom.
    pub scope: Scope,
    /// Where it leads.
    pub set: EndpointSet,
}

impl Frontend {
    /// A ClusterIP with `internalTrafficPolicy: Cluster`.
    pub const fn cluster_ip(address: IpAddr, port: u16) -> Self {
        Self {
            address: Some(address),
            port,
            kind: FrontendKind::ClusterIp,
            scope: Scope::Inside,
            set: EndpointSet::Cluster,
        }
    }
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

/// An endpoint.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Backend {
    /// State.
    pub state: BackendState,
    /// It is in the set for policy `Cluster`; never if no frontend leads to that set.
    pub cluster: bool,
    /// It is in the set for policy `Local`; never if no frontend leads to that set.
    pub local: bool,
    /// Node, or empty.
    pub node: String,
    /// Zone, or empty.
    pub zone: String,
    /// Pod behind it (namespace/name), or empty.
    pub target: String,
}

impl Backend {
    /// A ready one in the set for policy `Cluster`, of which nothing else is known.
    pub const fn active() -> Self {
        Self {
            state: BackendState::Active,
            cluster: true,
            local: false,
            node: String::new(),
            zone: String::new(),
            target: String::new(),
        }
    }

    /// Whether it is in a set.
    pub const fn is_in(&self, set: EndpointSet) -> bool {
        match set {
            EndpointSet::Cluster => self.cluster,
            EndpointSet::Local => self.local,
        }
    }
}

/// An endpoint that takes no new connections, and why.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UnusedBackend {
    /// As a used one would be, in no set.
    pub backend: Backend,
    /// For people: "not ready", "terminating" …
    pub reason: &'static str,
}

/// Desired state of one Service port.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ServicePort {
    /// Frontends; never empty in a desired state.
    pub frontends: BTreeSet<Frontend>,
    /// Endpoints for new connections, each in at least one set, ordered by address and port: the
    /// order is the same on every node.
    pub backends: BTreeMap<BackendAddress, Backend>,
    /// Endpoints that are not used. Not part of what reaches the kernel.
    pub unused: BTreeMap<BackendAddress, UnusedBackend>,
    /// How long a client keeps its endpoint after its last connection, seconds, 1 to 86400; `None`:
    /// `sessionAffinity` is off.
    pub affinity: Option<u32>,
    /// The clients that its frontends of kind `LoadBalancer` serve (`loadBalancerSourceRanges`), inside and
    /// outside, of the key's family and truncated; `None`: all. None if there is no such frontend.
    pub source_ranges: Option<BTreeSet<IpNet>>,
}

impl ServicePort {
    /// Whether a frontend leads to the set.
    pub fn uses(&self, set: EndpointSet) -> bool {
        self.frontends.iter().any(|frontend| frontend.set == set)
    }

    /// Every endpoint that the slices have for it, used or not.
    pub fn endpoints(&self) -> impl Iterator<Item = &BackendAddress> {
        self.backends.keys().chain(self.unused.keys())
    }

    /// Whether the slices have an endpoint for it, used or not.
    pub fn has_endpoint(&self, endpoint: &BackendAddress) -> bool {
        self.backends.contains_key(endpoint) || self.unused.contains_key(endpoint)
    }
}
