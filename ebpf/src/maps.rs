//! Every map, and the counters of their lookups. Layouts are in `weir-common`; sizes given here
//! are the defaults that the agent overrides when it loads the object.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, ArrayOfMaps, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SkStorage},
    macros::btf_map,
};
use weir_common::{
    Ipv4, Ipv6,
    affinity::{Affinity, AffinityKey},
    config::{Config, DeviceAddresses},
    endpoint::Endpoint,
    event::Event,
    flow::{FlowEntry, FlowKey},
    ipcache::IpcacheEntry,
    limits,
    lookup::{self, Lookup},
    metrics::{self, Counter, FlowRingState, FragmentKey, FragmentPorts},
    next_hop::NextHop,
    service::{
        Backend, ELEMENTS_PER_CHUNK, FrontendKey, ServiceState, SourceRangeKey, endpoint_set,
    },
    socket::SocketFrontends,
};

use crate::switches;

const FLOWS: usize = limits::flows(limits::CONNECTIONS_DEFAULT) as usize;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

/// Entries of one family, two for each connection.
pub type Flows<A> = HashMap<FlowKey<A>, FlowEntry<A>, FLOWS>;
/// Keys of the forward entries of one family, in the order the connections began.
pub type FlowRing<A> = Array<FlowKey<A>, { limits::CONNECTIONS_DEFAULT as usize }>;
/// Ports of datagrams whose fragments are under way.
pub type Fragments<A> =
    LruHashMap<FragmentKey<A>, FragmentPorts, { limits::FRAGMENTS_DEFAULT as usize }>;
/// Address and port of a Service → row of `SERVICE_STATE`.
pub type Frontends<A> =
    HashMap<FrontendKey<A>, u32, { limits::FRONTENDS_DEFAULT as usize }, ON_DEMAND>;
/// Clients that a Service port serves at its load balancer addresses, by longest prefix.
pub type SourceRanges<A> =
    LpmTrie<SourceRangeKey<A>, u32, { limits::SOURCE_RANGES_DEFAULT as usize }>;
/// What an address is, by longest prefix.
pub type Ipcache<A> = LpmTrie<A, IpcacheEntry, { limits::IPCACHE_DEFAULT as usize }>;
/// Address of a local pod, as offset in the pod ranges → endpoint number.
pub type LocalAddresses = Array<u32, { limits::LOCAL_ADDRESSES_MAX as usize }>;
/// One chunk of slots.
pub type SlotChunk = Array<u64, { ELEMENTS_PER_CHUNK as usize }, MMAPABLE>;

#[btf_map]
pub static CONFIG: Array<Config, 1> = Array::new();

#[btf_map]
pub static ENDPOINTS: Array<Endpoint, { limits::ENDPOINTS_MAX as usize }> = Array::new();
/// 1 once the endpoint has an entry in the flow table. Set here, cleared by the agent when the
/// number is given to another pod.
#[btf_map]
pub static ENDPOINT_FLOWS: Array<u32, { limits::ENDPOINT_FLOWS_ROWS as usize }> = Array::new();
#[btf_map]
pub static ENDPOINT_BY_IFINDEX: HashMap<u32, u32, { limits::ENDPOINTS_MAX as usize }> =
    HashMap::new();
/// Cookie of a pod's network namespace → endpoint number: all that a socket tells of its pod.
#[btf_map]
pub static ENDPOINT_BY_COOKIE: HashMap<u64, u32, { limits::ENDPOINTS_MAX as usize }> =
    HashMap::new();
#[btf_map]
pub static LOCAL_ADDRESSES_V4: LocalAddresses = Array::new();
#[btf_map]
pub static LOCAL_ADDRESSES_V6: LocalAddresses = Array::new();

#[btf_map]
pub static NEXT_HOPS: Array<NextHop, { limits::NEXT_HOPS_MAX as usize }> = Array::new();
#[btf_map]
pub static IPCACHE_V4: Ipcache<Ipv4> = LpmTrie::new();
#[btf_map]
pub static IPCACHE_V6: Ipcache<Ipv6> = LpmTrie::new();

/// Interface index of a device of the node → the addresses that it sends from.
#[btf_map]
pub static DEVICE_ADDRESSES: HashMap<u32, DeviceAddresses, { limits::DEVICES_MAX as usize }> =
    HashMap::new();

