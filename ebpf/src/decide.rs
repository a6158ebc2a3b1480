//! The slow path, pure: service → egress policy → target → ingress policy → next hop. Nothing is
//! written here; `flow::commit` does that, and a dry run leaves it out.

use aya_ebpf::programs::TcContext;
use weir_common::{
    DropReason, Port,
    address::Address as _,
    config::Config,
    endpoint,
    flow::scope,
    ipcache::{class, flag as address_flag},
    next_hop, protocol,
    service::{frontend as frontend_bits, scope as service_scope, service_port_of_row},
};

use crate::{
    deliver::Hop,
    family::{Family, InPodRange},
    fragment,
    local::{self, Local},
    maps,
    packet::Packet,
    policy,
    route::{self, source},
    scratch, service,
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
    /// 1: the source is this node's now, and the port must be one of the NAT range.
    pub source_nat: u32,
    /// 1: the port must be one of the NAT range, though the source stays. See [`crate::hooks::from_netdev`].
    pub nat_port: u32,
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
    /// It is beyond the cluster: neither a node's nor a pod's.
    is_outside: bool,
}

/// Sender of what the node itself sends: the number that no endpoint has.
pub const NODE: u32 = 0;

/// Sender of what enters the node by its devices: the number that stands for the node's own stack elsewhere, and
/// which no endpoint has either.
pub const OUTSIDE: u32 = next_hop::HOST;

/// Decides for a packet that leaves the pod `sender`, or for one of [`NODE`] or [`OUTSIDE`]; the decision is
/// left in the scratch room. From [`OUTSIDE`] a pod is asked for only by what comes from beyond the cluster.
///
/// `ports_known` is false for a later fragment whose first was not seen: it can be forwarded only
/// where ports make no difference.
#[inline(always)]
pub fn for_sender<F: Family>(
    ctx: &TcContext,
    sender: u32,
    ports_known: bool,
) -> Result<(), DropReason> {
    match F::decide(ctx, sender, u32::from(ports_known)) {
        0 => Ok(()),
        reason => Err(DropReason::of_kernel(reason)),
    }
}

/// The body of [`Family::decide`]: returns 0, or the number of a drop reason.
#[inline(always)]
pub fn decide<F: Family>(ctx: &TcContext, sender: u32, ports_known: u32) -> u32 {
    match try_decide::<F>(ctx, sender, ports_known != 0) {
        Ok(()) => 0,
        Err(reason) => reason as u32,
    }
}

