//! Changes of the configuration: they concern its row and the ipcache.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::{ConfigTable, Ipcache, NodeConfig, TableError, tables};

/// Changes the configuration: its row, and what the ipcache says of pod ranges.
pub struct Configure<'a> {
    pub(super) config: &'a mut ConfigTable,
    pub(super) ipcache: &'a mut Ipcache,
}

impl Configure<'_> {
    /// See [`ConfigTable::apply`]. All of a pod range that is larger than what has rows in
    /// `LOCAL_ADDRESSES_*` counts as this node's; what the setting `non-masquerade-cidrs` covers is marked.
    ///
    /// # Errors
    ///
    /// As there, or the ipcache is full.
    pub fn apply(&mut self, config: &NodeConfig) -> Result<(), TableError> {
        self.ipcache
            .set_non_masquerade(&config.non_masquerade_cidrs)?;
        let large: BTreeSet<IpNet> = tables::config::large_ranges(config).collect();
        self.ipcache.add_large_ranges(&large)?;
        self.config.apply(config)?;
        self.ipcache.keep_large_ranges(&large)
    }

    /// See [`ConfigTable::set_new_flow_events`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn set_new_flow_events(&mut self, on: bool) -> Result<(), TableError> {
        self.config.set_new_flow_events(on)
    }
}
