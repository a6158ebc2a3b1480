//! IPv4 (RFC 791).

use aya_ebpf::{btf_maps::lpm_trie::Key, helpers::bpf_get_prandom_u32, programs::TcContext};
use weir_common::{
    DropReason, Ipv4, checksum,
    config::{self, Config, DeviceAddresses, PodRange},
    endpoint::Endpoint,
    hash,
    ipcache::IpcacheEntry,
    lookup::Lookup,
    protocol,
    service::SourceRangeKey,
};

use super::{Family, InPodRange};
use crate::{
    access::{self, ETHERNET},
    answer, global,
    maps::{self, FlowRing, Flows, Fragments, Frontends, LocalAddresses},
    packet::{Packet, fragment, icmp_type},
};

/// Marker of the family.
pub struct V4;

/// The header without options.
#[repr(C)]
pub struct Header {
    /// Version in the upper half, length in words of four bytes in the lower.
    pub version_and_length: u8,
    /// Type of service.
    pub tos: u8,
    /// Bytes of header and payload, network byte order.
    pub total_length: u16,
    /// Identification, network byte order.
    pub identification: u16,
    /// Flags and fragment offset in units of eight bytes, network byte order.
    pub fragment: u16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol.
    pub protocol: u8,
    /// Header checksum.
    pub checksum: u16,
    /// Source.
    pub source: Ipv4,
    /// Destination.
    pub destination: Ipv4,
}

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;

/// Difference that a time to live lower by one makes to the header checksum: `!0x0100` in
/// network byte order.
const TTL_DIFFERENCE: u32 = u16::from_be(!0x0100) as u32;

/// Difference that a time to live higher by one makes to it.
const TTL_RISE: u32 = u16::from_be(0x0100) as u32;

/// What the checksum gains when the flag 'don't fragment' is taken away.
const DONT_FRAGMENT_DIFFERENCE: u32 = u16::from_be(!DONT_FRAGMENT) as u32;

#[inline(always)]
fn header(ctx: &TcContext) -> Result<*mut Header, DropReason> {
    // SAFETY: plain bytes.
    unsafe { access::at::<Header>(ctx, ETHERNET) }.ok_or(DropReason::Malformed)
}

impl Family for V4 {
    type Address = Ipv4;

    const NUMBER: u8 = 4;
    const HEADER: u32 = 20;
    const SOURCE: u32 = 12;
    const ICMP: u8 = protocol::ICMP;
    const ECHO_REQUEST: u8 = icmp_type::ECHO_REQUEST;
    const MASQUERADE: u32 = config::flag::MASQUERADE_V4;
    const RING_STATE: u32 = 0;

