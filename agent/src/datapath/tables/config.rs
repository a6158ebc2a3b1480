//! The writer of `CONFIG`: what the programs know of this node. It also says where in
//! `LOCAL_ADDRESSES_*` the addresses of a pod range stand; that place is kept while the range is
//! configured, over restarts too.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::maps::{Array, MapData};
use ipnet::IpNet;
use weir_common::{
    ABI_VERSION, Ipv4, Ipv6,
    address::Address,
    config::{self, Config, PodRange},
    flow::Timeouts,
    limits::{LOCAL_ADDRESSES_MAX, POD_RANGES_MAX},
};

use super::{TableError, io_error};
use crate::objects::Family;

const MAP: &str = "CONFIG";

/// The most addresses of one range that pods can have, so that every range finds its place.
const USABLE_MAX: u32 = LOCAL_ADDRESSES_MAX / POD_RANGES_MAX as u32;

/// Number of addresses of a pod range, counted from its first, that pods can have. IPAM hands
/// out no others.
#[must_use]
pub fn usable_addresses(range: IpNet) -> u32 {
    let bits = range.max_prefix_len() - range.prefix_len();
    1u32.checked_shl(u32::from(bits))
        .filter(|&all| all != 0 && bits < 32)
        .map_or(USABLE_MAX, |all| all.min(USABLE_MAX))
}

/// Ranges that are larger than what pods can have of them.
pub(crate) fn large_ranges(config: &NodeConfig) -> impl Iterator<Item = IpNet> + '_ {
    let is_large = |range: &&IpNet| {
        let bits = range.max_prefix_len() - range.prefix_len();
        u128::from(usable_addresses(**range)) < 1u128.checked_shl(bits.into()).unwrap_or(u128::MAX)
    };
    config.pod_ranges.iter().filter(is_large).map(IpNet::trunc)
}

/// What can be configured while the programs run.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NodeConfig {
    /// Ranges that this node's pods have addresses of: the Node's pod CIDRs, and older ones as
    /// long as pods live in them. At most four of a family.
    pub pod_ranges: Vec<IpNet>,
    /// Source address of hairpin traffic, IPv4.
    pub loopback_v4: Ipv4Addr,
    /// Source address of hairpin traffic, IPv6.
    pub loopback_v6: Ipv6Addr,
    /// Address of this node from which ICMP errors are sent to the outside, IPv4.
    pub node_v4: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub node_v6: Option<Ipv6Addr>,
    /// Gateway of the pods, IPv4.
    pub gateway_v4: Ipv4Addr,
    /// Gateway of the pods, IPv6.
    pub gateway_v6: Ipv6Addr,
    /// First source port for connections whose own port is taken.
    pub nat_port_first: u16,
    /// Number of such ports.
    pub nat_port_count: u16,
    /// What pods send to the outside over IPv4 gets an address of this node.
    pub masquerade_v4: bool,
    /// The same over IPv6.
    pub masquerade_v6: bool,
    /// Destinations to which pods keep their address.
    pub non_masquerade_cidrs: Vec<IpNet>,
    /// Idle times of connections.
    pub timeouts: Timeouts,
    /// Cookie of the node's own network namespace, 0 if unknown.
    pub netns_cookie: u64,
    /// Interface index of the end of the node's own device that the stack uses, 0 if there is none.
    pub host_ifindex: u32,
    /// Refusals that may be sent per second, 0 for no limit.
    pub refusals_per_second: u32,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            pod_ranges: Vec::new(),
            loopback_v4: config::LOOPBACK_V4.into(),
            loopback_v6: config::LOOPBACK_V6.into(),
            node_v4: None,
            node_v6: None,
            gateway_v4: config::GATEWAY_V4.into(),
            gateway_v6: config::GATEWAY_V6.into(),
            nat_port_first: config::NAT_PORT_FIRST,
            nat_port_count: config::NAT_PORT_COUNT,
            masquerade_v4: true,
            masquerade_v6: true,
            non_masquerade_cidrs: Vec::new(),
            timeouts: Timeouts::DEFAULT,
            netns_cookie: 0,
            host_ifindex: 0,
            refusals_per_second: config::REFUSALS_PER_SECOND,
        }
    }
}

