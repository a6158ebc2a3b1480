//! What the node's own processes send to Services, as far as it was not translated at the socket, and
//! to the node's own addresses. Routes lead the first to a device of ours, at whose other end this
//! program runs; the second is seen on the loopback device.

use aya_ebpf::programs::TcContext;
use weir_common::{DropReason, flow::scope, ipcache, metrics::Hook, protocol};

use super::{Kind, read_frame};
use crate::{
    access, decide,
    deliver::{self, Hop, LOOPBACK},
    family::{Family, V4, V6},
    flow,
    fragment::{self, ports},
    icmp, local,
    packet::Packet,
    refuse, scratch,
    verdict::Verdict,
};

/// The program.
#[inline(always)]
pub fn run(ctx: &TcContext) -> Result<Verdict, DropReason> {
    match read_frame(ctx)?.kind {
        Kind::V4 => forward::<V4>(ctx),
        Kind::V6 => forward::<V6>(ctx),
        Kind::Arp | Kind::Other => Ok(Verdict::STACK),
    }
}

#[inline(always)]
fn forward<F: Family>(ctx: &TcContext) -> Result<Verdict, DropReason> {
    let packet = scratch::packet::<F>()?;
    F::parse(ctx, scope::NODE, packet)?;
    let on_loopback = access::ifindex(ctx) == LOOPBACK;
    if F::is_loopback(packet.key.destination) || F::is_multicast(packet.key.destination) {
        return Ok(Verdict::STACK);
    }
    let ports_known = fragment::resolve_ports::<F>(ctx, packet) == ports::KNOWN;
    let has_flows = ports_known && local::has_flows(decide::NODE);
    if has_flows && let Some(hop) = flow::find::<F>(ctx, Hook::FromHost, packet, None)? {
        return deliver::deliver::<F>(ctx, Hook::FromHost, packet, hop);
    }
    if has_flows && icmp::is_error(packet) && icmp::translate_error::<F>(ctx, packet)?.is_some() {
        return Ok(Verdict::STACK);
    }
    if on_loopback && !may_be_for_service(packet) {
        return Ok(Verdict::STACK);
    }
    match decide_and_commit::<F>(ctx, packet, ports_known, on_loopback) {
        Ok(Some(next_hop)) => {
            deliver::deliver::<F>(ctx, Hook::FromHost, packet, Hop::find(next_hop)?)
        }
        Ok(None) => Ok(Verdict::STACK),
        Err(reason) => refuse::or_drop::<F>(ctx, decide::NODE, reason),
    }
}

/// Most of what passes the loopback device are connections of the node with itself: only their
/// first packet can be for a Service.
#[inline(always)]
fn may_be_for_service<A: weir_common::address::Address>(packet: &Packet<A>) -> bool {
    packet.may_begin_flow() || packet.key.protocol == protocol::SCTP
}

/// A packet without an entry. Gives its next hop, and leaves the translation in the packet; `None`
/// if it is no Service's.
#[inline(always)]
fn decide_and_commit<F: Family>(
    ctx: &TcContext,
    packet: &mut Packet<F::Address>,
    ports_known: bool,
    on_loopback: bool,
) -> Result<Option<u32>, DropReason> {
    decide::for_sender::<F>(ctx, decide::NODE, ports_known)?;
    let decision = &scratch::decision::<F>()?.decision;
    if decision.stateful == 0 {
        // An address that Services share with others: the stack sends what comes from this device
        // on without the rule that led it here.
        if on_loopback || decision.address_flags & u32::from(ipcache::flag::SERVED) != 0 {
            return Ok(None);
        }
        // The route is that of a Service which is gone: the stack would lead it here again.
        return Err(DropReason::NoServicePort);
    }
    flow::commit::<F>(ctx, Hook::FromHost, decide::NODE)?;
    packet.rewrite.copy_from(&scratch::decision::<F>()?.forward);
    Ok(Some(scratch::decision::<F>()?.decision.next_hop))
}
