//! Addresses of this node's pods, out of the node's pod ranges. Pure: no I/O, no clock (the caller
//! passes the time); `endpoint` is its only user and keeps its state in `RUN-DIR/ipam.json`.

mod pool;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weir_common::limits::{LOCAL_ADDRESSES_MAX, POD_RANGES_MAX};

pub use self::pool::Pool;
#[cfg(test)]
pub(crate) use self::tests::Random;
use crate::objects::Family;

/// Offsets of one range that are used at most. `LOCAL_ADDRESSES_*` has [`LOCAL_ADDRESSES_MAX`] rows
/// for a family, and each of its [`POD_RANGES_MAX`] ranges may use an equal part of them, so that a new
/// range always finds room beside old ones. Four times the number of endpoints a node can have.
pub const RANGE_OFFSETS_MAX: u32 = LOCAL_ADDRESSES_MAX / POD_RANGES_MAX as u32;

/// Default rest of a released address, seconds.
pub const DEFAULT_REST_SECONDS: u64 = 60;

/// Why an address or a range is refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum IpamError {
    /// The node has no pod range of this family.
    #[error(
        "this node has no {} pod range; set spec.podCIDRs of its Node object",
        .0.name()
    )]
    NoRange(Family),
    /// Every address is used.
    #[error(
        "no {} address is left: {usage}; remove pods from this node or give it a larger pod range",
        .family.name()
    )]
    Exhausted {
        /// Family asked for.
        family: Family,
        /// Ranges with their counts: `10.0.0.0/29: 6 of 6 in use`.
        usage: String,
    },
    /// The address is given out already.
    #[error("address {0} is in use by another endpoint")]
    InUse(IpAddr),
    /// The address is in no range, or is one that is never given out.
    #[error("address {0} belongs to no pod range of this node")]
    Outside(IpAddr),
    /// The family has as many ranges as it can have.
    #[error(
        "pod range {0} is not used: this node has {POD_RANGES_MAX} ranges of its family already, \
         those of pods that still run included; it is tried again when one becomes empty"
    )]
    TooManyRanges(IpNet),
    /// The range overlaps another.
    #[error(
        "pod range {range} is not used: it overlaps {other}, which {pods} addresses of this node \
         belong to; it is tried again when that range is gone from the Node object and empty"
    )]
    Overlap {
        /// The range refused.
        range: IpNet,
        /// The range in its way.
        other: IpNet,
        /// Addresses of the other range in use.
        pods: u32,
    },
}

/// A range as the datapath's tables see it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RangeInfo {
    /// Network, truncated.
    pub network: IpNet,
    /// Offsets in use of it: addresses are `network.network() + 0 .. length`.
    pub length: u32,
    /// New addresses come from it; otherwise it only waits for its last pod to go.
    pub active: bool,
    /// Addresses that can be given out.
    pub size: u32,
    /// Addresses in use.
    pub used: u32,
    /// Addresses resting, at most.
    pub resting: u32,
}

/// What outlives the agent. Addresses in use are not part of it: endpoints know theirs.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct IpamState {
    /// Ranges, those that only wait for their last pod included.
    pub ranges: Vec<RangeState>,
    /// Addresses that rest.
    pub resting: Vec<RestingAddress>,
}

/// A range in [`IpamState`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RangeState {
    /// Network.
    pub network: IpNet,
    /// Offset at which the next search starts.
    pub cursor: u32,
}

/// An address in [`IpamState`].
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RestingAddress {
    /// The address.
    pub address: IpAddr,
    /// When it was released, seconds of the caller's clock.
    pub released: u64,
}

/// The allocator. Times are seconds of one clock that never goes back.
#[derive(Clone, Debug)]
pub struct Ipam {
    rest: u64,
    /// As the node has them; `None` until the node is known.
    wanted: Option<Vec<IpNet>>,
    ranges: Vec<Range>,
}

#[derive(Clone, Debug)]
struct Range {
    network: IpNet,
    active: bool,
    length: u32,
    pool: Pool,
}

impl Ipam {
    /// Without ranges. `rest`: seconds that a released address is left alone.
    #[must_use]
    pub fn new(rest: u64) -> Self {
        Self {
            rest,
            wanted: None,
            ranges: Vec::new(),
        }
    }

    /// Sets the ranges that new addresses come from, in order of preference. Ranges not named stay
    /// until their last address is released. Returns those that cannot be used and why; they are
    /// tried again by themselves when room appears.
    pub fn set_ranges(&mut self, ranges: &[IpNet]) -> Vec<IpamError> {
        let mut wanted = Vec::with_capacity(ranges.len());
        for range in ranges {
            let range = range.trunc();
            if !wanted.contains(&range) {
                wanted.push(range);
            }
        }
        self.wanted = Some(wanted);
        self.apply_wanted()
    }

