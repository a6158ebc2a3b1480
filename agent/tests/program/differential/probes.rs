//! Which packets are sent in a random world: by whom, where to, and what must have been among them.

use std::{collections::BTreeMap, net::IpAddr};

use weir_agent::{
    model::{BackendAddress, Frontend, FrontendKind, Scope, ServicePortKey},
    objects::{Family, Protocol},
};

use super::Differential;
use crate::{
    bed::{CLIENT, OTHER, SERVER},
    support::FAMILIES,
    world::{random::ADDRESSES, reference::Reference},
};

/// Source ports are between this and the NAT ports; nothing is sent to one.
pub const FIRST_SOURCE_PORT: u16 = 31_000;
/// On this node.
const SENDERS: [Sender; 4] = [
    Sender::Pod(CLIENT),
    Sender::Pod(SERVER),
    Sender::Pod(OTHER),
    Sender::Node,
];
/// Clients outside: for each family one that is in a source range of random worlds, and one that is in none.
const OUTSIDE: [Sender; 2] = [Sender::Outside(0), Sender::Outside(1)];
/// Packets to meet all endpoints of a set; with ten of them it fails once in
/// 10^17 times.
const ENOUGH: usize = 400;
/// Frontends of which every endpoint is to be met at each look.
const CROWDED: usize = 6;
/// Packets to anywhere at each look.
const FAR: usize = 12;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Sender {
    Pod(u32),
    Node,
    /// A client beyond the node's devices, by number.
    Outside(u8),
}

impl Sender {
    fn all() -> Vec<Self> {
        SENDERS.into_iter().chain(OUTSIDE).collect()
    }

    /// Those for whom frontends of a scope are.
    fn of(scope: Scope) -> &'static [Self] {
        match scope {
            Scope::Inside => &SENDERS,
            Scope::Outside => &OUTSIDE,
        }
    }

    pub fn scope(self) -> Scope {
        match self {
            Self::Outside(_) => Scope::Outside,
            Self::Pod(_) | Self::Node => Scope::Inside,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Pod(_) => "pod",
            Self::Node => "node",
            Self::Outside(_) => "outside",
        }
    }
}

/// The first packet of a connection, or a later one.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    pub sender: Sender,
    pub address: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
    pub source_port: u16,
    pub is_first: bool,
}
/// What must have been seen.
pub fn assert_complete(seen: &BTreeMap<String, usize>) {
    let mut wanted: Vec<String> = [
        "no endpoints",
        "unknown port",
        "SCTP with another port",
        "endpoint at a Service's address",
        "itself",
        "source NAT",
        "source NAT beyond the cluster",
        "masqueraded",
        "masqueraded SCTP",
        "masqueraded to an endpoint",
        "keeps its address",
        "an answer to a pod",
        "an answer to the outside",
        "not in a source range",
        "in a source range",
        "a ClusterIP from outside",
        "not a Service's",
        "the route of a Service that is gone",
        "affinity",
        "UDP goes on",
        "UDP moves",
        "TCP goes on",
        "TCP goes on to the end",
        "all endpoints met",
    ]
    .map(str::to_owned)
    .into();
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        for family in FAMILIES {
            wanted.push(format!("{} {}", protocol.name(), family.name()));
        }
    }
    for kind in [
        FrontendKind::ClusterIp,
        FrontendKind::NodePort,
        FrontendKind::ExternalIp,
        FrontendKind::LoadBalancer,
        FrontendKind::HostPort,
    ] {
        for sender in ["pod", "node"] {
            wanted.push(format!("{} from {sender}", kind.name()));
        }
        if kind != FrontendKind::ClusterIp {
            wanted.push(format!("{} from outside", kind.name()));
            wanted.push(format!("{} from outside to Cluster", kind.name()));
        }
    }
    for kind in ["NodePort", "ExternalIP", "LoadBalancer"] {
        wanted.push(format!("{kind} from outside to Local"));
    }
    for set in ["ClusterIP to Local", "ClusterIP to Cluster"] {
        wanted.push(set.to_owned());
    }
    let missing: Vec<String> = wanted
        .into_iter()
        .filter(|w| !seen.contains_key(w))
        .collect();
    assert!(missing.is_empty(), "never seen: {missing:?}");
}

