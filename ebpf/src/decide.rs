//! The slow path, pure: service → egress policy → target → ingress policy → next hop. Nothing is
//! written here; `flow::commit` does that, and a dry run leaves it out.

use weir_common::{
    DropReason, Port,
    config::Config,
    endpoint,
    flow::scope,
    ipcache::{class, flag as address_flag},
    next_hop, protocol,
    service::{scope as service_scope, service_port_of_row},
};

use crate::{
    deliver::Hop,
    family::{Family, InPodRange},
    fragment, local,
    packet::Packet,
    policy, scratch, service,
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
    /// Number of the Service port if it has session affinity, else 0.
    pub affinity_port: u32,
    /// What the ipcache says of the packet's destination, see [`address_flag`].
    pub address_flags: u32,
}

/// Where an address is.
#[derive(Clone, Copy)]
struct Target {
    next_hop: u32,
    reply_scope: u8,
    /// See [`address_flag`].
    flags: u8,
}

/// Sender of what the node itself sends: the number that no endpoint has.
pub const NODE: u32 = 0;

/// Decides for a packet that leaves the pod `sender`, or [`NODE`]; the decision is left in the
/// scratch room.
///
/// `ports_known` is false for a later fragment whose first was not seen: it can be forwarded only
/// where ports make no difference.
#[inline(always)]
pub fn for_sender<F: Family>(sender: u32, ports_known: bool) -> Result<(), DropReason> {
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
    let (number, egress_set) = match sender {
        NODE => (NODE, endpoint::POLICY_SET_ALLOW_ALL),
        _ => {
            let local = local::by_number(sender).ok_or(DropReason::StaleEndpoint)?;
            (sender, local.row.egress_set)
        }
    };
    let work = scratch::decision::<F>()?;
    let decision = &mut work.decision;
    decision.source = packet.key.source;
    decision.destination = packet.key.destination;
    decision.destination_port = packet.key.destination_port;
    decision.hairpin = 0;
    decision.stateful = 0;
    decision.backend = 0;
    decision.backend_generation = 0;
    decision.affinity_port = 0;
    policy::judge(egress_set)?;
    let mut target = locate::<F>(config, packet.key.destination, number);
    decision.address_flags = u32::from(target.flags);
    let row = frontend::<F>(packet, number, target.flags, ports_known)?;
    if row != service::NO_ROW {
        let client = service::client_of::<F>(packet.key.source, number == NODE);
        let chosen = service::choose::<F>(row, F::hash_tuple(packet), &client)?;
        decision.destination = chosen.address;
        if chosen.affinity != 0 {
            decision.affinity_port = service_port_of_row(row);
        }
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
        target = locate::<F>(config, decision.destination, number);
        if target.flags & address_flag::REFUSE != 0 {
            // An endpoint with the address of a Service leads nowhere but in circles.
            return Err(DropReason::NoBackend);
        }
    }
    decision.next_hop = target.next_hop;
    decision.reply_scope = target.reply_scope;
    let hop = Hop::find(target.next_hop)?;
    decision.next_hop_generation = hop.generation();
    decision.ingress_set = hop.ingress_set();
    if number != NODE {
        // The node reaches its own pods under any policy.
        policy::judge(decision.ingress_set)?;
        if policy::is_stateful(egress_set) || policy::is_stateful(decision.ingress_set) {
            decision.stateful = 1;
        }
    }
    if number != NODE && target.next_hop == number && decision.backend != 0 {
        // A pod drops what comes from its own address.
        decision.hairpin = 1;
        decision.source = F::loopback(config);
    }
    Ok(())
}

/// The row of `SERVICE_STATE` that the packet's destination leads to, or [`service::NO_ROW`] if it is
/// no Service's. An error when it is to be refused.
#[inline(always)]
fn frontend<F: Family>(
    packet: &Packet<F::Address>,
    sender: u32,
    flags: u8,
    ports_known: bool,
) -> Result<u32, DropReason> {
    if flags == 0 {
        return Ok(service::NO_ROW);
    }
    if !ports_known {
        // A pod's datagram can be put together first; what the node sends comes in order.
        let may_wait = sender != NODE && fragment::is_put_together();
        if flags & address_flag::FRONTENDS != 0 || may_wait {
            return Err(DropReason::FragmentNotFound);
        }
        // Most of what goes to a node is for the node.
        return Ok(service::NO_ROW);
    }
    let row = service::find_row::<F>(
        packet.key.destination,
        packet.key.destination_port,
        packet.key.protocol,
        service_scope::INSIDE,
        flags,
    );
    if row == service::NO_ROW && flags & address_flag::REFUSE != 0 {
        return Err(DropReason::NoServicePort);
    }
    Ok(row)
}

/// Where an address is: a pod of this node, another node, this node, or elsewhere, as seen from
/// `sender`.
#[inline(always)]
fn locate<F: Family>(config: &Config, address: F::Address, sender: u32) -> Target {
    let host = |reply_scope, flags| Target {
        next_hop: next_hop::HOST,
        reply_scope,
        flags,
    };
    // Replies of the node to a pod leave by the pod's device; those to itself by the loopback device.
    let from_this_node = if sender == NODE {
        scope::NODE
    } else {
        scope::HOST
    };
    if let InPodRange::Row(_) = F::in_pod_range(config, address) {
        return match local::by_address::<F>(config, address) {
            Some(target) => Target {
                next_hop: target.number,
                reply_scope: scope::POD,
                flags: 0,
            },
            // The route of the range is 'unreachable': the stack says so to the sender.
            None => host(from_this_node, 0),
        };
    }
    let Some(entry) = F::ipcache(address) else {
        return host(scope::UNDERLAY, 0);
    };
    match entry.class {
        class::THIS_NODE => host(from_this_node, entry.flags),
        class::REMOTE_PODS | class::REMOTE_NODE if entry.next_hop != next_hop::NONE => Target {
            next_hop: entry.next_hop,
            reply_scope: scope::UNDERLAY,
            flags: entry.flags,
        },
        _ => host(scope::UNDERLAY, entry.flags),
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
        Some(entry)
            if entry.class == class::THIS_NODE || entry.flags & address_flag::CLUSTER_IP != 0 =>
        {
            Err(DropReason::InvalidSource)
        }
        _ => Ok(()),
    }
}
