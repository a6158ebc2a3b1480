//! Devices without a link layer (tun, WireGuard, PPP, tunnels of IP in IP): packets there begin with the network
//! header. They get an Ethernet header for the time that a program looks at them, so that there is one
//! way for all devices. The kernel takes it off by itself: at ingress behind the program, and where a packet is
//! redirected to a device that has none.

use aya_ebpf::{
    helpers::{bpf_redirect, bpf_skb_change_head},
    programs::TcContext,
};
use weir_common::{DropReason, MacAddress, mark, protocol::ether_type};

use crate::{
    access::{self, ETHERNET},
    switches,
    verdict::Verdict,
};

/// An Ethernet header.
#[repr(C)]
struct Header {
    _macs: [MacAddress; 2],
    ether_type: [u8; 2],
}

/// Gives the packet an Ethernet header with addresses of nobody.
#[inline(always)]
pub fn add_header(ctx: &TcContext) -> Result<(), DropReason> {
    let kind = protocol(ctx);
    // SAFETY: the context is valid; the helper checks its arguments, and fills the header with zeros.
    if unsafe { bpf_skb_change_head(ctx.skb.skb, ETHERNET, 0) } != 0 {
        return Err(DropReason::PullFailed);
    }
    // SAFETY: plain bytes.
    let header = unsafe { access::at::<Header>(ctx, 0) }.ok_or(DropReason::Malformed)?;
    // SAFETY: checked by `at`; nobody else holds a reference into the packet.
    unsafe { (*header).ether_type = kind.to_ne_bytes() };
    Ok(())
}

/// The packet's EtherType as the device has it, network byte order.
#[inline(always)]
fn protocol(ctx: &TcContext) -> u16 {
    // SAFETY: the context is valid for the whole run of the program.
    unsafe { (*ctx.skb.skb).protocol as u16 }
}

/// The version of a packet that begins with its network header; 0 if it is neither IPv4 nor IPv6.
#[inline(always)]
pub fn version(ctx: &TcContext) -> u8 {
    match u16::from_be(protocol(ctx)) {
        ether_type::IPV4 => 4,
        ether_type::IPV6 => 6,
        _ => 0,
    }
}

/// Sends a packet that has got a header by [`add_header`] on by its own device, which takes the header
/// off again; this program then sees it once more, with the mark.
#[inline(always)]
pub fn send_on(ctx: &TcContext) -> Verdict {
    ctx.set_mark(access::mark(ctx) | mark::DONE << switches::mark_shift());
    // SAFETY: no preconditions.
    let action = unsafe { bpf_redirect(access::ifindex(ctx), 0) };
    Verdict::to_stack_by(action as i32)
}
