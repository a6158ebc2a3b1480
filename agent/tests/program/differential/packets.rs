//! What packets may do in a random world: which outcomes the reference allows, and the bytes of each.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use weir_agent::{
    model::{BackendAddress, Frontend, FrontendKind, Scope, ServicePortKey},
    objects::{Family, Protocol},
};
use weir_common::{
    DropReason, mark,
    metrics::{Hook, outcome},
};

use super::{Differential, place::Place};
use crate::{
    bed::{
        CLIENT, ETH0, OTHER, SERVER, TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, Verdict,
        delivered_macs, device, hex, on,
    },
    packet::{ACK, Packet, SYN, sctp, tcp, udp},
    refusals::refusal,
    support::FAMILIES,
    world::{
        random::ADDRESSES,
        reference::{self, Reference},
    },
};

/// Source ports are between this and the NAT ports; nothing is sent to one.
pub const FIRST_SOURCE_PORT: u16 = 31_000;
const SENDERS: [Sender; 4] = [
    Sender::Pod(CLIENT),
    Sender::Pod(SERVER),
    Sender::Pod(OTHER),
    Sender::Node,
];
/// Interface index of the loopback device.
const LOOPBACK: u32 = 1;
/// Bits by which the mark is shifted.
const MARK_SHIFT: u32 = 20;
/// Packets to meet all endpoints of a set; with ten of them it fails once in
/// 10^17 times.
const ENOUGH: usize = 400;
/// Frontends of which every endpoint is to be met at each look.
const CROWDED: usize = 6;
/// Packets to anywhere at each look.
const FAR: usize = 12;
/// Connections that go on.
const OPEN_MAX: usize = 24;
/// What clocks may be wrong by.
const SLACK: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Sender {
    Pod(u32),
    Node,
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

/// The endpoint that a client was given.
#[derive(Clone, Copy, Debug)]
pub struct Remembered {
    pub backend: BackendAddress,
    at: Instant,
}

/// A connection that goes on.
#[derive(Clone, Debug)]
pub struct Open {
    probe: Probe,
    pub key: ServicePortKey,
    pub backend: BackendAddress,
    /// Its endpoint has been one of its Service port ever since.
    pub is_alive: bool,
}

/// What may become of a packet.
struct Outcome {
    verdict: Verdict,
    frame: Vec<u8>,
    backend: Option<BackendAddress>,
    /// For [`assert_complete`].
    what: &'static str,
}

/// What must have been seen.
pub fn assert_complete(seen: &BTreeMap<String, usize>) {
    let mut wanted: Vec<String> = [
        "no endpoints",
        "unknown port",
        "SCTP with another port",
        "endpoint at a Service's address",
        "itself",
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
            .filter(|(_, frontend)| frontend.scope == Scope::Inside)
            .collect();
        let from_all = frontends
            .iter()
            .flat_map(|f| SENDERS.map(|sender| (f, sender)));
        for ((key, frontend), sender) in from_all {
            let probe = Probe {
                sender,
                ..self.probe(key, frontend)
            };
            let sender = match probe.sender {
                Sender::Pod(_) => "pod",
                Sender::Node => "node",
            };
            let kind = frontend.kind.name();
            self.note(format!("{kind} from {sender}"));
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
            port.affinity.is_none() && key.protocol != Protocol::Sctp && members.count() > 1
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
            sender: self.random.pick(&SENDERS),
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
            sender: self.random.pick(&SENDERS),
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
                let allowed = self.translated(reference, probe, open.backend);
                self.run(probe, &[allowed]);
                if self.random.one_in(2) {
                    self.open.push(open);
                }
            } else {
                self.send(reference, open.probe);
            }
        }
    }

    /// Sends the first packet of a connection. Gives the endpoint that it was sent to.
    fn send(&mut self, reference: &Reference, probe: Probe) -> Option<BackendAddress> {
        let packet = reference::Packet {
            scope: Scope::Inside,
            address: probe.address,
            port: probe.port,
            protocol: probe.protocol,
            is_node_address: self.places.is_this_node(probe.address),
        };
        let taken = reference.port_of(&packet);
        let Some((key, port, _)) = taken else {
            let allowed = self.without_service(reference, probe);
            self.run(probe, &[allowed]);
            return None;
        };
        let mut members = reference.endpoints_of(&packet).unwrap();
        let client = (probe.sender, key.clone());
        let begun = Instant::now();
        if let Some(seconds) = port.affinity
            && let Some(known) = self.remembered.get(&client)
            && known.at.elapsed() + SLACK < Duration::from_secs(seconds.into())
            && members.contains(&known.backend)
        {
            members = [known.backend].into();
            self.note("affinity");
        }
        let allowed: Vec<Outcome> = match members.len() {
            0 => vec![self.refused(probe, DropReason::NoBackend, "no endpoints")],
            _ => members
                .iter()
                .map(|member| self.translated(reference, probe, *member))
                .collect(),
        };
        let backend = self.run(probe, &allowed)?;
        if port.affinity.is_some() {
            self.remembered
                .insert(client, Remembered { backend, at: begun });
        }
        self.note(format!("{} {}", probe.protocol.name(), key.family.name()));
        let is_settled = !ADDRESSES
            .iter()
            .any(|a| backend.address == a.parse::<IpAddr>().unwrap());
        if self.open.len() < OPEN_MAX
            && probe.protocol != Protocol::Sctp
            && is_settled
            && self.random.one_in(4)
        {
            self.open.push(Open {
                probe,
                key: key.clone(),
                backend,
                is_alive: true,
            });
        }
        Some(backend)
    }

    /// What becomes of a packet that no frontend takes.
    fn without_service(&mut self, reference: &Reference, probe: Probe) -> Outcome {
        if self.places.is_refused(reference, probe.address) {
            return self.refused(probe, DropReason::NoServicePort, "unknown port");
        }
        let (packet, _, ifindex) = self.packet(probe);
        if probe.sender == Sender::Node && ifindex != LOOPBACK {
            let what = "the route of a Service that is gone";
            return self.refused(probe, DropReason::NoServicePort, what);
        }
        let place = match probe.sender {
            Sender::Pod(_) => self.places.at(probe.address),
            Sender::Node => Place::Stack,
        };
        sent(packet, place, None, "not a Service's")
    }

    fn refused(&mut self, probe: Probe, reason: DropReason, what: &'static str) -> Outcome {
        let (packet, ..) = self.packet(probe);
        Outcome {
            verdict: Verdict::Refused(reason),
            frame: refusal(self.bed, &packet).frame(),
            backend: None,
            what,
        }
    }

    /// What becomes of a packet that is for an endpoint.
    fn translated(
        &mut self,
        reference: &Reference,
        probe: Probe,
        backend: BackendAddress,
    ) -> Outcome {
        if probe.protocol == Protocol::Sctp && backend.port != probe.port {
            return Outcome {
                verdict: Verdict::Dropped(DropReason::UnsupportedProtocol),
                frame: Vec::new(),
                backend: None,
                what: "SCTP with another port",
            };
        }
        if self.places.is_refused(reference, backend.address) {
            let what = "endpoint at a Service's address";
            return self.refused(probe, DropReason::NoBackend, what);
        }
        let place = self.places.at(backend.address);
        let (packet, ..) = self.packet(probe);
        let mut packet = packet.to(backend.address).destination_port(backend.port);
        let mut what = "to an endpoint";
        if let (Sender::Pod(sender), Place::Pod(pod)) = (probe.sender, place)
            && sender == pod
        {
            packet = packet.from(self.bed.loopback());
            what = "itself";
        }
        sent(packet, place, Some(backend), what)
    }

    /// The packet, and where it is seen.
    fn packet(&mut self, probe: Probe) -> (Packet, Hook, u32) {
        self.bed.family = Family::of(probe.address);
        let (source, destination) = (probe.source_port, probe.port);
        let l4 = match probe.protocol {
            Protocol::Tcp if probe.is_first => tcp(source, destination, SYN),
            Protocol::Tcp => tcp(source, destination, ACK),
            Protocol::Udp => udp(source, destination),
            Protocol::Sctp => sctp(source, destination),
        };
        match probe.sender {
            Sender::Pod(pod) => {
                let packet = self.bed.leaving(pod, probe.address, l4);
                (packet, Hook::FromPod, device(pod))
            }
            Sender::Node => {
                let packet = self.bed.incoming(self.bed.node(), probe.address, l4);
                // Any other device stands for the node's own.
                let is_own = self.places.is_this_node(probe.address);
                (packet, Hook::FromHost, if is_own { LOOPBACK } else { ETH0 })
            }
        }
    }

    /// Sends a packet, which must end in one of the ways allowed. Gives the endpoint of that.
    fn run(&mut self, probe: Probe, allowed: &[Outcome]) -> Option<BackendAddress> {
        let (packet, hook, ifindex) = self.packet(probe);
        let output = self
            .bed
            .run_raw(hook, &packet.frame(), on(ifindex))
            .unwrap();
        self.cases += 1;
        let is_met = |outcome: &&Outcome| {
            let (action, is_marked) = match outcome.verdict {
                Verdict::Stack => (TC_ACT_UNSPEC, false),
                Verdict::Dropped(_) => (TC_ACT_SHOT, false),
                Verdict::Remote => (TC_ACT_REDIRECT, true),
                Verdict::Refused(_) => (TC_ACT_REDIRECT, hook == Hook::FromHost),
                Verdict::Local | Verdict::Answered | Verdict::HostDevice => {
                    (TC_ACT_REDIRECT, false)
                }
            };
            let mark = if is_marked {
                mark::DONE << MARK_SHIFT
            } else {
                0
            };
            (output.action, output.mark) == (action, mark)
                && (action == TC_ACT_SHOT || output.frame == outcome.frame)
        };
        let Some(met) = allowed.iter().find(is_met) else {
            let mut text = format!(
                "{probe:?}\n  in      {}\n  action {} mark {:#x}\n  out     {}",
                hex(&packet.frame()),
                output.action,
                output.mark,
                hex(&output.frame)
            );
            for Outcome {
                verdict,
                frame,
                backend,
                what,
            } in allowed
            {
                let frame = hex(frame);
                text += &format!("\n  allowed {frame} {verdict:?} {backend:?} ({what})");
            }
            panic!("{text}\n{:#?}", self.world);
        };
        let number = match met.verdict {
            Verdict::Stack | Verdict::HostDevice => outcome::STACK,
            Verdict::Local => outcome::LOCAL,
            Verdict::Remote => outcome::REMOTE,
            Verdict::Answered => outcome::ANSWERED,
            Verdict::Dropped(reason) => reason as u8,
            Verdict::Refused(reason) => {
                *self
                    .counted
                    .entry((hook as u32, outcome::REFUSED))
                    .or_default() += 1;
                reason as u8
            }
        };
        *self.counted.entry((hook as u32, number)).or_default() += 1;
        self.note(met.what);
        met.backend
    }
}

/// A packet on its way.
fn sent(
    packet: Packet,
    place: Place,
    backend: Option<BackendAddress>,
    what: &'static str,
) -> Outcome {
    let (verdict, packet) = match place {
        Place::Pod(pod) => (
            Verdict::Local,
            packet.forwarded().with_macs(delivered_macs(pod)),
        ),
        Place::Remote => (Verdict::Remote, packet.forwarded()),
        Place::Stack => (Verdict::Stack, packet),
    };
    Outcome {
        verdict,
        frame: packet.frame(),
        backend,
        what,
    }
}
