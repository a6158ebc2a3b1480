//! The desired state computed from all objects at once, as plainly as the Kubernetes documentation
//! puts it (concepts: "Service", "EndpointSlices", "Virtual IPs and Service Proxies", "Topology Aware
//! Routing"). Shares no code with the model.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use weir_agent::{
    model::{
        Backend, BackendAddress, BackendState, EndpointSet, Frontend, FrontendKind, HostPort,
        Owner, Scope, ServicePort, ServicePortKey, UnusedBackend,
    },
    objects::{
        EndpointSlice, Family, Node, Object, Protocol, Service, ServiceType, SliceEndpoint,
        TrafficPolicy,
    },
};

use super::World;

#[derive(Default)]
pub struct Reference {
    pub services: BTreeMap<ServicePortKey, ServicePort>,
    pub problems: usize,
    /// Owner and number of its port, by what clients address.
    taken: BTreeMap<Place, (Owner, usize)>,
}

/// What clients address; without an address every one of this node.
type Place = (Option<IpAddr>, Family, u16, Protocol);

/// A first packet of a client.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// Where the client is.
    pub scope: Scope,
    pub address: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
    /// Whether node ports are served at the address.
    pub is_node_address: bool,
}

impl Reference {
    /// The endpoints that a packet may go to; `None` if no frontend takes it.
    pub fn endpoints_of(&self, packet: &Packet) -> Option<BTreeSet<BackendAddress>> {
        let (_, port, frontend) = self.port_of(packet)?;
        let members = port
            .backends
            .iter()
            .filter(|(_, backend)| backend.is_in(frontend.set));
        Some(members.map(|(address, _)| *address).collect())
    }

    /// The Service port that takes a packet, and by which frontend. One with
    /// the packet's own address comes before node ports.
    pub fn port_of(&self, packet: &Packet) -> Option<(&ServicePortKey, &ServicePort, &Frontend)> {
        let every = packet.is_node_address.then_some(None);
        let found = [Some(Some(packet.address)), every].into_iter().flatten();
        let takes = |address| {
            self.services.iter().find_map(|(key, port)| {
                let of_port =
                    key.family == Family::of(packet.address) && key.protocol == packet.protocol;
                let mut frontends = port.frontends.iter().filter(|_| of_port);
                let frontend = frontends.find(|f| {
                    (f.address, f.port, f.scope) == (address, packet.port, packet.scope)
                })?;
                Some((key, port, frontend))
            })
        };
        found.into_iter().find_map(takes)
    }
}

/// Whether a frontend of a port serves a client: with `loadBalancerSourceRanges` a load balancer address
/// is for those in a range only.
pub fn serves(port: &ServicePort, frontend: &Frontend, client: IpAddr) -> bool {
    frontend.kind != FrontendKind::LoadBalancer
        || (port.source_ranges.as_ref())
            .is_none_or(|ranges| ranges.iter().any(|range| range.contains(&client)))
}

pub fn compute(world: &World) -> Reference {
    let mut reference = Reference::default();
    // The oldest gets the address; without a time it is younger than all others. Objects are in
    // the order of their names, and sorting keeps it.
    let mut services: Vec<&Service> = world
        .objects
        .values()
        .filter_map(|object| match object {
            Object::Service(service) if is_served(service, world) => Some(service),
            _ => None,
        })
        .collect();
    services.sort_by_key(|service| (service.created.is_none(), service.created));
    for service in services {
        add_service(&mut reference, service, world);
    }
    for (interface, host_ports) in &world.host_ports {
        let owner = Owner::HostPort(Box::new(interface.clone()));
        for (index, host_port) in host_ports.iter().enumerate() {
            add_host_port(&mut reference, &owner, index, host_port, world);
        }
    }
    // SCTP's checksum does not allow another port.
    for (key, port) in &reference.services {
        if key.protocol == Protocol::Sctp {
            let numbers: BTreeSet<u16> = port.frontends.iter().map(|f| f.port).collect();
            let is_changed = |n: &&u16| port.backends.keys().any(|backend| backend.port != **n);
            reference.problems += numbers.iter().filter(is_changed).count();
        }
    }
    reference
}

