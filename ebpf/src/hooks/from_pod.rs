//! All that leaves a pod: source check, flow table, else decide and commit, then deliver.

use aya_ebpf::programs::TcContext;
use weir_common::{DropReason, endpoint::HOST_MAC_PREFIX, flow::scope, metrics::Hook};

use super::{Kind, read_frame};
use crate::{
    decide,
    deliver::{self, Hop},
    family::{Family, V4, V6},
    flow, fragment, icmp,
    local::{self, Local},
    neighbour,
    packet::Packet,
    rewrite::Rewrite,
    scratch,
    verdict::Verdict,
};

/// The program.
#[inline(always)]
pub fn run(ctx: &TcContext) -> Result<Verdict, DropReason> {
    let frame = read_frame(ctx)?;
    let sender = local::of_device(ctx, HOST_MAC_PREFIX, frame.destination)?;
    match frame.kind {
        Kind::V4 => {
            let packet = V4::parse(ctx, scope::POD)?;
            if packet.key.source != sender.row.ipv4 || V4::is_link_local(packet.key.source) {
                return unusual_source::<V4>(&packet);
            }
            forward::<V4>(ctx, sender, packet)
        }
        Kind::V6 => {
            let packet = V6::parse(ctx, scope::POD)?;
            if let Some(answer) = neighbour::solicitation(ctx, local::config()?, sender, &packet)? {
                return Ok(answer);
            }
            if packet.key.source != sender.row.ipv6 || V6::is_link_local(packet.key.source) {
                return unusual_source::<V6>(&packet);
            }
            forward::<V6>(ctx, sender, packet)
        }
        Kind::Arp => neighbour::arp(ctx, local::config()?, sender),
        Kind::Other => Err(DropReason::UnsupportedL3),
    }
}

/// A pod sends from its own addresses only. Its device talks before it has one and on its own
/// link (DHCP, duplicate address detection, multicast listener reports): that goes no further
/// than the host's stack and is not called a drop.
#[inline(always)]
fn unusual_source<F: Family>(packet: &Packet<F::Address>) -> Result<Verdict, DropReason> {
    let on_link =
        F::is_multicast(packet.key.destination) || F::is_link_local(packet.key.destination);
    if F::is_link_local(packet.key.source) && on_link {
        Ok(Verdict::STACK)
    } else {
        Err(DropReason::InvalidSource)
    }
}

#[inline(always)]
fn forward<F: Family>(
    ctx: &TcContext,
    sender: Local,
    mut packet: Packet<F::Address>,
) -> Result<Verdict, DropReason> {
    if F::is_multicast(packet.key.destination) {
        return Ok(Verdict::STACK);
    }
    let ports_known = fragment::resolve_ports::<F>(&mut packet);
    let has_flows = ports_known && local::has_flows(sender.number);
    let found = if has_flows {
        flow::find::<F>(ctx, Hook::FromPod, &packet, Some(sender))
    } else {
        None
    };
    let (hop, rewrite) = match found {
        Some(found) => (found.hop, found.rewrite),
        None if has_flows && icmp::is_error(&packet) => {
            return error_of_pod::<F>(ctx, sender, &packet);
        }
        None => {
            decide::from_pod::<F>(&packet, sender.number, ports_known)?;
            if scratch::decision::<F>()?.decision.stateful != 0 {
                flow::commit::<F>(ctx, Hook::FromPod, &packet, sender.number)?;
            }
            let work = scratch::decision::<F>()?;
            (
                Hop::find(work.decision.next_hop)?,
                Rewrite::of(&work.forward),
            )
        }
    };
    deliver::deliver::<F>(ctx, Hook::FromPod, &packet, hop, Some(&rewrite))
}

/// An ICMP error that a pod sends, perhaps about a packet it got through a Service.
#[inline(always)]
fn error_of_pod<F: Family>(
    ctx: &TcContext,
    sender: Local,
    packet: &Packet<F::Address>,
) -> Result<Verdict, DropReason> {
    let next_hop = match icmp::translate_error::<F>(ctx, packet)? {
        Some(next_hop) => next_hop,
        None => {
            decide::from_pod::<F>(packet, sender.number, true)?;
            scratch::decision::<F>()?.decision.next_hop
        }
    };
    deliver::deliver::<F>(ctx, Hook::FromPod, packet, Hop::find(next_hop)?, None)
}
