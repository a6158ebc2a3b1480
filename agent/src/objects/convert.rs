//! From `k8s-openapi` types to the reduced ones, with the defaults that the Kubernetes API gives to
//! absent fields. Called by the sources, for every object that they decode.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use weir_common::affinity;

use super::{
    EndpointSlice, Family, Hints, Kind, Namespace, Node, ObjectKey, ObjectName, Pod, Protocol,
    Service, ServicePort, ServiceType, SliceEndpoint, SlicePort, SocketTranslation, SourceRanges,
    TrafficPolicy,
};

/// Label of an EndpointSlice that names its Service.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Taint that the cluster autoscaler puts on a Node before it removes it.
const LEAVING_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// `clusterIP` of a headless Service.
const NO_CLUSTER_IP: &str = "None";

/// An object with a field that cannot be understood.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{object}: {field}: {value:?} {cause}")]
pub struct InvalidObject {
    /// The object.
    pub object: ObjectKey,
    /// Path of the field: `spec.ports[0].port`.
    pub field: String,
    /// Its value.
    pub value: String,
    /// What is wrong with it, and what is right.
    pub cause: &'static str,
}

/// A bad value, before it is known whose.
struct BadField {
    field: String,
    value: String,
    cause: &'static str,
}

impl BadField {
    fn new(field: impl Into<String>, value: impl ToString, cause: &'static str) -> Self {
        Self {
            field: field.into(),
            value: value.to_string(),
            cause,
        }
    }

    fn of(self, kind: Kind, name: ObjectName) -> InvalidObject {
        InvalidObject {
            object: ObjectKey { kind, name },
            field: self.field,
            value: self.value,
            cause: self.cause,
        }
    }
}

/// Runs `read` with the name that `metadata` holds, and puts the object's name on its error.
fn named<T>(
    kind: Kind,
    metadata: &mut ObjectMeta,
    read: impl FnOnce(ObjectName) -> Result<T, BadField>,
) -> Result<T, InvalidObject> {
    let namespace = match kind {
        Kind::Node | Kind::Namespace => String::new(),
        _ => metadata
            .namespace
            .take()
            .filter(|namespace| !namespace.is_empty())
            .unwrap_or_else(|| ObjectName::DEFAULT_NAMESPACE.to_owned()),
    };
    let name = ObjectName::new(namespace, metadata.name.take().unwrap_or_default());
    if name.name.is_empty() {
        return Err(BadField::new("metadata.name", "", "must not be empty").of(kind, name));
    }
    read(name.clone()).map_err(|error| error.of(kind, name))
}

impl TryFrom<core::Service> for Service {
    type Error = InvalidObject;

    fn try_from(mut from: core::Service) -> Result<Self, InvalidObject> {
        let mut metadata = std::mem::take(&mut from.metadata);
        let labels = metadata.labels.take().unwrap_or_default();
        let created = metadata.creation_timestamp.take();
        named(Kind::Service, &mut metadata, |name| {
            let spec = from.spec.unwrap_or_default();
            let service_type = match spec.type_.as_deref() {
                None | Some("" | "ClusterIP") => ServiceType::ClusterIp,
                Some("NodePort") => ServiceType::NodePort,
                Some("LoadBalancer") => ServiceType::LoadBalancer,
                Some("ExternalName") => ServiceType::ExternalName,
                Some(other) => {
                    return Err(BadField::new(
                        "spec.type",
                        other,
                        "is not one of ClusterIP, NodePort, LoadBalancer, ExternalName",
                    ));
                }
            };
            let cluster_ips = match service_type {
                ServiceType::ExternalName => Vec::new(),
                _ => cluster_ips(spec.cluster_ip, spec.cluster_ips.unwrap_or_default())?,
            };
            let ingress = from.status.and_then(|status| status.load_balancer);
            let ingress = ingress.and_then(|balancer| balancer.ingress);
            Ok(Self {
                name,
                labels,
                created: created.map(|time| time.0.as_second()),
                service_type,
                cluster_ips,
                external_ips: indexed("spec.externalIPs", spec.external_ips, |field, text| {
                    unicast_address(field, &text)
                })?,
                load_balancer_ips: load_balancer_ips(ingress)?,
                health_check_node_port: node_port(
                    "spec.healthCheckNodePort",
                    spec.health_check_node_port,
                )?,
                source_ranges: SourceRanges::parse(
                    spec.load_balancer_source_ranges.unwrap_or_default(),
                ),
                internal_policy: traffic_policy(
                    "spec.internalTrafficPolicy",
                    spec.internal_traffic_policy.as_deref(),
                )?,
                external_policy: traffic_policy(
                    "spec.externalTrafficPolicy",
                    spec.external_traffic_policy.as_deref(),
                )?,
                affinity: session_affinity(
                    spec.session_affinity.as_deref(),
                    spec.session_affinity_config,
                )?,
                ports: indexed("spec.ports", spec.ports, service_port)?,
            })
        })
    }
}

