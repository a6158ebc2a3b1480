//! What packets may do in a random world: which outcomes the reference allows, and the bytes of each.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use weir_agent::{
    model::{BackendAddress, FrontendKind, ServicePortKey},
    objects::{Family, Protocol},
};
use weir_common::{
    DropReason,
    config::NAT_PORT_FIRST,
    mark,
    metrics::{Hook, outcome},
};

use super::{
    Differential,
    place::Place,
    probes::{Probe, Sender},
};
use crate::{
    bed::{
        ETH0, TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, Verdict, delivered_macs, device, hex,
        on, wire_macs,
    },
    outside::port_of,
    packet::{ACK, Packet, SYN, sctp, tcp, udp},
    refusals::refusal,
    run::Output,
    world::{
        random::ADDRESSES,
        reference::{self, Reference},
    },
};

/// Interface index of the loopback device.
const LOOPBACK: u32 = 1;
/// Bits by which the mark is shifted.
const MARK_SHIFT: u32 = 20;
/// Connections that go on.
const OPEN_MAX: usize = 24;
/// What clocks may be wrong by.
const SLACK: Duration = Duration::from_millis(100);

/// The endpoint that a client was given.
#[derive(Clone, Copy, Debug)]
pub struct Remembered {
    pub backend: BackendAddress,
    at: Instant,
}

/// A connection that goes on.
#[derive(Clone, Debug)]
pub struct Open {
    pub probe: Probe,
    pub key: ServicePortKey,
    pub backend: BackendAddress,
    /// Its endpoint has been one of its Service port ever since.
    pub is_alive: bool,
    /// See [`Differential::changes_source`]: it goes on as it began, whatever the settings say by now.
    pub changes_source: bool,
}

/// What may become of a packet.
pub struct Outcome {
    verdict: Verdict,
    packet: Packet,
    /// The source port is one of the NAT range.
    has_nat_port: bool,
    /// The source is the node's, to which answers come.
    has_nat_source: bool,
    backend: Option<BackendAddress>,
    /// What is seen with it, see [`super::probes::assert_complete`].
    what: &'static str,
}

impl Outcome {
    fn dropped(reason: DropReason, what: &'static str) -> Self {
        let nobody = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        Self {
            verdict: Verdict::Dropped(reason),
            // It is not seen.
            packet: Packet::new(wire_macs(), nobody, nobody, udp(0, 0)),
            has_nat_port: false,
            has_nat_source: false,
            backend: None,
            what,
        }
    }

    /// The frame that must come out, given what did.
    fn frame(&self, seen: &[u8]) -> Vec<u8> {
        let l4 = if self.packet.source.is_ipv4() { 34 } else { 54 };
        let port = seen
            .get(l4..l4 + 2)
            .map(|port| u16::from_be_bytes([port[0], port[1]]));
        match port {
            Some(port) if self.has_nat_port && port >= NAT_PORT_FIRST => {
                self.packet.clone().source_port(port).frame()
            }
            _ => self.packet.frame(),
        }
    }
}

