//! The writer of `IPCACHE_V4` and `IPCACHE_V6`. A prefix can be wanted for two causes at once: by
//! the node manager (pods and nodes) and because it is an address of Services. ClusterIPs decide what
//! is written: kube-proxy's ipvs mode and node-local DNS caches put their addresses on a device of
//! the node. Other frontends are marked by a flag, for they often stand at addresses of nodes. Pod ranges of this node of which only the first addresses have rows in
//! `LOCAL_ADDRESSES_*` stand here for the rest, so that nothing from outside may claim to be there.
//!
//! Ranges to which pods keep their address have entries too, and their flag stands on every entry in them.
//! A range that lies within another entry has none of its own: that entry says what the address is, and what is
//! known there is never masqueraded.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use aya::maps::{LpmTrie, MapData, lpm_trie::Key};
use ipnet::IpNet;
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    ipcache::{IpcacheEntry, class, flag},
    next_hop,
};

use super::{TableError, io_error, is_full};
use crate::model::FrontendKind;

const MAP_V4: &str = "IPCACHE_V4";
const MAP_V6: &str = "IPCACHE_V6";

/// See the module.
#[derive(Debug)]
pub struct Ipcache {
    v4: LpmTrie<MapData, Ipv4, IpcacheEntry>,
    v6: LpmTrie<MapData, Ipv6, IpcacheEntry>,
    entries: u32,
    rows: HashMap<IpNet, Row>,
    /// Addresses that have become Services' own, or are no longer, since the last
    /// [`Self::take_service_addresses`].
    service_addresses: BTreeSet<IpAddr>,
    /// See [`Self::refuse_later`].
    refuses_later: bool,
    /// Addresses of Services at which nothing is refused yet.
    lenient: BTreeSet<IpAddr>,
    /// Ranges to which pods keep their address.
    non_masquerade: BTreeSet<IpNet>,
}

/// Whether an entry is that of an address that Services serve and no node has.
fn is_service(entry: Option<IpcacheEntry>) -> bool {
    entry.is_some_and(|entry| entry.class == class::SERVICE && entry.flags & flag::FRONTENDS != 0)
}

/// What is known of one prefix.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    /// As the node manager wants it.
    explicit: Option<IpcacheEntry>,
    /// Frontends at this address.
    frontends: Frontends,
    /// Nothing is refused there yet.
    is_lenient: bool,
    /// A pod range of this node of which only a part has rows.
    large_range: bool,
    /// Found at start: what an earlier agent had written, as long as it has frontends and none of
    /// this agent's are known.
    found: Option<IpcacheEntry>,
    /// As it stands in the kernel.
    written: Option<IpcacheEntry>,
}

/// How many frontends there are at an address.
#[derive(Clone, Copy, Debug, Default)]
struct Frontends {
    cluster_ips: u32,
    load_balancers: u32,
    others: u32,
}

impl Frontends {
    fn of(&mut self, kind: FrontendKind) -> &mut u32 {
        match kind {
            FrontendKind::ClusterIp => &mut self.cluster_ips,
            FrontendKind::LoadBalancer => &mut self.load_balancers,
            FrontendKind::NodePort | FrontendKind::ExternalIp | FrontendKind::HostPort => {
                &mut self.others
            }
        }
    }

    fn add(&mut self, kind: FrontendKind) {
        *self.of(kind) += 1;
    }

    fn remove(&mut self, kind: FrontendKind) {
        let count = self.of(kind);
        *count = count.saturating_sub(1);
    }

    const fn is_empty(self) -> bool {
        self.cluster_ips == 0 && self.load_balancers == 0 && self.others == 0
    }

    /// Bits of [`flag`] at an address that is a node's or not.
    const fn flags(self, is_node: bool) -> u8 {
        if self.is_empty() {
            0
        } else if self.cluster_ips > 0 {
            OF_FRONTENDS
        } else if self.load_balancers > 0 && !is_node {
            flag::FRONTENDS | flag::REFUSE
        } else {
            flag::FRONTENDS
        }
    }
}

impl Row {
    /// `place`: how the prefix lies to the ranges to which pods keep their address.
    fn wanted(&self, place: Place) -> Option<IpcacheEntry> {
        let outside = IpcacheEntry {
            class: class::OUTSIDE,
            ..IpcacheEntry::default()
        };
        let known = self.known();
        let entry = known.or((place == Place::Range).then_some(outside))?;
        let flags = match place {
            Place::Apart => entry.flags & !flag::NO_MASQUERADE,
            Place::Covered | Place::Range => entry.flags | flag::NO_MASQUERADE,
        };
        Some(IpcacheEntry { flags, ..entry })
    }

    /// Whether nodes, pods or Services have it, as far as is known, or had it before this agent.
    fn is_anybodys(&self) -> bool {
        let is_written = |entry: IpcacheEntry| entry.class != class::OUTSIDE;
        self.known().is_some() || self.written.is_some_and(is_written)
    }

