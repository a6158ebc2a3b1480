//! The state of a model as text, for golden files.

use std::{fmt::Write as _, net::SocketAddr};

use weir_agent::model::{Backend, BackendState, Model, ServicePort, ServicePortKey};

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
    let _ = writeln!(text, "{} {name} {protocol} {family}", key.service);
    for frontend in &port.frontends {
        let address = SocketAddr::new(frontend.address, frontend.port);
        let _ = writeln!(text, "  {} {address}", frontend.kind.name());
    }
    for (address, backend) in &port.backends {
        let address = SocketAddr::new(address.address, address.port);
        let state = match backend.state {
            BackendState::Active => "active",
            BackendState::Terminating => "terminating",
        };
        let _ = writeln!(text, "  -> {address} {state}{}", details(backend));
    }
    for (address, unused) in &port.unused {
        let address = SocketAddr::new(address.address, address.port);
        let details = details(&unused.backend);
        let _ = writeln!(text, "  unused {address} ({}){details}", unused.reason);
    }
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
