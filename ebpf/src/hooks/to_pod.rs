//! What the host's stack sends to a pod: replies of host-network endpoints are translated back,
//! the rest passes. The node reaches its own pods under any policy, so that probes work.

use aya_ebpf::programs::TcContext;
use weir_common::{DropReason, endpoint::POD_MAC_PREFIX, flow::scope, metrics::Hook};

use super::{Kind, read_frame};
use crate::{
    deliver,
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
    if !local::has_flows(receiver.number) {
        return Ok(Verdict::STACK);
    }
    match frame.kind {
        Kind::V4 => forward::<V4>(ctx, receiver),
        Kind::V6 => forward::<V6>(ctx, receiver),
        Kind::Arp | Kind::Other => Ok(Verdict::STACK),
    }
}

#[inline(always)]
fn forward<F: Family>(ctx: &TcContext, receiver: Local) -> Result<Verdict, DropReason> {
    let packet = scratch::packet::<F>()?;
    F::parse(ctx, scope::HOST, packet)?;
    if packet.key.destination != F::endpoint_address(receiver.row) {
        return Ok(Verdict::STACK);
    }
    if fragment::resolve_ports::<F>(ctx, packet) != ports::KNOWN {
        // Whether it belongs to a translated connection cannot be told without its first.
        return Err(DropReason::FragmentNotFound);
    }
    // Replies of the node itself; then those of endpoints that the stack reached by a device
    // without our programs, and the stack's own errors about such connections.
    if let Some(verdict) = translate::<F>(ctx, packet)? {
        return Ok(verdict);
    }
    packet.key.scope = scope::UNDERLAY;
    Ok(translate::<F>(ctx, packet)?.unwrap_or(Verdict::STACK))
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
