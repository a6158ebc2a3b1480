//! IPv6 (RFC 8200).

use aya_ebpf::{btf_maps::lpm_trie::Key, helpers::bpf_csum_update, programs::TcContext};
use weir_common::{
    DropReason, Ipv6,
    config::{self, Config, DeviceAddresses, PodRange},
    endpoint::Endpoint,
    hash,
    ipcache::IpcacheEntry,
    lookup::Lookup,
    protocol::{self, extension},
    service::SourceRangeKey,
};

use super::{Family, InPodRange};
use crate::{
    access::{self, ETHERNET, OFFSET_MASK},
    answer, global,
    maps::{self, FlowRing, Flows, Fragments, Frontends, LocalAddresses},
    packet::{Packet, fragment, icmp_type},
};

/// Marker of the family.
pub struct V6;

/// The fixed header.
#[repr(C)]
pub struct Header {
    /// Version, traffic class, flow label.
    pub version_and_flow: u32,
    /// Bytes after this header, network byte order.
    pub payload_length: u16,
    /// Next header.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source.
    pub source: Ipv6,
    /// Destination.
    pub destination: Ipv6,
}

/// Bytes of the fixed header.
const HEADER: u32 = 40;

/// Bytes of the hop-by-hop header in which Linux' stack says the length of a packet beyond 64 KiB.
/// It takes it out again when it cuts the packet (`ipv6_gso_segment`).
const JUMBO_OPTION: u8 = 8;

/// Difference that a hop limit lower by one makes to the sum of the packet: `!1` in network byte
/// order.
const HOP_DIFFERENCE: u32 = u16::from_be(!1) as u32;

/// Difference that a hop limit higher by one makes to it.
const HOP_RISE: u32 = u16::from_be(1) as u32;

/// Extension headers that are followed. RFC 8200 recommends each at most once, in an order that
/// has seven.
const EXTENSION_HEADERS_MAX: u32 = 8;

#[inline(always)]
fn header(ctx: &TcContext) -> Result<*mut Header, DropReason> {
    // SAFETY: plain bytes.
    unsafe { access::at::<Header>(ctx, ETHERNET) }.ok_or(DropReason::Malformed)
}

impl Family for V6 {
    type Address = Ipv6;

    const NUMBER: u8 = 6;
    const HEADER: u32 = HEADER;
    const SOURCE: u32 = 8;
    const ICMP: u8 = protocol::ICMPV6;
    const ECHO_REQUEST: u8 = icmp_type::V6_ECHO_REQUEST;
    const MASQUERADE: u32 = config::flag::MASQUERADE_V6;
    const RING_STATE: u32 = 1;

