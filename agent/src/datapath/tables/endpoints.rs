//! The writer of the endpoint tables. `LOCAL_ADDRESSES_*` publishes an endpoint: it is written
//! last and cleared first. The generation of a row rises whenever its number changes hands, so
//! that flows of a former pod are recognised.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use aya::maps::{Array, HashMap, MapData};
use weir_common::{
    endpoint::{Endpoint, POLICY_SET_ALLOW_ALL, host_mac, pod_mac},
    limits::ENDPOINTS_MAX,
};

use super::{ConfigTable, TableError, io_error, read_array};
use crate::{datapath::sys::RawMap, objects::Family};

const ENDPOINTS: &str = "ENDPOINTS";
const BY_IFINDEX: &str = "ENDPOINT_BY_IFINDEX";
const BY_COOKIE: &str = "ENDPOINT_BY_COOKIE";
const HAS_FLOWS: &str = "ENDPOINT_FLOWS";

/// A pod of this node as the data path sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct EndpointRow {
    /// Number, 1 to 4095.
    pub number: u32,
    /// IPv4 address, of a configured pod range.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address, of a configured pod range.
    pub ipv6: Option<Ipv6Addr>,
    /// Interface index of the host side of its veth pair.
    pub ifindex: u32,
    /// MTU of the pod's device, bytes (layer 3).
    pub mtu: u32,
    /// Cookie of its network namespace, 0 if unknown.
    pub netns_cookie: u64,
    /// Bits of [`weir_common::endpoint::flag`].
    pub flags: u16,
}

/// The maps of the endpoint tables.
pub struct EndpointMaps {
    /// `ENDPOINTS`.
    pub endpoints: Array<MapData, Endpoint>,
    /// `ENDPOINT_FLOWS`.
    pub has_flows: Array<MapData, u32>,
    /// `ENDPOINT_BY_IFINDEX`.
    pub by_ifindex: HashMap<MapData, u32, u32>,
    /// `ENDPOINT_BY_COOKIE`.
    pub by_cookie: HashMap<MapData, u64, u32>,
    /// `LOCAL_ADDRESSES_V4`.
    pub local_v4: LocalAddresses,
    /// `LOCAL_ADDRESSES_V6`.
    pub local_v6: LocalAddresses,
}

/// `LOCAL_ADDRESSES_V4` or `_V6`.
pub struct LocalAddresses {
    /// Name of the map.
    pub name: &'static str,
    /// For single rows.
    pub map: Array<MapData, u32>,
    /// For all rows.
    pub raw: RawMap,
}

/// See the module.
pub struct EndpointTable {
    maps: EndpointMaps,
    /// Rows as they stand in the kernel.
    rows: Vec<Endpoint>,
}