/// The ClusterIPs of a Service; none when it is headless, or has none yet.
fn cluster_ips(first: Option<String>, all: Vec<String>) -> Result<Vec<IpAddr>, BadField> {
    let first = first.unwrap_or_default();
    let all = match all.first() {
        Some(in_list) if !first.is_empty() && *in_list != first => {
            return Err(BadField::new(
                "spec.clusterIP",
                first,
                "differs from spec.clusterIPs[0]; they must be equal",
            ));
        }
        Some(_) => all,
        None if first.is_empty() => return Ok(Vec::new()),
        None => vec![first],
    };
    if all == [NO_CLUSTER_IP] {
        return Ok(Vec::new());
    }
    indexed("spec.clusterIPs", Some(all), |field, text| {
        unicast_address(field, &text)
    })
}

/// Addresses of load balancers whose packets arrive as they were sent. With `ipMode: Proxy` the
/// balancer is a hop of its own and must be gone through; one with a name alone cannot be served.
fn load_balancer_ips(
    ingress: Option<Vec<core::LoadBalancerIngress>>,
) -> Result<Vec<IpAddr>, BadField> {
    let addresses = indexed("status.loadBalancer.ingress", ingress, |field, ingress| {
        let is_vip = match ingress.ip_mode.as_deref() {
            None | Some("" | "VIP") => true,
            Some("Proxy") => false,
            Some(other) => {
                return Err(BadField::new(
                    format!("{field}.ipMode"),
                    other,
                    "is not one of VIP, Proxy",
                ));
            }
        };
        ingress
            .ip
            .filter(|ip| is_vip && !ip.is_empty())
            .map(|ip| unicast_address(&format!("{field}.ip"), &ip))
            .transpose()
    })?;
    Ok(addresses.into_iter().flatten().collect())
}

fn traffic_policy(field: &str, text: Option<&str>) -> Result<TrafficPolicy, BadField> {
    match text {
        None | Some("" | "Cluster") => Ok(TrafficPolicy::Cluster),
        Some("Local") => Ok(TrafficPolicy::Local),
        Some(other) => Err(BadField::new(
            field,
            other,
            "is not one of Cluster, Local; write one of them",
        )),
    }
}

fn session_affinity(
    text: Option<&str>,
    config: Option<core::SessionAffinityConfig>,
) -> Result<Option<u32>, BadField> {
    match text {
        None | Some("" | "None") => return Ok(None),
        Some("ClientIP") => {}
        Some(other) => {
            return Err(BadField::new(
                "spec.sessionAffinity",
                other,
                "is not one of None, ClientIP; write one of them",
            ));
        }
    }
    let seconds = config
        .and_then(|config| config.client_ip)
        .and_then(|client_ip| client_ip.timeout_seconds);
    let Some(seconds) = seconds else {
        return Ok(Some(affinity::TIMEOUT_DEFAULT));
    };
    match u32::try_from(seconds) {
        Ok(seconds) if (1..=affinity::TIMEOUT_MAX).contains(&seconds) => Ok(Some(seconds)),
        _ => Err(BadField::new(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            seconds,
            "is not a time that affinity can last: 1 to 86400 seconds; leave it out for 10800",
        )),
    }
}

fn service_port(field: &str, from: core::ServicePort) -> Result<ServicePort, BadField> {
    Ok(ServicePort {
        name: from.name.unwrap_or_default(),
        protocol: protocol(field, from.protocol.as_deref())?,
        port: port(field, from.port)?,
        node_port: node_port(&format!("{field}.nodePort"), from.node_port)?,
    })
}

/// A port of the node; 0 if there is none (yet).
fn node_port(field: &str, number: Option<i32>) -> Result<u16, BadField> {
    let number = number.unwrap_or_default();
    u16::try_from(number).map_err(|_| BadField::new(field, number, PORT_RANGE))
}

