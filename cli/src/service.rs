//! `weir service`: Services as the agent sees them.

use std::{fmt::Write as _, path::Path, time::Duration};

use weir_api::v1::{Backend, Frontend, ListServicesRequest, ServicePort};

use crate::{
    Format, agent, output,
    table::{Cell, Colour, Table},
};

const CLUSTER: &str = "Cluster";
const LOCAL: &str = "Local";
/// The agent's reason for an endpoint that only another node may use.
const ELSEWHERE: &str = "not on this node (traffic policy Local)";
const OUTSIDE: &str = "outside";

/// `weir service list`.
pub async fn list(socket: &Path, format: Format) -> anyhow::Result<()> {
    let services = ask(socket, ListServicesRequest::default()).await?;
    output::list(format, &services, list_table)
}

/// `weir service get NAMESPACE/NAME`.
pub async fn get(socket: &Path, name: &str, format: Format) -> anyhow::Result<()> {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    anyhow::ensure!(
        !namespace.is_empty() && !name.is_empty() && !name.contains('/'),
        "{namespace}/{name} does not name a Service; give NAMESPACE/NAME"
    );
    let request = ListServicesRequest {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    let ports = ask(socket, request).await?;
    match format {
        Format::Json => output::json(&ports),
        Format::Yaml => output::yaml(&ports),
        Format::Table => output::text(&description(&ports, output::colours())),
    }
}

/// All Services, from an agent that answers in time.
pub async fn all(socket: &Path, timeout: Duration) -> anyhow::Result<Vec<ServicePort>> {
    ask_within(socket, ListServicesRequest::default(), timeout).await
}

async fn ask(socket: &Path, request: ListServicesRequest) -> anyhow::Result<Vec<ServicePort>> {
    ask_within(socket, request, agent::TIMEOUT).await
}

async fn ask_within(
    socket: &Path,
    request: ListServicesRequest,
    timeout: Duration,
) -> anyhow::Result<Vec<ServicePort>> {
    let answer = agent::connect(socket, Some(timeout))
        .await?
        .list_services(request)
        .await
        .map_err(|status| agent::explain(&status, socket))?;
    Ok(answer.into_inner().services)
}

fn list_table(services: &[ServicePort]) -> Table {
    let mut table = Table::new([
        "NAMESPACE",
        "NAME",
        "PORT",
        "FRONTEND",
        "TYPE",
        "AFFINITY",
        "ENDPOINTS",
        "STATE",
        "TARGET",
        "STATUS",
    ]);
    for service in services {
        let frontends = places(service);
        let address = |place: &Place<'_>| {
            let address = address(place.frontend);
            format!("{address}/{}", service.protocol)
        };
        let backends = &service.backends;
        let status = [service.status.clone()].into_iter();
        let status = status.chain(without_endpoint(service).map(str::to_owned));
        table.row([
            service.namespace.as_str().into(),
            service.name.as_str().into(),
            output::or_dash(&service.port_name).into(),
            Cell::lines(frontends.iter().map(address)),
            Cell::lines(frontends.iter().map(Place::kind_and_policy)),
            affinity(service).into(),
            Cell::lines(backends.iter().map(backend_address)),
            Cell::lines(backends.iter().map(|backend| state(service, backend))),
            Cell::lines(backends.iter().map(target)),
            Cell::coloured(
                status
                    .chain(service.problems.iter().cloned())
                    .collect::<Vec<_>>()
                    .join("\n"),
                colour(service),
            ),
        ]);
    }
    table
}

fn colour(service: &ServicePort) -> Colour {
    match service.status.as_str() {
        "applied" if service.problems.is_empty() && without_endpoint(service).is_none() => {
            Colour::Green
        }
        "applied" => Colour::Yellow,
        _ => Colour::Red,
    }
}