fn add_service(reference: &mut Reference, service: &Service, world: &World) {
    let owner = Owner::Service(service.name.clone());
    let families: BTreeSet<Family> = service
        .cluster_ips
        .iter()
        .map(|address| Family::of(*address))
        .collect();
    let set = |policy: TrafficPolicy| match policy {
        TrafficPolicy::Cluster => EndpointSet::Cluster,
        TrafficPolicy::Local => EndpointSet::Local,
    };
    let internal = vec![(Scope::Inside, set(service.internal_policy))];
    let external = vec![
        (Scope::Inside, EndpointSet::Cluster),
        (Scope::Outside, set(service.external_policy)),
    ];
    let balanced = match service.service_type {
        ServiceType::LoadBalancer => service.load_balancer_ips.clone(),
        _ => Vec::new(),
    };
    let is_excluded = |address: &IpAddr| world.excluded_cidrs.iter().any(|c| c.contains(address));
    if !families.is_empty() {
        let strange: BTreeSet<IpAddr> = service
            .external_ips
            .iter()
            .chain(&balanced)
            .copied()
            .filter(|a| !families.contains(&Family::of(*a)) && !is_excluded(a))
            .collect();
        reference.problems += strange.len();
    }
    for (index, port) in service.ports.iter().enumerate() {
        let mut asked = Vec::new();
        for (kind, addresses, ways) in [
            (FrontendKind::ClusterIp, &service.cluster_ips, &internal),
            (FrontendKind::ExternalIp, &service.external_ips, &external),
            (FrontendKind::LoadBalancer, &balanced, &external),
        ] {
            for address in addresses.iter().copied().collect::<BTreeSet<_>>() {
                if families.contains(&Family::of(address)) && !is_excluded(&address) {
                    asked.push((kind, Family::of(address), Some(address), port.port, ways));
                }
            }
        }
        let has_node_ports = [ServiceType::NodePort, ServiceType::LoadBalancer];
        if has_node_ports.contains(&service.service_type) && port.node_port != 0 {
            for family in &families {
                asked.push((
                    FrontendKind::NodePort,
                    *family,
                    None,
                    port.node_port,
                    &external,
                ));
            }
        }
        for (kind, family, address, number, ways) in asked {
            let is_free = take(
                reference,
                (address, family, number, port.protocol),
                (owner.clone(), index),
                kind,
                world,
            );
            if !is_free {
                continue;
            }
            let key = ServicePortKey {
                owner: owner.clone(),
                port_name: port.name.clone(),
                protocol: port.protocol,
                family,
                port: port.port,
            };
            let row = reference.services.entry(key).or_default();
            row.affinity = service.affinity;
            for (scope, set) in ways.iter().copied() {
                add(
                    row,
                    Frontend {
                        address,
                        port: number,
                        kind,
                        scope,
                        set,
                    },
                );
            }
        }
    }
    let (mut is_balanced, mut is_restricted) = (false, false);
    for (key, row) in &mut reference.services {
        if key.owner == owner {
            choose_endpoints(key, row, world);
            is_balanced |= restrict_clients(key, row, service);
            is_restricted |= row.source_ranges.is_some();
        }
    }
    if is_balanced {
        let ranges = &service.source_ranges;
        reference.problems += ranges.invalid.len();
        if !is_restricted && !ranges.ranges.is_empty() {
            // All of them are of the other family.
            reference.problems += 1;
        }
    }
}

/// Says whether the port has load balancer addresses. A family without a range is not restricted, unless
/// something is no range at all.
fn restrict_clients(key: &ServicePortKey, row: &mut ServicePort, service: &Service) -> bool {
    let mut kinds = row.frontends.iter().map(|frontend| frontend.kind);
    if !kinds.any(|kind| kind == FrontendKind::LoadBalancer) {
        return false;
    }
    let given = &service.source_ranges;
    let mut ranges = BTreeSet::new();
    for range in &given.ranges {
        if Family::of(range.addr()) == key.family {
            ranges.insert(*range);
        }
    }
    if !ranges.is_empty() || !given.invalid.is_empty() {
        row.source_ranges = Some(ranges);
    }
    true
}

/// An address with two purposes is shown with the first.
fn add(row: &mut ServicePort, new: Frontend) {
    let is_there = row
        .frontends
        .iter()
        .any(|old| (old.address, old.port, old.scope) == (new.address, new.port, new.scope));
    if !is_there {
        row.frontends.insert(new);
    }
}