#[inline(always)]
fn try_decide<F: Family>(
    ctx: &TcContext,
    sender: u32,
    ports_known: bool,
) -> Result<(), DropReason> {
    let packet = scratch::packet::<F>()?;
    let config = local::config()?;
    let (number, egress_set) = match sender {
        NODE | OUTSIDE => (sender, endpoint::POLICY_SET_ALLOW_ALL),
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
    decision.source_nat = 0;
    decision.nat_port = 0;
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
    if number != NODE {
        translate_source::<F>(ctx, config, decision, target, (number, ports_known))?;
    }
    let hop = Hop::find(decision.next_hop)?;
    decision.next_hop_generation = hop.generation();
    decision.ingress_set = hop.ingress_set();
    if number != NODE {
        // The node reaches its own pods under any policy.
        policy::judge(decision.ingress_set)?;
        if policy::is_stateful(egress_set) || policy::is_stateful(decision.ingress_set) {
            decision.stateful = 1;
        }
    }
    if next_hop::is_endpoint(number) && target.next_hop == number && decision.backend != 0 {
        // A pod drops what comes from its own address.
        decision.hairpin = 1;
        decision.source = F::loopback(config);
    }
    Ok(())
}

/// Leaves the decision about what the stack sends to the pod `receiver` in the scratch room: it goes there as it is,
/// and what the pod answers goes back to the stack.
#[inline(always)]
pub fn as_sent_by_stack<F: Family>(
    packet: &Packet<F::Address>,
    receiver: Local,
) -> Result<(), DropReason> {
    let decision = &mut scratch::decision::<F>()?.decision;
    decision.source = packet.key.source;
    decision.destination = packet.key.destination;
    decision.destination_port = packet.key.destination_port;
    decision.reply_scope = scope::POD;
    decision.hairpin = 0;
    decision.stateful = 1;
    decision.source_nat = 0;
    decision.nat_port = 0;
    decision.next_hop = receiver.number;
    decision.next_hop_generation = receiver.row.generation;
    decision.ingress_set = receiver.row.ingress_set;
    decision.backend = 0;
    decision.backend_generation = 0;
    decision.affinity_port = 0;
    decision.address_flags = 0;
    Ok(())
}

/// Gives what leaves the node for somebody else an address of the node, so that the answers come back
/// here: clients outside whose endpoint is elsewhere, and pods that talk to the outside.
#[inline(always)]
fn translate_source<F: Family>(
    ctx: &TcContext,
    config: &Config,
    decision: &mut Decision<F::Address>,
    target: Target,
    (sender, ports_known): (u32, bool),
) -> Result<(), DropReason> {
    let is_masqueraded = config.flags & F::MASQUERADE != 0;
    if sender == OUTSIDE {
        if decision.backend == 0 {
            // Not for a Service. What a pod answers to the outside must be told from what it begins itself.
            // (The caller has seen that it comes from there.)
            if next_hop::is_endpoint(target.next_hop) && is_masqueraded {
                decision.stateful = 1;
            }
            return Ok(());
        }
        if target.reply_scope != scope::UNDERLAY {
            // On this node: it answers the client itself, by way of our programs.
            return Ok(());
        }
        if target.next_hop != next_hop::HOST {
            decision.source_nat = 1;
            decision.source = source_towards::<F>(target.next_hop)?;
            return Ok(());
        }
    } else if !is_masqueraded || !target.is_outside {
        return Ok(());
    } else if !ports_known {
        return Err(DropReason::FragmentNotFound);
    }
    match F::find_source(ctx) {
        source::FOUND => {}
        source::NOT_OURS if sender != OUTSIDE => return Ok(()),
        source::NOT_OURS => return Err(DropReason::NoNextHop),
        reason => return Err(DropReason::of_kernel(reason)),
    }
    decision.source_nat = 1;
    decision.stateful = 1;
    decision.source = route::chosen_source::<F>();
    decision.next_hop = next_hop::ROUTED;
    Ok(())
}

/// This node's address towards another one.
#[inline(always)]
fn source_towards<F: Family>(next_hop: u32) -> Result<F::Address, DropReason> {
    let row = maps::NEXT_HOPS
        .get(next_hop.wrapping_sub(next_hop::FIRST_ROW))
        .ok_or(DropReason::NoNextHop)?;
    if row.source.is_zero() {
        return Err(DropReason::NoSourceAddress);
    }
    Ok(F::Address::from_shared(row.source))
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
    if flags & (address_flag::SERVED | address_flag::REFUSE) == 0 {
        return Ok(service::NO_ROW);
    }
    if !ports_known {
        // A datagram can be put together first; what the node sends comes in order.
        let may_wait = sender != NODE && fragment::is_put_together();
        if flags & address_flag::FRONTENDS != 0 || may_wait {
            return Err(DropReason::FragmentNotFound);
        }
        // Most of what goes to a node is for the node.
        return Ok(service::NO_ROW);
    }
    let found = service::find_frontend::<F>(
        packet.key.destination,
        packet.key.destination_port,
        packet.key.protocol,
        if sender == OUTSIDE {
            service_scope::OUTSIDE
        } else {
            service_scope::INSIDE
        },
        flags,
    );
    if found == service::NO_ROW && flags & address_flag::REFUSE != 0 {
        let is_for_inside = sender == OUTSIDE && flags & address_flag::CLUSTER_IP != 0;
        return Err(if is_for_inside {
            DropReason::InvalidDestination
        } else {
            DropReason::NoServicePort
        });
    }
    let client = if sender == NODE {
        F::node(local::config()?)
    } else {
        packet.key.source
    };
    service::check_source_range::<F>(found, client)?;
    Ok(found & frontend_bits::ROW_MASK)
}

/// Where an address is: a pod of this node, another node, this node, or elsewhere, as seen from
/// `sender`.
#[inline(always)]
fn locate<F: Family>(config: &Config, address: F::Address, sender: u32) -> Target {
    let host = |reply_scope, flags, is_outside| Target {
        next_hop: next_hop::HOST,
        reply_scope,
        flags,
        is_outside,
    };
    // Replies of the node to a pod leave by the pod's device; those to itself by the loopback device,
    // those to the outside by its devices.
    let from_this_node = match sender {
        NODE => scope::NODE,
        OUTSIDE => scope::DEVICE,
        _ => scope::HOST,
    };
    if let InPodRange::Row(_) = F::in_pod_range(config, address) {
        return match local::by_address::<F>(config, address) {
            Some(target) => Target {
                next_hop: target.number,
                reply_scope: scope::POD,
                flags: 0,
                is_outside: false,
            },
            // The route of the range is 'unreachable': the stack says so to the sender.
            None => host(from_this_node, 0, false),
        };
    }
    let Some(entry) = F::ipcache(address) else {
        // No router sends on what is for an IPv6 link (RFC 4291 section 2.5.6).
        let is_on_link = F::NUMBER == 6 && F::is_link_local(address);
        return host(scope::UNDERLAY, 0, !is_on_link);
    };
    match entry.class {
        class::THIS_NODE => host(from_this_node, entry.flags, false),
        class::REMOTE_PODS | class::REMOTE_NODE if entry.next_hop != next_hop::NONE => Target {
            next_hop: entry.next_hop,
            reply_scope: scope::UNDERLAY,
            flags: entry.flags,
            is_outside: false,
        },
        class::REMOTE_PODS | class::REMOTE_NODE => host(scope::UNDERLAY, entry.flags, false),
        _ => {
            let is_outside = entry.flags & address_flag::NO_MASQUERADE == 0;
            host(scope::UNDERLAY, entry.flags, is_outside)
        }
    }
}

/// Whether what pods send to an address is masqueraded: it is beyond the cluster, and for one receiver.
#[inline(always)]
pub fn is_outside<F: Family>(config: &Config, address: F::Address) -> bool {
    !F::is_multicast(address) && locate::<F>(config, address, OUTSIDE).is_outside
}

/// Where a packet from a device comes from.
#[derive(Clone, Copy, Eq, PartialEq)]
pub enum Origin {
    /// Beyond the cluster: what pods send there is masqueraded.
    Outside,
    /// A pod of another node, or an address that pods are to keep their own towards.
    Pod,
    /// Another node.
    Node,
}

/// Whether a packet from a device may have this source: nothing outside may claim to be inside. Gives where it comes from.
#[inline(always)]
pub fn check_outside_source<F: Family>(
    config: &Config,
    address: F::Address,
) -> Result<Origin, DropReason> {
    if F::is_impossible_source(address) {
        return Err(DropReason::InvalidSource);
    }
    if let InPodRange::Row(_) = F::in_pod_range(config, address) {
        return Err(DropReason::InvalidSource);
    }
    let Some(entry) = F::ipcache(address) else {
        return Ok(Origin::Outside);
    };
    match entry.class {
        _ if entry.flags & address_flag::CLUSTER_IP != 0 => Err(DropReason::InvalidSource),
        class::THIS_NODE => Err(DropReason::InvalidSource),
        class::REMOTE_NODE => Ok(Origin::Node),
        class::REMOTE_PODS => Ok(Origin::Pod),
        _ if entry.flags & address_flag::NO_MASQUERADE != 0 => Ok(Origin::Pod),
        _ => Ok(Origin::Outside),
    }
}
