//! Ports of the node at which NodePorts and HostPorts are served. The kernel must not give them to the node's own
//! connections as source ports: replies to those would be taken for packets to the NodePort. They must not lie within the
//! setting `nat-ports` either, for the same reason. The switch is written once for all changes that are due together.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Agent, Row};
use crate::{
    model::{FrontendKind, Owner, ServicePort, ServicePortKey},
    objects::Protocol,
    settings::NatPorts,
};

/// Problems of one kind that are told one by one.
const SHOWN: usize = 5;

/// Who has which port of the node.
#[derive(Debug, Default)]
pub(super) struct LocalPorts {
    of: HashMap<ServicePortKey, BTreeSet<(u16, FrontendKind)>>,
    users: BTreeMap<u16, BTreeSet<(FrontendKind, Owner, ServicePortKey)>>,
}

impl LocalPorts {
    /// A Service port is as `desired` from now on; `None`: gone. Gives whether other ports are served than before.
    fn note(&mut self, key: &ServicePortKey, desired: Option<&ServicePort>) -> bool {
        let frontends = desired.into_iter().flat_map(|port| &port.frontends);
        let is_of_node = |kind| matches!(kind, FrontendKind::NodePort | FrontendKind::HostPort);
        let ports: BTreeSet<_> = frontends
            .filter(|frontend| is_of_node(frontend.kind))
            .map(|frontend| (frontend.port, frontend.kind))
            .collect();
        let user = |kind| (kind, key.owner.clone(), key.clone());
        let before = self.of.remove(key).unwrap_or_default();
        let mut changed = false;
        for (port, kind) in ports.difference(&before) {
            let users = self.users.entry(*port).or_default();
            changed |= users.is_empty();
            users.insert(user(*kind));
        }
        for (port, kind) in before.difference(&ports) {
            if let Some(users) = self.users.get_mut(port) {
                users.remove(&user(*kind));
                if users.is_empty() {
                    self.users.remove(port);
                    changed = true;
                }
            }
        }
        if !ports.is_empty() {
            self.of.insert(key.clone(), ports);
        }
        changed
    }

    fn ports(&self) -> impl Iterator<Item = u16> + '_ {
        self.users.keys().copied()
    }

    /// Those at which health checks are served, too: packets from outside go to the Service instead. `checks` are the
    /// ports over TCP, with whose they are.
    pub(super) fn hidden_checks(&self, checks: impl Iterator<Item = (u16, String)>) -> Vec<String> {
        let mut problems = Vec::new();
        for (port, check) in checks {
            let users = self.users.get(&port).into_iter().flatten();
            let mut users = users.filter(|(_, _, key)| key.protocol == Protocol::Tcp);
            if let Some((kind, owner, _)) = users.next() {
                problems.push(format!(
                    "{check} cannot be asked from outside at port {port}: it is the {} of {owner}, which gets those \
                     packets, and load balancers may think well of a broken node; give one of them another port",
                    kind.name()
                ));
            }
        }
        problems
    }

    /// Those that translated connections have, too.
    pub(super) fn problems(&self, nat: NatPorts) -> Vec<String> {
        let within = self.users.range(nat.first..=nat.last);
        let mut who: BTreeSet<(u16, FrontendKind, &Owner)> = BTreeSet::new();
        for (port, users) in within {
            who.extend(users.iter().map(|(kind, owner, _)| (*port, *kind, owner)));
        }
        let told = who.iter().take(SHOWN).map(|(port, kind, owner)| {
            let whose = match owner {
                Owner::Service(_) => owner.to_string(),
                Owner::HostPort(interface) => interface.to_string(),
            };
            format!(
                "{} {port} of {whose} lies within nat-ports {nat}: packets to it and replies to translated connections \
                 cannot be told apart; give it another port, or the setting nat-ports a range without it",
                kind.name()
            )
        });
        let mut problems: Vec<String> = told.collect();
        if who.len() > SHOWN {
            problems.push(format!(
                "{} more NodePorts and HostPorts lie within nat-ports {nat}; give nat-ports another range",
                who.len() - SHOWN
            ));
        }
        problems
    }
}

impl Agent {
    /// What is wrong with ports of this node, with whose they are.
    pub(super) fn problems_with_ports(&self) -> Vec<String> {
        let mut problems = self.local_ports.problems(self.settings.nat_ports);
        problems.extend(self.hidden_checks());
        problems.extend(self.health.problems());
        problems
    }

    /// Health checks that a NodePort or HostPort hides.
    fn hidden_checks(&self) -> Vec<String> {
        // At a loopback address nobody outside asks.
        let healthz = self.settings.healthz_address;
        let healthz = healthz.filter(|address| !address.ip().is_loopback());
        let healthz = healthz.map(|address| (address.port(), "/healthz".to_owned()));
        let checks = self.model.health_checks().iter();
        let checks = checks.map(|(service, check)| {
            let check_of = format!("the healthCheckNodePort of Service {service}");
            (check.port, check_of)
        });
        self.local_ports
            .hidden_checks(healthz.into_iter().chain(checks))
    }

    /// To be called before a Service port is applied.
    pub(super) fn note_local_ports(&mut self, key: &ServicePortKey) {
        if self.local_ports.note(key, self.model.service(key)) {
            self.mark(Row::LocalPorts);
        }
    }

