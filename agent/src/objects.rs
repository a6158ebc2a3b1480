//! Kubernetes objects reduced to what Weir uses. Sources make them from `k8s-openapi` types as they are
//! decoded, so that a large cluster is held in little memory; the model reads nothing else.

mod convert;
mod selector;
mod socket_translation;
mod source_ranges;

pub use convert::InvalidObject;
pub use selector::{LabelSelector, SelectorError};
pub use socket_translation::{SOCKET_TRANSLATION, SocketTranslation};
pub use source_ranges::SourceRanges;

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

/// Namespace and name; the namespace is empty for cluster-scoped objects.
#[derive(Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ObjectName {
    /// Namespace, or empty.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ObjectName {
    /// Namespace of objects that do not name one.
    pub const DEFAULT_NAMESPACE: &'static str = "default";

    /// From its parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl std::fmt::Display for ObjectName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// Kinds of objects that a source delivers.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[allow(missing_docs, reason = "the names are Kubernetes' own")]
pub enum Kind {
    Service,
    EndpointSlice,
    Node,
    Pod,
    Namespace,
}

impl Kind {
    /// As Kubernetes writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::Namespace => "Namespace",
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Identity of an object: its kind and name.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ObjectKey {
    /// Kind.
    pub kind: Kind,
    /// Namespace and name.
    pub name: ObjectName,
}

impl std::fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// One object.
#[derive(Clone, Debug, Eq, PartialEq)]
#[allow(missing_docs, reason = "the names are Kubernetes' own")]
pub enum Object {
    Service(Service),
    EndpointSlice(EndpointSlice),
    Node(Node),
    Pod(Pod),
    Namespace(Namespace),
}

impl Object {
    /// Its identity.
    pub fn key(&self) -> ObjectKey {
        let (kind, name) = match self {
            Self::Service(o) => (Kind::Service, &o.name),
            Self::EndpointSlice(o) => (Kind::EndpointSlice, &o.name),
            Self::Node(o) => (Kind::Node, &o.name),
            Self::Pod(o) => (Kind::Pod, &o.name),
            Self::Namespace(o) => (Kind::Namespace, &o.name),
        };
        ObjectKey {
            kind,
            name: name.clone(),
        }
    }
}

/// Layer-4 protocol of a port.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[allow(missing_docs, reason = "the names are Kubernetes' own")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// IANA number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => weir_common::protocol::TCP,
            Self::Udp => weir_common::protocol::UDP,
            Self::Sctp => weir_common::protocol::SCTP,
        }
    }

    /// As Kubernetes writes it: TCP, UDP, SCTP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// Address family.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// As Kubernetes writes it: IPv4, IPv6.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// `v1.Service`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `metadata.creationTimestamp`, in seconds since 1970.
    pub created: Option<i64>,
    /// `spec.type`.
    pub service_type: ServiceType,
    /// `spec.clusterIPs` (or `clusterIP`) that are addresses. Empty for headless Services.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` whose `ipMode` is VIP or absent.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.healthCheckNodePort`, or 0. It means something for type LoadBalancer with
    /// `externalTrafficPolicy: Local` only.
    pub health_check_node_port: u16,
    /// `spec.loadBalancerSourceRanges`.
    pub source_ranges: SourceRanges,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// `spec.sessionAffinity: ClientIP`: its `timeoutSeconds`, 1 to 86400.
    pub affinity: Option<u32>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
}

/// `spec.internalTrafficPolicy` or `spec.externalTrafficPolicy` of a Service.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum TrafficPolicy {
    /// Endpoints everywhere.
    #[default]
    Cluster,
    /// Endpoints of the node where the traffic is.
    Local,
}

/// `spec.type` of a Service.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[allow(missing_docs, reason = "the names are Kubernetes' own")]
pub enum ServiceType {
    #[default]
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalName,
}

/// One of `spec.ports` of a Service.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServicePort {
    /// `name`, or empty.
    pub name: String,
    /// `protocol`.
    pub protocol: Protocol,
    /// `port`.
    pub port: u16,
    /// `nodePort`, or 0.
    pub node_port: u16,
}

/// `discovery.k8s.io/v1 EndpointSlice`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EndpointSlice {
    /// Namespace and name of the slice.
    pub name: ObjectName,
    /// Label `kubernetes.io/service-name`, or empty.
    pub service: String,
    /// `addressType`; `None` for FQDN, which is not served.
    pub family: Option<Family>,
    /// `endpoints`.
    pub endpoints: Vec<SliceEndpoint>,
    /// `ports`: those with a number.
    pub ports: Vec<SlicePort>,
}

/// One of `endpoints` of an EndpointSlice.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SliceEndpoint {
    /// `addresses[0]` parsed (kube-proxy uses the first only); `None` when it is not of the slice's family.
    pub address: Option<IpAddr>,
    /// `conditions.ready`; absent means true.
    pub ready: bool,
    /// `conditions.serving`; absent means true.
    pub serving: bool,
    /// `conditions.terminating`; absent means false.
    pub terminating: bool,
    /// `nodeName`, or empty.
    pub node: String,
    /// `zone`, or empty.
    pub zone: String,
    /// `targetRef` as namespace/name, or empty.
    pub target: String,
    /// `hints`; `None` without any.
    pub hints: Option<Box<Hints>>,
}

/// `hints` of an endpoint: who should use it (KEP-2433, KEP-3015).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Hints {
    /// `forNodes`: names of nodes.
    pub nodes: Vec<String>,
    /// `forZones`: names of zones.
    pub zones: Vec<String>,
}

/// One of `ports` of an EndpointSlice.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SlicePort {
    /// `name`, or empty.
    pub name: String,
    /// `protocol`.
    pub protocol: Protocol,
    /// `port`.
    pub port: u16,
}

/// `v1.Node`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Node {
    /// Name (namespace empty).
    pub name: ObjectName,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `status.addresses` of type InternalIP.
    pub internal_ips: Vec<IpAddr>,
    /// `status.addresses` of type ExternalIP.
    pub external_ips: Vec<IpAddr>,
    /// `spec.podCIDRs` (or `podCIDR`), truncated to the network.
    pub pod_cidrs: Vec<IpNet>,
    /// It is being deleted (`metadata.deletionTimestamp`), or will be (a taint with the key
    /// `ToBeDeletedByClusterAutoscaler`): load balancers should send it nothing new (KEP-3836).
    pub leaving: bool,
}

/// `v1.Pod`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Pod {
    /// Namespace and name.
    pub name: ObjectName,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `spec.nodeName`, or empty.
    pub node: String,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `status.podIPs` (or `podIP`). Empty once the pod has finished: the addresses may be another's.
    pub ips: Vec<IpAddr>,
    /// Annotation [`SOCKET_TRANSLATION`]; a Namespace says it in its labels.
    pub socket_translation: SocketTranslation,
}

/// `v1.Namespace`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Namespace {
    /// Name (namespace empty).
    pub name: ObjectName,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
}
