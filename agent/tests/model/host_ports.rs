//! Host ports of this node's pods, beside the Services.

use weir_agent::{
    model::{
        EndpointSet, FrontendKind, HostPort, Model, ModelOptions, Owner, PodInterface, Scope,
        ServicePortKey,
    },
    objects::{
        Family, Kind, Node, Object, ObjectKey, ObjectName, Protocol, Service, ServicePort,
        ServiceType,
    },
    source::Change,
};

fn interface(pod: &str, container: &str) -> PodInterface {
    PodInterface {
        pod: ObjectName::new("default", pod),
        container_id: container.to_owned(),
        ifname: "eth0".to_owned(),
    }
}

fn host_port(host_ip: &str, number: u16) -> HostPort {
    HostPort {
        host_ip: host_ip.parse().ok(),
        host_port: number,
        protocol: Protocol::Tcp,
        addresses: vec!["10.244.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
        container_port: 80,
    }
}

/// What is served: owner, family, address and port.
fn served(model: &mut Model) -> Vec<String> {
    model.take_delta();
    let mut served = Vec::new();
    for (key, port) in model.services() {
        for frontend in &port.frontends {
            assert_eq!(frontend.kind, kind_of(key), "{key:?}");
            assert_eq!(frontend.set, EndpointSet::Cluster);
            if frontend.scope == Scope::Inside {
                let address = frontend.address.map_or("*".to_owned(), |a| a.to_string());
                let (owner, family) = (key.owner.name(), key.family.name());
                served.push(format!("{owner} {family} {address} {}", frontend.port));
            }
        }
        let outside = |s| port.frontends.iter().filter(|f| f.scope == s).count();
        assert_eq!(outside(Scope::Inside), outside(Scope::Outside));
        assert_eq!(
            port.backends.len(),
            usize::from(key.owner.service().is_none())
        );
        let families = port.backends.keys().map(|b| Family::of(b.address));
        assert!(families.into_iter().all(|family| family == key.family));
    }
    served
}

fn kind_of(key: &ServicePortKey) -> FrontendKind {
    match key.owner {
        Owner::Service(_) => FrontendKind::NodePort,
        Owner::HostPort(_) => FrontendKind::HostPort,
    }
}

fn problems(model: &Model) -> Vec<String> {
    model.problems().map(ToString::to_string).collect()
}

const NODE: &str = "node1";

/// The model of a node that has these addresses.
fn model_with_addresses(addresses: &[&str]) -> Model {
    let mut model = Model::new(ModelOptions {
        node_name: NODE.to_owned(),
        ..ModelOptions::default()
    });
    set_node(&mut model, NODE, addresses);
    model
}

fn set_node(model: &mut Model, name: &str, addresses: &[&str]) {
    let node = Node {
        name: ObjectName::new("", name),
        internal_ips: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        ..Node::default()
    };
    model.apply(Change::Upsert(Object::Node(node)));
}

#[test]
fn the_host_ip_says_where_a_port_is_served() {
    for (host_ip, expected) in [
        ("", &["default/p IPv4 * 8080", "default/p IPv6 * 8080"][..]),
        ("0.0.0.0", &["default/p IPv4 * 8080"]),
        ("::", &["default/p IPv6 * 8080"]),
        ("192.0.2.1", &["default/p IPv4 192.0.2.1 8080"]),
        ("2001:db8::1", &["default/p IPv6 2001:db8::1 8080"]),
        ("127.0.0.1", &["default/p IPv4 127.0.0.1 8080"]),
        ("127.1.2.3", &["default/p IPv4 127.1.2.3 8080"]),
        ("::1", &["default/p IPv6 ::1 8080"]),
    ] {
        let mut model = model_with_addresses(&["192.0.2.1", "2001:db8::1"]);
        model.set_host_ports(interface("p", "1"), Some(vec![host_port(host_ip, 8080)]));
        assert_eq!(served(&mut model), expected, "{host_ip:?}");
        model.set_host_ports(interface("p", "1"), None);
        assert!(served(&mut model).is_empty());
        model.set_host_ports(interface("p", "1"), None);
        assert!(model.take_delta().is_empty());
    }
}

/// Otherwise whoever may make pods could take any address for the clients of a whole node.
#[test]
fn an_address_that_is_not_the_nodes_is_not_served() {
    for (host_ip, other) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
        let pod = |model: &mut Model| {
            model.set_host_ports(interface("p", "1"), Some(vec![host_port(host_ip, 8080)]));
        };
        let mut model = model_with_addresses(&[other]);
        let refused = format!(
            "HostPort of pod default/p: {} TCP is not served: hostIP {host_ip} is no loopback \
             address and none that the Node node1 has, so it would take traffic that is for \
             others. Give the pod an address of the Node as hostIP, or none for all of them",
            std::net::SocketAddr::new(host_ip.parse().unwrap(), 8080)
        );
        let assert_served = |model: &mut Model, expected: bool| {
            assert_eq!(served(model).len(), usize::from(expected), "{host_ip}");
            let problem = if expected {
                &[][..]
            } else {
                std::slice::from_ref(&refused)
            };
            assert_eq!(problems(model), problem);
        };
        pod(&mut model);
        assert_served(&mut model, false);
        // Of another node it is no better.
        set_node(&mut model, "node2", &[host_ip]);
        assert_served(&mut model, false);
        // The node gets the address, loses it, and gets it before the pod comes.
        for has_it in [true, false, true] {
            let both = [other, host_ip];
            set_node(&mut model, NODE, &both[..1 + usize::from(has_it)]);
            assert_served(&mut model, has_it);
        }
        model.set_host_ports(interface("p", "1"), None);
        model.take_delta();
        pod(&mut model);
        assert_served(&mut model, true);
        model.apply(Change::Delete(ObjectKey {
            kind: Kind::Node,
            name: ObjectName::new("", NODE),
        }));
        assert_served(&mut model, false);
    }
}