/// The bits of [`config::flag`] that are configured.
const MASQUERADE: u32 = config::flag::MASQUERADE_V4 | config::flag::MASQUERADE_V6;

fn masquerade_flags(config: &NodeConfig) -> u32 {
    let bit = |on, bit| if on { bit } else { 0 };
    bit(config.masquerade_v4, config::flag::MASQUERADE_V4)
        | bit(config.masquerade_v6, config::flag::MASQUERADE_V6)
}

/// See the module.
pub struct ConfigTable {
    map: Array<MapData, Config>,
    row: Config,
    connections: u32,
}

impl ConfigTable {
    /// Reads the row.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn open(map: Array<MapData, Config>, connections: u32) -> Result<Self, TableError> {
        let row = map
            .get(&0, 0)
            .map_err(|error| TableError::kernel(MAP, "row 0", io_error(error)))?;
        Ok(Self {
            map,
            row,
            connections,
        })
    }

    /// Writes the configuration. A range that stays keeps its place; the places of ranges that
    /// are gone become free, so their pods must be removed before.
    ///
    /// # Errors
    ///
    /// More than four ranges of a family, ranges that overlap, or the kernel's.
    pub fn apply(&mut self, config: &NodeConfig) -> Result<(), TableError> {
        let mut v4: Vec<(Ipv4, Ipv4, u32)> = Vec::new();
        let mut v6: Vec<(Ipv6, Ipv6, u32)> = Vec::new();
        for (at, range) in config.pod_ranges.iter().enumerate() {
            if let Some(other) = config.pod_ranges[..at]
                .iter()
                .find(|other| other.contains(range) || range.contains(*other))
            {
                return Err(TableError::Invalid(format!(
                    "pod ranges {other} and {range} overlap: give each address to one range"
                )));
            }
            let usable = usable_addresses(*range);
            match range.trunc() {
                IpNet::V4(net) => v4.push((net.network().into(), net.netmask().into(), usable)),
                IpNet::V6(net) => v6.push((net.network().into(), net.netmask().into(), usable)),
            }
        }
        let row = Config {
            abi_version: ABI_VERSION,
            flags: self.row.flags & !MASQUERADE | masquerade_flags(config),
            loopback_v4: config.loopback_v4.into(),
            loopback_v6: config.loopback_v6.into(),
            gateway_v4: config.gateway_v4.into(),
            gateway_v6: config.gateway_v6.into(),
            nat_port_first: config.nat_port_first,
            nat_port_count: config.nat_port_count,
            connections: self.connections,
            timeouts: config.timeouts,
            node_v4: config.node_v4.map(Into::into).unwrap_or_default(),
            node_v6: config.node_v6.map(Into::into).unwrap_or_default(),
            netns_cookie: config.netns_cookie,
            host_ifindex: config.host_ifindex,
            refusals_per_second: config.refusals_per_second,
            pod_ranges_v4: place(&v4, &self.row.pod_ranges_v4)?,
            pod_ranges_v6: place(&v6, &self.row.pod_ranges_v6)?,
        };
        let before = self.row;
        self.write(row)?;
        for range in large_ranges(config) {
            let known = match range.trunc() {
                IpNet::V4(net) => before.pod_ranges_v4.iter().any(|r| {
                    r.is_used() && r.base == net.network().into() && r.mask == net.netmask().into()
                }),
                IpNet::V6(net) => before.pod_ranges_v6.iter().any(|r| {
                    r.is_used() && r.base == net.network().into() && r.mask == net.netmask().into()
                }),
            };
            if !known {
                tracing::debug!(
                    %range,
                    used = USABLE_MAX,
                    "the pod range is larger than what pods get addresses of: the first are used"
                );
            }
        }
        Ok(())
    }

    /// Whether the programs send an event for every new flow too.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn set_new_flow_events(&mut self, on: bool) -> Result<(), TableError> {
        let mut row = self.row;
        if on {
            row.flags |= config::flag::EVENT_NEW_FLOW;
        } else {
            row.flags &= !config::flag::EVENT_NEW_FLOW;
        }
        self.write(row)
    }

    /// The row in the kernel.
    #[must_use]
    pub fn row(&self) -> &Config {
        &self.row
    }

    /// The row of `LOCAL_ADDRESSES_V4` or `_V6` where a pod's address stands; `None` if no range
    /// has it among its usable addresses.
    #[must_use]
    pub fn local_index(&self, address: IpAddr) -> Option<(Family, u32)> {
        let index = match address {
            IpAddr::V4(v4) => index_in(&self.row.pod_ranges_v4, v4.into(), |a: Ipv4| {
                u128::from(u32::from_be_bytes(a.0))
            }),
            IpAddr::V6(v6) => index_in(&self.row.pod_ranges_v6, v6.into(), |a: Ipv6| {
                u128::from_be_bytes(a.0)
            }),
        };
        index.map(|index| (Family::of(address), index))
    }

    fn write(&mut self, row: Config) -> Result<(), TableError> {
        if row != self.row {
            self.map
                .set(0, row, 0)
                .map_err(|error| TableError::kernel(MAP, "row 0", io_error(error)))?;
            self.row = row;
        }
        Ok(())
    }
}