    /// Takes an address of this family.
    ///
    /// # Errors
    ///
    /// [`IpamError::NoRange`], [`IpamError::Exhausted`].
    pub fn allocate(&mut self, family: Family, now: u64) -> Result<IpAddr, IpamError> {
        let rest = self.rest;
        let mut active = self.active_mut(family).peekable();
        if active.peek().is_none() {
            return Err(IpamError::NoRange(family));
        }
        for range in active {
            if let Some(offset) = range.pool.take(now, rest) {
                return Ok(range.address(offset));
            }
        }
        let oldest = self
            .active_mut(family)
            .min_by_key(|range| range.pool.resting().next().map_or(u64::MAX, |(_, t)| t));
        if let Some(range) = oldest
            && let Some(offset) = range.pool.take_resting()
        {
            return Ok(range.address(offset));
        }
        let usage: Vec<String> = self
            .active_mut(family)
            .map(|range| {
                let (used, size) = (range.pool.used(), range.pool.size());
                format!("{}: {used} of {size} in use", range.network)
            })
            .collect();
        Err(IpamError::Exhausted {
            family,
            usage: usage.join(", "),
        })
    }

    /// Takes this very address: of an endpoint that exists already.
    ///
    /// # Errors
    ///
    /// [`IpamError::InUse`], [`IpamError::Outside`] (see [`Self::adopt_range`]).
    pub fn reserve(&mut self, address: IpAddr) -> Result<(), IpamError> {
        let (range, offset) = self
            .locate(address)
            .filter(|(range, offset)| range.is_usable(*offset))
            .ok_or(IpamError::Outside(address))?;
        if range.pool.reserve(offset) {
            Ok(())
        } else {
            Err(IpamError::InUse(address))
        }
    }

    /// Makes sure that a range is known that an existing endpoint's address came from, without
    /// giving out new addresses of it.
    ///
    /// # Errors
    ///
    /// [`IpamError::TooManyRanges`], [`IpamError::Overlap`].
    pub fn adopt_range(&mut self, network: IpNet) -> Result<(), IpamError> {
        let network = network.trunc();
        if self.ranges.iter().any(|range| range.network == network) {
            return Ok(());
        }
        self.insert_range(network, false)
    }

    /// Gives an address back, to rest. `false`: it was not in use.
    pub fn release(&mut self, address: IpAddr, now: u64) -> bool {
        let released = self
            .locate(address)
            .is_some_and(|(range, offset)| range.pool.release(offset, now));
        self.drop_empty();
        released
    }

    /// Gives back an address that nobody has seen: it does not rest.
    pub fn cancel(&mut self, address: IpAddr) -> bool {
        let cancelled = self
            .locate(address)
            .is_some_and(|(range, offset)| range.pool.cancel(offset));
        self.drop_empty();
        cancelled
    }

