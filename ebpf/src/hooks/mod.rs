//! A file per hook; each reads like a recipe.

use aya_ebpf::programs::TcContext;
use weir_common::{DropReason, MacAddress, protocol::ether_type};

use crate::access;

pub mod from_defrag;
pub mod from_host;
pub mod from_netdev;
pub mod from_pod;
pub mod to_netdev;
pub mod to_pod;

/// Bytes that must be readable in place for the usual headers: Ethernet, IPv6 (or IPv4 with 20
/// bytes of options), TCP.
const USUAL_HEADERS: u32 = 14 + 40 + 20;

/// The Ethernet header.
#[repr(C)]
#[derive(Clone, Copy)]
struct Ethernet {
    destination: MacAddress,
    _source: MacAddress,
    /// Network byte order.
    ether_type: u16,
}

/// What of it matters.
struct Frame {
    destination: MacAddress,
    kind: Kind,
}

/// What a frame carries.
enum Kind {
    V4,
    V6,
    Arp,
    Other,
}

/// Makes the usual headers readable and reads the first.
#[inline(always)]
fn read_frame(ctx: &TcContext) -> Result<Frame, DropReason> {
    if !access::make_readable(ctx, USUAL_HEADERS) {
        return Err(DropReason::PullFailed);
    }
    // SAFETY: plain bytes.
    let header = unsafe { access::at::<Ethernet>(ctx, 0) }.ok_or(DropReason::Malformed)?;
    // SAFETY: checked by `at`.
    let Ethernet {
        destination,
        ether_type,
        ..
    } = unsafe { *header };
    let kind = match u16::from_be(ether_type) {
        ether_type::IPV4 => Kind::V4,
        ether_type::IPV6 => Kind::V6,
        ether_type::ARP => Kind::Arp,
        _ => Kind::Other,
    };
    Ok(Frame { destination, kind })
}