impl Differential<'_> {
    /// Sends the first packet of a connection. Gives the endpoint that it was sent to.
    pub(super) fn send(&mut self, reference: &Reference, probe: Probe) -> Option<BackendAddress> {
        let packet = reference::Packet {
            scope: probe.sender.scope(),
            address: probe.address,
            port: probe.port,
            protocol: probe.protocol,
            is_node_address: self.places.is_this_node(probe.address),
        };
        let taken = reference.port_of(&packet);
        let Some((key, port, frontend)) = taken else {
            let allowed = self.without_service(reference, probe);
            self.run(probe, &[allowed]);
            return None;
        };
        let (sent, ..) = self.packet(probe);
        if !reference::serves(port, frontend, sent.source) {
            let allowed = Outcome::dropped(DropReason::NotInSourceRange, "not in a source range");
            self.run(probe, &[allowed]);
            return None;
        }
        if frontend.kind == FrontendKind::LoadBalancer && port.source_ranges.is_some() {
            self.note("in a source range");
        }
        let mut members = reference.endpoints_of(&packet).unwrap();
        let client = (probe.sender, key.clone());
        let at = Instant::now();
        let output = self.output(probe);
        // Asked afterwards: the programs did when it was no later.
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
                .map(|member| {
                    let changes = self.changes_source(probe, *member);
                    self.translated(reference, probe, *member, changes)
                })
                .collect(),
        };
        let backend = self.judge(probe, &output, &allowed)?;
        if port.affinity.is_some() {
            self.remembered.insert(client, Remembered { backend, at });
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
            let changes_source = self.changes_source(probe, backend);
            self.open.push(Open {
                probe,
                key: key.clone(),
                backend,
                is_alive: true,
                changes_source,
            });
        }
        Some(backend)
    }

    /// What becomes of a packet that no frontend takes.
    fn without_service(&mut self, reference: &Reference, probe: Probe) -> Outcome {
        let is_outside = matches!(probe.sender, Sender::Outside(_));
        if is_outside && self.places.is_cluster_ip(reference, probe.address) {
            let what = "a ClusterIP from outside";
            return self.refused(probe, DropReason::InvalidDestination, what);
        }
        if self.places.is_refused(reference, probe.address) {
            return self.refused(probe, DropReason::NoServicePort, "unknown port");
        }
        let (packet, _, ifindex) = self.packet(probe);
        let is_served = self.places.is_served(reference, probe.address);
        if probe.sender == Sender::Node && ifindex != LOOPBACK && !is_served {
            let what = "the route of a Service that is gone";
            return self.refused(probe, DropReason::NoServicePort, what);
        }
        let place = match probe.sender {
            Sender::Pod(_) | Sender::Outside(_) => self.places.at(probe.address),
            Sender::Node => Place::Stack,
        };
        if !matches!(probe.sender, Sender::Pod(_)) || place != Place::Stack {
            return sent(packet, place, None, "not a Service's");
        }
        if self.places.is_masqueraded(probe.address) {
            let what = ["masqueraded", "masqueraded SCTP"];
            return sent_as_node(packet, probe, self.bed.node(), what);
        }
        sent(packet, place, None, "keeps its address")
    }

    fn refused(&mut self, probe: Probe, reason: DropReason, what: &'static str) -> Outcome {
        let (packet, ..) = self.packet(probe);
        Outcome {
            verdict: Verdict::Refused(reason),
            packet: refusal(self.bed, &packet),
            has_nat_port: false,
            has_nat_source: false,
            backend: None,
            what,
        }
    }

    /// Whether what a pod sends to an endpoint is masqueraded, or a client beside the cluster, which reaches the
    /// pods directly, too, gets a port of the NAT range.
    fn changes_source(&mut self, probe: Probe, backend: BackendAddress) -> bool {
        match probe.sender {
            Sender::Pod(_) => self.places.is_masqueraded(backend.address),
            Sender::Node => false,
            Sender::Outside(_) => {
                let client = self.packet(probe).0.source;
                let ranges = self.places.kept_ranges();
                ranges.iter().any(|range| range.contains(&client))
            }
        }
    }

    /// What becomes of a packet that is for an endpoint.
    pub(super) fn translated(
        &mut self,
        reference: &Reference,
        probe: Probe,
        backend: BackendAddress,
        changes_source: bool,
    ) -> Outcome {
        if probe.protocol == Protocol::Sctp && backend.port != probe.port {
            let what = "SCTP with another port";
            return Outcome::dropped(DropReason::UnsupportedProtocol, what);
        }
        if self.places.is_refused(reference, backend.address) {
            let what = "endpoint at a Service's address";
            return self.refused(probe, DropReason::NoBackend, what);
        }
        let (packet, _, ifindex) = self.packet(probe);
        let place = match self.places.at(backend.address) {
            // It was on its way to the node: the stack looks up another for it.
            Place::Remote if ifindex == LOOPBACK => Place::Stack,
            place => place,
        };
        let mut packet = packet.to(backend.address).destination_port(backend.port);
        let mut what = "to an endpoint";
        if let (Sender::Pod(sender), Place::Pod(pod)) = (probe.sender, place)
            && sender == pod
        {
            packet = packet.from(self.bed.loopback());
            what = "itself";
        }
        let node = self.bed.node();
        let is_own = self.places.is_this_node(backend.address);
        let outcome = match (probe.sender, place) {
            (Sender::Outside(_), Place::Remote) => Outcome {
                verdict: Verdict::Remote,
                ..sent_as_node(packet, probe, node, ["source NAT", "source NAT of SCTP"])
            },
            (Sender::Outside(_), Place::Stack) if !is_own => {
                let what = ["source NAT beyond the cluster"; 2];
                sent_as_node(packet, probe, node, what)
            }
            (Sender::Pod(_), Place::Stack) if changes_source => {
                sent_as_node(packet, probe, node, ["masqueraded to an endpoint"; 2])
            }
            (Sender::Outside(_), _) if changes_source => Outcome {
                has_nat_port: probe.protocol != Protocol::Sctp,
                ..sent(packet, place, None, "a client that is not masqueraded to")
            },
            _ => sent(packet, place, None, what),
        };
        Outcome {
            backend: Some(backend),
            ..outcome
        }
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
            Sender::Outside(client) => {
                let source = match (client, self.bed.is_v4()) {
                    (0, _) => self.bed.outside(),
                    (_, true) => "192.0.2.66".parse().unwrap(),
                    (_, false) => "2001:db9::66".parse().unwrap(),
                };
                let packet = self.bed.incoming(source, probe.address, l4);
                (packet, Hook::FromNetdev, ETH0)
            }
        }
    }

    /// Sends a packet, which must end in one of the ways allowed. Gives the endpoint of that.
    pub(super) fn run(&mut self, probe: Probe, allowed: &[Outcome]) -> Option<BackendAddress> {
        let output = self.output(probe);
        self.judge(probe, &output, allowed)
    }

    fn output(&mut self, probe: Probe) -> Output {
        let (packet, hook, ifindex) = self.packet(probe);
        self.cases += 1;
        self.bed
            .run_raw(hook, &packet.frame(), on(ifindex))
            .unwrap()
    }

    fn judge(
        &mut self,
        probe: Probe,
        output: &Output,
        allowed: &[Outcome],
    ) -> Option<BackendAddress> {
        let (packet, hook, _) = self.packet(probe);
        let is_met = |outcome: &&Outcome| {
            let (action, is_marked) = match outcome.verdict {
                Verdict::Stack => (TC_ACT_UNSPEC, false),
                Verdict::Dropped(_) => (TC_ACT_SHOT, false),
                Verdict::Remote | Verdict::Routed => (TC_ACT_REDIRECT, true),
                Verdict::Refused(_) if hook == Hook::FromNetdev => (TC_ACT_REDIRECT, true),
                Verdict::Local
                | Verdict::Answered
                | Verdict::Refused(_)
                | Verdict::HostDevice
                | Verdict::Defrag => (TC_ACT_REDIRECT, false),
            };
            let mark = if is_marked {
                mark::DONE << MARK_SHIFT
            } else {
                0
            };
            (output.action, output.mark) == (action, mark)
                && (action == TC_ACT_SHOT || output.frame == outcome.frame(&output.frame))
        };
        let Some(met) = allowed.iter().find(is_met) else {
            let mut text = format!(
                "{probe:?}\n  in      {}\n  action {} mark {:#x}\n  out     {}",
                hex(&packet.frame()),
                output.action,
                output.mark,
                hex(&output.frame)
            );
            for outcome in allowed {
                let frame = hex(&outcome.frame(&output.frame));
                let Outcome {
                    verdict,
                    backend,
                    what,
                    ..
                } = outcome;
                text += &format!("\n  allowed {frame} {verdict:?} {backend:?} ({what})");
            }
            panic!("{text}\n{:#?}", self.world);
        };
        let number = match met.verdict {
            Verdict::Stack | Verdict::HostDevice => outcome::STACK,
            Verdict::Local => outcome::LOCAL,
            Verdict::Remote => outcome::REMOTE,
            Verdict::Routed => outcome::ROUTED,
            Verdict::Answered => outcome::ANSWERED,
            Verdict::Defrag => outcome::DEFRAG,
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
        if met.has_nat_source {
            self.answer(probe, met.backend, &output.frame);
        }
        met.backend
    }

    /// What the other side answers to the address of the node comes back to who has asked, from where it was asked.
    fn answer(&mut self, probe: Probe, backend: Option<BackendAddress>, sent: &[u8]) {
        let (request, ..) = self.packet(probe);
        let (address, port) = backend.map_or((probe.address, probe.port), |b| (b.address, b.port));
        let nat_port = port_of(self.bed, sent, 0);
        let l4 = match probe.protocol {
            Protocol::Tcp => tcp(port, nat_port, ACK),
            Protocol::Udp => udp(port, nat_port),
            Protocol::Sctp => sctp(port, nat_port),
        };
        let answer = self.bed.incoming(address, self.bed.node(), l4);
        let wanted = answer.clone().from(probe.address).to(request.source);
        let wanted = wanted
            .source_port(probe.port)
            .destination_port(probe.source_port)
            .forwarded();
        let (wanted, mark, number, what) = match probe.sender {
            Sender::Pod(pod) => {
                let wanted = wanted.with_macs(delivered_macs(pod));
                (wanted, 0, outcome::LOCAL, "an answer to a pod")
            }
            Sender::Node | Sender::Outside(_) => {
                let mark = mark::DONE << MARK_SHIFT;
                (wanted, mark, outcome::ROUTED, "an answer to the outside")
            }
        };
        let hook = Hook::FromNetdev;
        let seen = self.bed.run_raw(hook, &answer.frame(), on(ETH0)).unwrap();
        self.cases += 1;
        assert_eq!(
            (seen.action, seen.mark, hex(&seen.frame)),
            (TC_ACT_REDIRECT, mark, hex(&wanted.frame())),
            "the answer {} to {probe:?}",
            hex(&answer.frame())
        );
        *self.counted.entry((hook as u32, number)).or_default() += 1;
        self.note(what);
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
        packet,
        has_nat_port: false,
        has_nat_source: false,
        backend,
        what,
    }
}

/// A packet from the address of the node, past the stack by the way that its routes name.
fn sent_as_node(packet: Packet, probe: Probe, node: IpAddr, what: [&'static str; 2]) -> Outcome {
    let is_sctp = probe.protocol == Protocol::Sctp;
    Outcome {
        verdict: Verdict::Routed,
        packet: packet.from(node).forwarded(),
        has_nat_port: !is_sctp,
        has_nat_source: true,
        backend: None,
        what: what[usize::from(is_sctp)],
    }
}
