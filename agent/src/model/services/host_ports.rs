//! Host ports of this node's pods: each mapping is a Service port of one endpoint in each family.

use std::{collections::BTreeMap, net::IpAddr};

use super::super::{Backend, BackendAddress, HostPort, Owner, ServicePort, ServicePortKey};
use super::claims::every_address;
use crate::objects::Family;

/// The host ports of one pod.
#[derive(Debug)]
pub(super) struct HostPorts {
    /// Rises from pod to pod: the first to come keeps what it has.
    pub sequence: u64,
    pub mappings: Vec<HostPort>,
}

/// The addresses of the node that a mapping is for, one for each family; unspecified: all of the
/// family. The pod has an address in each.
pub(super) fn addresses(host_port: &HostPort) -> Vec<IpAddr> {
    let families = [Family::V4, Family::V6];
    let addresses: Vec<IpAddr> = match host_port.host_ip {
        None => families.map(every_address).to_vec(),
        Some(address) => vec![address],
    };
    addresses
        .into_iter()
        .filter(|address| pod_address(host_port, Family::of(*address)).is_some())
        .collect()
}

fn pod_address(host_port: &HostPort, family: Family) -> Option<IpAddr> {
    let mut addresses = host_port.addresses.iter().copied();
    addresses.find(|address| Family::of(*address) == family)
}

/// The Service port of a mapping in one family, without frontends.
pub(super) fn service_port(
    owner: &Owner,
    host_port: &HostPort,
    family: Family,
) -> (ServicePortKey, ServicePort) {
    let exact = host_port.host_ip.filter(|ip| !ip.is_unspecified());
    let key = ServicePortKey {
        owner: owner.clone(),
        port_name: exact.map(|ip| ip.to_string()).unwrap_or_default(),
        protocol: host_port.protocol,
        family,
        port: host_port.host_port,
    };
    let backends = pod_address(host_port, family).map(|address| {
        let backend = Backend {
            target: owner.name().to_string(),
            ..Backend::active()
        };
        let port = host_port.container_port;
        (BackendAddress { address, port }, backend)
    });
    let port = ServicePort {
        backends: BTreeMap::from_iter(backends),
        ..ServicePort::default()
    };
    (key, port)
}
