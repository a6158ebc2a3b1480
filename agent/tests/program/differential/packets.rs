//! What packets may do in a random world: which outcomes the reference allows, and the bytes of each.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use weir_agent::{
    model::{BackendAddress, Scope, ServicePortKey},
    objects::{Family, Protocol},
};
use weir_common::{
    DropReason, mark,
    metrics::{Hook, outcome},
};

use super::{
    Differential,
    place::Place,
    probes::{Probe, Sender},
};
use crate::{
    bed::{
        ETH0, TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, Verdict, delivered_macs, device, hex, on,
    },
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
}

/// What may become of a packet.
pub struct Outcome {
    verdict: Verdict,
    frame: Vec<u8>,
    backend: Option<BackendAddress>,
    /// What is seen with it, see [`super::probes::assert_complete`].
    what: &'static str,
}

impl Differential<'_> {
    /// Sends the first packet of a connection. Gives the endpoint that it was sent to.
    pub(super) fn send(&mut self, reference: &Reference, probe: Probe) -> Option<BackendAddress> {
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
                .map(|member| self.translated(reference, probe, *member))
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
        let is_served = self.places.is_served(reference, probe.address);
        if probe.sender == Sender::Node && ifindex != LOOPBACK && !is_served {
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
    pub(super) fn translated(
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
                Verdict::Remote => (TC_ACT_REDIRECT, true),
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