impl TryFrom<discovery::EndpointSlice> for EndpointSlice {
    type Error = InvalidObject;

    fn try_from(mut from: discovery::EndpointSlice) -> Result<Self, InvalidObject> {
        let service = from
            .metadata
            .labels
            .as_mut()
            .and_then(|labels| labels.remove(SERVICE_NAME_LABEL))
            .unwrap_or_default();
        named(Kind::EndpointSlice, &mut from.metadata, |name| {
            let family = match from.address_type.as_str() {
                "IPv4" => Some(Family::V4),
                "IPv6" => Some(Family::V6),
                "FQDN" => None,
                other => {
                    return Err(BadField::new(
                        "addressType",
                        other,
                        "is not one of IPv4, IPv6, FQDN",
                    ));
                }
            };
            let endpoints = indexed("endpoints", Some(from.endpoints), |field, endpoint| {
                slice_endpoint(field, endpoint, family, &name.namespace)
            })?;
            // A port without a number means all ports, which no Service has.
            let ports = from
                .ports
                .map(|ports| ports.into_iter().filter(|p| p.port.is_some()).collect());
            let ports = indexed("ports", ports, slice_port)?;
            Ok(Self {
                name,
                service,
                family,
                endpoints,
                ports,
            })
        })
    }
}

fn slice_endpoint(
    field: &str,
    from: discovery::Endpoint,
    family: Option<Family>,
    namespace: &str,
) -> Result<SliceEndpoint, BadField> {
    let field = format!("{field}.addresses[0]");
    let Some(first) = from.addresses.first() else {
        return Err(BadField::new(field, "", "is missing"));
    };
    let address = match family {
        Some(_) => Some(unicast_address(&field, first)?),
        None => None,
    };
    let conditions = from.conditions.unwrap_or_default();

    let target = from.target_ref.and_then(|target| {
        let namespace = target.namespace.unwrap_or_else(|| namespace.to_owned());
        target.name.map(|name| format!("{namespace}/{name}"))
    });
    Ok(SliceEndpoint {
        address: address.filter(|address| Some(Family::of(*address)) == family),
        ready: conditions.ready.unwrap_or(true),
        serving: conditions.serving.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
        node: from.node_name.unwrap_or_default(),
        zone: from.zone.unwrap_or_default(),
        target: target.unwrap_or_default(),
        hints: from.hints.and_then(hints),
    })
}

fn hints(from: discovery::EndpointHints) -> Option<Box<Hints>> {
    let nodes = from.for_nodes.unwrap_or_default().into_iter();
    let zones = from.for_zones.unwrap_or_default().into_iter();
    let hints = Hints {
        nodes: nodes.map(|node| node.name).collect(),
        zones: zones.map(|zone| zone.name).collect(),
    };
    (hints != Hints::default()).then(|| Box::new(hints))
}

fn slice_port(field: &str, from: discovery::EndpointPort) -> Result<SlicePort, BadField> {
    Ok(SlicePort {
        name: from.name.unwrap_or_default(),
        protocol: protocol(field, from.protocol.as_deref())?,
        port: port(field, from.port.unwrap_or_default())?,
    })
}

impl TryFrom<core::Node> for Node {
    type Error = InvalidObject;

    fn try_from(mut from: core::Node) -> Result<Self, InvalidObject> {
        let labels = from.metadata.labels.take().unwrap_or_default();
        let is_being_deleted = from.metadata.deletion_timestamp.is_some();
        named(Kind::Node, &mut from.metadata, |name| {
            let addresses = from.status.and_then(|status| status.addresses);
            let addresses = indexed("status.addresses", addresses, |field, from| {
                let external = match from.type_.as_str() {
                    "InternalIP" => false,
                    "ExternalIP" => true,
                    _ => return Ok(None),
                };
                let address = address(&format!("{field}.address"), &from.address)?;
                Ok(Some((external, address)))
            })?;
            let of_type = |external| {
                addresses
                    .iter()
                    .flatten()
                    .filter_map(|&(e, address)| (e == external).then_some(address))
                    .collect()
            };
            let spec = from.spec.unwrap_or_default();
            let taints = spec.taints.unwrap_or_default();
            let pod_cidrs = spec.pod_cidrs.filter(|all| !all.is_empty()).or_else(|| {
                spec.pod_cidr
                    .filter(|c| !c.is_empty())
                    .map(|cidr| vec![cidr])
            });
            Ok(Self {
                name,
                labels,
                internal_ips: of_type(false),
                external_ips: of_type(true),
                pod_cidrs: indexed("spec.podCIDRs", pod_cidrs, |field, text| cidr(field, &text))?,
                leaving: is_being_deleted || taints.iter().any(|taint| taint.key == LEAVING_TAINT),
            })
        })
    }
}

