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
}

/// Rows of `LOOKUPS`.
pub const COUNT: u32 = 7;

/// All kinds, in the order of their numbers.
pub const ALL: [Lookup; COUNT as usize] = [
    Lookup::Flow,
    Lookup::Ipcache,
    Lookup::Frontend,
    Lookup::Fragment,
    Lookup::EndpointByIfindex,
    Lookup::FlowUpdate,
    Lookup::Affinity,
];
