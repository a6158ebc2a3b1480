//! What Services and host ports want for themselves: an address, port and protocol can be one's
//! only. Says what a Service asks for, and who comes first where several ask for the same.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::super::{EndpointSet, Frontend, FrontendKind, ModelOptions, Owner, PodInterface, Scope};
use super::host_ports::HostPorts;
use crate::objects::{Family, Protocol, Service, ServiceType, TrafficPolicy};

/// Services with one of these labels are left to somebody else, or to nobody, whatever the value.
const NOT_SERVED_LABELS: [&str; 2] = [
    "service.kubernetes.io/service-proxy-name",
    "service.kubernetes.io/headless",
];

/// An address, port and protocol that a Service port wants for itself.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Claim {
    /// Unspecified: every address of the node of that family.
    pub address: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
}

impl Claim {
    /// The smallest in a range.
    pub fn first(range: IpNet) -> Self {
        Self {
            address: range.network(),
            port: 0,
            protocol: Protocol::Tcp,
        }
    }

    /// The largest in a range.
    pub fn last(range: IpNet) -> Self {
        Self {
            address: range.broadcast(),
            port: u16::MAX,
            protocol: Protocol::Sctp,
        }
    }
}

impl std::fmt::Display for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let protocol = self.protocol.name();
        if self.address.is_unspecified() {
            let family = Family::of(self.address).name();
            let port = self.port;
            return write!(f, "port {port} {protocol} of the node's {family} addresses");
        }
        let address = std::net::SocketAddr::new(self.address, self.port);
        write!(f, "{address} {protocol}")
    }
}

/// Who makes a claim. The first in order that may have it has it: the oldest Service, so that a
/// new one takes nothing from those that are served.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Claimant {
    pub age: Age,
    pub owner: Owner,
    /// Of the ports of the Service, or of the pod's host ports.
    pub index: usize,
    pub kind: FrontendKind,
}

impl Claimant {
    /// Whether both are for the same port of the same owner.
    pub fn is_same_port(&self, other: &Self) -> bool {
        self.index == other.index && self.owner == other.owner
    }
}

/// When a Service was made; the oldest comes first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Age {
    /// In seconds since 1970.
    CreatedAt(i64),
    /// Counts as the youngest of Services.
    Unknown,
    /// Host ports come after all Services, in the order in which they came to this node.
    HostPort(u64),
}

/// A claim, and what it is for.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    pub claim: Claim,
    pub claimant: Claimant,
}

impl Wish {
    /// The frontends that follow when it is granted.
    ///
    /// Clients inside a node reach addresses that are meant for the outside as if they were in the
    /// policy `Cluster` (concepts: "Virtual IPs and Service Proxies", traffic policies).
    pub fn frontends(&self, policies: Policies) -> Vec<Frontend> {
        let Policies {
            internal, external, ..
        } = policies;
        let frontend = |(scope, set)| Frontend {
            address: Some(self.claim.address).filter(|address| !address.is_unspecified()),
            port: self.claim.port,
            kind: self.claimant.kind,
            scope,
            set,
        };
        let ways = match self.claimant.kind {
            // As kube-proxy, whose internal policy counts for all clients of a ClusterIP.
            FrontendKind::ClusterIp if policies.cluster_ips_outside => {
                vec![(Scope::Inside, internal), (Scope::Outside, internal)]
            }
            FrontendKind::ClusterIp => vec![(Scope::Inside, internal)],
            FrontendKind::NodePort | FrontendKind::ExternalIp | FrontendKind::LoadBalancer => {
                vec![
                    (Scope::Inside, EndpointSet::Cluster),
                    (Scope::Outside, external),
                ]
            }
            FrontendKind::HostPort => vec![
                (Scope::Inside, EndpointSet::Cluster),
                (Scope::Outside, EndpointSet::Cluster),
            ],
        };
        ways.into_iter().map(frontend).collect()
    }
}

/// Which endpoints serve which clients.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policies {
    /// The set that `internalTrafficPolicy` asks for.
    pub internal: EndpointSet,
    /// The set that `externalTrafficPolicy` asks for.
    pub external: EndpointSet,
    /// ClusterIPs are served for clients outside, too.
    pub cluster_ips_outside: bool,
}

impl Policies {
    /// For host ports: all endpoints.
    pub const fn all() -> Self {
        Self {
            internal: EndpointSet::Cluster,
            external: EndpointSet::Cluster,
            cluster_ips_outside: false,
        }
    }
}

/// The policies of a Service.
pub(super) fn policies(service: &Service, options: &ModelOptions) -> Policies {
    let set = |policy| match policy {
        TrafficPolicy::Cluster => EndpointSet::Cluster,
        TrafficPolicy::Local => EndpointSet::Local,
    };
    Policies {
        internal: set(service.internal_policy),
        external: set(service.external_policy),
        cluster_ips_outside: options.cluster_ips_outside,
    }
}

/// Whether a Service is ours.
pub(super) fn is_served(service: &Service, options: &ModelOptions) -> bool {
    let excluded = options.exclude_services.as_ref();
    service.service_type != ServiceType::ExternalName
        && !NOT_SERVED_LABELS
            .iter()
            .any(|label| service.labels.contains_key(*label))
        && !excluded.is_some_and(|selector| selector.selects(&service.labels))
}