impl TryFrom<core::Pod> for Pod {
    type Error = InvalidObject;

    fn try_from(mut from: core::Pod) -> Result<Self, InvalidObject> {
        let labels = from.metadata.labels.take().unwrap_or_default();
        let uid = from.metadata.uid.take().unwrap_or_default();
        let annotations = from.metadata.annotations.take().unwrap_or_default();
        named(Kind::Pod, &mut from.metadata, |name| {
            let spec = from.spec.unwrap_or_default();
            let status = from.status.unwrap_or_default();
            let finished = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
            let ips: Option<Vec<String>> = match status.pod_ips {
                _ if finished => None,
                Some(ips) if !ips.is_empty() => Some(ips.into_iter().map(|ip| ip.ip).collect()),
                _ => status.pod_ip.filter(|ip| !ip.is_empty()).map(|ip| vec![ip]),
            };
            Ok(Self {
                name,
                uid,
                labels,
                node: spec.node_name.unwrap_or_default(),
                host_network: spec.host_network.unwrap_or(false),
                ips: indexed("status.podIPs", ips, |field, text| address(field, &text))?,
                socket_translation: SocketTranslation::of(&annotations),
            })
        })
    }
}

impl TryFrom<core::Namespace> for Namespace {
    type Error = InvalidObject;

    fn try_from(mut from: core::Namespace) -> Result<Self, InvalidObject> {
        let labels = from.metadata.labels.take().unwrap_or_default();
        named(Kind::Namespace, &mut from.metadata, |name| {
            Ok(Self { name, labels })
        })
    }
}

/// Converts the elements of a list; `convert` gets the path of each.
fn indexed<T, U>(
    field: &str,
    list: Option<Vec<T>>,
    mut convert: impl FnMut(&str, T) -> Result<U, BadField>,
) -> Result<Vec<U>, BadField> {
    list.unwrap_or_default()
        .into_iter()
        .enumerate()
        .map(|(index, element)| convert(&format!("{field}[{index}]"), element))
        .collect()
}

fn protocol(field: &str, text: Option<&str>) -> Result<Protocol, BadField> {
    match text {
        None | Some("" | "TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(BadField::new(
            format!("{field}.protocol"),
            other,
            "is not one of TCP, UDP, SCTP",
        )),
    }
}

const PORT_RANGE: &str = "is not a port: 1 to 65535";

fn port(field: &str, number: i32) -> Result<u16, BadField> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(BadField::new(format!("{field}.port"), number, PORT_RANGE)),
    }
}

fn address(field: &str, text: &str) -> Result<IpAddr, BadField> {
    match text.parse::<IpAddr>() {
        Ok(IpAddr::V6(v6)) if v6.to_ipv4_mapped().is_some() => Err(BadField::new(
            field,
            text,
            "is an IPv4 address in IPv6 form; write it as IPv4",
        )),
        Ok(address) if address.is_unspecified() => {
            Err(BadField::new(field, text, "is the unspecified address"))
        }
        Ok(address) => Ok(address),
        Err(_) => Err(BadField::new(field, text, "is not an IP address")),
    }
}

/// An address that packets can be sent to from another machine, as the API server demands of
/// ClusterIPs and endpoints (`ValidateEndpointIP`).
fn unicast_address(field: &str, text: &str) -> Result<IpAddr, BadField> {
    let address = address(field, text)?;
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if link_local || address.is_loopback() || address.is_multicast() {
        return Err(BadField::new(
            field,
            text,
            "is a loopback, link-local, broadcast or multicast address; a Service cannot use it",
        ));
    }
    Ok(address)
}

fn cidr(field: &str, text: &str) -> Result<IpNet, BadField> {
    text.parse::<IpNet>()
        .map(|net| net.trunc())
        .map_err(|_| BadField::new(field, text, "is not a CIDR such as 10.0.1.0/24"))
}
