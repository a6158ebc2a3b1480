//! The slow path, pure: service → egress policy → target → ingress policy → next hop. Nothing is
//! written here; `flow::commit` does that, and a dry run leaves it out.

use weir_common::{
    DropReason, Port, config::Config, flow::scope, ipcache::class, next_hop, protocol,
    service::scope as service_scope,
};

use crate::{
    deliver::Hop,
    family::{Family, InPodRange},
    local, policy, scratch, service,
};

/// What was decided for a new connection, or for a packet that needs none. Flags are words, so
/// that every bit pattern is valid (it lives in the scratch room).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Decision<A> {
    /// Source address after translation.
    pub source: A,
    /// Destination address after translation.
    pub destination: A,
    /// Destination port after translation.
    pub destination_port: Port,
    /// Scope in which replies will be seen.
    pub reply_scope: u8,
    /// 1: the pod reaches itself.
    pub hairpin: u8,
    /// 1: the connection must be entered in the flow table.
    pub stateful: u32,
    /// Number of the next hop.
    pub next_hop: u32,
    /// Generation of its row.
    pub next_hop_generation: u32,
    /// Policy set of the receiver, if it is an endpoint of this node.
    pub ingress_set: u32,
    /// Backend chosen, 0 without a Service.
    pub backend: u32,
    /// Generation of its row.
    pub backend_generation: u32,
}

/// Where an address is.
#[derive(Clone, Copy)]
struct Target {
    next_hop: u32,
    reply_scope: u8,
}

/// Decides for a packet that leaves the pod `sender`; the decision is left in the scratch room.
///
/// `ports_known` is false for a later fragment whose first was not seen: it can be forwarded only
/// where ports make no difference.
#[inline(always)]
pub fn from_pod<F: Family>(sender: u32, ports_known: bool) -> Result<(), DropReason> {
    match F::decide(sender, u32::from(ports_known)) {
        0 => Ok(()),
        reason => Err(DropReason::of_kernel(reason)),
    }
}

/// The body of [`Family::decide`]: returns 0, or the number of a drop reason.
#[inline(always)]
pub fn decide<F: Family>(sender: u32, ports_known: u32) -> u32 {
    match try_decide::<F>(sender, ports_known != 0) {
        Ok(()) => 0,
        Err(reason) => reason as u32,
    }
}

#[inline(always)]
fn try_decide<F: Family>(sender: u32, ports_known: bool) -> Result<(), DropReason> {
    let packet = scratch::packet::<F>()?;
    let config = local::config()?;
    let sender = local::by_number(sender).ok_or(DropReason::StaleEndpoint)?;
    let work = scratch::decision::<F>()?;
    let decision = &mut work.decision;
    decision.source = packet.key.source;
    decision.destination = packet.key.destination;
    decision.destination_port = packet.key.destination_port;
    decision.hairpin = 0;
    decision.stateful = 0;
    decision.backend = 0;
    decision.backend_generation = 0;
    policy::judge(sender.row.egress_set)?;
    let mut located = locate::<F>(config, packet.key.destination);
    if let Located::Service = located {
        if !ports_known {
            return Err(DropReason::FragmentNotFound);
        }
        let chosen = service::choose::<F>(packet, service_scope::INSIDE)?;
        decision.destination = chosen.address;
        decision.destination_port = chosen.port;
        decision.backend = chosen.number;
        decision.backend_generation = chosen.generation;
        decision.stateful = 1;
        if packet.key.protocol == protocol::SCTP
            && decision.destination_port != packet.key.destination_port
        {
            // Its CRC covers the whole packet.
            return Err(DropReason::UnsupportedProtocol);
        }
        located = locate::<F>(config, decision.destination);
    }
    // An endpoint with the address of a Service leads nowhere but in circles.
    let Located::At(target) = located else {
        return Err(DropReason::NoBackend);
    };
    decision.next_hop = target.next_hop;
    decision.reply_scope = target.reply_scope;
    let hop = Hop::find(target.next_hop)?;
    decision.next_hop_generation = hop.generation();
    decision.ingress_set = hop.ingress_set();
    policy::judge(decision.ingress_set)?;
    if policy::is_stateful(sender.row.egress_set) || policy::is_stateful(decision.ingress_set) {
        decision.stateful = 1;
    }
    if target.next_hop == sender.number && decision.backend != 0 {
        // A pod drops what comes from its own address.
        decision.hairpin = 1;
        decision.source = F::loopback(config);
    }
    Ok(())
}

enum Located {
    At(Target),
    Service,
}

/// Where an address is: a pod of this node, another node, this node, a Service, or elsewhere.
#[inline(always)]
fn locate<F: Family>(config: &Config, address: F::Address) -> Located {
    let host = |reply_scope| {
        Located::At(Target {
            next_hop: next_hop::HOST,
            reply_scope,
        })
    };
    if let InPodRange::Row(_) = F::in_pod_range(config, address) {
        return match local::by_address::<F>(config, address) {
            Some(target) => Located::At(Target {
                next_hop: target.number,
                reply_scope: scope::POD,
            }),
            // The route of the range is 'unreachable': the stack says so to the sender.
            None => host(scope::HOST),
        };
    }
    let Some(entry) = F::ipcache(address) else {
        return host(scope::UNDERLAY);
    };
    match entry.class {
        class::SERVICE => Located::Service,
        class::THIS_NODE => host(scope::HOST),
        class::REMOTE_PODS | class::REMOTE_NODE if entry.next_hop != next_hop::NONE => {
            Located::At(Target {
                next_hop: entry.next_hop,
                reply_scope: scope::UNDERLAY,
            })
        }
        _ => host(scope::UNDERLAY),
    }
}

/// Whether a packet from a device may have this source: nothing outside may claim to be inside.
#[inline(always)]
pub fn check_outside_source<F: Family>(
    config: &Config,
    address: F::Address,
) -> Result<(), DropReason> {
    if F::is_impossible_source(address) {
        return Err(DropReason::InvalidSource);
    }
    if let InPodRange::Row(_) = F::in_pod_range(config, address) {
        return Err(DropReason::InvalidSource);
    }
    match F::ipcache(address) {
        Some(entry) if matches!(entry.class, class::THIS_NODE | class::SERVICE) => {
            Err(DropReason::InvalidSource)
        }
        _ => Ok(()),
    }
}