impl EndpointTable {
    /// Reads the rows.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn open(maps: EndpointMaps, raw: &RawMap) -> Result<Self, TableError> {
        let rows =
            read_array(raw).map_err(|error| TableError::kernel(ENDPOINTS, "all rows", error))?;
        Ok(Self { maps, rows })
    }

    /// Adds or changes an endpoint. The same pod again (addresses, device and namespace) keeps
    /// its generation, another one raises it.
    ///
    /// # Errors
    ///
    /// The number or an address is out of range, or the kernel's; the endpoint is then not
    /// published, and the call can be repeated.
    pub fn insert(&mut self, row: &EndpointRow, config: &ConfigTable) -> Result<(), TableError> {
        let number = row.number;
        if !(1..ENDPOINTS_MAX).contains(&number) {
            return Err(TableError::Invalid(format!(
                "endpoint number {number} is not within 1 and {}",
                ENDPOINTS_MAX - 1
            )));
        }
        let places = addresses(row.ipv4, row.ipv6)
            .map(|address| {
                config.local_index(address).ok_or_else(|| {
                    TableError::Invalid(format!(
                        "address {address} of endpoint {number} is not among the usable \
                         addresses of this node's pod ranges: check the Node's podCIDRs"
                    ))
                })
            })
            .collect::<Result<Vec<_>, _>>()?;

        let old = self.rows[number as usize];
        let wanted = Endpoint {
            netns_cookie: row.netns_cookie,
            ifindex: row.ifindex,
            generation: old.generation,
            ipv4: row.ipv4.map(Into::into).unwrap_or_default(),
            ipv6: row.ipv6.map(Into::into).unwrap_or_default(),
            pod_mac: pod_mac(number),
            host_mac: host_mac(number),
            egress_set: POLICY_SET_ALLOW_ALL,
            ingress_set: POLICY_SET_ALLOW_ALL,
            identity: 0,
            mtu: u16::try_from(row.mtu).unwrap_or(u16::MAX),
            flags: row.flags,
        };
        let same_pod = old.ifindex == wanted.ifindex
            && old.ipv4 == wanted.ipv4
            && old.ipv6 == wanted.ipv6
            && old.netns_cookie == wanted.netns_cookie;
        if same_pod {
            self.write(number, wanted)?;
        } else {
            if old.ifindex != 0 {
                self.remove(number, config)?;
            }
            self.maps
                .has_flows
                .set(number, 0, 0)
                .map_err(|error| TableError::kernel(HAS_FLOWS, number, io_error(error)))?;
            let generation = self.rows[number as usize].generation.wrapping_add(1);
            self.write(
                number,
                Endpoint {
                    generation,
                    ..wanted
                },
            )?;
        }
        self.maps
            .by_ifindex
            .insert(row.ifindex, number, 0)
            .map_err(|error| TableError::kernel(BY_IFINDEX, row.ifindex, io_error(error)))?;
        self.enter_cookie(number, row.netns_cookie)?;
        for (family, index) in places {
            self.publish(family, index, number)?;
        }
        Ok(())
    }

    /// Removes an endpoint; one that does not exist is no error.
    ///
    /// # Errors
    ///
    /// The kernel's; the call can be repeated.
    pub fn remove(&mut self, number: u32, config: &ConfigTable) -> Result<(), TableError> {
        let Some(&old) = self.rows.get(number as usize) else {
            return Ok(());
        };
        if old.ifindex == 0 {
            return Ok(());
        }
        let ipv4 = (old.ipv4 != Default::default()).then(|| old.ipv4.into());
        let ipv6 = (!old.ipv6.is_zero()).then(|| old.ipv6.into());
        for (family, index) in addresses(ipv4, ipv6).filter_map(|a| config.local_index(a)) {
            // The address may have been given to another endpoint already.
            let local = self.local(family);
            let holder = local
                .map
                .get(&index, 0)
                .map_err(|error| TableError::kernel(local.name, index, io_error(error)))?;
            if holder == number {
                self.publish(family, index, 0)?;
            }
        }
        if self.maps.by_ifindex.get(&old.ifindex, 0).ok() == Some(number) {
            self.maps
                .by_ifindex
                .remove(&old.ifindex)
                .map_err(|error| TableError::kernel(BY_IFINDEX, old.ifindex, io_error(error)))?;
        }
        self.leave_cookie(number, old.netns_cookie)?;
        self.write(
            number,
            Endpoint {
                generation: old.generation.wrapping_add(1),
                ..Endpoint::default()
            },
        )
    }

    /// Sets the flags of an endpoint, bits of [`weir_common::endpoint::flag`]; of one that does not
    /// exist it is no error.
    ///
    /// # Errors
    ///
    /// The kernel's; the call can be repeated.
    pub fn set_flags(&mut self, number: u32, flags: u16) -> Result<(), TableError> {
        match self.get(number) {
            Some(&row) => self.write(number, Endpoint { flags, ..row }),
            None => Ok(()),
        }
    }

    /// The row of an endpoint, if it exists.
    #[must_use]
    pub fn get(&self, number: u32) -> Option<&Endpoint> {
        let row = self.rows.get(number as usize);
        row.filter(|row| row.ifindex != 0)
    }

    /// Whether an endpoint has gone since it had this generation. Number 0 is none, and stays.
    #[must_use]
    pub fn is_gone(&self, number: u32, generation: u32) -> bool {
        number != 0
            && self
                .rows
                .get(number as usize)
                .is_none_or(|row| row.ifindex == 0 || row.generation != generation)
    }

    /// Removes every endpoint whose number is not in `keep`, and whatever in the other maps leads
    /// to an endpoint that is not there. Gives the number of endpoints removed.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn prune(
        &mut self,
        keep: &BTreeSet<u32>,
        config: &ConfigTable,
    ) -> Result<usize, TableError> {
        let stale: Vec<u32> = (1..ENDPOINTS_MAX)
            .filter(|n| self.rows[*n as usize].ifindex != 0 && !keep.contains(n))
            .collect();
        for &number in &stale {
            self.remove(number, config)?;
        }

        for family in [Family::V4, Family::V6] {
            let wanted: std::collections::HashMap<u32, u32> = (1..ENDPOINTS_MAX)
                .filter_map(|number| {
                    let row = &self.rows[number as usize];
                    let address = match family {
                        Family::V4 => IpAddr::V4(row.ipv4.into()),
                        Family::V6 => IpAddr::V6(row.ipv6.into()),
                    };
                    let (_, index) = config.local_index(address)?;
                    (row.ifindex != 0).then_some((index, number))
                })
                .collect();
            let local = self.local(family);
            let holders: Vec<u32> = read_array(&local.raw)
                .map_err(|error| TableError::kernel(local.name, "all rows", error))?;
            for (index, holder) in (0..).zip(holders) {
                if holder != 0 && wanted.get(&index) != Some(&holder) {
                    self.publish(family, index, 0)?;
                }
            }
        }

        let leading_nowhere: Vec<u32> = self
            .maps
            .by_ifindex
            .iter()
            .flatten()
            .filter(|(ifindex, number)| {
                self.rows
                    .get(*number as usize)
                    .is_none_or(|row| row.ifindex != *ifindex)
            })
            .map(|(ifindex, _)| ifindex)
            .collect();
        for ifindex in leading_nowhere {
            self.maps
                .by_ifindex
                .remove(&ifindex)
                .map_err(|error| TableError::kernel(BY_IFINDEX, ifindex, io_error(error)))?;
        }
        let leading_nowhere: Vec<u64> = self
            .maps
            .by_cookie
            .iter()
            .flatten()
            .filter(|(cookie, number)| !self.has_cookie(*number, *cookie))
            .map(|(cookie, _)| cookie)
            .collect();
        for cookie in leading_nowhere {
            self.maps
                .by_cookie
                .remove(&cookie)
                .map_err(|error| TableError::kernel(BY_COOKIE, cookie, io_error(error)))?;
        }
        Ok(stale.len())
    }

    /// The rows in use with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Endpoint)> {
        (0..).zip(&self.rows).filter(|(_, row)| row.ifindex != 0)
    }

    /// Endpoints, and how many there can be.
    #[must_use]
    pub fn fill(&self) -> (u32, u32) {
        (self.iter().count() as u32, ENDPOINTS_MAX - 1)
    }

    fn has_cookie(&self, number: u32, cookie: u64) -> bool {
        self.get(number)
            .is_some_and(|row| row.netns_cookie == cookie)
    }

    /// A namespace with several of our interfaces is known by the first of them.
    fn enter_cookie(&mut self, number: u32, cookie: u64) -> Result<(), TableError> {
        let holder = self.maps.by_cookie.get(&cookie, 0).ok();
        if cookie == 0 || holder.is_some_and(|holder| self.has_cookie(holder, cookie)) {
            return Ok(());
        }
        self.maps
            .by_cookie
            .insert(cookie, number, 0)
            .map_err(|error| TableError::kernel(BY_COOKIE, cookie, io_error(error)))
    }

    /// Another interface of the namespace takes the place, if there is one.
    fn leave_cookie(&mut self, number: u32, cookie: u64) -> Result<(), TableError> {
        if self.maps.by_cookie.get(&cookie, 0).ok() != Some(number) {
            return Ok(());
        }
        let other = (1..ENDPOINTS_MAX).find(|n| *n != number && self.has_cookie(*n, cookie));
        match other {
            Some(other) => self.maps.by_cookie.insert(cookie, other, 0),
            None => self.maps.by_cookie.remove(&cookie),
        }
        .map_err(|error| TableError::kernel(BY_COOKIE, cookie, io_error(error)))
    }

    fn write(&mut self, number: u32, row: Endpoint) -> Result<(), TableError> {
        if self.rows[number as usize] != row {
            self.maps
                .endpoints
                .set(number, row, 0)
                .map_err(|error| TableError::kernel(ENDPOINTS, number, io_error(error)))?;
            self.rows[number as usize] = row;
        }
        Ok(())
    }

    fn publish(&mut self, family: Family, index: u32, number: u32) -> Result<(), TableError> {
        let local = match family {
            Family::V4 => &mut self.maps.local_v4,
            Family::V6 => &mut self.maps.local_v6,
        };
        local
            .map
            .set(index, number, 0)
            .map_err(|error| TableError::kernel(local.name, index, io_error(error)))
    }

    fn local(&self, family: Family) -> &LocalAddresses {
        match family {
            Family::V4 => &self.maps.local_v4,
            Family::V6 => &self.maps.local_v6,
        }
    }
}

fn addresses(v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>) -> impl Iterator<Item = IpAddr> {
    v4.map(IpAddr::V4).into_iter().chain(v6.map(IpAddr::V6))
}
