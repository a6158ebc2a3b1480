//! Which ports are open: that of `/healthz`, and one for each `healthCheckNodePort` on every
//! address of the node. They come and go with the Services.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
    time::Instant,
};

use tokio::sync::watch;

use super::{
    DataPath,
    answer::Site,
    socket::{Socket, addresses},
};
use crate::{model::HealthCheck, objects::ObjectName};

/// See the module.
#[derive(Debug)]
pub struct Ports {
    data_path: watch::Receiver<DataPath>,
    healthz: Option<Port>,
    checks: BTreeMap<ObjectName, HealthCheck>,
    services: BTreeMap<u16, ServicePort>,
}

/// Sockets that serve the same.
#[derive(Debug)]
struct Port {
    site: watch::Sender<Site>,
    sockets: Vec<Socket>,
}

/// The port of a Service.
#[derive(Debug)]
struct ServicePort {
    port: Port,
    /// The Service that has it.
    owner: ObjectName,
    /// Others that want it.
    others: BTreeSet<ObjectName>,
}

impl Port {
    fn open(address: SocketAddr, site: Site, data_path: &watch::Receiver<DataPath>) -> Self {
        let (site, receiver) = watch::channel(site);
        let sockets = addresses(address).into_iter();
        let sockets = sockets.map(|address| Socket::open(address, &receiver, data_path));
        Self {
            sockets: sockets.collect(),
            site,
        }
    }

    fn retry(&mut self, now: Instant, data_path: &watch::Receiver<DataPath>) {
        let site = self.site.subscribe();
        for socket in &mut self.sockets {
            socket.retry(now, &site, data_path);
        }
    }

    /// Those that cannot be served.
    fn failures(&self) -> Option<String> {
        let failures: Vec<String> = self.sockets.iter().filter_map(Socket::failure).collect();
        (!failures.is_empty()).then(|| failures.join(", "))
    }
}

impl Ports {
    /// Opens `/healthz`, if it has an address.
    pub fn open(healthz: Option<SocketAddr>, data_path: watch::Receiver<DataPath>) -> Self {
        Self {
            healthz: healthz.map(|address| Port::open(address, Site::Proxy, &data_path)),
            data_path,
            checks: BTreeMap::new(),
            services: BTreeMap::new(),
        }
    }

    /// The health check of a Service has changed, or it has none any more.
    pub fn set(&mut self, service: ObjectName, check: Option<HealthCheck>) {
        let before = match check {
            Some(check) => self.checks.insert(service.clone(), check),
            None => self.checks.remove(&service),
        };
        if let Some(before) = before
            && check.is_none_or(|check| check.port != before.port)
        {
            self.leave(before.port, &service);
        }
        if let Some(check) = check {
            self.enter(service, check);
        }
    }

    /// The Service is not at this port any more.
    fn leave(&mut self, number: u16, service: &ObjectName) {
        let Some(port) = self.services.get_mut(&number) else {
            return;
        };
        port.others.remove(service);
        if port.owner != *service {
            return;
        }
        let next = port.others.pop_first();
        match next.and_then(|next| Some((self.checks.get(&next)?, next))) {
            Some((check, next)) => {
                port.owner = next.clone();
                port.port.site.send_replace(Site::Service(next, *check));
            }
            None => {
                self.services.remove(&number);
            }
        }
    }

    /// The Service wants this port, or has it already and its count is another.
    fn enter(&mut self, service: ObjectName, check: HealthCheck) {
        let site = Site::Service(service.clone(), check);
        match self.services.get_mut(&check.port) {
            Some(port) if port.owner == service => {
                port.port.site.send_replace(site);
            }
            Some(port) => {
                port.others.insert(service);
            }
            None => {
                let every = SocketAddr::from((Ipv4Addr::UNSPECIFIED, check.port));
                let port = ServicePort {
                    port: Port::open(every, site, &self.data_path),
                    owner: service,
                    others: BTreeSet::new(),
                };
                self.services.insert(check.port, port);
            }
        }
    }

    fn all(&self) -> impl Iterator<Item = &Port> {
        let services = self.services.values().map(|port| &port.port);
        self.healthz.iter().chain(services)
    }

    /// When a socket is to be tried again.
    pub fn next_due(&self) -> Option<Instant> {
        let sockets = self.all().flat_map(|port| &port.sockets);
        sockets.filter_map(Socket::due).min()
    }