#[btf_map]
pub static FLOWS_V4: Flows<Ipv4> = HashMap::new();
#[btf_map]
pub static FLOWS_V6: Flows<Ipv6> = HashMap::new();
#[btf_map]
pub static FLOW_RING_V4: FlowRing<Ipv4> = Array::new();
#[btf_map]
pub static FLOW_RING_V6: FlowRing<Ipv6> = Array::new();
#[btf_map]
pub static FLOW_RING_STATE: Array<FlowRingState, 2> = Array::new();
#[btf_map]
pub static FRAGMENTS_V4: Fragments<Ipv4> = LruHashMap::new();
#[btf_map]
pub static FRAGMENTS_V6: Fragments<Ipv6> = LruHashMap::new();

#[btf_map]
pub static FRONTENDS_V4: Frontends<Ipv4> = HashMap::new();
#[btf_map]
pub static FRONTENDS_V6: Frontends<Ipv6> = HashMap::new();
#[btf_map]
pub static SOURCE_RANGES_V4: SourceRanges<Ipv4> = LpmTrie::new();
#[btf_map]
pub static SOURCE_RANGES_V6: SourceRanges<Ipv6> = LpmTrie::new();
#[btf_map]
pub static SERVICE_STATE: Array<
    ServiceState,
    { (limits::SERVICE_PORTS_DEFAULT * endpoint_set::COUNT) as usize },
    MMAPABLE,
> = Array::new();
#[btf_map]
pub static SLOTS: ArrayOfMaps<SlotChunk, { limits::SLOT_CHUNKS_MAX as usize }> = ArrayOfMaps::new();
#[btf_map]
pub static BACKENDS: Array<Backend, { limits::BACKENDS_DEFAULT as usize }, MMAPABLE> = Array::new();

/// The endpoint that a client of a Service port has been given.
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, { limits::AFFINITY_DEFAULT as usize }> =
    LruHashMap::new();
/// How long that counts, in seconds, by number of the Service port.
#[btf_map]
pub static AFFINITY_TIMEOUTS: Array<u32, { limits::SERVICE_PORTS_DEFAULT as usize }, MMAPABLE> =
    Array::new();

/// When the next refusal is due (nanoseconds of `CLOCK_MONOTONIC`), by number of the endpoint that is
/// refused; 0 is the node, [`weir_common::next_hop::HOST`] stands for all clients outside. The last row is for
/// ICMP errors to the outside, so that refusals do not keep those of path-MTU discovery away.
#[btf_map]
pub static REFUSALS: Array<u64, { limits::REFUSALS_ROWS as usize }> = Array::new();

/// When the whole NAT range may be searched again (nanoseconds of `CLOCK_MONOTONIC`): row 0 at all, the others for
/// destinations by their hash.
#[btf_map]
pub static NAT_SEARCH: Array<u64, { 1 + limits::NAT_SEARCH_ROWS as usize }> = Array::new();

/// Interface index of the device behind which the kernel puts datagrams together, 0 if there is none.
#[btf_map]
pub static DEFRAG: Array<u32, 1> = Array::new();

/// What sockets remember of their translation.
#[btf_map]
pub static SOCKET_FRONTENDS: SkStorage<SocketFrontends> = SkStorage::new();

#[btf_map]
pub static METRICS: PerCpuArray<Counter, { metrics::ROWS as usize }> = PerCpuArray::new();
#[btf_map]
pub static LOOKUPS: PerCpuArray<u64, { lookup::COUNT as usize }> = PerCpuArray::new();
#[btf_map]
pub static EVENTS: RingBuf<Event, { limits::EVENTS_BYTES as usize }> = RingBuf::new();

/// Room for the packet that is being handled, see [`crate::scratch::packet`]. Not pinned, never
/// read by the agent.
#[repr(C, align(8))]
pub struct PacketRoom(pub [u64; 16]);
#[btf_map]
pub static PACKET: PerCpuArray<PacketRoom, 1> = PerCpuArray::new();

/// Room for a question to the node's routes, see [`crate::route`]. Not pinned, never read by the agent.
#[repr(C, align(8))]
pub struct RouteRoom(pub [u64; 8]);
#[btf_map]
pub static ROUTE: PerCpuArray<RouteRoom, 1> = PerCpuArray::new();

/// Room for what is too large for the stack of 512 bytes. Not pinned, never read by the agent.
#[repr(C, align(8))]
pub struct Scratch(pub [u64; 64]);
#[btf_map]
pub static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// Counts a lookup, if that is switched on.
#[inline(always)]
pub fn count_lookup(kind: Lookup) {
    if switches::count_lookups()
        && let Some(count) = LOOKUPS.get_ptr_mut(kind as u32)
    {
        // SAFETY: an element of a per-CPU array, written by this processor only.
        unsafe { *count += 1 };
    }
}