    /// What it is by nodes, pods and Services.
    fn known(&self) -> Option<IpcacheEntry> {
        let this_node = self.large_range.then_some(IpcacheEntry {
            class: class::THIS_NODE,
            next_hop: next_hop::HOST,
            ..IpcacheEntry::default()
        });
        let explicit = self.explicit.or(this_node);
        let found = self.found.filter(|_| self.frontends.is_empty());
        if let Some(found) = found.filter(|found| found.class == class::SERVICE) {
            return Some(found);
        }
        let service = IpcacheEntry {
            class: class::SERVICE,
            ..IpcacheEntry::default()
        };
        let base = match explicit {
            Some(entry) if self.frontends.cluster_ips == 0 => entry,
            None if self.frontends.is_empty() && found.is_none() => return None,
            None if found.is_some() => return found,
            _ => service,
        };
        let is_node = matches!(base.class, class::THIS_NODE | class::REMOTE_NODE);
        let held = found.map_or(0, |found| found.flags & OF_FRONTENDS);
        let of_frontends = match self.frontends.flags(is_node) {
            flags if self.is_lenient => flags & !flag::REFUSE,
            flags => flags,
        };
        Some(IpcacheEntry {
            flags: base.flags | of_frontends | held,
            ..base
        })
    }
}

/// How a prefix lies to the ranges to which pods keep their address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// In none of them.
    Apart,
    /// In one of them.
    Covered,
    /// One of them itself, and no other entry says what it is part of.
    Range,
}