fn add_host_port(
    reference: &mut Reference,
    owner: &Owner,
    index: usize,
    host_port: &HostPort,
    world: &World,
) {
    for pod in &host_port.addresses {
        let family = Family::of(*pod);
        let address = match host_port.host_ip {
            Some(ip) if Family::of(ip) != family => continue,
            Some(ip) if ip.is_unspecified() => None,
            other => other,
        };
        let place = (address, family, host_port.host_port, host_port.protocol);
        let kind = FrontendKind::HostPort;
        if !take(reference, place, (owner.clone(), index), kind, world) {
            continue;
        }
        let key = ServicePortKey {
            owner: owner.clone(),
            port_name: address.map(|a| a.to_string()).unwrap_or_default(),
            protocol: host_port.protocol,
            family,
            port: host_port.host_port,
        };
        let row = reference.services.entry(key).or_default();
        for scope in [Scope::Inside, Scope::Outside] {
            let (port, set) = (host_port.host_port, EndpointSet::Cluster);
            add(
                row,
                Frontend {
                    address,
                    port,
                    kind,
                    scope,
                    set,
                },
            );
        }
        let backend = Backend {
            target: owner.name().to_string(),
            ..Backend::active()
        };
        let port = host_port.container_port;
        row.backends.insert(
            BackendAddress {
                address: *pod,
                port,
            },
            backend,
        );
    }
}

/// Whether this one may have the place; counted as a problem if not.
fn take(
    reference: &mut Reference,
    place: Place,
    who: (Owner, usize),
    kind: FrontendKind,
    world: &World,
) -> bool {
    let nodes = || {
        world.objects.values().filter_map(|object| match object {
            Object::Node(node) => Some(node),
            _ => None,
        })
    };
    let is_nodes =
        |a: IpAddr| nodes().any(|n| n.internal_ips.contains(&a) || n.external_ips.contains(&a));
    let is_pods = |a: IpAddr| nodes().any(|n: &Node| n.pod_cidrs.iter().any(|c| c.contains(&a)));
    let is_this_nodes = |a: IpAddr| {
        let mut this = nodes().filter(|n| n.name.name == world.node);
        this.any(|n| n.internal_ips.contains(&a) || n.external_ips.contains(&a))
    };
    let refused = place.0.is_some_and(|address| {
        is_pods(address)
            || match kind {
                FrontendKind::ClusterIp => is_nodes(address),
                // A pod may have a port of its own node alone.
                FrontendKind::HostPort => !address.is_loopback() && !is_this_nodes(address),
                _ => false,
            }
    });
    let is_free = !refused && *reference.taken.entry(place).or_insert(who.clone()) == who;
    reference.problems += usize::from(!is_free);
    is_free
}

pub fn is_served(service: &Service, world: &World) -> bool {
    service.service_type != ServiceType::ExternalName
        && !service
            .labels
            .contains_key("service.kubernetes.io/headless")
        && !service
            .labels
            .contains_key("service.kubernetes.io/service-proxy-name")
        && !service.labels.contains_key(&world.excluded_label)
}