fn index_in<A: Address>(
    ranges: &[PodRange<A>; POD_RANGES_MAX],
    address: A,
    value: impl Fn(A) -> u128,
) -> Option<u32> {
    ranges
        .iter()
        .filter(|range| range.is_used() && value(address) & value(range.mask) == value(range.base))
        .find_map(|range| {
            let offset = u32::try_from(value(address) - value(range.base)).ok()?;
            (offset < range.length).then_some(range.first_index + offset)
        })
}

/// Gives each wanted range (base, mask, length) a place; those that had one keep it.
fn place<A: Address>(
    wanted: &[(A, A, u32)],
    old: &[PodRange<A>; POD_RANGES_MAX],
) -> Result<[PodRange<A>; POD_RANGES_MAX], TableError> {
    if wanted.len() > POD_RANGES_MAX {
        return Err(TableError::Invalid(format!(
            "{} pod ranges of one family, at most {POD_RANGES_MAX} are possible",
            wanted.len()
        )));
    }
    let kept = |(base, mask, length): (A, A, u32)| {
        old.iter()
            .find(|o| o.is_used() && o.base == base && o.mask == mask && o.length == length)
    };
    let mut taken: Vec<(u32, u32)> = wanted
        .iter()
        .filter_map(|range| kept(*range))
        .map(|range| (range.first_index, range.length))
        .collect();
    let mut rows = [PodRange::default(); POD_RANGES_MAX];
    for (row, &(base, mask, length)) in rows.iter_mut().zip(wanted) {
        let first_index = match kept((base, mask, length)) {
            Some(range) => range.first_index,
            None => {
                let first = first_gap(&taken, length).ok_or_else(|| {
                    TableError::Invalid(format!(
                        "no room for {length} addresses among {LOCAL_ADDRESSES_MAX} while older \
                         pod ranges are in use"
                    ))
                })?;
                taken.push((first, length));
                first
            }
        };
        *row = PodRange {
            base,
            mask,
            length,
            first_index,
        };
    }
    Ok(rows)
}