    /// Has the kernel give no process of the node a port by itself that Weir has. Until every Service is known the ports of an
    /// earlier agent stay. What cannot be set is a problem, and looked at again: see [`Agent::tick`].
    pub(super) fn reserve_local_ports(&mut self) {
        let nat = self.settings.nat_ports;
        let synced = self.source_state.synced;
        let served = synced.then(|| self.local_ports.ports());
        let reserved = self.sysctls.reserve_ports(nat.first..=nat.last, served);
        self.notes.local_ports = reserved.err().map(|error| error.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{EndpointSet, Frontend, PodInterface, Scope},
        objects::{Family, ObjectName},
    };

    const NAT: NatPorts = NatPorts {
        first: 61_000,
        last: 61_015,
    };

    fn key(owner: Owner, family: Family) -> ServicePortKey {
        ServicePortKey {
            owner,
            port_name: String::new(),
            protocol: Protocol::Tcp,
            family,
            port: 80,
        }
    }

    fn web(family: Family) -> ServicePortKey {
        key(ObjectName::new("ns", "web").into(), family)
    }

    fn served(kind: FrontendKind, ports: &[u16]) -> ServicePort {
        let frontend = |port: &u16| Frontend {
            address: None,
            port: *port,
            kind,
            scope: Scope::Outside,
            set: EndpointSet::Cluster,
        };
        ServicePort {
            frontends: ports.iter().map(frontend).collect(),
            ..ServicePort::default()
        }
    }

    #[test]
    fn a_port_is_served_until_nobody_has_it() {
        let mut local = LocalPorts::default();
        let ports = |local: &LocalPorts| local.ports().collect::<Vec<_>>();
        let node_port = |ports: &[u16]| served(FrontendKind::NodePort, ports);
        assert!(local.note(&web(Family::V4), Some(&node_port(&[30_080]))));
        assert!(!local.note(&web(Family::V4), Some(&node_port(&[30_080]))));
        assert!(!local.note(&web(Family::V6), Some(&node_port(&[30_080]))));
        let pod = Owner::HostPort(Box::new(PodInterface {
            pod: ObjectName::new("ns", "pod"),
            container_id: "1".to_owned(),
            ifname: "eth0".to_owned(),
        }));
        let pod = key(pod, Family::V4);
        assert!(local.note(&pod, Some(&served(FrontendKind::HostPort, &[8080]))));
        let cluster_ip = served(FrontendKind::ClusterIp, &[80]);
        let other = key(ObjectName::new("ns", "other").into(), Family::V4);
        assert!(
            !local.note(&other, Some(&cluster_ip)),
            "no port of the node"
        );
        assert_eq!(ports(&local), [8080, 30_080]);
        assert!(!local.note(&web(Family::V4), None), "IPv6 has it still");
        assert!(local.note(&web(Family::V6), Some(&node_port(&[30_081]))));
        assert_eq!(ports(&local), [8080, 30_081]);
        assert!(local.note(&web(Family::V6), None) && local.note(&pod, None));
        assert!(local.users.is_empty() && local.of.is_empty());
    }

    #[test]
    fn ports_within_the_nat_range_are_named_with_the_remedy() {
        let mut local = LocalPorts::default();
        let node_port = |ports: &[u16]| served(FrontendKind::NodePort, ports);
        local.note(&web(Family::V4), Some(&node_port(&[60_999, 61_016])));
        assert!(local.problems(NAT).is_empty());
        for family in [Family::V4, Family::V6] {
            local.note(&web(family), Some(&node_port(&[61_000])));
        }
        let problems = local.problems(NAT);
        assert_eq!(problems.len(), 1, "both families are one: {problems:?}");
        for part in [
            "NodePort 61000",
            "Service ns/web",
            "61000-61015",
            "another port",
        ] {
            assert!(problems[0].contains(part), "{part}: {problems:?}");
        }
        let many: Vec<u16> = (61_000..61_010).collect();
        local.note(&web(Family::V4), Some(&node_port(&many)));
        let problems = local.problems(NAT);
        assert_eq!(problems.len(), SHOWN + 1);
        assert!(problems[SHOWN].starts_with("5 more"), "{problems:?}");
    }

    #[test]
    fn a_health_check_is_hidden_by_a_port_of_tcp() {
        let mut local = LocalPorts::default();
        let node_port = served(FrontendKind::NodePort, &[10_256]);
        let hidden = |local: &LocalPorts| {
            let checks = [(10_256, "/healthz"), (32_000, "that of ns/other")];
            local.hidden_checks(
                checks
                    .map(|(port, whose)| (port, whose.to_owned()))
                    .into_iter(),
            )
        };
        let of_udp = ServicePortKey {
            protocol: Protocol::Udp,
            ..web(Family::V4)
        };
        local.note(&of_udp, Some(&node_port));
        assert!(hidden(&local).is_empty(), "nobody asks over UDP");
        for family in [Family::V4, Family::V6] {
            local.note(&web(family), Some(&node_port));
        }
        let problems = hidden(&local);
        assert_eq!(problems.len(), 1, "both families are one: {problems:?}");
        for part in [
            "/healthz",
            "10256",
            "NodePort",
            "Service ns/web",
            "another port",
        ] {
            assert!(problems[0].contains(part), "{part}: {problems:?}");
        }
    }
}
