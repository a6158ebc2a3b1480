//! The writer of `IPCACHE_V4` and `IPCACHE_V6`. A prefix can be wanted for two causes at once: by
//! the node manager (pods and nodes) and because it is an address of Services. The Services decide
//! what is written: kube-proxy's ipvs mode and node-local DNS caches put their addresses on a device
//! of the node. Pod ranges of this node of which only the first addresses have rows in
//! `LOCAL_ADDRESSES_*` stand here for the rest, so that nothing from outside may claim to be there.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use aya::maps::{LpmTrie, MapData, lpm_trie::Key};
use ipnet::IpNet;
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    ipcache::{IpcacheEntry, class},
    next_hop,
};

use super::{TableError, io_error, is_full};

const MAP_V4: &str = "IPCACHE_V4";
const MAP_V6: &str = "IPCACHE_V6";

/// See the module.
#[derive(Debug)]
pub struct Ipcache {
    v4: LpmTrie<MapData, Ipv4, IpcacheEntry>,
    v6: LpmTrie<MapData, Ipv6, IpcacheEntry>,
    entries: u32,
    rows: HashMap<IpNet, Row>,
}

/// What is known of one prefix.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    /// As the node manager wants it.
    explicit: Option<IpcacheEntry>,
    /// Frontends of Services at this address.
    frontends: u32,
    /// A pod range of this node of which only a part has rows.
    large_range: bool,
    /// As it stands in the kernel.
    written: Option<IpcacheEntry>,
}

impl Row {
    fn wanted(&self) -> Option<IpcacheEntry> {
        let service = (self.frontends > 0).then_some(IpcacheEntry {
            class: class::SERVICE,
            flags: weir_common::ipcache::flag::FRONTENDS | weir_common::ipcache::flag::REFUSE,
            ..IpcacheEntry::default()
        });
        let this_node = self.large_range.then_some(IpcacheEntry {
            class: class::THIS_NODE,
            next_hop: next_hop::HOST,
            ..IpcacheEntry::default()
        });
        service.or(self.explicit).or(this_node)
    }
}