/// Everything about one Service.
fn description(ports: &[ServicePort], colours: bool) -> String {
    let mut text = String::new();
    let Some(first) = ports.first() else {
        return text;
    };
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "{:<9} {}/{}",
        first.owner, first.namespace, first.name
    );
    if first.health_check_node_port != 0 {
        let _ = writeln!(
            text,
            "{:<9} healthCheckNodePort {}",
            "Health", first.health_check_node_port
        );
    }
    for port in ports.iter().filter(|port| !port.protocol.is_empty()) {
        let name = output::or_dash(&port.port_name);
        let status = colour(port).paint(&port.status, colours);
        let _ = writeln!(
            text,
            "\nPort      {name} {} {}, number {}\nStatus    {status}\nAffinity  {}",
            port.protocol,
            port.family,
            port.number,
            affinity(port)
        );
        if let Some(why) = without_endpoint(port) {
            let _ = writeln!(text, "Refused   {why}");
        }
        if port.restricted {
            let _ = writeln!(text, "Clients   {}", clients(port));
        }
        text.push('\n');
        text += &frontend_table(port).render(colours);
        text.push('\n');
        text += &endpoint_table(port).render(colours);
    }
    if ports.iter().all(|port| port.protocol.is_empty()) {
        let status = colour(first).paint(&first.status, colours);
        let _ = writeln!(text, "Status    {status}");
    }
    let mut problems: Vec<&String> = ports.iter().flat_map(|port| &port.problems).collect();
    problems.sort_unstable();
    problems.dedup();
    for (index, problem) in problems.into_iter().enumerate() {
        let heading = if index == 0 {
            text.push('\n');
            "Problems"
        } else {
            ""
        };
        let _ = writeln!(text, "{heading:<10}{problem}");
    }
    text
}

fn frontend_table(port: &ServicePort) -> Table {
    let mut table = Table::new(["FRONTEND", "TYPE", "CLIENTS", "POLICY"]);
    for frontend in &port.frontends {
        table.row([
            address(frontend).into(),
            frontend.kind.as_str().into(),
            frontend.scope.as_str().into(),
            frontend.set.as_str().into(),
        ]);
    }
    table
}

fn endpoint_table(port: &ServicePort) -> Table {
    let mut table = Table::new([
        "ENDPOINT",
        "NODE",
        "ZONE",
        "TARGET",
        "STATE",
        "USED BY POLICY",
    ]);
    for backend in &port.backends {
        let colour = match backend.state.as_str() {
            "active" => Colour::Green,
            _ => Colour::Yellow,
        };
        let used = match backend.reason.as_str() {
            "" => backend.sets.join(", "),
            reason => format!("no: {reason}"),
        };
        table.row([
            backend_address(backend).into(),
            output::or_dash(&backend.node).into(),
            output::or_dash(&backend.zone).into(),
            output::or_dash(&backend.target).into(),
            Cell::coloured(backend.state.as_str(), colour),
            used.into(),
        ]);
    }
    table
}

/// A frontend for clients inside and outside.
struct Place<'a> {
    frontend: &'a Frontend,
    inside: Option<&'a str>,
    outside: Option<&'a str>,
}

/// The frontends of a port, inside and outside together.
fn places(service: &ServicePort) -> Vec<Place<'_>> {
    let mut places: Vec<Place<'_>> = Vec::new();
    for frontend in &service.frontends {
        let is_same = |other: &&mut Place<'_>| {
            let other = other.frontend;
            (&other.kind, &other.address, other.port)
                == (&frontend.kind, &frontend.address, frontend.port)
        };
        let known = places.iter_mut().find(is_same);
        let set = Some(frontend.set.as_str());
        match (known, frontend.scope == OUTSIDE) {
            (Some(place), true) => place.outside = set,
            (Some(place), false) => place.inside = set,
            (None, outside) => places.push(Place {
                frontend,
                inside: set.filter(|_| !outside),
                outside: set.filter(|_| outside),
            }),
        }
    }
    places
}

impl Place<'_> {
    /// The policy is named where it is not `Cluster`.
    fn kind_and_policy(&self) -> String {
        let kind = self.frontend.kind.as_str();
        let is_local = |set: Option<&str>| set.is_some_and(|set| set != CLUSTER);
        match (is_local(self.inside), is_local(self.outside)) {
            (false, false) => kind.to_owned(),
            (false, true) => format!("{kind} (outside: Local)"),
            (true, false) => format!("{kind} (inside: Local)"),
            (true, true) => format!("{kind} (Local)"),
        }
    }
}