    /// Families that addresses can be had of, IPv4 first.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        [Family::V4, Family::V6].into_iter().filter(|&family| {
            self.ranges
                .iter()
                .any(|range| range.active && range.family() == family)
        })
    }

    /// The range that an address belongs to.
    #[must_use]
    pub fn range_of(&self, address: IpAddr) -> Option<IpNet> {
        self.ranges
            .iter()
            .find(|range| range.offset(address).is_some())
            .map(|range| range.network)
    }

    /// All ranges, those of both families and those without new addresses included.
    pub fn ranges(&self) -> impl Iterator<Item = RangeInfo> + '_ {
        self.ranges.iter().map(|range| RangeInfo {
            network: range.network,
            length: range.length,
            active: range.active,
            size: range.pool.size(),
            used: range.pool.used(),
            resting: u32::try_from(range.pool.resting().len()).unwrap_or(u32::MAX),
        })
    }

    /// What outlives the agent.
    #[must_use]
    pub fn state(&self) -> IpamState {
        IpamState {
            ranges: self
                .ranges
                .iter()
                .map(|range| RangeState {
                    network: range.network,
                    cursor: range.pool.cursor(),
                })
                .collect(),
            resting: self
                .ranges
                .iter()
                .flat_map(|range| {
                    range
                        .pool
                        .resting()
                        .map(|(offset, released)| RestingAddress {
                            address: range.address(offset),
                            released,
                        })
                })
                .collect(),
        }
    }

    /// Takes over what an earlier agent left; before any other call. Its ranges give out no new
    /// addresses until [`Self::set_ranges`] names them. Returns ranges that could not be taken over.
    pub fn restore(&mut self, state: &IpamState, now: u64) -> Vec<IpamError> {
        let mut errors = Vec::new();
        for saved in &state.ranges {
            let network = saved.network.trunc();
            if let Err(error) = self.insert_range(network, false) {
                errors.push(error);
            } else if let Some(range) = self.ranges.last_mut() {
                range.pool.set_cursor(saved.cursor);
            }
        }
        for resting in &state.resting {
            if let Some((range, offset)) = self.locate(resting.address) {
                range.pool.restore_resting(offset, resting.released, now);
            }
        }
        errors
    }

    /// Makes `wanted` true as far as it can be.
    fn apply_wanted(&mut self) -> Vec<IpamError> {
        let Some(wanted) = self.wanted.clone() else {
            return Vec::new();
        };
        for range in &mut self.ranges {
            range.active = wanted.contains(&range.network);
        }
        self.ranges
            .retain(|range| range.active || range.pool.used() != 0);
        let mut errors = Vec::new();
        for &network in &wanted {
            if !self.ranges.iter().any(|range| range.network == network)
                && let Err(error) = self.insert_range(network, true)
            {
                errors.push(error);
            }
        }
        self.ranges.sort_by_key(|range| {
            let rank = wanted.iter().position(|w| *w == range.network);
            (range.family(), rank.unwrap_or(usize::MAX))
        });
        errors
    }

    fn insert_range(&mut self, network: IpNet, active: bool) -> Result<(), IpamError> {
        let overlapping = self.ranges.iter().find(|range| {
            range.network.contains(&network.network()) || network.contains(&range.network.network())
        });
        if let Some(other) = overlapping {
            return Err(IpamError::Overlap {
                range: network,
                other: other.network,
                pods: other.pool.used(),
            });
        }
        let family = Family::of(network.addr());
        let same_family = |range: &&Range| range.family() == family;
        if self.ranges.iter().filter(same_family).count() >= POD_RANGES_MAX {
            return Err(IpamError::TooManyRanges(network));
        }
        self.ranges.push(Range::new(network, active));
        Ok(())
    }

    /// Forgets ranges that only waited for their last pod, which may make room for others.
    fn drop_empty(&mut self) {
        if self.wanted.is_none() {
            // The node is not known yet: any range may turn out to be its own.
            return;
        }
        let before = self.ranges.len();
        self.ranges
            .retain(|range| range.active || range.pool.used() != 0);
        if self.ranges.len() != before {
            // What is still refused was reported when it was asked for.
            let _ = self.apply_wanted();
        }
    }

    fn locate(&mut self, address: IpAddr) -> Option<(&mut Range, u32)> {
        self.ranges.iter_mut().find_map(|range| {
            let offset = range.offset(address)?;
            Some((range, offset))
        })
    }

    fn active_mut(&mut self, family: Family) -> impl Iterator<Item = &mut Range> {
        self.ranges
            .iter_mut()
            .filter(move |range| range.active && range.family() == family)
    }
}

impl Range {
    fn new(network: IpNet, active: bool) -> Self {
        let host_bits = network.max_prefix_len() - network.prefix_len();
        let full = 1u64.checked_shl(host_bits.into()).unwrap_or(u64::MAX);
        let length = u32::try_from(full)
            .unwrap_or(u32::MAX)
            .min(RANGE_OFFSETS_MAX);
        // IPv4: the network and the broadcast address, unless there is no room for them (RFC 3021).
        // IPv6: the subnet-router anycast address (RFC 4291 2.6.1), which /127 does not have (RFC 6164).
        let first = u32::from(host_bits >= 2);
        let last = match network {
            IpNet::V4(_) if host_bits >= 2 && u64::from(length) == full => length - 1,
            _ => length,
        };
        Self {
            network,
            active,
            length,
            pool: Pool::new(first, last),
        }
    }

    fn family(&self) -> Family {
        Family::of(self.network.addr())
    }

    fn address(&self, offset: u32) -> IpAddr {
        match self.network.network() {
            IpAddr::V4(base) => Ipv4Addr::from_bits(base.to_bits() + offset).into(),
            IpAddr::V6(base) => Ipv6Addr::from_bits(base.to_bits() + u128::from(offset)).into(),
        }
    }

    /// The offset of an address of this range, if its table has a row for it.
    fn offset(&self, address: IpAddr) -> Option<u32> {
        let offset = match (self.network.network(), address) {
            (IpAddr::V4(base), IpAddr::V4(address)) => {
                u128::from(address.to_bits().checked_sub(base.to_bits())?)
            }
            (IpAddr::V6(base), IpAddr::V6(address)) => {
                address.to_bits().checked_sub(base.to_bits())?
            }
            _ => return None,
        };
        u32::try_from(offset).ok().filter(|&o| o < self.length)
    }

    fn is_usable(&self, offset: u32) -> bool {
        self.pool.contains(offset)
    }
}
