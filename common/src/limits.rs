//! Sizes of tables that both sides must agree on. Sizes that can be set when the programs are
//! loaded (flows, backends, frontends …) are defaults here.

/// Numbers of endpoints on one node: 1 to `ENDPOINTS_MAX - 1`; 0 means none. The kubelet's usual
/// limit is 110 pods, large nodes run 500.
pub const ENDPOINTS_MAX: u32 = 4096;
/// Rows of `ENDPOINT_FLOWS`: one for each endpoint, row 0 for the node, and row
/// [`crate::next_hop::HOST`] for what the node itself answers to clients outside.
pub const ENDPOINT_FLOWS_ROWS: u32 = ENDPOINTS_MAX + 1;

/// Rows of `REFUSALS` for 'too big' to the outside, by a hash of whom it is for: a client that is flooded, or floods, costs
/// few others the way to learn of a smaller MTU.
pub const REFUSALS_TOO_BIG: u32 = 64;

/// Rows of `REFUSALS`: as `ENDPOINT_FLOWS`, one for other ICMP errors to the outside, and [`REFUSALS_TOO_BIG`].
pub const REFUSALS_ROWS: u32 = ENDPOINT_FLOWS_ROWS + 1 + REFUSALS_TOO_BIG;

/// Rows of `NAT_SEARCH` for destinations; a power of two.
pub const NAT_SEARCH_ROWS: u32 = 256;

/// Rows of `LOCAL_ADDRESSES_V4` and `_V6`: addresses that pods of this node may have, over all
/// pod ranges of the family (see [`crate::config::PodRange`]).
pub const LOCAL_ADDRESSES_MAX: u32 = 65_536;

/// Pod ranges of one family on one node. More than one happens while pods of an older range live.
pub const POD_RANGES_MAX: usize = 4;

/// Rows of `NEXT_HOPS`. See [`crate::next_hop`] for the numbering.
pub const NEXT_HOPS_MAX: u32 = 8192;

/// Default number of Service ports, each of one family: half the rows of `SERVICE_STATE`.
pub const SERVICE_PORTS_DEFAULT: u32 = 65_536;

/// Default entries of `FRONTENDS_V4` and `_V6` (allocated as they are used).
pub const FRONTENDS_DEFAULT: u32 = 262_144;

/// Default rows of `BACKENDS`.
pub const BACKENDS_DEFAULT: u32 = 131_072;

/// Slots in one chunk (inner map) of `SLOTS`; a power of two. A region never spans two chunks.
pub const SLOTS_PER_CHUNK: u32 = 65_536;

/// Slots that stand in one element of a chunk: elements of a memory-mapped array are rounded up
/// to eight bytes, so two packed numbers share one.
pub const SLOTS_PER_ELEMENT: u32 = 2;

/// Chunks of `SLOTS`, made on demand: 4096 chunks hold 268 million slots.
pub const SLOT_CHUNKS_MAX: u32 = 4096;

/// Default number of connections of one family; a connection has two entries in `FLOWS_*` and
/// one place in `FLOW_RING_*`.
pub const CONNECTIONS_DEFAULT: u32 = 131_072;

/// Entries of `FLOWS_*` beyond two for each connection. A connection claims its reply tuple before the one whose
/// place it takes goes, on several processors at once.
pub const FLOWS_SPARE: u32 = 1024;

/// Entries of `FLOWS_V4` and `_V6` for so many connections.
#[must_use]
pub const fn flows(connections: u32) -> u32 {
    connections.saturating_mul(2).saturating_add(FLOWS_SPARE)
}

/// Places of the flow ring looked at for each new connection when the table is full.
pub const FLOW_RING_PROBES: u32 = 8;

/// Default entries of `IPCACHE_V4` and `_V6` (allocated as they are used).
pub const IPCACHE_DEFAULT: u32 = 131_072;

/// Entries of `FRAGMENTS_V4` and `_V6` (LRU): datagrams whose fragments are under way at once.
pub const FRAGMENTS_DEFAULT: u32 = 4096;

/// Default entries of `AFFINITY` (LRU): clients of Services with session affinity, remembered at
/// once.
pub const AFFINITY_DEFAULT: u32 = 65_536;

/// Bytes of the event ring buffer; a power of two and a multiple of the page size.
pub const EVENTS_BYTES: u32 = 512 * 1024;

/// Default entries of `SOURCE_RANGES_V4` and `_V6` (allocated as they are used).
pub const SOURCE_RANGES_DEFAULT: u32 = 65_536;
/// Entries of `DEVICE_ADDRESSES`: devices of the node that programs are attached to.
pub const DEVICES_MAX: u32 = 1024;
/// Source ports tried when the reply tuple of a new connection is taken by another connection.
pub const NAT_PORT_PROBES: u32 = 8;