#[test]
fn two_host_ports_at_an_address_that_is_not_the_nodes_are_both_refused_for_it() {
    let mut model = model_with_addresses(&["192.0.2.2"]);
    model.set_host_ports(
        interface("p", "1"),
        Some(vec![host_port("192.0.2.1", 8080)]),
    );
    model.set_host_ports(
        interface("q", "1"),
        Some(vec![host_port("192.0.2.1", 8080)]),
    );
    assert!(served(&mut model).is_empty());
    // Both are refused for their address, neither because of the other.
    let problems = problems(&model);
    assert_eq!(problems.len(), 2);
    assert!(
        problems
            .iter()
            .all(|p| p.contains("is not served: hostIP 192.0.2.1"))
    );
}

#[test]
fn the_same_port_at_two_addresses_and_with_two_protocols_is_two_ports() {
    let mut model = model_with_addresses(&["192.0.2.1", "192.0.2.2"]);
    let mut udp = host_port("192.0.2.1", 8080);
    udp.protocol = Protocol::Udp;
    let ports = vec![
        host_port("192.0.2.1", 8080),
        host_port("192.0.2.2", 8080),
        udp,
    ];
    model.set_host_ports(interface("p", "1"), Some(ports));
    assert_eq!(served(&mut model).len(), 3);
    assert_eq!(problems(&model), [""; 0]);
}

#[test]
fn the_first_pod_keeps_a_port_until_it_goes() {
    let mut model = Model::default();
    // One takes the place of the other, as a StatefulSet's does: the name is the same.
    let (old, new) = (interface("p", "9"), interface("p", "1"));
    model.set_host_ports(old.clone(), Some(vec![host_port("0.0.0.0", 8080)]));
    model.set_host_ports(new, Some(vec![host_port("0.0.0.0", 8080)]));
    // Told again, it is as old as it was.
    model.set_host_ports(old.clone(), Some(vec![host_port("0.0.0.0", 8080)]));
    model.take_delta();
    let owners = |model: &Model| -> Vec<String> {
        let of = |key: &ServicePortKey| match &key.owner {
            Owner::HostPort(interface) => interface.container_id.clone(),
            Owner::Service(name) => name.to_string(),
        };
        model.services().map(|(key, _)| of(key)).collect()
    };
    assert_eq!(owners(&model), ["9"]);
    assert_eq!(
        problems(&model),
        [
            "HostPort of pod default/p: port 8080 TCP of the node's IPv4 addresses belongs to \
             HostPort of pod default/p, which had it first. Give one of them another hostPort or \
             hostIP"
        ]
    );
    model.set_host_ports(old, None);
    model.take_delta();
    assert_eq!(owners(&model), ["1"]);
    assert_eq!(problems(&model), [""; 0]);
}

#[test]
fn a_node_port_takes_the_port_whenever_it_comes() {
    let service = |node_port| Service {
        name: ObjectName::new("default", "web"),
        service_type: ServiceType::NodePort,
        cluster_ips: Vec::new(),
        external_ips: vec!["192.0.2.1".parse().unwrap()],
        ports: vec![ServicePort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: 8080,
            node_port,
        }],
        ..Service::default()
    };
    for pod_first in [true, false] {
        let mut model = Model::default();
        let mut with_ip = service(30_000);
        with_ip.cluster_ips = vec!["10.96.0.1".parse().unwrap()];
        // Only what stands at every address matters here.
        with_ip.external_ips.clear();
        let steps: [&dyn Fn(&mut Model); 2] = [
            &|model| {
                let ports = vec![host_port("0.0.0.0", 30_000)];
                model.set_host_ports(interface("p", "1"), Some(ports));
            },
            &|model| model.apply(Change::Upsert(Object::Service(with_ip.clone()))),
        ];
        for step in if pod_first { [0, 1] } else { [1, 0] } {
            steps[step](&mut model);
            model.take_delta();
        }
        let owners: Vec<_> = model
            .services()
            .map(|(key, _)| key.owner.service())
            .collect();
        assert!(owners.iter().all(Option::is_some), "{owners:?}");
        let problems = problems(&model);
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].contains("comes before host ports"),
            "{problems:?}"
        );
        model.apply(Change::Delete(Object::Service(with_ip.clone()).key()));
        assert_eq!(served(&mut model), ["default/p IPv4 * 30000"]);
    }
}
