//! What the host's stack sends to a pod: replies of host-network endpoints are translated back,
//! the rest passes. The node reaches its own pods under any policy, so that probes work.
//!
//! What comes from outside by way of the stack (somebody's own translation, a proxy that keeps the client's
//! address) is noted, so that the pod's answers go back the same way and are not masqueraded.

use aya_ebpf::programs::TcContext;
use weir_common::{DropReason, endpoint::POD_MAC_PREFIX, flow::scope, metrics::Hook};

use super::{Kind, read_frame};
use crate::{
    decide, deliver,
    family::{Family, V4, V6},
    flow,
    fragment::{self, ports},
    icmp,
    local::{self, Local},
    packet::Packet,
    scratch,
    verdict::Verdict,
};

/// The program.
#[inline(always)]
pub fn run(ctx: &TcContext) -> Result<Verdict, DropReason> {
    let frame = read_frame(ctx)?;
    let receiver = local::of_device(ctx, POD_MAC_PREFIX, frame.destination)?;
    match frame.kind {
        Kind::V4 => forward::<V4>(ctx, receiver),
        Kind::V6 => forward::<V6>(ctx, receiver),
        Kind::Arp | Kind::Other => Ok(Verdict::STACK),
    }
}

#[inline(always)]
fn forward<F: Family>(ctx: &TcContext, receiver: Local) -> Result<Verdict, DropReason> {
    let config = local::config()?;
    let has_flows = local::has_flows(receiver.number);
    if !has_flows && config.flags & F::MASQUERADE == 0 {
        return Ok(Verdict::STACK);
    }
    let packet = scratch::packet::<F>()?;
    F::parse(ctx, scope::HOST, packet)?;
    if packet.key.destination != F::endpoint_address(receiver.row) {
        return Ok(Verdict::STACK);
    }
    let ports_known = fragment::resolve_ports::<F>(ctx, packet) == ports::KNOWN;
    if has_flows {
        if !ports_known {
            // Whether it belongs to a translated connection cannot be told without its first.
            return Err(DropReason::FragmentNotFound);
        }
        // Replies of the node itself; then those of endpoints that the stack reached by a device
        // without our programs, and the stack's own errors about such connections.
        if let Some(verdict) = translate::<F>(ctx, packet)? {
            return Ok(verdict);
        }
        let (asked, stale_created) = (packet.asked, packet.stale_created);
        packet.key.scope = scope::UNDERLAY;
        if let Some(verdict) = translate::<F>(ctx, packet)? {
            return Ok(verdict);
        }
        packet.key.scope = scope::HOST;
        (packet.asked, packet.stale_created) = (asked, stale_created);
    }
    // Who is on the node's own links (a resolver for this node) is no client outside.
    let is_answered =
        ports_known && !icmp::is_error(packet) && !F::is_link_local(packet.key.source);
    if is_answered
        && config.flags & F::MASQUERADE != 0
        && decide::is_outside::<F>(config, packet.key.source)
    {
        decide::as_sent_by_stack::<F>(packet, receiver)?;
        match flow::commit::<F>(ctx, Hook::ToPod, decide::NODE) {
            // The answers belong to another connection: one of ours, whose packet the stack has cut.
            Ok(()) | Err(DropReason::NatPortsExhausted) => {}
            Err(reason) => return Err(reason),
        }
    }
    Ok(Verdict::STACK)
}

#[inline(always)]
fn translate<F: Family>(
    ctx: &TcContext,
    packet: &mut Packet<F::Address>,
) -> Result<Option<Verdict>, DropReason> {
    if flow::find::<F>(ctx, Hook::ToPod, packet, None)?.is_some() {
        return deliver::to_stack::<F>(ctx, Hook::ToPod, packet).map(Some);
    }
    if icmp::is_error(packet) && icmp::translate_error::<F>(ctx, packet)?.is_some() {
        return Ok(Some(Verdict::STACK));
    }
    Ok(None)
}
