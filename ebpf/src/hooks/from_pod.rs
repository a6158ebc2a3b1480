//! All that leaves a pod: source check, flow table, else decide and commit, then deliver.

use aya_ebpf::programs::TcContext;
use weir_common::{DropReason, endpoint::HOST_MAC_PREFIX, flow::scope, metrics::Hook, next_hop};

use super::{Kind, read_frame};
use crate::{
    access, decide,
    deliver::{self, Hop},
    family::{Family, V4, V6},
    flow,
    fragment::{self, ports},
    icmp,
    local::{self, Local},
    neighbour,
    packet::Packet,
    refuse, scratch,
    verdict::Verdict,
};

/// The program.
#[inline(always)]
pub fn run(ctx: &TcContext) -> Result<Verdict, DropReason> {
    if access::is_tagged(ctx) || !access::remove_priority_tag(ctx) {
        // The tag would leave the node with the packet.
        return Err(DropReason::UnsupportedL3);
    }
    let frame = read_frame(ctx)?;
    let sender = local::of_device(ctx, HOST_MAC_PREFIX, frame.destination)?;
    match frame.kind {
        Kind::V4 => {
            let packet = scratch::packet::<V4>()?;
            V4::parse(ctx, scope::POD, packet)?;
            if packet.key.source != sender.row.ipv4 || V4::is_link_local(packet.key.source) {
                return unusual_source::<V4>(packet);
            }
            forward::<V4>(ctx, sender, packet)
        }
        Kind::V6 => {
            let packet = scratch::packet::<V6>()?;
            V6::parse(ctx, scope::POD, packet)?;
            if let Some(answer) = neighbour::solicitation(ctx, sender, packet) {
                return Ok(answer);
            }
            if packet.key.source != sender.row.ipv6 || V6::is_link_local(packet.key.source) {
                return unusual_source::<V6>(packet);
            }
            forward::<V6>(ctx, sender, packet)
        }
        Kind::Arp => Ok(neighbour::arp(ctx, sender)),
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
    packet: &mut Packet<F::Address>,
) -> Result<Verdict, DropReason> {
    if F::is_multicast(packet.key.destination) {
        return Ok(Verdict::STACK);
    }
    let resolved = fragment::resolve_ports::<F>(ctx, packet);
    let ports_known = resolved == ports::KNOWN;
    let has_flows = local::has_flows(sender.number);
    if !ports_known && (has_flows || resolved == ports::ELSEWHERE) {
        // Its connection may be one that is translated; or others of its datagram are there already.
        let verdict = fragment::put_together::<F>(ctx, Hook::FromPod, sender.number);
        if verdict.forwards() {
            return Ok(verdict);
        }
    }
    let has_flows = ports_known && has_flows;
    let found = if has_flows {
        flow::find::<F>(ctx, Hook::FromPod, packet, Some(sender))?
    } else {
        None
    };
    let hop = match found {
        Some(hop) => hop,
        None if has_flows && icmp::is_error(packet) => {
            // Perhaps about a packet that the pod got through a Service.
            match icmp::translate_error::<F>(ctx, packet)? {
                Some(next_hop::HOST) => return deliver::as_received_by_host(ctx),
                Some(next_hop) => Hop::find(next_hop)?,
                None => {
                    decide::for_sender::<F>(ctx, sender.number, true)?;
                    let decision = &scratch::decision::<F>()?.decision;
                    if decision.source_nat != 0 {
                        // It tells of nothing that the outside has sent.
                        return Err(DropReason::InvalidSource);
                    }
                    Hop::find(decision.next_hop)?
                }
            }
        }
        None => match decide_and_commit::<F>(ctx, sender, packet, ports_known, has_flows) {
            Ok(next_hop) => Hop::find(next_hop)?,
            Err(DropReason::FragmentNotFound) => {
                return Ok(fragment::put_together::<F>(
                    ctx,
                    Hook::FromPod,
                    sender.number,
                ));
            }
            Err(reason) => return refuse::or_drop::<F>(ctx, sender.number, reason),
        },
    };
    deliver::deliver::<F>(ctx, Hook::FromPod, packet, hop)
}

/// A packet without an entry. Gives its next hop, and leaves the translation in the packet.
#[inline(always)]
fn decide_and_commit<F: Family>(
    ctx: &TcContext,
    sender: Local,
    packet: &mut Packet<F::Address>,
    ports_known: bool,
    has_flows: bool,
) -> Result<u32, DropReason> {
    decide::for_sender::<F>(ctx, sender.number, ports_known)?;
    // Its replies must not be taken for those of a connection through a Service.
    if has_flows && packet.may_begin_flow() && F::reply_tuple_is_taken() != 0 {
        scratch::decision::<F>()?.decision.stateful = 1;
    }
    if scratch::decision::<F>()?.decision.stateful != 0 {
        flow::commit::<F>(ctx, Hook::FromPod, sender.number)?;
        packet.rewrite.copy_from(&scratch::decision::<F>()?.forward);
    }
    Ok(scratch::decision::<F>()?.decision.next_hop)
}