    #[inline(always)]
    fn flows() -> &'static Flows<Ipv4> {
        &maps::FLOWS_V4
    }
    #[inline(always)]
    fn ring() -> &'static FlowRing<Ipv4> {
        &maps::FLOW_RING_V4
    }
    #[inline(always)]
    fn fragments() -> &'static Fragments<Ipv4> {
        &maps::FRAGMENTS_V4
    }
    #[inline(always)]
    fn frontends() -> &'static Frontends<Ipv4> {
        &maps::FRONTENDS_V4
    }
    #[inline(always)]
    fn local_addresses() -> &'static LocalAddresses {
        &maps::LOCAL_ADDRESSES_V4
    }
    #[inline(always)]
    fn ipcache(address: Ipv4) -> Option<&'static IpcacheEntry> {
        maps::count_lookup(Lookup::Ipcache);
        maps::IPCACHE_V4.get(&Key::new(32, address))
    }

    #[inline(always)]
    fn is_in_source_ranges(service_port: u32, client: Ipv4) -> bool {
        maps::count_lookup(Lookup::SourceRange);
        let key = SourceRangeKey {
            service_port: service_port.to_be_bytes(),
            address: client,
        };
        maps::SOURCE_RANGES_V4
            .get(&Key::new(32 + 32, key))
            .is_some()
    }

    #[inline(always)]
    fn device_address(device: &DeviceAddresses) -> Ipv4 {
        device.v4
    }

    #[inline(always)]
    fn endpoint_address(endpoint: &Endpoint) -> Ipv4 {
        endpoint.ipv4
    }
    #[inline(always)]
    fn node(config: &Config) -> Ipv4 {
        if config.node_v4.word() == 0 {
            config.gateway_v4
        } else {
            config.node_v4
        }
    }
    #[inline(always)]
    fn loopback(config: &Config) -> Ipv4 {
        config.loopback_v4
    }
    #[inline(always)]
    fn in_pod_range(config: &Config, address: Ipv4) -> InPodRange {
        let mut i = 0;
        while i < config.pod_ranges_v4.len() {
            let range: &PodRange<Ipv4> = &config.pod_ranges_v4[i];
            if range.length != 0 && address.word() & range.mask.word() == range.base.word() {
                let offset = u32::from_be(address.word()) - u32::from_be(range.base.word());
                if offset < range.length {
                    return InPodRange::Row(range.first_index + offset);
                }
            }
            i += 1;
        }
        InPodRange::No
    }
    #[inline(always)]
    fn is_impossible_source(address: Ipv4) -> bool {
        address.0[0] == 127 || address.0[0] >= 224
    }
    #[inline(always)]
    fn is_loopback(address: Ipv4) -> bool {
        address.0[0] == 127
    }
    #[inline(always)]
    fn is_multicast(address: Ipv4) -> bool {
        (address.0[0] & 0xf0) == 224 || address.word() == u32::MAX
    }
    #[inline(always)]
    fn is_link_local(address: Ipv4) -> bool {
        address.word() == 0
    }

    #[inline(always)]
    fn parse(ctx: &TcContext, scope: u8, packet: &mut Packet<Ipv4>) -> Result<(), DropReason> {
        // SAFETY: checked by `header`.
        let version_and_length = unsafe { (*header(ctx)?).version_and_length };
        let header_length = u32::from(version_and_length & 0x0f) * 4;
        if version_and_length >> 4 != 4 || header_length < 20 {
            return Err(DropReason::Malformed);
        }
        if header_length > 20 && !access::make_readable(ctx, ETHERNET + header_length + 20) {
            return Err(DropReason::PullFailed);
        }
        // SAFETY: as above.
        let header = unsafe { &*header(ctx)? };
        let available = ctx.len() - ETHERNET;
        let total = u32::from(u16::from_be(header.total_length));
        // An offloaded packet beyond 64 KiB says zero (kernel 6.3, "BIG TCP").
        let jumbo = total == 0 && access::gso_size(ctx) != 0;
        let length = if jumbo { available } else { total };
        if length < header_length || length > available {
            return Err(DropReason::Malformed);
        }
        packet.reset(header.source, header.destination, header.protocol, scope);
        packet.l4_offset = access::forget_bounds(ETHERNET + header_length);
        packet.l3_length = length;
        packet.ttl = header.ttl;
        let place = u16::from_be(header.fragment);
        packet.dont_fragment = u8::from(place & DONT_FRAGMENT != 0);
        if place & (MORE_FRAGMENTS | OFFSET) != 0 {
            packet.identification = u32::from(header.identification);
            packet.fragment = if place & OFFSET == 0 {
                fragment::FIRST
            } else {
                fragment::LATER
            };
        }
        packet.read_l4(ctx, length - header_length)
    }

    #[inline(always)]
    fn source(ctx: &TcContext, offset: u32) -> Result<Ipv4, DropReason> {
        // SAFETY: plain bytes.
        let header = unsafe { access::at::<Header>(ctx, offset) }.ok_or(DropReason::Malformed)?;
        // SAFETY: checked by `at`.
        Ok(unsafe { (*header).source })
    }

    #[inline(always)]
    fn write_header(
        ctx: &TcContext,
        source: &Ipv4,
        destination: &Ipv4,
        protocol: u8,
        length: u32,
    ) -> Result<(), DropReason> {
        let total = Self::HEADER + length;
        let mut header = [0u32; 5];
        header[0] = u32::from_ne_bytes([0x45, 0xc0, (total >> 8) as u8, total as u8]);
        header[2] = u32::from_ne_bytes([answer::TTL, protocol, 0, 0]);
        header[3] = source.word();
        header[4] = destination.word();
        let sum: u64 = header.iter().map(|w| u64::from(*w)).sum();
        header[2] |= u32::from(!checksum::fold16(sum)) << 16;
        // SAFETY: plain bytes.
        let place =
            unsafe { access::at::<[u32; 5]>(ctx, ETHERNET) }.ok_or(DropReason::Malformed)?;
        // SAFETY: checked by `at`.
        unsafe { *place = header };
        Ok(())
    }

    #[inline(always)]
    fn write_addresses(
        ctx: &TcContext,
        source: Ipv4,
        destination: Ipv4,
        difference: u32,
    ) -> Result<(), DropReason> {
        // SAFETY: checked by `header`; nobody else holds a reference into the packet.
        let header = unsafe { &mut *header(ctx)? };
        header.source = source;
        header.destination = destination;
        header.checksum = checksum::apply(header.checksum, difference);
        Ok(())
    }

    #[inline(always)]
    fn decrement_ttl(ctx: &TcContext) -> Result<(), DropReason> {
        // SAFETY: as above.
        let header = unsafe { &mut *header(ctx)? };
        header.ttl -= 1;
        header.checksum = checksum::apply(header.checksum, TTL_DIFFERENCE);
        Ok(())
    }

    #[inline(always)]
    fn permit_fragments(ctx: &TcContext) -> Result<(), DropReason> {
        // SAFETY: as above.
        let header = unsafe { &mut *header(ctx)? };
        header.fragment &= !DONT_FRAGMENT.to_be();
        // SAFETY: no preconditions.
        let identification = unsafe { bpf_get_prandom_u32() } as u16;
        // Where it may not be cut Linux gives all packets the same (RFC 6864 section 4.1).
        let changed = checksum::apply(header.checksum, DONT_FRAGMENT_DIFFERENCE);
        let numbered = u32::from(!header.identification) + u32::from(identification);
        header.checksum = checksum::apply(changed, numbered);
        header.identification = identification;
        Ok(())
    }

    #[inline(always)]
    fn increment_ttl(ctx: &TcContext) -> Result<(), DropReason> {
        // SAFETY: as above.
        let header = unsafe { &mut *header(ctx)? };
        header.ttl = header.ttl.wrapping_add(1);
        header.checksum = checksum::apply(header.checksum, TTL_RISE);
        Ok(())
    }

    #[inline(always)]
    fn decide(ctx: &TcContext, sender: u32, ports_known: u32) -> u32 {
        global::decide_v4(ctx.skb.skb, sender, ports_known)
    }
    #[inline(always)]
    fn reply_tuple_is_taken() -> u32 {
        global::reply_tuple_is_taken_v4()
    }
    #[inline(always)]
    fn refuse(ctx: &TcContext, sender: u32, reason: u32) -> u32 {
        global::refuse_v4(ctx.skb.skb, sender, reason)
    }
    #[inline(always)]
    fn claim_reply_tuple() -> u32 {
        global::claim_reply_tuple_v4()
    }
    #[inline(always)]
    fn examine_place(place: u32) -> u32 {
        global::examine_place_v4(place)
    }
    #[inline(always)]
    fn claim_nat_port(hook: u32) -> u32 {
        global::claim_nat_port_v4(hook)
    }
    #[inline(always)]
    fn examine_tenant() -> u32 {
        global::examine_tenant_v4()
    }
    #[inline(always)]
    fn find_route(ctx: &TcContext) -> u32 {
        global::find_route_v4(ctx.skb.skb)
    }
    #[inline(always)]
    fn find_source(ctx: &TcContext) -> u32 {
        global::find_source_v4(ctx.skb.skb)
    }
    #[inline(always)]
    fn resolve_ports(ctx: &TcContext) -> u32 {
        global::resolve_ports_v4(ctx.skb.skb)
    }
    #[inline(always)]
    fn put_together(ctx: &TcContext, hook: u32, endpoint: u32) -> u32 {
        global::put_together_v4(ctx.skb.skb, hook, endpoint)
    }
    #[inline(always)]
    fn commit(ctx: &TcContext, hook: u32, sender: u32) -> u32 {
        global::commit_v4(ctx.skb.skb, hook, sender)
    }

    #[inline(always)]
    fn hash_tuple(packet: &Packet<Ipv4>) -> u32 {
        let key = &packet.key;
        hash::mix([
            key.source.word(),
            key.destination.word(),
            u32::from(key.source_port.word()) << 16 | u32::from(key.destination_port.word()),
            u32::from(key.protocol),
        ])
    }
}