/// Who is refused for want of an endpoint, and whether other nodes have one.
fn without_endpoint(service: &ServicePort) -> Option<&'static str> {
    let has = |set| {
        let mut sets = service.backends.iter().flat_map(|backend| &backend.sets);
        sets.any(|known| known == set)
    };
    let lacks = |set| service.frontends.iter().any(|f| f.set == set) && !has(set);
    let mut reasons = service.backends.iter().map(|backend| &backend.reason);
    let is_elsewhere = has(CLUSTER) || reasons.any(|reason| reason == ELSEWHERE);
    match (lacks(CLUSTER), lacks(LOCAL)) {
        (false, false) => None,
        (false, true) if is_elsewhere => {
            Some("no endpoint on this node for the traffic policy Local; other nodes have one")
        }
        _ => Some("no endpoint at all, on no node"),
    }
}

fn address(frontend: &Frontend) -> String {
    let address = match frontend.address.as_str() {
        "" => "*",
        address => address,
    };
    output::address_port(address, u16::try_from(frontend.port).unwrap_or_default())
}

fn backend_address(backend: &Backend) -> String {
    output::address_port(
        &backend.address,
        u16::try_from(backend.port).unwrap_or_default(),
    )
}

fn affinity(service: &ServicePort) -> String {
    match service.affinity_seconds {
        0 => "-".to_owned(),
        seconds => format!("ClientIP {seconds}s"),
    }
}

/// Who may use the load balancer addresses.
fn clients(service: &ServicePort) -> String {
    let whose = "at load balancer addresses (loadBalancerSourceRanges)";
    match service.source_ranges.join(", ") {
        ranges if ranges.is_empty() => format!("nobody {whose}"),
        ranges => format!("{ranges} {whose}"),
    }
}

/// With the sets, where the frontends lead to both.
fn state(service: &ServicePort, backend: &Backend) -> String {
    let first = service.frontends.first().map(|frontend| &frontend.set);
    let both = service.frontends.iter().any(|f| Some(&f.set) != first);
    match backend.reason.as_str() {
        "" if both => format!("{} ({})", backend.state, backend.sets.join(", ")),
        "" => backend.state.clone(),
        reason => format!("{} ({reason})", backend.state),
    }
}

