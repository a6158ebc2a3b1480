//! What the host's stack sends to a pod: replies of host-network endpoints are translated back,
//! the rest passes. The node reaches its own pods under any policy, so that probes work.

use aya_ebpf::programs::TcContext;
use weir_common::{DropReason, endpoint::POD_MAC_PREFIX, flow::scope, metrics::Hook};

use super::{Kind, read_frame};
use crate::{
    deliver,
    family::{Family, V4, V6},
    flow, fragment, icmp,
    local::{self, Local},
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
    if !fragment::resolve_ports::<F>(packet) {
        // Whether it belongs to a translated connection cannot be told without its first.
        return Err(DropReason::FragmentNotFound);
    }
    if flow::find::<F>(ctx, Hook::ToPod, packet, None).is_some() {
        return deliver::to_stack::<F>(ctx, packet);
    }
    if icmp::is_error(packet) {
        icmp::translate_error::<F>(ctx, packet)?;
    }
    Ok(Verdict::STACK)
}
