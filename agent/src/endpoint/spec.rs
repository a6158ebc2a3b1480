//! What is known of one endpoint, and how it is written to its file.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weir_api::v1;
use weir_common::{MacAddress, config, endpoint, limits::ENDPOINTS_MAX};

use super::{
    error::{EndpointError, ErrorKind},
    host_port::{self, HostPort},
};

/// Identity of an endpoint: a container and the name of the interface inside.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct EndpointKey {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

impl std::fmt::Display for EndpointKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of container {}", self.ifname, self.container_id)
    }
}

impl EndpointKey {
    /// From its parts.
    pub fn new(container_id: impl Into<String>, ifname: impl Into<String>) -> Self {
        Self {
            container_id: container_id.into(),
            ifname: ifname.into(),
        }
    }

    /// Both parts become part of a file's name and of the kernel's.
    pub(super) fn validate(&self) -> Result<(), EndpointError> {
        let Self {
            container_id,
            ifname,
        } = self;
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if container_id.len() > 200
            || !container_id.starts_with(|c: char| c.is_ascii_alphanumeric())
            || !container_id.chars().all(allowed)
        {
            return Err(EndpointError::new(
                ErrorKind::Invalid,
                format!(
                    "container_id {container_id:?} is not a letter or digit followed by letters, \
                     digits, _ . or -, 200 at most"
                ),
            ));
        }
        if ifname.is_empty()
            || ifname.len() > 15
            || matches!(ifname.as_str(), "." | "..")
            || ifname.contains(|c: char| c == '/' || c == ':' || c == '\0' || c.is_whitespace())
        {
            return Err(EndpointError::new(
                ErrorKind::Invalid,
                format!(
                    "ifname {ifname:?} is no interface name: 1 to 15 bytes without / : or space"
                ),
            ));
        }
        Ok(())
    }
}

/// What the CNI plugin asks for.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AllocateRequest {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// Path of the pod's network namespace.
    pub netns: String,
    /// Namespace of the pod, or empty.
    pub pod_namespace: String,
    /// Name of the pod, or empty.
    pub pod_name: String,
    /// `metadata.uid` of the pod, or empty.
    pub pod_uid: String,
    /// Ports of the node that shall lead to the pod.
    pub host_ports: Vec<HostPort>,
}

impl TryFrom<v1::AllocateRequest> for AllocateRequest {
    type Error = EndpointError;

    fn try_from(request: v1::AllocateRequest) -> Result<Self, EndpointError> {
        Ok(Self {
            host_ports: host_port::of_request(&request.port_mappings)?,
            container_id: request.container_id,
            ifname: request.ifname,
            netns: request.netns,
            pod_namespace: request.pod_namespace,
            pod_name: request.pod_name,
            pod_uid: request.pod_uid,
        })
    }
}

/// An endpoint: a pod's interface on this node.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct EndpointSpec {
    /// Number, 1 to `ENDPOINTS_MAX - 1`.
    pub number: u32,
    /// Container and interface.
    #[serde(flatten)]
    pub key: EndpointKey,
    /// Path of the pod's network namespace, as the runtime gave it.
    pub netns: String,
    /// Namespace of the pod, or empty.
    pub pod_namespace: String,
    /// Name of the pod, or empty.
    pub pod_name: String,
    /// `metadata.uid` of the pod, or empty.
    pub pod_uid: String,
    /// One address for each family the node had a range of, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// The ranges they came from.
    pub ranges: Vec<IpNet>,
    /// Name of the host side of the veth pair.
    pub host_ifname: String,
    /// MTU of the pod's device, bytes (layer 3).
    pub mtu: u32,
    /// Interface index of the host side; 0 until the endpoint is committed, and when the device is
    /// known to be gone.
    pub host_ifindex: u32,
    /// Cookie of the pod's network namespace (`SO_NETNS_COOKIE`), 0 if unknown.
    pub netns_cookie: u64,
    /// Ports of the node that lead to the pod; files of older versions have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_ports: Vec<HostPort>,
}

impl EndpointSpec {
    /// Ethernet address of the host side.
    #[must_use]
    pub fn host_mac(&self) -> MacAddress {
        endpoint::host_mac(self.number)
    }

    /// Ethernet address of the pod side.
    #[must_use]
    pub fn pod_mac(&self) -> MacAddress {
        endpoint::pod_mac(self.number)
    }

    /// Gateway for each address, in their order.
    #[must_use]
    pub fn gateways(&self) -> Vec<IpAddr> {
        self.addresses
            .iter()
            .map(|address| match address {
                IpAddr::V4(_) => IpAddr::V4(config::GATEWAY_V4.into()),
                IpAddr::V6(_) => IpAddr::V6(config::GATEWAY_V6.into()),
            })
            .collect()
    }

    /// `namespace/name` of the pod, or the container when the runtime told no pod.
    #[must_use]
    pub fn display_name(&self) -> String {
        if self.pod_name.is_empty() {
            format!("container {}", self.key.container_id)
        } else {
            format!("{}/{}", self.pod_namespace, self.pod_name)
        }
    }

    /// What a file may hold wrongly although it parses.
    pub(super) fn validate(&self) -> Result<(), String> {
        self.key.validate().map_err(|error| error.message)?;
        if self.number == 0 || self.number >= ENDPOINTS_MAX {
            return Err(format!(
                "number {} is not in 1..{ENDPOINTS_MAX}",
                self.number
            ));
        }
        if self.addresses.is_empty() || self.addresses.len() != self.ranges.len() {
            return Err(format!(
                "{} addresses of {} ranges",
                self.addresses.len(),
                self.ranges.len()
            ));
        }
        if self.host_ifname.is_empty() || self.host_ifname.len() > 15 {
            return Err(format!(
                "host_ifname {:?} is no interface name",
                self.host_ifname
            ));
        }
        self.host_ports.iter().try_for_each(HostPort::validate)
    }
}

impl From<&EndpointSpec> for v1::AllocateResponse {
    fn from(spec: &EndpointSpec) -> Self {
        Self {
            endpoint: spec.number,
            host_ifname: spec.host_ifname.clone(),
            host_mac: spec.host_mac().to_string(),
            pod_mac: spec.pod_mac().to_string(),
            addresses: spec.addresses.iter().map(IpAddr::to_string).collect(),
            gateways: spec.gateways().iter().map(IpAddr::to_string).collect(),
            mtu: spec.mtu,
        }
    }
}

/// How far an endpoint has come.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state", content = "detail")]
pub enum EndpointState {
    /// Allocated, not committed; since this time (seconds).
    Reserved(u64),
    /// In the kernel.
    Ready,
    /// Committed by its plugin, but not installed since the agent started, or something of it is
    /// missing, and why. Tried again.
    Failing(String),
    /// Released, but the kernel refused to let go, and why. Tried again.
    Removing(String),
}

impl std::fmt::Display for EndpointState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Reserved(_) => f.write_str("reserved"),
            Self::Ready => f.write_str("ready"),
            Self::Failing(why) => write!(f, "not in the kernel: {why}"),
            Self::Removing(why) => write!(f, "not out of the kernel: {why}"),
        }
    }
}

/// An endpoint and its state: the content of its file.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Endpoint {
    /// What it is.
    #[serde(flatten)]
    pub spec: EndpointSpec,
    /// How far it has come.
    #[serde(flatten)]
    pub state: EndpointState,
}