fn target(backend: &Backend) -> String {
    match (backend.target.as_str(), backend.node.as_str()) {
        ("", "") => "-".to_owned(),
        (target, "") => target.to_owned(),
        ("", node) => format!("on {node}"),
        (target, node) => format!("{target} on {node}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(address: &str, state: &str, reason: &str, sets: &[&str]) -> Backend {
        Backend {
            address: address.into(),
            port: 8080,
            node: "b".into(),
            state: state.into(),
            reason: reason.into(),
            target: "default/web-1".into(),
            sets: sets.iter().map(|set| (*set).to_owned()).collect(),
            ..Backend::default()
        }
    }

    fn frontend(kind: &str, address: &str, scope: &str, set: &str) -> Frontend {
        Frontend {
            kind: kind.into(),
            address: address.into(),
            port: 80,
            scope: scope.into(),
            set: set.into(),
        }
    }

    fn service() -> ServicePort {
        ServicePort {
            namespace: "default".into(),
            name: "web".into(),
            port_name: "http".into(),
            protocol: "TCP".into(),
            family: "IPv6".into(),
            owner: "Service".into(),
            number: 3,
            frontends: vec![frontend("ClusterIP", "fd00:96::1", "inside", "Cluster")],
            backends: vec![
                backend("fd00::7", "active", "", &["Cluster"]),
                backend("fd00::8", "unused", "not ready", &[]),
            ],
            status: "applied".into(),
            ..ServicePort::default()
        }
    }

    #[test]
    fn a_service_shows_its_frontends_and_endpoints_below_each_other() {
        assert_eq!(
            list_table(&[service()]).render(false),
            "NAMESPACE  NAME  PORT  FRONTEND             TYPE       AFFINITY  ENDPOINTS       STATE               TARGET              STATUS\n\
             default    web   http  [fd00:96::1]:80/TCP  ClusterIP  -         [fd00::7]:8080  active              default/web-1 on b  applied\n\
             \u{20}                                                                [fd00::8]:8080  unused (not ready)  default/web-1 on b\n"
        );
    }

    #[test]
    fn scopes_and_policies_are_told_where_they_differ() {
        let mut service = service();
        service.frontends.extend([
            frontend("NodePort", "", "inside", "Cluster"),
            frontend("NodePort", "", "outside", "Local"),
        ]);
        service.backends[0].sets.push("Local".into());
        service.affinity_seconds = 60;
        service.problems.push("port 81 is somebody else's".into());
        let text = list_table(&[service]).render(false);
        for part in [
            "*:80/TCP",
            "NodePort (outside: Local)",
            "active (Cluster, Local)",
            "ClientIP 60s",
            "port 81 is somebody else's",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(text.matches("NodePort").count(), 1, "{text}");
    }

    #[test]
    fn everything_about_one() {
        let mut service = service();
        service.problems.push("port 81 is somebody else's".into());
        assert_eq!(
            description(&[service.clone(), service], false),
            "Service   default/web\n\
             \n\
             Port      http TCP IPv6, number 3\n\
             Status    applied\n\
             Affinity  -\n\
             \n\
             FRONTEND         TYPE       CLIENTS  POLICY\n\
             [fd00:96::1]:80  ClusterIP  inside   Cluster\n\
             \n\
             ENDPOINT        NODE  ZONE  TARGET         STATE   USED BY POLICY\n\
             [fd00::7]:8080  b     -     default/web-1  active  Cluster\n\
             [fd00::8]:8080  b     -     default/web-1  unused  no: not ready\n\
             \n\
             Port      http TCP IPv6, number 3\n\
             Status    applied\n\
             Affinity  -\n\
             \n\
             FRONTEND         TYPE       CLIENTS  POLICY\n\
             [fd00:96::1]:80  ClusterIP  inside   Cluster\n\
             \n\
             ENDPOINT        NODE  ZONE  TARGET         STATE   USED BY POLICY\n\
             [fd00::7]:8080  b     -     default/web-1  active  Cluster\n\
             [fd00::8]:8080  b     -     default/web-1  unused  no: not ready\n\
             \n\
             Problems  port 81 is somebody else's\n"
        );
    }

    #[test]
    fn no_endpoint_here_is_told_from_none_at_all() {
        let mut service = service();
        assert_eq!(without_endpoint(&service), None);
        // Inside all endpoints serve, outside those of this node.
        service
            .frontends
            .push(frontend("NodePort", "", "outside", "Local"));
        let here = "no endpoint on this node for the traffic policy Local; other nodes have one";
        assert_eq!(without_endpoint(&service), Some(here));
        for text in [
            description(std::slice::from_ref(&service), false),
            list_table(std::slice::from_ref(&service)).render(false),
        ] {
            assert!(text.contains(here), "{text}");
        }
        service.backends[0].sets.push("Local".into());
        assert_eq!(without_endpoint(&service), None);
        // Every frontend is Local.
        service.frontends.remove(0);
        service.backends = vec![backend("fd00::7", "unused", ELSEWHERE, &[])];
        assert_eq!(without_endpoint(&service), Some(here));
        for backends in [
            Vec::new(),
            vec![backend("fd00::7", "unused", "not ready", &[])],
        ] {
            service.backends = backends;
            let none = Some("no endpoint at all, on no node");
            assert_eq!(without_endpoint(&service), none);
            service.frontends[0].set = "Cluster".into();
            assert_eq!(without_endpoint(&service), none);
        }
    }

    #[test]
    fn clients_are_told_where_they_are_restricted() {
        let mut service = service();
        service.restricted = true;
        let text = |service: &ServicePort| description(std::slice::from_ref(service), false);
        assert!(text(&service).contains("\nClients   nobody at load balancer addresses"));
        service.source_ranges = vec!["192.0.2.0/24".into(), "198.51.100.0/24".into()];
        let shown = "\nClients   192.0.2.0/24, 198.51.100.0/24 at load balancer addresses";
        assert!(text(&service).contains(shown), "{}", text(&service));
    }

    #[test]
    fn one_that_is_not_served_says_why() {
        let service = ServicePort {
            namespace: "default".into(),
            name: "web".into(),
            owner: "Service".into(),
            status: "not served: it is of type ExternalName".into(),
            ..ServicePort::default()
        };
        assert_eq!(
            description(&[service], false),
            "Service   default/web\nStatus    not served: it is of type ExternalName\n"
        );
    }
}
