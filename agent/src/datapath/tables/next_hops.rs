//! The writer of `NEXT_HOPS`: one row for each other node and family. Flows hold the number and
//! the generation of a row, so a row changes its route in place and keeps its number as long as
//! its node lives, over restarts of the agent too: there the numbers are found again through the
//! ipcache entries that name them, or by the way that they lead.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    net::IpAddr,
};

use aya::maps::{Array, MapData};
use ipnet::IpNet;
use weir_common::{
    Ipv6,
    limits::NEXT_HOPS_MAX,
    next_hop::{self, FIRST_ROW, NextHop, ROUTED, kind},
};

use super::{Ipcache, TableError, io_error, read_array};
use crate::{datapath::sys::RawMap, objects::Family};

const MAP: &str = "NEXT_HOPS";

/// The way to a node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hop {
    /// Interface index of the device.
    pub ifindex: u32,
    /// The neighbour to send to; not always of the family of the packets.
    pub gateway: IpAddr,
    /// MTU of the way, bytes (layer 3).
    pub mtu: u32,
    /// This node's address towards there, of the family of the packets; `None`: it has none.
    pub source: Option<IpAddr>,
}

/// Where an ipcache entry leads.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HopRef<'a> {
    /// Nowhere.
    None,
    /// The node's own stack.
    Host,
    /// The row of a node and family, made by [`NextHops::set`] before.
    Node(&'a str, Family),
}

/// See the module.
pub struct NextHops {
    map: Array<MapData, NextHop>,
    /// Rows as they stand in the kernel.
    rows: Vec<NextHop>,
    numbers: HashMap<(String, Family), u32>,
    /// Numbers found in use at start and not claimed yet.
    unclaimed: BTreeSet<u32>,
    /// Numbers found in use at start which no entry of the ipcache named, claimed or not: whose they are is not
    /// known. Flows to any node with the same way may refer to them.
    nameless: BTreeSet<u32>,
    /// Free row indices; the one that has been free for longest comes first.
    free: VecDeque<u32>,
}

