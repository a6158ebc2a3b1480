//! The writer of `DEVICE_ADDRESSES`: the addresses that pods' traffic to the outside gets at each device of
//! the node. What would leave by a device without a row is dropped, so a device that programs are to be
//! attached to has none until they are, and one that they are not attached to gets its row at once.

use std::collections::{BTreeMap, BTreeSet};

use aya::maps::{HashMap as BpfHashMap, MapData};
use weir_common::{
    Ipv4, Ipv6,
    config::{DeviceAddresses, device_flag},
    limits::DEVICES_MAX,
};

use super::{TableError, io_error, is_full};
use crate::node::devices::SourceAddresses;

const MAP: &str = "DEVICE_ADDRESSES";

/// See the module.
pub struct DeviceTable {
    map: BpfHashMap<MapData, u32, DeviceAddresses>,
    /// Rows as they stand in the kernel, by interface index.
    rows: BTreeMap<u32, DeviceAddresses>,
}

impl DeviceTable {
    /// Reads the rows.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn open(map: BpfHashMap<MapData, u32, DeviceAddresses>) -> Result<Self, TableError> {
        let rows = map
            .iter()
            .collect::<Result<_, _>>()
            .map_err(|error| TableError::kernel(MAP, "all rows", io_error(error)))?;
        Ok(Self { map, rows })
    }

    /// Says what a device sends from. `attached`: the programs are attached to it.
    ///
    /// # Errors
    ///
    /// The map is full, or the kernel's; the row is as before.
    pub fn set(
        &mut self,
        ifindex: u32,
        sources: SourceAddresses,
        attached: bool,
    ) -> Result<(), TableError> {
        let row = DeviceAddresses {
            flags: if attached { device_flag::ATTACHED } else { 0 }
                | if sources.sole_v6 {
                    device_flag::SOLE_V6
                } else {
                    0
                },
            v4: sources.v4.map(Ipv4::from).unwrap_or_default(),
            v6: sources.v6.map(Ipv6::from).unwrap_or_default(),
        };
        if self.rows.get(&ifindex) == Some(&row) {
            return Ok(());
        }
        self.map
            .insert(ifindex, row, 0)
            .map_err(io_error)
            .map_err(|error| {
                if is_full(&error) {
                    TableError::Full {
                        map: MAP,
                        entries: DEVICES_MAX,
                        remedy: "the node has more devices than it can hold; what pods send to the \
                                 outside by those that have no row is dropped",
                    }
                } else {
                    TableError::kernel(MAP, format!("device #{ifindex}"), error)
                }
            })?;
        self.rows.insert(ifindex, row);
        Ok(())
    }

    /// The device is gone, or programs are about to be attached to it; one without a row is no error.
    ///
    /// # Errors
    ///
    /// The kernel's; the row stays.
    pub fn remove(&mut self, ifindex: u32) -> Result<(), TableError> {
        if !self.rows.contains_key(&ifindex) {
            return Ok(());
        }
        match self.map.remove(&ifindex).map_err(io_error) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                Err(TableError::kernel(MAP, format!("device #{ifindex}"), error))
            }
            _ => {
                self.rows.remove(&ifindex);
                Ok(())
            }
        }
    }

    /// Whether the row says that the programs are attached.
    #[must_use]
    pub fn is_attached(&self, ifindex: u32) -> bool {
        self.rows
            .get(&ifindex)
            .is_some_and(|row| row.flags & device_flag::ATTACHED != 0)
    }

    /// Devices with a row, those of an earlier agent included.
    #[must_use]
    pub fn devices(&self) -> BTreeSet<u32> {
        self.rows.keys().copied().collect()
    }

    /// Rows in use and rows there are.
    #[must_use]
    pub fn fill(&self) -> (u32, u32) {
        (self.rows.len() as u32, DEVICES_MAX)
    }
}