/// What is listed of an endpoint counts as often as it is listed; the best counts.
fn choose_endpoints(key: &ServicePortKey, row: &mut ServicePort, world: &World) {
    let name = key.owner.name();
    let slices: Vec<&EndpointSlice> = world
        .objects
        .values()
        .filter_map(|object| match object {
            Object::EndpointSlice(slice) => Some(slice),
            _ => None,
        })
        .filter(|slice| slice.name.namespace == name.namespace && slice.service == name.name)
        .filter(|slice| slice.family == Some(key.family))
        .collect();
    let zone = world.objects.values().find_map(|object| match object {
        Object::Node(node) if node.name.name == world.node => {
            node.labels.get("topology.kubernetes.io/zone").cloned()
        }
        _ => None,
    });
    let zone = zone.unwrap_or_default();
    let is_here = |e: &SliceEndpoint| e.node == world.node;
    let is_ready = |e: &SliceEndpoint| e.ready;
    let is_draining = |e: &SliceEndpoint| !e.ready && e.serving && e.terminating;
    let quality = |e: &SliceEndpoint| match () {
        () if is_ready(e) => 0,
        () if is_draining(e) => 1,
        () if !e.terminating => 2,
        () => 3,
    };
    // In the order of the slices' names.
    let mut endpoints: BTreeMap<BackendAddress, &SliceEndpoint> = BTreeMap::new();
    for slice in slices {
        for port in &slice.ports {
            if port.name != key.port_name || port.protocol != key.protocol {
                continue;
            }
            for endpoint in &slice.endpoints {
                let Some(address) = endpoint.address else {
                    continue;
                };
                let address = BackendAddress {
                    address,
                    port: port.port,
                };
                let known = endpoints.entry(address).or_insert(endpoint);
                let is_better = quality(endpoint) < quality(known)
                    || (quality(endpoint) == quality(known)
                        && is_here(endpoint)
                        && !is_here(known));
                if is_better {
                    *known = endpoint;
                }
            }
        }
    }

    let node_hints = |e: &SliceEndpoint| e.hints.clone().unwrap_or_default().nodes;
    let zone_hints = |e: &SliceEndpoint| e.hints.clone().unwrap_or_default().zones;
    let ready: Vec<&SliceEndpoint> = endpoints
        .values()
        .copied()
        .filter(|e| is_ready(e))
        .collect();
    let by_node = ready.iter().all(|e| !node_hints(e).is_empty())
        && ready.iter().any(|e| node_hints(e).contains(&world.node));
    let by_zone = !by_node
        && ready.iter().all(|e| !zone_hints(e).is_empty())
        && ready.iter().any(|e| zone_hints(e).contains(&zone));
    let is_ours = |e: &SliceEndpoint| {
        (!by_node || node_hints(e).contains(&world.node))
            && (!by_zone || zone_hints(e).contains(&zone))
    };
    let any_ready_here = ready.iter().any(|e| is_here(e));

    let leads_to = |set| row.frontends.iter().any(|frontend| frontend.set == set);
    let (uses_cluster, uses_local) = (leads_to(EndpointSet::Cluster), leads_to(EndpointSet::Local));
    for (address, endpoint) in &endpoints {
        let mut cluster = is_ready(endpoint) && is_ours(endpoint);
        if ready.is_empty() {
            cluster = is_draining(endpoint);
        }
        let mut local = is_here(endpoint) && is_ready(endpoint);
        if !any_ready_here {
            local = is_here(endpoint) && is_draining(endpoint);
        }
        let backend = Backend {
            state: match quality(endpoint) {
                0 | 2 => BackendState::Active,
                _ => BackendState::Terminating,
            },
            cluster: cluster && uses_cluster,
            local: local && uses_local,
            node: endpoint.node.clone(),
            zone: endpoint.zone.clone(),
            target: endpoint.target.clone(),
        };
        if backend.cluster || backend.local {
            row.backends.insert(*address, backend);
            continue;
        }
        let reason = match quality(endpoint) {
            2 => "not ready",
            3 => "terminating, not serving",
            _ if !uses_cluster && !is_here(endpoint) => "not on this node (traffic policy Local)",
            1 => "terminating",
            _ if by_node => "another node (hints)",
            _ => "another zone (hints)",
        };
        row.unused
            .insert(*address, UnusedBackend { backend, reason });
    }
}

/// The names that may be given to an address, best first.
pub fn owners(world: &World, address: IpAddr) -> Vec<String> {
    let mut owners = Vec::new();
    for rank in 0..3 {
        for object in world.objects.values() {
            let (of_rank, addresses, name) = match object {
                Object::Node(o) => (0, [&o.internal_ips[..], &o.external_ips].concat(), &o.name),
                Object::Pod(o) if !o.host_network => (1, o.ips.clone(), &o.name),
                Object::Service(o) if is_served(o, world) => {
                    (2, service_addresses(o, world), &o.name)
                }
                _ => continue,
            };
            if rank == of_rank && addresses.contains(&address) {
                owners.push(name.to_string());
            }
        }
    }
    owners
}

fn service_addresses(service: &Service, world: &World) -> Vec<IpAddr> {
    let mut addresses = [&service.cluster_ips[..], &service.external_ips].concat();
    if service.service_type == ServiceType::LoadBalancer {
        addresses.extend(&service.load_balancer_ips);
    }
    let has_family = |a: &IpAddr| {
        let mut cluster_ips = service.cluster_ips.iter();
        cluster_ips.any(|ip| Family::of(*ip) == Family::of(*a))
    };
    addresses.retain(|a| has_family(a) && !world.excluded_cidrs.iter().any(|c| c.contains(a)));
    addresses
}