    #[inline(always)]
    fn flows() -> &'static Flows<Ipv6> {
        &maps::FLOWS_V6
    }
    #[inline(always)]
    fn ring() -> &'static FlowRing<Ipv6> {
        &maps::FLOW_RING_V6
    }
    #[inline(always)]
    fn fragments() -> &'static Fragments<Ipv6> {
        &maps::FRAGMENTS_V6
    }
    #[inline(always)]
    fn frontends() -> &'static Frontends<Ipv6> {
        &maps::FRONTENDS_V6
    }
    #[inline(always)]
    fn local_addresses() -> &'static LocalAddresses {
        &maps::LOCAL_ADDRESSES_V6
    }
    #[inline(always)]
    fn ipcache(address: Ipv6) -> Option<&'static IpcacheEntry> {
        maps::count_lookup(Lookup::Ipcache);
        maps::IPCACHE_V6.get(&Key::new(128, address))
    }

    #[inline(always)]
    fn is_in_source_ranges(service_port: u32, client: Ipv6) -> bool {
        maps::count_lookup(Lookup::SourceRange);
        let key = SourceRangeKey {
            service_port: service_port.to_be_bytes(),
            address: client,
        };
        maps::SOURCE_RANGES_V6
            .get(&Key::new(32 + 128, key))
            .is_some()
    }

    #[inline(always)]
    fn device_address(device: &DeviceAddresses) -> Ipv6 {
        device.v6
    }

    #[inline(always)]
    fn endpoint_address(endpoint: &Endpoint) -> Ipv6 {
        endpoint.ipv6
    }
    #[inline(always)]
    fn node(config: &Config) -> Ipv6 {
        if config.node_v6.is_zero() {
            config.gateway_v6
        } else {
            config.node_v6
        }
    }
    #[inline(always)]
    fn loopback(config: &Config) -> Ipv6 {
        config.loopback_v6
    }
    #[inline(always)]
    fn in_pod_range(config: &Config, address: Ipv6) -> InPodRange {
        let words = address.words();
        let mut i = 0;
        while i < config.pod_ranges_v6.len() {
            let range: &PodRange<Ipv6> = &config.pod_ranges_v6[i];
            let base = range.base.words();
            // Offsets are small: within the used part only the last word differs from the base.
            if words[0] ^ base[0] | words[1] ^ base[1] | words[2] ^ base[2] == 0 {
                let offset = u32::from_be(words[3]).wrapping_sub(u32::from_be(base[3]));
                if offset < range.length {
                    return InPodRange::Row(range.first_index + offset);
                }
            }
            i += 1;
        }
        InPodRange::No
    }
    #[inline(always)]
    fn is_impossible_source(address: Ipv6) -> bool {
        let words = address.words();
        address.0[0] == 0xff || (words[0] | words[1] | words[2] == 0 && words[3] == 1u32.to_be())
    }
    #[inline(always)]
    fn is_loopback(address: Ipv6) -> bool {
        let words = address.words();
        words[0] | words[1] | words[2] | (words[3] ^ 1u32.to_be()) == 0
    }
    #[inline(always)]
    fn is_multicast(address: Ipv6) -> bool {
        address.0[0] == 0xff
    }
    #[inline(always)]
    fn is_link_local(address: Ipv6) -> bool {
        (address.0[0] == 0xfe && address.0[1] & 0xc0 == 0x80) || address.is_zero()
    }

    #[inline(always)]
    fn parse(ctx: &TcContext, scope: u8, packet: &mut Packet<Ipv6>) -> Result<(), DropReason> {
        // SAFETY: checked by `header`.
        let header = unsafe { &*header(ctx)? };
        if header.version_and_flow.to_be() >> 28 != 6 {
            return Err(DropReason::Malformed);
        }
        let available = ctx.len() - ETHERNET;
        let payload = u32::from(u16::from_be(header.payload_length));
        // An offloaded packet beyond 64 KiB says zero (RFC 2675, "BIG TCP").
        let jumbo = payload == 0 && access::gso_size(ctx) != 0;
        let length = if jumbo { available } else { HEADER + payload };
        if length > available {
            return Err(DropReason::Malformed);
        }
        packet.reset(header.source, header.destination, header.next_header, scope);
        if jumbo && header.next_header == extension::HOP_BY_HOP {
            packet.jumbo_option = JUMBO_OPTION;
        }
        packet.ttl = header.hop_limit;
        packet.l3_length = length;
        packet.l4_offset = ETHERNET + HEADER;
        if !is_upper_layer(packet.key.protocol) {
            walk_extensions(ctx, packet)?;
            if !access::make_readable(ctx, packet.l4_offset + 20) {
                return Err(DropReason::PullFailed);
            }
        }
        packet.read_l4(
            ctx,
            (ETHERNET + packet.l3_length).wrapping_sub(packet.l4_offset),
        )
    }

    #[inline(always)]
    fn source(ctx: &TcContext, offset: u32) -> Result<Ipv6, DropReason> {
        // SAFETY: plain bytes.
        let header = unsafe { access::at::<Header>(ctx, offset) }.ok_or(DropReason::Malformed)?;
        // SAFETY: checked by `at`.
        Ok(unsafe { (*header).source })
    }

    #[inline(always)]
    fn write_header(
        ctx: &TcContext,
        source: &Ipv6,
        destination: &Ipv6,
        protocol: u8,
        length: u32,
    ) -> Result<(), DropReason> {
        // SAFETY: checked by `header`; nobody else holds a reference into the packet.
        unsafe {
            *header(ctx)? = Header {
                version_and_flow: u32::from_ne_bytes([0x60, 0, 0, 0]),
                payload_length: (length as u16).to_be(),
                next_header: protocol,
                hop_limit: answer::TTL,
                source: *source,
                destination: *destination,
            };
        }
        Ok(())
    }

    #[inline(always)]
    fn write_addresses(
        ctx: &TcContext,
        source: Ipv6,
        destination: Ipv6,
        _difference: u32,
    ) -> Result<(), DropReason> {
        // SAFETY: checked by `header`; nobody else holds a reference into the packet.
        let header = unsafe { &mut *header(ctx)? };
        header.source = source;
        header.destination = destination;
        Ok(())
    }

    #[inline(always)]
    fn decrement_ttl(ctx: &TcContext) -> Result<(), DropReason> {
        // SAFETY: as above.
        let header = unsafe { &mut *header(ctx)? };
        header.hop_limit -= 1;
        // IPv6 has no header checksum that would make up for it in the sum that a device may have
        // made of the packet. (Refused where there is no such sum, and that is all right.)
        // SAFETY: the context is valid.
        unsafe { bpf_csum_update(ctx.skb.skb, HOP_DIFFERENCE) };
        Ok(())
    }

    /// Nobody but the sender cuts (RFC 8200 section 4.5).
    #[inline(always)]
    fn permit_fragments(_: &TcContext) -> Result<(), DropReason> {
        Ok(())
    }

    #[inline(always)]
    fn increment_ttl(ctx: &TcContext) -> Result<(), DropReason> {
        // SAFETY: as above.
        let header = unsafe { &mut *header(ctx)? };
        header.hop_limit = header.hop_limit.wrapping_add(1);
        // As above.
        // SAFETY: the context is valid.
        unsafe { bpf_csum_update(ctx.skb.skb, HOP_RISE) };
        Ok(())
    }

    #[inline(always)]
    fn decide(ctx: &TcContext, sender: u32, ports_known: u32) -> u32 {
        global::decide_v6(ctx.skb.skb, sender, ports_known)
    }
    #[inline(always)]
    fn reply_tuple_is_taken() -> u32 {
        global::reply_tuple_is_taken_v6()
    }
    #[inline(always)]
    fn refuse(ctx: &TcContext, sender: u32, reason: u32) -> u32 {
        global::refuse_v6(ctx.skb.skb, sender, reason)
    }
    #[inline(always)]
    fn claim_reply_tuple() -> u32 {
        global::claim_reply_tuple_v6()
    }
    #[inline(always)]
    fn examine_place(place: u32) -> u32 {
        global::examine_place_v6(place)
    }
    #[inline(always)]
    fn claim_nat_port(hook: u32) -> u32 {
        global::claim_nat_port_v6(hook)
    }
    #[inline(always)]
    fn examine_tenant() -> u32 {
        global::examine_tenant_v6()
    }
    #[inline(always)]
    fn find_route(ctx: &TcContext) -> u32 {
        global::find_route_v6(ctx.skb.skb)
    }
    #[inline(always)]
    fn find_source(ctx: &TcContext) -> u32 {
        global::find_source_v6(ctx.skb.skb)
    }
    #[inline(always)]
    fn resolve_ports(ctx: &TcContext) -> u32 {
        global::resolve_ports_v6(ctx.skb.skb)
    }
    #[inline(always)]
    fn put_together(ctx: &TcContext, hook: u32, endpoint: u32) -> u32 {
        global::put_together_v6(ctx.skb.skb, hook, endpoint)
    }
    #[inline(always)]
    fn commit(ctx: &TcContext, hook: u32, sender: u32) -> u32 {
        global::commit_v6(ctx.skb.skb, hook, sender)
    }

    #[inline(always)]
    fn hash_tuple(packet: &Packet<Ipv6>) -> u32 {
        let key = &packet.key;
        let (s, d) = (key.source.words(), key.destination.words());
        hash::mix([
            s[0],
            s[1],
            s[2],
            s[3],
            d[0],
            d[1],
            d[2],
            d[3],
            u32::from(key.source_port.word()) << 16 | u32::from(key.destination_port.word()),
            u32::from(key.protocol),
        ])
    }
}

