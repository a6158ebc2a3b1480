//! All that leaves the node by its devices. What another program of ours has decided carries the
//! mark, which ends here. What the node itself answers to clients of Services outside is translated back; the
//! rest is the node's own traffic and passes. Nothing leaves with the address of a pod that should have
//! another.

use aya_ebpf::programs::TcContext;
use weir_common::{
    DropReason,
    flow::{flag, scope},
    mark,
    metrics::Hook,
    next_hop,
};

use super::{Kind, read_frame};
use crate::{
    access::{self, ETHERNET},
    bare, decide, deliver,
    family::{Family, InPodRange, V4, V6},
    flow,
    fragment::{self, ports},
    icmp, local,
    packet::Packet,
    scratch, switches,
    verdict::Verdict,
};

/// The program.
#[inline(always)]
pub fn run(ctx: &TcContext) -> Result<Verdict, DropReason> {
    // What is tagged has passed the program of its VLAN's device.
    if is_done(ctx) || access::is_tagged(ctx) {
        return Ok(Verdict::STACK);
    }
    look(ctx)
}

/// The program at devices without a link layer.
#[inline(always)]
pub fn run_bare(ctx: &TcContext) -> Result<Verdict, DropReason> {
    if is_done(ctx) {
        return Ok(Verdict::STACK);
    }
    let concerns_us = match bare::version(ctx) {
        4 => bare_concerns_us::<V4>(ctx)?,
        6 => bare_concerns_us::<V6>(ctx)?,
        _ => false,
    };
    if !concerns_us {
        return Ok(Verdict::STACK);
    }
    bare::add_header(ctx)?;
    look(ctx)?;
    Ok(bare::send_on(ctx))
}

/// Whether another program of ours has decided about the packet. Its mark ends here.
#[inline(always)]
fn is_done(ctx: &TcContext) -> bool {
    let shift = switches::mark_shift();
    let value = access::mark(ctx);
    if value & (mark::DONE << shift) == 0 {
        return false;
    }
    // Our bits mean nothing beyond this node.
    ctx.set_mark(value & !(0xf << shift));
    true
}

#[inline(always)]
fn look(ctx: &TcContext) -> Result<Verdict, DropReason> {
    match read_frame(ctx)?.kind {
        Kind::V4 => forward::<V4>(ctx),
        Kind::V6 => forward::<V6>(ctx),
        Kind::Arp | Kind::Other => Ok(Verdict::STACK),
    }
}

#[inline(always)]
fn forward<F: Family>(ctx: &TcContext) -> Result<Verdict, DropReason> {
    let config = local::config()?;
    let has_flows = local::has_flows(next_hop::HOST);
    let is_pod = F::in_pod_range(config, F::source(ctx, ETHERNET)?) != InPodRange::No;
    if !has_flows && !is_pod {
        return Ok(Verdict::STACK);
    }
    let packet = scratch::packet::<F>()?;
    F::parse(ctx, scope::DEVICE, packet)?;
    if is_pod {
        return check_pod_source::<F>(ctx, packet);
    }
    if fragment::resolve_ports::<F>(ctx, packet) != ports::KNOWN {
        return Ok(Verdict::STACK);
    }
    if flow::find::<F>(ctx, Hook::ToNetdev, packet, None)?.is_some() {
        return deliver::to_stack::<F>(ctx, Hook::ToNetdev, packet);
    }
    if icmp::is_error(packet) {
        icmp::translate_error::<F>(ctx, packet)?;
    }
    Ok(Verdict::STACK)
}

/// Whether a packet that begins with its network header may have to be translated or dropped.
#[inline(always)]
fn bare_concerns_us<F: Family>(ctx: &TcContext) -> Result<bool, DropReason> {
    if !access::make_readable(ctx, F::HEADER) {
        return Err(DropReason::PullFailed);
    }
    let is_pod = F::in_pod_range(local::config()?, F::source(ctx, 0)?) != InPodRange::No;
    Ok(is_pod || local::has_flows(next_hop::HOST))
}

/// What a pod sends passes with the pod's address where that is not masqueraded, and where it answers to
/// somebody outside who has asked the pod itself.
#[inline(always)]
fn check_pod_source<F: Family>(
    ctx: &TcContext,
    packet: &mut Packet<F::Address>,
) -> Result<Verdict, DropReason> {
    let config = local::config()?;
    let is_masqueraded = config.flags & F::MASQUERADE != 0;
    if !is_masqueraded || !decide::is_outside::<F>(config, packet.key.destination) {
        return Ok(Verdict::STACK);
    }
    if fragment::resolve_ports::<F>(ctx, packet) != ports::KNOWN {
        return Err(DropReason::FragmentNotFound);
    }
    packet.key.scope = scope::POD;
    match flow::flags_of::<F>(&packet.key) {
        Some(flags) if flags & flag::SOURCE_NAT == 0 => Ok(Verdict::STACK),
        _ => Err(DropReason::InvalidSource),
    }
}