/// The bits of [`flag`] that follow from frontends.
const OF_FRONTENDS: u8 = flag::FRONTENDS | flag::REFUSE | flag::CLUSTER_IP;

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
            service_addresses: BTreeSet::new(),
            refuses_later: false,
            lenient: BTreeSet::new(),
            non_masquerade: BTreeSet::new(),
        })
    }

    /// From here on nothing is refused at an address that Services come to have, until [`Self::refuse`] is
    /// called: the first of the address's ports does not make the others unknown that are about to come,
    /// and that somebody else may have served until now.
    pub fn refuse_later(&mut self) {
        self.refuses_later = true;
    }

    /// Whether [`Self::refuse`] has something to do.
    #[must_use]
    pub fn is_lenient(&self) -> bool {
        !self.lenient.is_empty()
    }

    /// Every port that Services have at their addresses is known: others are refused from here on.
    ///
    /// # Errors
    ///
    /// The kernel's; the call can be repeated.
    pub fn refuse(&mut self) -> Result<(), TableError> {
        while let Some(&address) = self.lenient.first() {
            let prefix = IpNet::from(address);
            if self.rows.contains_key(&prefix) {
                self.change(prefix, |row| row.is_lenient = false)
                    .inspect_err(|_| {
                        if let Some(row) = self.rows.get_mut(&prefix) {
                            row.is_lenient = true;
                        }
                    })?;
            }
            self.lenient.pop_first();
        }
        Ok(())
    }

    /// Pods keep their address to these ranges, and to no others.
    ///
    /// # Errors
    ///
    /// The map is full, or the kernel's; the call can be repeated.
    pub fn set_non_masquerade(&mut self, ranges: &[IpNet]) -> Result<(), TableError> {
        let wanted: BTreeSet<IpNet> = ranges.iter().map(IpNet::trunc).collect();
        if wanted == self.non_masquerade {
            return Ok(());
        }
        let before = std::mem::replace(&mut self.non_masquerade, wanted.clone());
        let changed: Vec<IpNet> = wanted.symmetric_difference(&before).copied().collect();
        let known = self.rows.iter().filter(|(_, row)| row.known().is_some());
        let known = known.map(|(prefix, _)| *prefix);
        let touched: BTreeSet<IpNet> = known
            .filter(|prefix| changed.iter().any(|range| range.contains(prefix)))
            .chain(changed.iter().copied())
            // What an earlier agent has written is somebody's until all of the source is known.
            .filter(|prefix| {
                let row = self.rows.get(prefix).copied().unwrap_or_default();
                row.known().is_some() || !row.is_anybodys()
            })
            .collect();
        for prefix in touched {
            if let Err(error) = self.write(prefix) {
                self.non_masquerade = before;
                return Err(error);
            }
        }
        Ok(())
    }

    /// How `prefix` lies to these ranges.
    fn place(&self, prefix: IpNet) -> Place {
        let ranges = &self.non_masquerade;
        if ranges.contains(&prefix) && !self.is_within_another(prefix) {
            Place::Range
        } else if ranges.iter().any(|range| range.contains(&prefix)) {
            Place::Covered
        } else {
            Place::Apart
        }
    }

    /// Whether nodes or pods have a shorter prefix that `prefix` is part of.
    fn is_within_another(&self, prefix: IpNet) -> bool {
        let shorter = (0..prefix.prefix_len()).filter_map(|length| {
            let covering = IpNet::new(prefix.addr(), length).ok()?;
            self.rows.get(&covering.trunc())
        });
        shorter.into_iter().any(Row::is_anybodys)
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
    pub(super) fn add_frontend(
        &mut self,
        address: IpAddr,
        kind: FrontendKind,
    ) -> Result<(), TableError> {
        let row = self.rows.get(&IpNet::from(address));
        let refuses = row
            .and_then(|row| row.written)
            .is_some_and(|entry| entry.flags & flag::REFUSE != 0);
        if self.refuses_later && !refuses {
            self.lenient.insert(address);
            self.rows
                .entry(IpNet::from(address))
                .or_default()
                .is_lenient = true;
        }
        self.change_frontends(address, |frontends| frontends.add(kind))
    }

    /// A frontend at this address is of another kind now.
    pub(super) fn change_frontend(
        &mut self,
        address: IpAddr,
        before: FrontendKind,
        after: FrontendKind,
    ) -> Result<(), TableError> {
        self.change_frontends(address, |frontends| {
            frontends.add(after);
            frontends.remove(before);
        })
    }

    /// One frontend of a Service at this address is gone. When this fails the frontend still
    /// counts, so that the call can be repeated whatever others do meanwhile.
    pub(super) fn remove_frontend(
        &mut self,
        address: IpAddr,
        kind: FrontendKind,
    ) -> Result<(), TableError> {
        self.change_frontends(address, |frontends| frontends.remove(kind))
    }

    /// Takes [`Self::add_frontend`] back before anything leads to the address. An entry that the
    /// kernel does not give up is taken up by the next attempt, or falls to [`Self::prune`].
    pub(super) fn undo_add_frontend(&mut self, address: IpAddr, kind: FrontendKind) {
        let result = self.change(IpNet::from(address), |row| row.frontends.remove(kind));
        if let Err(error) = result {
            tracing::debug!(%error, "an ipcache entry stays without a frontend for now");
        }
    }

    /// Takes [`Self::change_frontend`] back.
    pub(super) fn undo_change_frontend(
        &mut self,
        address: IpAddr,
        before: FrontendKind,
        after: FrontendKind,
    ) {
        let result = self.change(IpNet::from(address), |row| {
            row.frontends.add(before);
            row.frontends.remove(after);
        });
        if let Err(error) = result {
            tracing::debug!(%error, "an ipcache entry keeps the flags of another kind for now");
        }
    }

    /// When this fails all counts as before.
    fn change_frontends(
        &mut self,
        address: IpAddr,
        edit: impl FnOnce(&mut Frontends),
    ) -> Result<(), TableError> {
        let prefix = IpNet::from(address);
        let before = self.rows.get(&prefix).copied().unwrap_or_default();
        self.change(prefix, |row| {
            edit(&mut row.frontends);
            row.found = None;
        })
        .inspect_err(|_| {
            if let Some(row) = self.rows.get_mut(&prefix) {
                (row.frontends, row.found) = (before.frontends, before.found);
            }
        })
    }

    /// Removes every entry that was found at start and that nobody has asked for since. Only once
    /// the source is synced. Gives the number removed.
    ///
    /// # Errors
    ///
    /// The first of the kernel's, after all have been tried.
    pub fn prune(&mut self) -> Result<usize, TableError> {
        let forgotten = |row: &Row| Row {
            found: None,
            ..*row
        };
        let stale: Vec<(IpNet, bool)> = self
            .rows
            .iter()
            .map(|(prefix, row)| (prefix, row, self.place(*prefix)))
            .filter(|(_, row, place)| row.found.is_some() || row.wanted(*place) != row.written)
            .map(|(prefix, row, place)| (*prefix, forgotten(row).wanted(place).is_none()))
            .collect();
        let mut failed = None;
        let mut removed = 0;
        for (prefix, is_removed) in stale {
            match self.change(prefix, |row| row.found = None) {
                Ok(()) => removed += usize::from(is_removed),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(removed), Err)
    }

    /// Whether Services serve an address that no node has.
    #[must_use]
    pub fn is_service_address(&self, address: IpAddr) -> bool {
        let row = self.rows.get(&IpNet::from(address));
        is_service(row.and_then(|row| row.written))
    }

    /// All such addresses.
    pub fn service_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let rows = self.rows.iter().filter(|(_, row)| is_service(row.written));
        rows.map(|(prefix, _)| prefix.addr())
    }

    /// The addresses that have become such, or are no longer, since the last call.
    pub fn take_service_addresses(&mut self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut self.service_addresses)
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
        edit(self.rows.entry(prefix).or_default());
        self.write(prefix)?;
        let ranges = self.non_masquerade.iter();
        let within: Vec<IpNet> = ranges
            .filter(|range| **range != prefix && prefix.contains(*range))
            .copied()
            .collect();
        for range in within {
            self.write(range)?;
        }
        Ok(())
    }

    /// Has the kernel have what is wanted of a prefix.
    fn write(&mut self, prefix: IpNet) -> Result<(), TableError> {
        let place = self.place(prefix);
        let row = self.rows.entry(prefix).or_default();
        let wanted = row.wanted(place);
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
            if is_service(row.written) != is_service(wanted) {
                self.service_addresses.insert(prefix.addr());
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
                found: Some(entry).filter(|entry| entry.flags & flag::FRONTENDS != 0),
                written: Some(entry),
                ..Row::default()
            },
        );
    }
    Ok(())
}
