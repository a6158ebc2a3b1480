//! All that enters the node from its devices: nothing outside may claim to be inside; what is for a Service
//! goes to an endpoint, here or elsewhere; what is for a pod of this node goes straight there, replies
//! translated back; the rest is the stack's.

use aya_ebpf::programs::TcContext;
use weir_common::{
    DropReason,
    flow::scope,
    ipcache::{class, flag as address_flag},
    metrics::Hook,
    next_hop, protocol,
};

use super::{Kind, read_frame};
use crate::{
    access, bare,
    decide::{self, Origin},
    deliver::{self, Hop},
    family::{Family, V4, V6},
    flow,
    fragment::{self, ports},
    icmp,
    local::{self, Local},
    packet::Packet,
    policy, refuse, scratch,
    verdict::Verdict,
};

/// The program.
#[inline(always)]
pub fn run(ctx: &TcContext) -> Result<Verdict, DropReason> {
    let is_for_another = access::is_for_another_host(ctx) && !fragment::is_ours_again(ctx);
    if access::is_tagged(ctx) || is_for_another {
        // It belongs to a VLAN's device, or to a device above this one (macvlan, a bridge), or to
        // nobody here: then the stack drops it.
        return Ok(Verdict::STACK);
    }
    if !access::remove_priority_tag(ctx) {
        return Ok(Verdict::STACK);
    }
    let frame = read_frame(ctx)?;
    match frame.kind {
        Kind::V4 => Verdict::settled(forward::<V4>(ctx)),
        Kind::V6 => Verdict::settled(forward::<V6>(ctx)),
        // Not ours to judge: ARP, LLDP, spanning tree …
        Kind::Arp | Kind::Other => Ok(Verdict::STACK),
    }
}

/// The program at devices without a link layer.
#[inline(always)]
pub fn run_bare(ctx: &TcContext) -> Result<Verdict, DropReason> {
    if bare::version(ctx) == 0 {
        return Ok(Verdict::STACK);
    }
    bare::add_header(ctx)?;
    run(ctx)
}

#[inline(always)]
fn forward<F: Family>(ctx: &TcContext) -> Result<Verdict, DropReason> {
    let packet = scratch::packet::<F>()?;
    F::parse(ctx, scope::UNDERLAY, packet)?;
    let config = local::config()?;
    let receiver = local::by_address::<F>(config, packet.key.destination);
    let number = receiver.map_or(decide::NODE, |receiver| receiver.number);
    let has_flows = local::has_flows(number);
    let ports_known = fragment::resolve_ports::<F>(ctx, packet) == ports::KNOWN;
    let found = if has_flows && ports_known {
        flow::find::<F>(ctx, Hook::FromNetdev, packet, None)?
    } else {
        None
    };
    let hop = if let Some(hop) = found {
        hop
    } else {
        let origin = decide::check_outside_source::<F>(config, packet.key.source)?;
        // What a pod answers to the outside must be told from what it begins itself, which is masqueraded.
        let is_told_apart = origin == Origin::Outside && config.flags & F::MASQUERADE != 0;
        let may_have_entry = has_flows || (is_told_apart && receiver.is_some());
        if !ports_known && is_put_together::<F>(packet, receiver, may_have_entry) {
            return Ok(fragment::put_together::<F>(ctx, Hook::FromNetdev, number));
        }
        let translated = if has_flows && ports_known && icmp::is_error(packet) {
            icmp::translate_error::<F>(ctx, packet)?
        } else {
            None
        };
        let is_direct = !ports_known || !is_told_apart;
        match (translated, receiver) {
            (Some(next_hop::HOST), _) => return deliver::as_received_by_host(ctx),
            (Some(next_hop), _) => Hop::find(next_hop)?,
            (None, Some(receiver)) if is_direct => {
                policy::judge(receiver.row.ingress_set)?;
                Hop::of_endpoint(receiver.row)
            }
            (None, None) if !ports_known => return Ok(Verdict::STACK),
            (None, _) => match decide_and_commit::<F>(ctx, packet, origin) {
                Ok(next_hop::HOST) if !packet.rewrite.is_needed() => return Ok(Verdict::STACK),
                Ok(next_hop) => Hop::find(next_hop)?,
                Err(reason) => return refuse::or_drop::<F>(ctx, decide::OUTSIDE, reason),
            },
        }
    };
    deliver::deliver::<F>(ctx, Hook::FromNetdev, packet, hop)
}

/// A packet without an entry: to a Service, to a pod that might take the outside for masqueraded, or to the node.
/// Gives its next hop, and leaves the translation in the packet.
///
/// A pod of the cluster that comes by this node's NodePort talks to the endpoint directly, too, without an entry
/// here, and its kernel may use one port for both. To an endpoint of this node they would be the same connection: by way
/// of the Service it gets a port of the NAT range, which nobody uses by himself, and keeps its address. (A node uses
/// the NAT range itself, for those that it translates to its own address: it keeps its port.)
#[inline(always)]
fn decide_and_commit<F: Family>(
    ctx: &TcContext,
    packet: &mut Packet<F::Address>,
    origin: Origin,
) -> Result<u32, DropReason> {
    decide::for_sender::<F>(ctx, decide::OUTSIDE, true)?;
    let decision = &mut scratch::decision::<F>()?.decision;
    if decision.stateful != 0 {
        if origin == Origin::Pod {
            decision.nat_port = 1;
        }
        flow::commit::<F>(ctx, Hook::FromNetdev, decide::OUTSIDE)?;
        packet.rewrite.copy_from(&scratch::decision::<F>()?.forward);
    }
    Ok(scratch::decision::<F>()?.decision.next_hop)
}

/// Whether a later fragment whose first has not been seen must be put together with the others: where it may
/// belong to a connection that has an entry, or is to have one.
#[inline(always)]
fn is_put_together<F: Family>(
    packet: &Packet<F::Address>,
    receiver: Option<Local>,
    may_have_entry: bool,
) -> bool {
    if receiver.is_some() {
        return may_have_entry;
    }
    // What the node only forwards, and what has no ports, belongs to none.
    let has_ports = matches!(
        packet.key.protocol,
        protocol::TCP | protocol::UDP | protocol::SCTP
    );
    has_ports
        && F::ipcache(packet.key.destination).is_some_and(|entry| {
            entry.flags & address_flag::SERVED != 0
                || (may_have_entry && entry.class == class::THIS_NODE)
        })
}
