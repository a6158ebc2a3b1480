//! The state of a model as text, for golden files.

use std::{fmt::Write as _, net::SocketAddr};

use weir_agent::model::{
    Backend, BackendState, EndpointSet, Frontend, Model, Owner, Scope, ServicePort, ServicePortKey,
};

pub fn render(model: &Model) -> String {
    let mut text = String::new();
    for (key, port) in model.services() {
        service_port(&mut text, key, port);
    }
    for (name, node) in model.nodes() {
        let _ = write!(text, "node {name}:");
        for address in &node.addresses {
            let _ = write!(text, " {address}");
        }
        for cidr in &node.pod_cidrs {
            let _ = write!(text, " pods {cidr}");
        }
        if !node.zone.is_empty() {
            let _ = write!(text, " zone {}", node.zone);
        }
        if model.is_leaving(name) {
            text.push_str(" leaving");
        }
        text.push('\n');
    }
    for (service, check) in model.health_checks() {
        let _ = write!(text, "health check of {service}: port {}", check.port);
        for (family, count) in [("IPv4", check.v4), ("IPv6", check.v6)] {
            if let Some(count) = count {
                let _ = write!(text, ", {count} {family}");
            }
        }
        text.push('\n');
    }
    for problem in model.problems() {
        let _ = writeln!(text, "problem: {problem}");
    }
    text
}

fn service_port(text: &mut String, key: &ServicePortKey, port: &ServicePort) {
    let name = match key.port_name.as_str() {
        "" => "-",
        name => name,
    };
    let (protocol, family) = (key.protocol.name(), key.family.name());
    let owner = match &key.owner {
        Owner::Service(service) => service.to_string(),
        owner => owner.to_string(),
    };
    let _ = writeln!(text, "{owner} {name} {protocol} {family}");
    for frontend in &port.frontends {
        let _ = writeln!(text, "  {}", self::frontend(frontend));
    }
    if let Some(seconds) = port.affinity {
        let _ = writeln!(text, "  affinity {seconds} s");
    }
    if let Some(ranges) = &port.source_ranges {
        let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
        let _ = writeln!(text, "  from [{}]", ranges.join(", "));
    }
    for (address, backend) in &port.backends {
        let address = SocketAddr::new(address.address, address.port);
        let state = match backend.state {
            BackendState::Active => "active",
            BackendState::Terminating => "terminating",
        };
        let sets = match (backend.cluster, backend.local) {
            (true, true) => " in Cluster and Local",
            (false, true) => " in Local",
            _ => "",
        };
        let _ = writeln!(text, "  -> {address} {state}{sets}{}", details(backend));
    }
    for (address, unused) in &port.unused {
        let address = SocketAddr::new(address.address, address.port);
        let details = details(&unused.backend);
        let _ = writeln!(text, "  unused {address} ({}){details}", unused.reason);
    }
}

/// `inside` and the set Cluster go without saying.
fn frontend(frontend: &Frontend) -> String {
    let kind = frontend.kind.name();
    let mut text = match frontend.address {
        Some(address) => format!("{kind} {}", SocketAddr::new(address, frontend.port)),
        None => format!("{kind} *:{}", frontend.port),
    };
    if frontend.scope == Scope::Outside {
        text += " outside";
    }
    if frontend.set == EndpointSet::Local {
        text += " Local";
    }
    text
}

fn details(backend: &Backend) -> String {
    let parts = [
        ("on", &backend.node),
        ("zone", &backend.zone),
        ("pod", &backend.target),
    ];
    parts
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .fold(String::new(), |text, (word, value)| {
            text + &format!(" {word} {value}")
        })
}
