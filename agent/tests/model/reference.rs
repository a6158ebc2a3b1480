//! The desired state computed from all objects at once, as plainly as the Kubernetes documentation
//! puts it (concepts: "Service", "EndpointSlices", "Virtual IPs and Service Proxies"). Shares no
//! code with the model.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use weir_agent::{
    model::{
        Backend, BackendAddress, BackendState, Frontend, FrontendKind, ServicePort, ServicePortKey,
        UnusedBackend,
    },
    objects::{EndpointSlice, Family, Object, ObjectKey, Service, ServiceType, SliceEndpoint},
};

pub type Objects = BTreeMap<ObjectKey, Object>;

pub struct Reference {
    pub services: BTreeMap<ServicePortKey, ServicePort>,
    pub problems: usize,
}

pub fn compute(objects: &Objects) -> Reference {
    let mut reference = Reference {
        services: BTreeMap::new(),
        problems: 0,
    };
    // The oldest gets the address; without a time it is younger than all others. Objects are in
    // the order of their names, and sorting keeps it.
    let mut services: Vec<&Service> = objects
        .values()
        .filter_map(|object| match object {
            Object::Service(service) if is_served(service) => Some(service),
            _ => None,
        })
        .collect();
    services.sort_by_key(|service| (service.created.is_none(), service.created));
    let mut taken = BTreeSet::new();
    for service in services {
        let cluster_ips: BTreeSet<IpAddr> = service.cluster_ips.iter().copied().collect();
        for (address, port) in cluster_ips
            .iter()
            .flat_map(|ip| service.ports.iter().map(move |port| (*ip, port)))
        {
            if belongs_to_a_node(address, objects) {
                reference.problems += 1;
                continue;
            }
            if !taken.insert((address, port.port, port.protocol)) {
                reference.problems += 1;
                continue;
            }
            let key = ServicePortKey {
                service: service.name.clone(),
                port_name: port.name.clone(),
                protocol: port.protocol,
                family: Family::of(address),
                port: port.port,
            };
            let mut row = backends(&key, objects);
            if let Some(before) = reference.services.remove(&key) {
                row.frontends = before.frontends;
            }
            row.frontends.insert(Frontend {
                address,
                port: port.port,
                kind: FrontendKind::ClusterIp,
            });
            reference.services.insert(key, row);
        }
    }
    reference
}

fn belongs_to_a_node(address: IpAddr, objects: &Objects) -> bool {
    objects.values().any(|object| match object {
        Object::Node(node) => {
            node.internal_ips.contains(&address)
                || node.external_ips.contains(&address)
                || node.pod_cidrs.iter().any(|cidr| cidr.contains(&address))
        }
        _ => false,
    })
}

pub fn is_served(service: &Service) -> bool {
    service.service_type != ServiceType::ExternalName
        && !service
            .labels
            .contains_key("service.kubernetes.io/headless")
        && !service
            .labels
            .contains_key("service.kubernetes.io/service-proxy-name")
}

fn backends(key: &ServicePortKey, objects: &Objects) -> ServicePort {
    let slices: Vec<&EndpointSlice> = objects
        .values()
        .filter_map(|object| match object {
            Object::EndpointSlice(slice) => Some(slice),
            _ => None,
        })
        .filter(|slice| slice.name.namespace == key.service.namespace)
        .filter(|slice| slice.service == key.service.name)
        .filter(|slice| slice.family == Some(key.family))
        .collect();
    // Every endpoint as often as it is listed, in the order of the slices' names.
    let mut listed: Vec<(BackendAddress, &SliceEndpoint)> = Vec::new();
    for slice in slices {
        for port in &slice.ports {
            if port.name == key.port_name && port.protocol == key.protocol {
                for endpoint in &slice.endpoints {
                    listed.extend(endpoint.address.map(|address| {
                        let port = port.port;
                        (BackendAddress { address, port }, endpoint)
                    }));
                }
            }
        }
    }
    let is_ready = |e: &SliceEndpoint| e.ready;
    let is_draining = |e: &SliceEndpoint| !e.ready && e.serving && e.terminating;
    let any_ready = listed.iter().any(|(_, e)| is_ready(e));
    let any_draining = listed.iter().any(|(_, e)| is_draining(e));
    let addresses: BTreeSet<BackendAddress> = listed.iter().map(|(a, _)| *a).collect();
    let mut row = ServicePort::default();
    for address in addresses {
        let copies: Vec<&SliceEndpoint> = listed
            .iter()
            .filter(|(a, _)| *a == address)
            .map(|(_, e)| *e)
            .collect();
        let first = |wanted: &dyn Fn(&SliceEndpoint) -> bool| {
            copies.iter().copied().find(|endpoint| wanted(endpoint))
        };
        let backend = |state, endpoint: &SliceEndpoint| Backend {
            state,
            node: endpoint.node.clone(),
            zone: endpoint.zone.clone(),
            target: endpoint.target.clone(),
        };
        let active = |endpoint| backend(BackendState::Active, endpoint);
        let terminating = |endpoint| backend(BackendState::Terminating, endpoint);
        if let Some(endpoint) = first(&is_ready) {
            row.backends.insert(address, active(endpoint));
            continue;
        }
        let (backend, reason) = if let Some(endpoint) = first(&is_draining) {
            if !any_ready && any_draining {
                row.backends.insert(address, terminating(endpoint));
                continue;
            }
            (terminating(endpoint), "terminating")
        } else if let Some(endpoint) = first(&|e| !e.terminating) {
            (active(endpoint), "not ready")
        } else {
            (terminating(copies[0]), "terminating, not serving")
        };
        row.unused
            .insert(address, UnusedBackend { backend, reason });
    }
    row
}

/// The names that may be given to an address, best first.
pub fn owners(objects: &Objects, address: IpAddr) -> Vec<String> {
    let mut owners = Vec::new();
    for rank in 0..3 {
        for object in objects.values() {
            let (of_rank, addresses, name) = match object {
                Object::Node(o) => (0, [&o.internal_ips[..], &o.external_ips].concat(), &o.name),
                Object::Pod(o) if !o.host_network => (1, o.ips.clone(), &o.name),
                Object::Service(o) if is_served(o) => (2, o.cluster_ips.clone(), &o.name),
                _ => continue,
            };
            if rank == of_rank && addresses.contains(&address) {
                owners.push(name.to_string());
            }
        }
    }
    owners
}