/// Whether nothing is to be followed: the common protocols, known without a table.
#[inline(always)]
fn is_upper_layer(next_header: u8) -> bool {
    matches!(
        next_header,
        protocol::TCP | protocol::UDP | protocol::ICMPV6 | protocol::SCTP
    )
}

/// Follows extension headers to the upper layer. A header that reaches beyond the packet, a second
/// fragment header and a chain longer than [`EXTENSION_HEADERS_MAX`] are errors: such a packet must
/// not pass as something it is not.
#[inline(always)]
fn walk_extensions(ctx: &TcContext, packet: &mut Packet<Ipv6>) -> Result<(), DropReason> {
    match walk(ctx, packet) {
        0 => Ok(()),
        reason => Err(DropReason::of_kernel(reason)),
    }
}

/// A function of its own: few packets have extension headers. Returns 0, or the number of a drop
/// reason.
#[inline(never)]
fn walk(ctx: &TcContext, packet: &mut Packet<Ipv6>) -> u32 {
    let end = ETHERNET + packet.l3_length;
    let mut fragmented = false;
    let mut i = 0;
    while i < EXTENSION_HEADERS_MAX {
        i += 1;
        let offset = packet.l4_offset;
        let kind = packet.key.protocol;
        if !is_extension(kind) {
            return 0;
        }
        if offset + 8 > end {
            return DropReason::Malformed as u32;
        }
        let Ok(header) = ctx.load::<[u8; 8]>(offset as usize) else {
            return DropReason::Malformed as u32;
        };
        let size = match kind {
            extension::FRAGMENT => 8,
            extension::AUTHENTICATION => (u32::from(header[1]) + 2) * 4,
            _ => (u32::from(header[1]) + 1) * 8,
        };
        if offset + size > end {
            return DropReason::Malformed as u32;
        }
        // What comes next must be within reach, whatever it is.
        if offset + size > OFFSET_MASK - 64 {
            return DropReason::ExtensionHeaders as u32;
        }
        packet.l4_offset = offset + size;
        packet.key.protocol = header[0];
        if kind == extension::FRAGMENT {
            if fragmented {
                return DropReason::Malformed as u32;
            }
            fragmented = true;
            let place = u16::from_be_bytes([header[2], header[3]]);
            packet.identification =
                u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
            if place & 0xfff8 != 0 {
                // What follows is payload, whatever its first header was.
                packet.fragment = fragment::LATER;
                return 0;
            }
            // An atomic fragment (RFC 6946) is a whole datagram.
            packet.fragment = if place & 1 != 0 {
                fragment::FIRST
            } else {
                fragment::WHOLE
            };
        }
    }
    DropReason::ExtensionHeaders as u32
}

/// Whether a header is followed to the next.
#[inline(always)]
fn is_extension(kind: u8) -> bool {
    matches!(
        kind,
        extension::HOP_BY_HOP
            | extension::ROUTING
            | extension::DESTINATION
            | extension::MOBILITY
            | extension::AUTHENTICATION
            | extension::FRAGMENT
    )
}