/// Why a Service asks for nothing.
pub(super) fn why_not_served(service: &Service, options: &ModelOptions) -> &'static str {
    if service.service_type == ServiceType::ExternalName {
        "it is of type ExternalName"
    } else if service.labels.contains_key(NOT_SERVED_LABELS[0]) {
        "its label service.kubernetes.io/service-proxy-name leaves it to another proxy"
    } else if service.labels.contains_key(NOT_SERVED_LABELS[1]) {
        "it has the label service.kubernetes.io/headless"
    } else if !is_served(service, options) {
        "its labels match the setting exclude-services"
    } else if service.cluster_ips.is_empty() {
        "it is headless, or has no clusterIP yet"
    } else if service.ports.is_empty() {
        "it has no ports"
    } else if addresses(service, options).is_empty() {
        "its addresses lie in the setting exclude-cidrs"
    } else {
        "its changes have not been taken in yet"
    }
}

/// Whether the Service has a ClusterIP of the family: without, it is not in that family at all, as
/// with kube-proxy.
pub(super) fn has_family(service: &Service, family: Family) -> bool {
    service
        .cluster_ips
        .iter()
        .any(|address| Family::of(*address) == family)
}

/// The addresses at which a Service is served, with their kinds, each once for each kind.
pub(super) fn addresses(service: &Service, options: &ModelOptions) -> Vec<(FrontendKind, IpAddr)> {
    if !is_served(service, options) {
        return Vec::new();
    }
    let of = |kind, addresses: &[IpAddr]| -> Vec<_> {
        addresses.iter().map(|address| (kind, *address)).collect()
    };
    let load_balancer: &[IpAddr] = match service.service_type {
        ServiceType::LoadBalancer => &service.load_balancer_ips,
        _ => &[],
    };
    let all = [
        of(FrontendKind::ClusterIp, &service.cluster_ips),
        of(FrontendKind::ExternalIp, &service.external_ips),
        of(FrontendKind::LoadBalancer, load_balancer),
    ];
    let mut addresses: Vec<(FrontendKind, IpAddr)> = Vec::new();
    for (kind, address) in all.into_iter().flatten() {
        let excluded = options.exclude_cidrs.iter().any(|c| c.contains(&address));
        if has_family(service, Family::of(address))
            && !excluded
            && !addresses.contains(&(kind, address))
        {
            addresses.push((kind, address));
        }
    }
    addresses
}

/// Addresses of a family that the Service has no ClusterIP of.
pub(super) fn of_missing_families(service: &Service, options: &ModelOptions) -> Vec<IpAddr> {
    if !is_served(service, options) || service.cluster_ips.is_empty() {
        return Vec::new();
    }
    let load_balancer: &[IpAddr] = match service.service_type {
        ServiceType::LoadBalancer => &service.load_balancer_ips,
        _ => &[],
    };
    let mut addresses: Vec<IpAddr> = service
        .external_ips
        .iter()
        .chain(load_balancer)
        .copied()
        .filter(|address| !has_family(service, Family::of(*address)))
        .filter(|address| !options.exclude_cidrs.iter().any(|c| c.contains(address)))
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Everything that a Service asks for.
pub(super) fn wishes_of_service(service: &Service, options: &ModelOptions) -> Vec<Wish> {
    let mut wishes = Vec::new();
    let mut wish = |kind, address, port, index, protocol| {
        wishes.push(Wish {
            claim: Claim {
                address,
                port,
                protocol,
            },
            claimant: Claimant {
                age: service.created.map_or(Age::Unknown, Age::CreatedAt),
                owner: Owner::Service(service.name.clone()),
                index,
                kind,
            },
        });
    };
    for (kind, address) in addresses(service, options) {
        for (index, port) in service.ports.iter().enumerate() {
            wish(kind, address, port.port, index, port.protocol);
        }
    }
    let has_node_ports = matches!(
        service.service_type,
        ServiceType::NodePort | ServiceType::LoadBalancer
    );
    if has_node_ports && is_served(service, options) {
        for family in [Family::V4, Family::V6] {
            let ports = service.ports.iter().enumerate();
            for (index, port) in ports.filter(|(_, port)| port.node_port != 0) {
                if has_family(service, family) {
                    let every = every_address(family);
                    wish(
                        FrontendKind::NodePort,
                        every,
                        port.node_port,
                        index,
                        port.protocol,
                    );
                }
            }
        }
    }
    wishes
}

/// Everything that a pod asks for.
pub(super) fn wishes_of_pod(interface: &PodInterface, host_ports: &HostPorts) -> Vec<Wish> {
    let mut wishes = Vec::new();
    for (index, host_port) in host_ports.mappings.iter().enumerate() {
        for address in super::host_ports::addresses(host_port) {
            wishes.push(Wish {
                claim: Claim {
                    address,
                    port: host_port.host_port,
                    protocol: host_port.protocol,
                },
                claimant: Claimant {
                    age: Age::HostPort(host_ports.sequence),
                    owner: Owner::HostPort(Box::new(interface.clone())),
                    index,
                    kind: FrontendKind::HostPort,
                },
            });
        }
    }
    wishes
}

/// Stands for every address of the node.
pub(super) const fn every_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    }
}