impl Differential<'_> {
    pub(super) fn send_packets(&mut self, reference: &Reference) {
        self.go_on(reference);
        let frontends: Vec<(ServicePortKey, Frontend)> = reference
            .services
            .iter()
            .flat_map(|(key, port)| port.frontends.iter().map(move |f| (key.clone(), *f)))
            .collect();
        let from_all = frontends
            .iter()
            .flat_map(|f| Sender::of(f.1.scope).iter().map(move |sender| (f, *sender)));
        for ((key, frontend), sender) in from_all {
            let probe = Probe {
                sender,
                ..self.probe(key, frontend)
            };
            let kind = frontend.kind.name();
            let from = sender.name();
            self.note(format!("{kind} from {from}"));
            if frontend.scope == Scope::Outside {
                self.note(format!("{kind} from {from} to {}", frontend.set.name()));
            }
            self.note(format!("{kind} to {}", frontend.set.name()));
            self.send(reference, probe);
            if reference.services[key].affinity.is_some() {
                for _ in 0..2 {
                    let probe = self.another(probe);
                    self.send(reference, probe);
                }
            }
            if self.random.one_in(4) {
                let probe = self.near(probe);
                self.send(reference, probe);
            }
        }
        for _ in 0..FAR {
            let probe = self.far();
            self.send(reference, probe);
        }
        let mut crowded = frontends;
        crowded.retain(|(key, frontend)| {
            let port = &reference.services[key];
            let members = port.backends.values().filter(|b| b.is_in(frontend.set));
            // A restricted one is not there for every client.
            let is_for_all = port.source_ranges.is_none();
            is_for_all
                && port.affinity.is_none()
                && key.protocol != Protocol::Sctp
                && members.count() > 1
        });
        for _ in 0..CROWDED.min(crowded.len()) {
            let (key, frontend) = self.random.pick(&crowded);
            self.meet_all(reference, &key, &frontend);
        }
    }

    /// To a frontend.
    fn probe(&mut self, key: &ServicePortKey, frontend: &Frontend) -> Probe {
        let address = match frontend.address {
            Some(address) => address,
            None => {
                let own = self.own_addresses(key.family);
                self.random.pick(&own)
            }
        };
        Probe {
            sender: self.random.pick(Sender::of(frontend.scope)),
            address,
            port: frontend.port,
            protocol: key.protocol,
            source_port: self.next_source_port(),
            is_first: true,
        }
    }

    /// Another connection of the same client.
    fn another(&mut self, probe: Probe) -> Probe {
        Probe {
            source_port: self.next_source_port(),
            ..probe
        }
    }

    /// Almost the same.
    fn near(&mut self, probe: Probe) -> Probe {
        let mut probe = self.another(probe);
        if self.random.one_in(2) {
            probe.port += 1;
        } else {
            probe.protocol = self.protocol();
        }
        probe
    }

    /// To anywhere.
    fn far(&mut self) -> Probe {
        let family = self.random.pick(&FAMILIES);
        self.bed.family = family;
        let mut addresses: Vec<IpAddr> = ADDRESSES.map(|a| a.parse().unwrap()).into();
        addresses.retain(|address| Family::of(*address) == family);
        addresses.extend([
            self.bed.node(),
            self.bed.remote_node(),
            self.bed.remote_pod(9),
            self.bed.pod(SERVER),
            self.bed.pod(CLIENT),
            self.bed.outside(),
        ]);
        Probe {
            sender: self.random.pick(&Sender::all()),
            address: self.random.pick(&addresses),
            port: self
                .random
                .pick(&[53, 80, 81, 8080, 30_000, 30_001, 30_002]),
            protocol: self.protocol(),
            source_port: self.next_source_port(),
            is_first: true,
        }
    }

    fn protocol(&mut self) -> Protocol {
        self.random
            .pick(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp])
    }

    fn next_source_port(&mut self) -> u16 {
        self.source_port += 1;
        assert!(self.source_port < 61_000, "the NAT ports begin there");
        self.source_port
    }

    /// Sends until every endpoint of a set has been met.
    fn meet_all(&mut self, reference: &Reference, key: &ServicePortKey, frontend: &Frontend) {
        let port = &reference.services[key];
        let members = port.backends.iter().filter(|(_, b)| b.is_in(frontend.set));
        let mut left: Vec<BackendAddress> = members.map(|(address, _)| *address).collect();
        left.retain(|member| !self.places.is_refused(reference, member.address));
        let members = left.len();
        for _ in 0..ENOUGH {
            let probe = self.probe(key, frontend);
            let met = self.send(reference, probe);
            left.retain(|address| Some(*address) != met);
            if left.is_empty() {
                self.note("all endpoints met");
                return;
            }
        }
        panic!("of {members} endpoints of {key:?} {frontend:?} {left:?} were never met");
    }

    /// Later packets of the connections that are open: TCP keeps its endpoint to the end, UDP as long as
    /// it is one.
    fn go_on(&mut self, reference: &Reference) {
        for open in std::mem::take(&mut self.open) {
            let mut probe = open.probe;
            probe.is_first = false;
            let is_tcp = probe.protocol == Protocol::Tcp;
            self.note(match (is_tcp, open.is_alive) {
                (true, true) => "TCP goes on",
                (true, false) => "TCP goes on to the end",
                (false, true) => "UDP goes on",
                (false, false) => "UDP moves",
            });
            if is_tcp || open.is_alive {
                let allowed = self.translated(reference, probe, open.backend, open.changes_source);
                self.run(probe, &[allowed]);
                if self.random.one_in(2) {
                    self.open.push(open);
                }
            } else {
                self.send(reference, open.probe);
            }
        }
    }
}