/// The first index from which `length` rows are in none of `taken` (index, length). Each range
/// begins a part of its own, so that whichever come and go, there is room for every one.
fn first_gap(taken: &[(u32, u32)], length: u32) -> Option<u32> {
    let ends = taken.iter().map(|(first, size)| first + size);
    (0..LOCAL_ADDRESSES_MAX)
        .step_by(USABLE_MAX as usize)
        // Ranges of an earlier version may stand anywhere.
        .chain(ends)
        .find(|&start| {
            let end = start + length;
            end <= LOCAL_ADDRESSES_MAX
                && taken
                    .iter()
                    .all(|&(first, size)| end <= first || first + size <= start)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(cidr: &str) -> (Ipv4, Ipv4, u32) {
        let net: ipnet::Ipv4Net = cidr.parse().unwrap();
        (
            net.network().into(),
            net.netmask().into(),
            usable_addresses(net.into()),
        )
    }

    #[test]
    fn large_ranges_are_cut_to_a_quarter_of_the_table() {
        for (cidr, usable) in [
            ("10.0.0.0/24", 256),
            ("10.0.0.0/32", 1),
            ("10.0.0.0/8", 16_384),
            ("0.0.0.0/0", 16_384),
            ("fd00::/64", 16_384),
            ("fd00::/112", 16_384),
            ("fd00::/120", 256),
        ] {
            assert_eq!(usable_addresses(cidr.parse().unwrap()), usable, "{cidr}");
        }
    }

    #[test]
    fn a_range_keeps_its_place_while_others_come_and_go() {
        let none = [PodRange::default(); POD_RANGES_MAX];
        let (a, b, c) = (
            range("10.0.0.0/24"),
            range("10.1.0.0/16"),
            range("10.2.0.0/25"),
        );
        let rows = place(&[a, b], &none).unwrap();
        assert_eq!((rows[0].first_index, rows[1].first_index), (0, 16_384));
        let rows = place(&[b, c], &rows).unwrap();
        assert_eq!((rows[0].first_index, rows[1].first_index), (16_384, 0));
        let rows = place(&[a, c, b], &rows).unwrap();
        assert_eq!(rows[2].first_index, 16_384, "kept");
        assert_eq!(rows[1].first_index, 0, "kept");
        assert_eq!(rows[0].first_index, 2 * 16_384);
    }

    #[test]
    fn there_is_room_for_four_ranges_in_whatever_order_they_come() {
        let none = [PodRange::default(); POD_RANGES_MAX];
        let large = |i: u8| range(&format!("10.{i}.0.0/16"));
        let small = range("10.0.0.0/24");
        let rows = place(&[small, large(1), large(2), large(3)], &none).unwrap();
        // The small one goes and a large one comes.
        let rows = place(&[large(1), large(2), large(3), large(4)], &rows).unwrap();
        let places: std::collections::BTreeSet<u32> =
            rows.iter().map(|row| row.first_index / 16_384).collect();
        assert_eq!(places.len(), 4);
    }

    #[test]
    fn ranges_packed_by_an_earlier_version_leave_room_for_what_fits() {
        let taken = [(0, 256), (256, 16_384), (16_640, 16_384)];
        assert_eq!(first_gap(&taken, 16_384), Some(49_152));
        let taken = [(0, 256), (256, 16_384), (16_640, 16_384), (33_024, 16_384)];
        assert_eq!(first_gap(&taken, 256), Some(49_408));
        assert_eq!(first_gap(&taken, 16_384), None);
    }

    /// IPAM and this table count alike: no pod gets an address that has no row.
    #[test]
    fn ipam_uses_what_has_a_row() {
        for cidr in [
            "10.0.0.0/8",
            "10.0.0.0/17",
            "10.0.0.0/18",
            "10.0.0.0/29",
            "fd00::/64",
        ] {
            let range: IpNet = cidr.parse().unwrap();
            let mut ipam = crate::ipam::Ipam::new(0);
            assert!(ipam.set_ranges(&[range]).is_empty());
            let info = ipam.ranges().next().unwrap();
            assert_eq!(info.length, usable_addresses(range), "{cidr}");
        }
    }

    #[test]
    fn five_ranges_are_refused() {
        let wanted: Vec<_> = (0..5).map(|i| range(&format!("10.{i}.0.0/24"))).collect();
        assert!(place(&wanted, &[PodRange::default(); POD_RANGES_MAX]).is_err());
    }
}
