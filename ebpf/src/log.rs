//! For developers, behind the feature `log-packets`: a line for each packet in the log of
//! `weir-agent`. Called by [`crate::verdict::conclude`] and by nobody else.

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use weir_common::{Ipv6, Port, event::Event};

use crate::{access, event, scratch};

/// Logs a packet as it is now, after what the program made of it. Hook and outcome are numbers of
/// [`weir_common::metrics`]: names are of different lengths, which the verifier does not like.
///
/// A function of its own for the sake of the stack.
#[inline(never)]
pub fn packet(ctx: &TcContext, hook: u32, outcome: u32) {
    // SAFETY: plain words; nothing that stands there is needed any more.
    let Ok(packet) = (unsafe { scratch::room::<Event>() }) else {
        return;
    };
    *packet = Event::default();
    event::describe(ctx, packet);
    debug!(
        ctx,
        "hook {} device {} outcome {}: {:x} {:i} {} > {:i} {} protocol {}, {} bytes",
        hook,
        access::ifindex(ctx),
        outcome,
        packet.ether_type,
        readable(packet.family, packet.source),
        number(packet.source_port),
        readable(packet.family, packet.destination),
        number(packet.destination_port),
        packet.protocol,
        ctx.len()
    );
}

/// An address that is shown as what it is: an IPv4 one as `::ffff:10.1.0.5`.
#[inline(always)]
fn readable(family: u8, address: Ipv6) -> [u8; 16] {
    let words = address.words();
    let [a, b, c, d] = match family {
        4 => [0, 0, 0xffff_u32.to_be(), words[0]],
        _ => words,
    };
    Ipv6::from_words([a, b, c, d]).0
}

#[inline(always)]
fn number(port: Port) -> u16 {
    u16::from_be_bytes(port.0)
}