    /// Tries those again whose time has come.
    pub fn retry(&mut self, now: Instant) {
        let services = self.services.values_mut().map(|port| &mut port.port);
        for port in self.healthz.iter_mut().chain(services) {
            port.retry(now, &self.data_path);
        }
    }

    /// What cannot be served, and what to do.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Some(failures) = self.healthz.as_ref().and_then(Port::failures) {
            problems.push(format!(
                "/healthz is not served at {failures}: load balancers may take this node for a broken \
                 one; it is tried again. Stop what has the port (kube-proxy has it, too), or give \
                 another healthz-address"
            ));
        }
        for (number, port) in &self.services {
            let owner = &port.owner;
            if let Some(failures) = port.port.failures() {
                problems.push(format!(
                    "Service {owner}: healthCheckNodePort {number} is not served at {failures}: load \
                     balancers take this node for one without endpoints; it is tried again. Stop what \
                     has the port (`ss -ltnp sport = :{number}`; kube-proxy has it, too), or give the \
                     Service another healthCheckNodePort"
                ));
            }
            for other in &port.others {
                problems.push(format!(
                    "Service {other}: healthCheckNodePort {number} is not served: Service {owner} had \
                     it first; give one of them another"
                ));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A port that nobody had a moment ago.
    fn free_port() -> u16 {
        let listener = std::net::TcpListener::bind("[::]:0").unwrap();
        listener.local_addr().unwrap().port()
    }

    fn name(name: &str) -> ObjectName {
        ObjectName::new("ns", name)
    }

    fn check(port: u16, count: usize) -> Option<HealthCheck> {
        Some(HealthCheck {
            port,
            v4: Some(count),
            v6: None,
        })
    }

    fn served(ports: &Ports) -> Vec<(u16, String, usize)> {
        let services = ports.services.iter();
        let all = services.map(|(number, port)| {
            let Site::Service(service, check) = port.port.site.borrow().clone() else {
                panic!("{number}");
            };
            assert_eq!((&service, check.port), (&port.owner, *number));
            (*number, service.name, check.v4.unwrap())
        });
        all.collect()
    }

    #[tokio::test]
    async fn a_port_belongs_to_the_first_until_it_goes() {
        let (_sender, data_path) = watch::channel(DataPath::starting());
        let mut ports = Ports::open(None, data_path);
        let number = free_port();
        ports.set(name("b"), check(number, 1));
        ports.set(name("a"), check(number, 2));
        ports.set(name("b"), check(number, 3));
        assert_eq!(served(&ports), [(number, "b".to_owned(), 3)]);
        let problems = ports.problems();
        assert_eq!(problems.len(), 1);
        for part in ["ns/a", "ns/b", &number.to_string(), "another"] {
            assert!(problems[0].contains(part), "{problems:?}");
        }
        ports.set(name("b"), None);
        assert_eq!(served(&ports), [(number, "a".to_owned(), 2)]);
        assert!(ports.problems().is_empty());
        let other = free_port();
        ports.set(name("a"), check(other, 2));
        assert_eq!(served(&ports), [(other, "a".to_owned(), 2)]);
        ports.set(name("a"), None);
        ports.set(name("a"), None);
        assert!(served(&ports).is_empty() && ports.next_due().is_none());
    }

    #[tokio::test]
    async fn a_port_in_use_is_a_problem_until_it_is_free() {
        let holder = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let number = holder.local_addr().unwrap().port();
        let (_sender, data_path) = watch::channel(DataPath::starting());
        let address = format!("127.0.0.1:{number}").parse().unwrap();
        let mut ports = Ports::open(Some(address), data_path);
        ports.set(name("a"), check(number, 1));
        let problems = ports.problems();
        assert_eq!(problems.len(), 2);
        for part in [
            "/healthz",
            &address.to_string(),
            "in use",
            "healthz-address",
        ] {
            assert!(problems[0].contains(part), "{problems:?}");
        }
        let every = format!("0.0.0.0:{number}");
        for part in ["ns/a", every.as_str(), "in use", "healthCheckNodePort"] {
            assert!(problems[1].contains(part), "{problems:?}");
        }
        let due = ports.next_due().unwrap();
        ports.retry(due);
        assert!(ports.next_due().unwrap() > due, "the pause grows");
        drop(holder);
        ports.healthz = None;
        ports.retry(ports.next_due().unwrap());
        assert!(ports.problems().is_empty() && ports.next_due().is_none());
    }
}