impl NextHops {
    /// Reads the rows; those that `ipcache` names or that are in use stay as they are until
    /// someone claims them or [`Self::prune`] removes them.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn open(
        map: Array<MapData, NextHop>,
        raw: &RawMap,
        ipcache: &Ipcache,
    ) -> Result<Self, TableError> {
        let rows: Vec<NextHop> =
            read_array(raw).map_err(|error| TableError::kernel(MAP, "all rows", error))?;
        let named: BTreeSet<u32> = ipcache
            .entries()
            .values()
            .map(|entry| entry.next_hop)
            .filter(|number| *number >= FIRST_ROW)
            .collect();
        let (mut unclaimed, mut free) = (BTreeSet::new(), VecDeque::new());
        let mut nameless = BTreeSet::new();
        for (index, row) in (0..).zip(&rows) {
            if FIRST_ROW + index == ROUTED {
                continue;
            }
            if row.kind != kind::NONE || named.contains(&(FIRST_ROW + index)) {
                unclaimed.insert(FIRST_ROW + index);
                if !named.contains(&(FIRST_ROW + index)) {
                    nameless.insert(FIRST_ROW + index);
                }
            } else {
                free.push_back(index);
            }
        }
        let mut table = Self {
            map,
            rows,
            numbers: HashMap::new(),
            unclaimed,
            nameless,
            free,
        };
        let routed = NextHop {
            kind: kind::ROUTED,
            ..NextHop::default()
        };
        table.write(ROUTED, routed)?;
        Ok(table)
    }

    /// Sets the way to a node for packets of a family; `None`: it cannot be reached now. Gives
    /// the number of the row, the same at every call. `prefixes` are the node's in the ipcache;
    /// at the first call after a start they lead back to the row that it had, or the way does.
    ///
    /// # Errors
    ///
    /// The table is full, or the kernel's.
    pub fn set(
        &mut self,
        node: &str,
        family: Family,
        prefixes: &[IpNet],
        hop: Option<Hop>,
        ipcache: &Ipcache,
    ) -> Result<u32, TableError> {
        let key = (node.to_owned(), family);
        let (number, generation) = match self.numbers.get(&key) {
            Some(&number) => (number, self.row(number).generation),
            None => match self
                .recovered(prefixes, ipcache)
                .or_else(|| self.with_same_way(hop))
            {
                Some(number) => (number, self.row(number).generation),
                None => {
                    let index = self.free.pop_front().ok_or(TableError::Full {
                        map: MAP,
                        entries: NEXT_HOPS_MAX - 1,
                        remedy: "the cluster has more nodes than it can hold",
                    })?;
                    let number = FIRST_ROW + index;
                    (number, self.row(number).generation.wrapping_add(1))
                }
            },
        };
        let wanted = match hop {
            Some(hop) => NextHop {
                kind: kind::NEIGHBOUR,
                gateway_family: if hop.gateway.is_ipv4() { 4 } else { 6 },
                mtu: u16::try_from(hop.mtu).unwrap_or(u16::MAX),
                ifindex: hop.ifindex,
                generation,
                gateway: Ipv6::from_ip(hop.gateway),
                source: hop.source.map_or_else(Ipv6::default, Ipv6::from_ip),
            },
            None => NextHop {
                generation,
                ..NextHop::default()
            },
        };
        let written = self.write(number, wanted);
        // A row that was found at start is named by the ipcache and waits for the next attempt.
        let found = self.unclaimed.contains(&number);
        if written.is_err() && !found && !self.numbers.contains_key(&key) {
            self.free.push_front(number - FIRST_ROW);
        }
        written?;
        self.unclaimed.remove(&number);
        self.numbers.insert(key, number);
        Ok(number)
    }

    /// The node is gone. Its ipcache entries must be removed before.
    ///
    /// # Errors
    ///
    /// The kernel's; the row stays.
    pub fn remove(&mut self, node: &str, family: Family) -> Result<(), TableError> {
        let key = (node.to_owned(), family);
        if let Some(&number) = self.numbers.get(&key) {
            if self.is_needed(number) {
                self.unclaimed.insert(number);
            } else {
                self.clear(number)?;
            }
            self.numbers.remove(&key);
        }
        Ok(())
    }

    /// Removes every row that was found at start and that nobody has claimed since, but for those that may be of flows to
    /// nodes which have another row now. Only once the source is synced and after the ipcache has been pruned. Gives the
    /// number removed.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn prune(&mut self) -> Result<usize, TableError> {
        let unclaimed = self.unclaimed.iter().copied();
        let stale: Vec<u32> = unclaimed.filter(|row| !self.is_needed(*row)).collect();
        for &number in &stale {
            self.clear(number)?;
            self.unclaimed.remove(&number);
        }
        Ok(stale.len())
    }

    /// The number that a reference stands for.
    ///
    /// # Errors
    ///
    /// The node has no row yet.
    pub fn number(&self, hop: HopRef<'_>) -> Result<u32, TableError> {
        match hop {
            HopRef::None => Ok(next_hop::NONE),
            HopRef::Host => Ok(next_hop::HOST),
            HopRef::Node(node, family) => self
                .numbers
                .get(&(node.to_owned(), family))
                .copied()
                .ok_or_else(|| {
                    TableError::Invalid(format!(
                        "node {node} has no next hop for {}: it must be set first",
                        family.name()
                    ))
                }),
        }
    }

    /// Every claimed row with its node, family and number.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Family, u32, NextHop)> {
        self.numbers
            .iter()
            .map(|((node, family), &number)| (node.as_str(), *family, number, self.row(number)))
    }

    /// Rows in use and rows there are.
    #[must_use]
    pub fn fill(&self) -> (u32, u32) {
        // One is nobody's: `ROUTED`.
        let total = self.rows.len() as u32 - 1;
        (total - self.free.len() as u32, total)
    }

    fn recovered(&self, prefixes: &[IpNet], ipcache: &Ipcache) -> Option<u32> {
        prefixes
            .iter()
            .filter_map(|prefix| ipcache.next_hop(prefix.trunc()))
            .find(|number| self.unclaimed.contains(number))
    }

    /// Where the ipcache was made anew and names no row: one found at start that leads the same way. On a routed
    /// network several may, and it is not known which was whose; for packets they are all the same, so that flows go
    /// on in whichever, as long as each has somebody or stays ([`Self::is_needed`]).
    fn with_same_way(&self, hop: Option<Hop>) -> Option<u32> {
        let hop = hop?;
        let leads_there = |number: &u32| {
            let row = self.row(*number);
            row.kind == kind::NEIGHBOUR
                && row.ifindex == hop.ifindex
                && row.gateway == Ipv6::from_ip(hop.gateway)
                && row.source == hop.source.map_or_else(Ipv6::default, Ipv6::from_ip)
        };
        let mut nameless = self.nameless.intersection(&self.unclaimed).copied();
        nameless.find(leads_there)
    }

    /// Whether a row that nobody has, or is to have any more, may be that of flows to a node which has another one:
    /// the row was found without a name, and leads the same way.
    fn is_needed(&self, number: u32) -> bool {
        let way = |number: u32| {
            let row = self.row(number);
            (row.kind == kind::NEIGHBOUR).then_some((row.ifindex, row.gateway, row.source))
        };
        let Some(own) = way(number) else { return false };
        let mut others = self.numbers.values().filter(|other| **other != number);
        self.nameless.contains(&number) && others.any(|other| way(*other) == Some(own))
    }

    fn row(&self, number: u32) -> NextHop {
        self.rows
            .get((number - FIRST_ROW) as usize)
            .copied()
            .unwrap_or_default()
    }

    fn clear(&mut self, number: u32) -> Result<(), TableError> {
        let empty = NextHop {
            generation: self.row(number).generation.wrapping_add(1),
            ..NextHop::default()
        };
        self.write(number, empty)?;
        self.nameless.remove(&number);
        self.free.push_back(number - FIRST_ROW);
        Ok(())
    }

    fn write(&mut self, number: u32, row: NextHop) -> Result<(), TableError> {
        let index = number - FIRST_ROW;
        if self.row(number) == row {
            return Ok(());
        }
        self.map
            .set(index, row, 0)
            .map_err(|error| TableError::kernel(MAP, number, io_error(error)))?;
        self.rows[index as usize] = row;
        Ok(())
    }
}
