//! How full the tables are.

use super::Datapath;

/// How full a map is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MapFill {
    /// Its name.
    pub map: &'static str,
    /// Entries in use; for flows, at the last complete sweep.
    pub entries: u32,
    /// Entries there can be.
    pub max: u32,
}

impl Datapath {
    /// How full every table is that can be full.
    #[must_use]
    pub fn fill(&self) -> Vec<MapFill> {
        let (endpoints, endpoints_max) = self.endpoints.fill();
        let (hops, hops_max) = self.next_hops.fill();
        let (ipcache_v4, ipcache_v6, ipcache_max) = self.ipcache.fill();
        let (flows_v4, flows_v6, flows_max) = self.flows.fill();
        let (devices, devices_max) = self.devices.fill();
        let services = self.services.fill();
        [
            ("ENDPOINTS", endpoints, endpoints_max),
            ("NEXT_HOPS", hops, hops_max),
            ("DEVICE_ADDRESSES", devices, devices_max),
            ("IPCACHE_V4", ipcache_v4, ipcache_max),
            ("IPCACHE_V6", ipcache_v6, ipcache_max),
            ("FLOWS_V4", flows_v4, flows_max),
            ("FLOWS_V6", flows_v6, flows_max),
            (
                "FRONTENDS_V4",
                services.frontends_v4.0,
                services.frontends_v4.1,
            ),
            (
                "FRONTENDS_V6",
                services.frontends_v6.0,
                services.frontends_v6.1,
            ),
            (
                "SOURCE_RANGES_V4",
                services.source_ranges_v4.0,
                services.source_ranges_v4.1,
            ),
            (
                "SOURCE_RANGES_V6",
                services.source_ranges_v6.0,
                services.source_ranges_v6.1,
            ),
            ("SERVICE_STATE", services.services.0, services.services.1),
            ("BACKENDS", services.backends.0, services.backends.1),
            ("SLOTS", services.slot_chunks.0, services.slot_chunks.1),
            ("AFFINITY", services.affinity.0, services.affinity.1),
        ]
        .into_iter()
        .map(|(map, entries, max)| MapFill { map, entries, max })
        .collect()
    }
}
