//! Events for `weir monitor`. A drop is always reported; a new flow only while someone watches.
//! The packet is read anew, byte by careful byte: a drop is reported of packets that could not be
//! parsed too.

use aya_ebpf::{helpers::bpf_ktime_get_ns, programs::TcContext};
use weir_common::{
    Ipv6, Port,
    address::Address,
    event::{Event, kind},
    flow::FlowEntry,
    metrics::{Hook, outcome},
    protocol::{self, ether_type},
};

use crate::{
    access::{self, ETHERNET},
    family::Family,
    maps,
    packet::Packet,
    verdict,
};

/// Reports a dropped packet; `reason` is the number of the [`weir_common::DropReason`].
#[inline(never)]
pub fn report_drop(ctx: &TcContext, hook: Hook, reason: u8) {
    let Some(mut entry) = maps::EVENTS.reserve(0) else {
        verdict::count(hook, outcome::EVENT_LOST, 0);
        return;
    };
    let event = entry.write(Event {
        // SAFETY: no preconditions.
        time: unsafe { bpf_ktime_get_ns() },
        kind: kind::DROP,
        reason,
        hook: hook as u8,
        ifindex: access::ifindex(ctx),
        length: ctx.len(),
        ..Event::default()
    });
    describe(ctx, event);
    entry.submit(0);
}

/// Fills in what can be read of the packet.
#[inline(always)]
pub fn describe(ctx: &TcContext, event: &mut Event) {
    let Ok(ether_type) = ctx.load::<[u8; 2]>(12) else {
        return;
    };
    event.ether_type = u16::from_be_bytes(ether_type);
    let l4 = match event.ether_type {
        ether_type::IPV4 => {
            let Ok(header) = ctx.load::<[u8; 20]>(ETHERNET as usize) else {
                return;
            };
            event.family = 4;
            event.protocol = header[9];
            event.source.0[..4].copy_from_slice(&header[12..16]);
            event.destination.0[..4].copy_from_slice(&header[16..20]);
            ETHERNET + u32::from(header[0] & 0x0f) * 4
        }
        ether_type::IPV6 => {
            let Ok(source) = ctx.load::<Ipv6>(ETHERNET as usize + 8) else {
                return;
            };
            let Ok(destination) = ctx.load::<Ipv6>(ETHERNET as usize + 24) else {
                return;
            };
            let Ok(next_header) = ctx.load::<u8>(ETHERNET as usize + 6) else {
                return;
            };
            event.family = 6;
            event.protocol = next_header;
            event.source = source;
            event.destination = destination;
            ETHERNET + 40
        }
        _ => return,
    };
    if matches!(
        event.protocol,
        protocol::TCP | protocol::UDP | protocol::SCTP
    ) {
        if let Ok([source, destination]) = ctx.load::<[Port; 2]>(l4 as usize) {
            event.source_port = source;
            event.destination_port = destination;
        }
        if event.protocol == protocol::TCP
            && let Ok(flags) = ctx.load::<u8>(l4 as usize + 13)
        {
            event.tcp_flags = flags;
        }
    }
}

/// Reports a connection that was entered in the flow table.
#[inline(always)]
pub fn report_new_flow<F: Family>(
    ctx: &TcContext,
    hook: Hook,
    packet: &Packet<F::Address>,
    entry: &FlowEntry<F::Address>,
) {
    let Some(mut event) = maps::EVENTS.reserve(0) else {
        verdict::count(hook, outcome::EVENT_LOST, 0);
        return;
    };
    event.write(Event {
        // SAFETY: no preconditions.
        time: unsafe { bpf_ktime_get_ns() },
        kind: kind::NEW_FLOW,
        hook: hook as u8,
        family: F::NUMBER,
        protocol: packet.key.protocol,
        tcp_flags: packet.tcp_flags,
        ifindex: access::ifindex(ctx),
        length: ctx.len(),
        source: packet.key.source.to_shared(),
        destination: packet.key.destination.to_shared(),
        source_port: packet.key.source_port,
        destination_port: packet.key.destination_port,
        backend_address: entry.new_destination.to_shared(),
        backend_port: entry.new_destination_port,
        source_endpoint: entry.source_endpoint,
        next_hop: entry.next_hop,
        ..Event::default()
    });
    event.submit(0);
}
