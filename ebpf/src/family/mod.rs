//! IPv4 and IPv6: one generic implementation of everything, with the differences of the two
//! network headers and the two sets of maps behind one trait.

mod v4;
mod v6;

use aya_ebpf::programs::TcContext;
use weir_common::{
    DropReason,
    address::Address,
    checksum::Summed,
    config::{Config, DeviceAddresses},
    endpoint::Endpoint,
    ipcache::IpcacheEntry,
};

pub use self::{v4::V4, v6::V6};
use crate::{
    maps::{FlowRing, Flows, Fragments, Frontends, LocalAddresses},
    packet::Packet,
};

/// What an address is that looks like one of a pod of this node.
#[derive(Clone, Copy, Eq, PartialEq)]
pub enum InPodRange {
    /// Not in a pod range of this node.
    No,
    /// In a pod range, at this row of `LOCAL_ADDRESSES_*`.
    Row(u32),
}

/// One address family.
pub trait Family: Sized {
    /// Its address.
    type Address: Address + Summed + 'static;

    /// 4 or 6.
    const NUMBER: u8;
    /// Bytes of its header without options.
    const HEADER: u32;
    /// Offset of the source address in its header; the destination follows.
    const SOURCE: u32;
    /// Protocol number of its ICMP.
    const ICMP: u8;
    /// Type of its echo request.
    const ECHO_REQUEST: u8;
    /// Bit of [`Config::flags`] that has its traffic masqueraded.
    const MASQUERADE: u32;
    /// Row of `FLOW_RING_STATE`.
    const RING_STATE: u32;

    /// Its flow table.
    fn flows() -> &'static Flows<Self::Address>;
    /// Its flow ring.
    fn ring() -> &'static FlowRing<Self::Address>;
    /// Its fragment table.
    fn fragments() -> &'static Fragments<Self::Address>;
    /// Its frontends.
    fn frontends() -> &'static Frontends<Self::Address>;
    /// Numbers of the local pods by offset of their address.
    fn local_addresses() -> &'static LocalAddresses;
    /// What an address is, by longest prefix.
    fn ipcache(address: Self::Address) -> Option<&'static IpcacheEntry>;

    /// Whether a client is in one of the ranges of a Service port.
    fn is_in_source_ranges(service_port: u32, client: Self::Address) -> bool;

    /// The address that a device sends from; zero if it has none of this family.
    fn device_address(device: &DeviceAddresses) -> Self::Address;

    /// Address of an endpoint; zero if it has none of this family.
    fn endpoint_address(endpoint: &Endpoint) -> Self::Address;
    /// Address from which this node sends ICMP errors: its own, else that of the pods' gateway.
    fn node(config: &Config) -> Self::Address;
    /// Source address of hairpin traffic.
    fn loopback(config: &Config) -> Self::Address;
    /// Where an address stands in the pod ranges of this node.
    fn in_pod_range(config: &Config, address: Self::Address) -> InPodRange;
    /// Addresses that no packet from a device may have as its source: loopback, multicast,
    /// broadcast. (The unspecified address is one that hosts use before they have another.)
    fn is_impossible_source(address: Self::Address) -> bool;
    /// An address of the loopback device.
    fn is_loopback(address: Self::Address) -> bool;
    /// Multicast or broadcast.
    fn is_multicast(address: Self::Address) -> bool;
    /// Unspecified, or valid on one link only.
    fn is_link_local(address: Self::Address) -> bool;

    /// Reads the headers into `packet`, whose key gets `scope`.
    fn parse(
        ctx: &TcContext,
        scope: u8,
        packet: &mut Packet<Self::Address>,
    ) -> Result<(), DropReason>;

    /// Source address of a packet whose headers have not been read yet, and whose network header stands at
    /// `offset`.
    fn source(ctx: &TcContext, offset: u32) -> Result<Self::Address, DropReason>;

    /// Writes a new header without options, for `length` bytes of `protocol`.
    fn write_header(
        ctx: &TcContext,
        source: &Self::Address,
        destination: &Self::Address,
        protocol: u8,
        length: u32,
    ) -> Result<(), DropReason>;

    /// Writes new addresses into the network header, with the checksum where it has one.
    fn write_addresses(
        ctx: &TcContext,
        source: Self::Address,
        destination: Self::Address,
        difference: u32,
    ) -> Result<(), DropReason>;

    /// Takes one from the time to live. The caller has seen that it is above one.
    fn decrement_ttl(ctx: &TcContext) -> Result<(), DropReason>;

    /// Permits the packet to be cut on its way, which its sender has not, where the family knows that.
    fn permit_fragments(ctx: &TcContext) -> Result<(), DropReason>;

    /// Gives one back to the time to live, which another host has taken.
    fn increment_ttl(ctx: &TcContext) -> Result<(), DropReason>;

    /// The tuple as words for [`weir_common::hash::mix`].
    fn hash_tuple(packet: &Packet<Self::Address>) -> u32;

    /// [`crate::decide::decide`] as a global function.
    fn decide(ctx: &TcContext, sender: u32, ports_known: u32) -> u32;
    /// [`crate::route::find`] as a global function.
    fn find_route(ctx: &TcContext) -> u32;
    /// [`crate::route::find_source`] as a global function.
    fn find_source(ctx: &TcContext) -> u32;
    /// [`crate::flow::reply_tuple_is_taken`] as a global function.
    fn reply_tuple_is_taken() -> u32;
    /// [`crate::refuse::refuse`] as a global function.
    fn refuse(ctx: &TcContext, sender: u32, reason: u32) -> u32;
    /// [`crate::fragment::resolve`] as a global function.
    fn resolve_ports(ctx: &TcContext) -> u32;
    /// [`crate::fragment::send_away`] as a global function.
    fn put_together(ctx: &TcContext, hook: u32, endpoint: u32) -> u32;
    /// [`crate::flow::claim_reply_tuple`] as a global function.
    fn claim_reply_tuple() -> u32;
    /// [`crate::ring::examine_place`] as a global function.
    fn examine_place(place: u32) -> u32;
    /// [`crate::nat_port::claim`] as a global function.
    fn claim_nat_port(hook: u32) -> u32;
    /// [`crate::nat_port::examine_tenant`] as a global function.
    fn examine_tenant() -> u32;
    /// [`crate::flow::enter`] as a global function.
    fn commit(ctx: &TcContext, hook: u32, sender: u32) -> u32;
}
