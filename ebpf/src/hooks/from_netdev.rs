//! All that enters the node from its devices: nothing outside may claim to be inside; what is for
//! a pod of this node goes straight there, replies translated back; the rest is the stack's.

use aya_ebpf::programs::TcContext;
use weir_common::{DropReason, flow::scope, ipcache::class, metrics::Hook, protocol};

use super::{Kind, read_frame};
use crate::{
    access, decide,
    deliver::{self, Hop},
    family::{Family, V4, V6},
    flow,
    fragment::{self, ports},
    icmp,
    local::{self, Local},
    packet::Packet,
    policy, scratch,
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
    let frame = read_frame(ctx)?;
    match frame.kind {
        Kind::V4 => forward::<V4>(ctx),
        Kind::V6 => forward::<V6>(ctx),
        // Not ours to judge: ARP, LLDP, spanning tree …
        Kind::Arp | Kind::Other => Ok(Verdict::STACK),
    }
}

#[inline(always)]
fn forward<F: Family>(ctx: &TcContext) -> Result<Verdict, DropReason> {
    let packet = scratch::packet::<F>()?;
    F::parse(ctx, scope::UNDERLAY, packet)?;
    let config = local::config()?;
    let receiver = local::by_address::<F>(config, packet.key.destination);
    let number = receiver.map_or(decide::NODE, |receiver| receiver.number);
    let has_flows = local::has_flows(number);
    if has_flows && fragment::resolve_ports::<F>(ctx, packet) != ports::KNOWN {
        decide::check_outside_source::<F>(config, packet.key.source)?;
        if receiver.is_some() || is_for_this_node::<F>(packet) {
            // Whether it belongs to a translated connection cannot be told without its first.
            return Ok(fragment::put_together::<F>(ctx, Hook::FromNetdev, number));
        }
        return Ok(Verdict::STACK);
    }
    match receiver {
        Some(receiver) => to_local_pod::<F>(ctx, receiver, packet, has_flows),
        None => to_node::<F>(ctx, packet, has_flows),
    }
}

/// Whether a packet may belong to a connection of the node through a Service: what the node only forwards, and
/// what has no ports, does not.
#[inline(always)]
fn is_for_this_node<F: Family>(packet: &Packet<F::Address>) -> bool {
    let has_ports = matches!(
        packet.key.protocol,
        protocol::TCP | protocol::UDP | protocol::SCTP
    );
    has_ports
        && F::ipcache(packet.key.destination).is_some_and(|entry| entry.class == class::THIS_NODE)
}

/// To the node, or through it: replies to what the node itself has sent to a Service are translated
/// back, the rest is the stack's.
#[inline(always)]
fn to_node<F: Family>(
    ctx: &TcContext,
    packet: &mut Packet<F::Address>,
    has_flows: bool,
) -> Result<Verdict, DropReason> {
    let config = local::config()?;
    if has_flows && let Some(hop) = flow::find::<F>(ctx, Hook::FromNetdev, packet, None)? {
        return deliver::deliver::<F>(ctx, Hook::FromNetdev, packet, hop);
    }
    decide::check_outside_source::<F>(config, packet.key.source)?;
    if has_flows && icmp::is_error(packet) && icmp::translate_error::<F>(ctx, packet)?.is_some() {
        return deliver::as_received_by_host(ctx);
    }
    Ok(Verdict::STACK)
}

#[inline(always)]
fn to_local_pod<F: Family>(
    ctx: &TcContext,
    receiver: Local,
    packet: &mut Packet<F::Address>,
    has_flows: bool,
) -> Result<Verdict, DropReason> {
    let config = local::config()?;
    if has_flows {
        if let Some(hop) = flow::find::<F>(ctx, Hook::FromNetdev, packet, None)? {
            return deliver::deliver::<F>(ctx, Hook::FromNetdev, packet, hop);
        }
        if icmp::is_error(packet) {
            decide::check_outside_source::<F>(config, packet.key.source)?;
            let next_hop = icmp::translate_error::<F>(ctx, packet)?;
            let hop = Hop::find(next_hop.unwrap_or(receiver.number))?;
            return deliver::deliver::<F>(ctx, Hook::FromNetdev, packet, hop);
        }
    }
    decide::check_outside_source::<F>(config, packet.key.source)?;
    policy::judge(receiver.row.ingress_set)?;
    deliver::deliver::<F>(
        ctx,
        Hook::FromNetdev,
        packet,
        Hop::of_endpoint(receiver.row),
    )
}
