//! The writer of `SOURCE_RANGES_*`: the clients that may use the load balancer addresses of a Service port.
//! They count only for frontends with the bit that says so, which is set after them and goes before them. A
//! number has no ranges when it is given to a port.

use std::collections::{BTreeMap, BTreeSet};

use aya::maps::{LpmTrie, MapData, lpm_trie::Key};
use ipnet::IpNet;
use weir_common::{Ipv4, Ipv6, address::Address, service::SourceRangeKey};

use super::super::{TableError, io_error, is_full};

const MAP_V4: &str = "SOURCE_RANGES_V4";
const MAP_V6: &str = "SOURCE_RANGES_V6";
/// Bits of a key before the address: the number of the Service port.
const NUMBER_BITS: u32 = 32;

/// See the module.
#[derive(Debug)]
pub struct SourceRangeTable {
    v4: LpmTrie<MapData, SourceRangeKey<Ipv4>, u32>,
    v6: LpmTrie<MapData, SourceRangeKey<Ipv6>, u32>,
    max: u32,
    /// As they stand in the kernel, by number.
    rows: BTreeMap<u32, BTreeSet<IpNet>>,
}

impl SourceRangeTable {
    /// Reads what the maps hold; `max` is the size of either.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn open(
        v4: LpmTrie<MapData, SourceRangeKey<Ipv4>, u32>,
        v6: LpmTrie<MapData, SourceRangeKey<Ipv6>, u32>,
        max: u32,
    ) -> Result<Self, TableError> {
        let mut rows = BTreeMap::new();
        read(&v4, MAP_V4, &mut rows)?;
        read(&v6, MAP_V6, &mut rows)?;
        Ok(Self { v4, v6, max, rows })
    }

    /// Enters what is missing of `ranges` for a Service port, as much as there is room for.
    ///
    /// # Errors
    ///
    /// The first: the map is full, or the kernel's. The call can be repeated.
    pub fn add(&mut self, number: u32, ranges: &BTreeSet<IpNet>) -> Result<(), TableError> {
        let known = self.rows.get(&number);
        let missing: Vec<IpNet> = ranges
            .iter()
            .filter(|range| known.is_none_or(|known| !known.contains(*range)))
            .copied()
            .collect();
        let mut failed = None;
        for range in missing {
            match self.insert(number, range) {
                Ok(()) => {
                    self.rows.entry(number).or_default().insert(range);
                }
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Removes all ranges of a Service port but those in `keep`.
    ///
    /// # Errors
    ///
    /// The kernel's; the call can be repeated.
    pub fn retain(&mut self, number: u32, keep: &BTreeSet<IpNet>) -> Result<(), TableError> {
        let unwanted: Vec<IpNet> = self
            .rows
            .get(&number)
            .into_iter()
            .flatten()
            .filter(|range| !keep.contains(*range))
            .copied()
            .collect();
        for range in unwanted {
            self.delete(number, range)?;
            if let Some(known) = self.rows.get_mut(&number) {
                known.remove(&range);
            }
        }
        if self.rows.get(&number).is_some_and(BTreeSet::is_empty) {
            self.rows.remove(&number);
        }
        Ok(())
    }

    /// Numbers with ranges.
    pub fn numbers(&self) -> Vec<u32> {
        self.rows.keys().copied().collect()
    }

    /// Ranges of IPv4 and of IPv6, each with the size of the map.
    pub fn fill(&self) -> [(u32, u32); 2] {
        let count = |is_v4| {
            let ranges = self.rows.values().flatten();
            ranges
                .filter(|range| range.addr().is_ipv4() == is_v4)
                .count() as u32
        };
        [(count(true), self.max), (count(false), self.max)]
    }

    fn insert(&mut self, number: u32, range: IpNet) -> Result<(), TableError> {
        let (map, result) = match range {
            IpNet::V4(net) => {
                let key = key(number, Ipv4::from(net.network()), net.prefix_len());
                (MAP_V4, self.v4.insert(&key, 0, 0))
            }
            IpNet::V6(net) => {
                let key = key(number, Ipv6::from(net.network()), net.prefix_len());
                (MAP_V6, self.v6.insert(&key, 0, 0))
            }
        };
        result.map_err(io_error).map_err(|error| {
            if is_full(&error) {
                TableError::Full {
                    map,
                    entries: self.max,
                    remedy: "clients in loadBalancerSourceRanges that found no room are not served: use \
                             fewer and wider ranges; each counts once for every port of its Service",
                }
            } else {
                TableError::kernel(map, range, error)
            }
        })
    }

    fn delete(&mut self, number: u32, range: IpNet) -> Result<(), TableError> {
        let (map, result) = match range {
            IpNet::V4(net) => {
                let key = key(number, Ipv4::from(net.network()), net.prefix_len());
                (MAP_V4, self.v4.remove(&key))
            }
            IpNet::V6(net) => {
                let key = key(number, Ipv6::from(net.network()), net.prefix_len());
                (MAP_V6, self.v6.remove(&key))
            }
        };
        match result.map_err(io_error) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                Err(TableError::kernel(map, range, error))
            }
            _ => Ok(()),
        }
    }
}

fn key<A: Address>(number: u32, address: A, length: u8) -> Key<SourceRangeKey<A>>
where
    SourceRangeKey<A>: aya::Pod,
{
    let data = SourceRangeKey {
        service_port: number.to_be_bytes(),
        address,
    };
    Key::new(NUMBER_BITS + u32::from(length), data)
}

fn read<A: Address>(
    map: &LpmTrie<MapData, SourceRangeKey<A>, u32>,
    name: &'static str,
    rows: &mut BTreeMap<u32, BTreeSet<IpNet>>,
) -> Result<(), TableError>
where
    SourceRangeKey<A>: aya::Pod,
{
    for item in map.iter() {
        let (key, _) =
            item.map_err(|error| TableError::kernel(name, "all entries", io_error(error)))?;
        let data = key.data();
        let length = key.prefix_len().saturating_sub(NUMBER_BITS);
        let length = u8::try_from(length).unwrap_or(u8::MAX);
        let Ok(range) = IpNet::new(data.address.to_ip(), length) else {
            continue;
        };
        rows.entry(u32::from_be_bytes(data.service_port))
            .or_default()
            .insert(range);
    }
    Ok(())
}
