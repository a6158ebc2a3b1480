//! Kinds of table lookups, counted by the programs when the switch `COUNT_LOOKUPS` is on. The
//! tests assert the promise of one hash lookup per packet with them.

/// Index into the per-CPU array `LOOKUPS` (u64 each).
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lookup {
    /// `FLOWS_*`.
    Flow = 0,
    /// `IPCACHE_*`.
    Ipcache = 1,
    /// `FRONTENDS_*`.
    Frontend = 2,
    /// `FRAGMENTS_*`.
    Fragment = 3,
    /// `ENDPOINT_BY_IFINDEX`.
    EndpointByIfindex = 4,
    /// Updates of `FLOWS_*`: insertions and removals.
    FlowUpdate = 5,
    /// `AFFINITY`, updates too.
    Affinity = 6,
    /// `SOURCE_RANGES_*`.
    SourceRange = 7,
    /// The node's routes (`bpf_fib_lookup`).
    Route = 8,
    /// `DEVICE_ADDRESSES`.
    DeviceAddress = 9,
}

/// Rows of `LOOKUPS`.
pub const COUNT: u32 = 10;

/// All kinds, in the order of their numbers.
pub const ALL: [Lookup; COUNT as usize] = [
    Lookup::Flow,
    Lookup::Ipcache,
    Lookup::Frontend,
    Lookup::Fragment,
    Lookup::EndpointByIfindex,
    Lookup::FlowUpdate,
    Lookup::Affinity,
    Lookup::SourceRange,
    Lookup::Route,
    Lookup::DeviceAddress,
];