impl Ipcache {
    /// Reads what the maps hold.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn open(
        v4: LpmTrie<MapData, Ipv4, IpcacheEntry>,
        v6: LpmTrie<MapData, Ipv6, IpcacheEntry>,
        entries: u32,
    ) -> Result<Self, TableError> {
        let mut rows = HashMap::new();
        read(&v4, MAP_V4, &mut rows)?;
        read(&v6, MAP_V6, &mut rows)?;
        Ok(Self {
            v4,
            v6,
            entries,
            rows,
        })
    }

    /// Says what a prefix is, unless a Service has this address.
    ///
    /// # Errors
    ///
    /// The map is full, or the kernel's.
    pub fn set(&mut self, prefix: IpNet, entry: IpcacheEntry) -> Result<(), TableError> {
        self.change(prefix, |row| row.explicit = Some(entry))
    }

    /// Takes back what [`Self::set`] said.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn remove(&mut self, prefix: IpNet) -> Result<(), TableError> {
        self.change(prefix, |row| row.explicit = None)
    }

    /// These are pod ranges of this node that are larger than their part of `LOCAL_ADDRESSES_*`.
    pub(crate) fn add_large_ranges(&mut self, ranges: &BTreeSet<IpNet>) -> Result<(), TableError> {
        for range in ranges {
            self.change(*range, |row| row.large_range = true)?;
        }
        Ok(())
    }

    /// Others are not.
    pub(crate) fn keep_large_ranges(&mut self, keep: &BTreeSet<IpNet>) -> Result<(), TableError> {
        let rows = self.rows.iter().filter(|(_, row)| row.large_range);
        let gone: Vec<IpNet> = rows
            .map(|(range, _)| *range)
            .filter(|range| !keep.contains(range))
            .collect();
        for range in gone {
            self.change(range, |row| row.large_range = false)
                .inspect_err(|_| {
                    if let Some(row) = self.rows.get_mut(&range) {
                        row.large_range = true;
                    }
                })?;
        }
        Ok(())
    }

    /// One more frontend of a Service has this address.
    pub(super) fn add_frontend(&mut self, address: IpAddr) -> Result<(), TableError> {
        let prefix = IpNet::from(address);
        self.change(prefix, |row| row.frontends += 1)
            .inspect_err(|_| {
                if let Some(row) = self.rows.get_mut(&prefix) {
                    row.frontends -= 1;
                }
            })
    }

    /// One frontend of a Service at this address is gone. When this fails the frontend still
    /// counts, so that the call can be repeated whatever others do meanwhile.
    pub(super) fn remove_frontend(&mut self, address: IpAddr) -> Result<(), TableError> {
        let prefix = IpNet::from(address);
        let before = self.rows.get(&prefix).map_or(0, |row| row.frontends);
        self.change(prefix, |row| row.frontends = before.saturating_sub(1))
            .inspect_err(|_| {
                if let Some(row) = self.rows.get_mut(&prefix) {
                    row.frontends = before;
                }
            })
    }

    /// Takes [`Self::add_frontend`] back before anything leads to the address. An entry that the
    /// kernel does not give up is taken up by the next attempt, or falls to [`Self::prune`].
    pub(super) fn undo_add_frontend(&mut self, address: IpAddr) {
        let result = self.change(IpNet::from(address), |row| {
            row.frontends = row.frontends.saturating_sub(1);
        });
        if let Err(error) = result {
            tracing::debug!(%error, "an ipcache entry stays without a frontend for now");
        }
    }

    /// Removes every entry that was found at start and that nobody has asked for since. Only once
    /// the source is synced. Gives the number removed.
    ///
    /// # Errors
    ///
    /// The first of the kernel's, after all have been tried.
    pub fn prune(&mut self) -> Result<usize, TableError> {
        let stale: Vec<IpNet> = self
            .rows
            .iter()
            .filter(|(_, row)| row.wanted().is_none())
            .map(|(prefix, _)| *prefix)
            .collect();
        let mut failed = None;
        let mut removed = 0;
        for prefix in stale {
            match self.change(prefix, |_| ()) {
                Ok(()) => removed += 1,
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(removed), Err)
    }

    /// The next hop that the entry of `prefix` names in the kernel, also one found at start.
    #[must_use]
    pub fn next_hop(&self, prefix: IpNet) -> Option<u32> {
        let entry = self.rows.get(&prefix)?.written?;
        (entry.next_hop >= next_hop::FIRST_ROW).then_some(entry.next_hop)
    }

    /// Every entry in the kernel.
    #[must_use]
    pub fn entries(&self) -> BTreeMap<IpNet, IpcacheEntry> {
        self.rows
            .iter()
            .filter_map(|(prefix, row)| Some((*prefix, row.written?)))
            .collect()
    }

    /// Entries of IPv4 and of IPv6, and the size of either map.
    #[must_use]
    pub fn fill(&self) -> (u32, u32, u32) {
        let written = self.rows.iter().filter(|(_, row)| row.written.is_some());
        let (v4, all) = written.fold((0, 0), |(v4, all), (prefix, _)| {
            (v4 + u32::from(prefix.addr().is_ipv4()), all + 1)
        });
        (v4, all - v4, self.entries)
    }

    fn change(&mut self, prefix: IpNet, edit: impl FnOnce(&mut Row)) -> Result<(), TableError> {
        let prefix = prefix.trunc();
        let row = self.rows.entry(prefix).or_default();
        edit(row);
        let wanted = row.wanted();
        if wanted != row.written {
            match wanted {
                Some(entry) => {
                    let map = match prefix {
                        IpNet::V4(net) => {
                            let key = Key::new(u32::from(net.prefix_len()), net.addr().into());
                            (MAP_V4, self.v4.insert(&key, entry, 0))
                        }
                        IpNet::V6(net) => {
                            let key = Key::new(u32::from(net.prefix_len()), net.addr().into());
                            (MAP_V6, self.v6.insert(&key, entry, 0))
                        }
                    };
                    written(map, prefix, self.entries)?;
                }
                None => match prefix {
                    IpNet::V4(net) => {
                        let key = Key::new(u32::from(net.prefix_len()), net.addr().into());
                        removed(MAP_V4, prefix, self.v4.remove(&key))?;
                    }
                    IpNet::V6(net) => {
                        let key = Key::new(u32::from(net.prefix_len()), net.addr().into());
                        removed(MAP_V6, prefix, self.v6.remove(&key))?;
                    }
                },
            }
            row.written = wanted;
        }
        if wanted.is_none() {
            self.rows.remove(&prefix);
        }
        Ok(())
    }
}

fn written(
    (map, result): (&'static str, Result<(), aya::maps::MapError>),
    prefix: IpNet,
    entries: u32,
) -> Result<(), TableError> {
    result.map_err(io_error).map_err(|error| {
        if is_full(&error) {
            TableError::Full {
                map,
                entries,
                remedy: "the cluster has more prefixes and Service addresses than it can hold",
            }
        } else {
            TableError::kernel(map, prefix, error)
        }
    })
}

fn removed(
    map: &'static str,
    prefix: IpNet,
    result: Result<(), aya::maps::MapError>,
) -> Result<(), TableError> {
    match result.map_err(io_error) {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
            Err(TableError::kernel(map, prefix, error))
        }
        _ => Ok(()),
    }
}

fn read<A: Address + aya::Pod>(
    map: &LpmTrie<MapData, A, IpcacheEntry>,
    name: &'static str,
    rows: &mut HashMap<IpNet, Row>,
) -> Result<(), TableError> {
    for item in map.iter() {
        let (key, entry) =
            item.map_err(|error| TableError::kernel(name, "all entries", io_error(error)))?;
        let address = { key.data() }.to_ip();
        let Ok(prefix) = IpNet::new(address, u8::try_from(key.prefix_len()).unwrap_or(u8::MAX))
        else {
            continue;
        };
        rows.insert(
            prefix,
            Row {
                written: Some(entry),
                ..Row::default()
            },
        );
    }
    Ok(())
}
