//! At which addresses of this node NodePorts are served: the setting `nodeport-addresses`. HostPorts are
//! served at all of them. Pure; called by [`super::plan`].

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::plan::Snapshot;
use crate::objects::Family;

/// The setting.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum NodePortAddresses {
    /// Those of devices with a default route and of the setting `devices`, and those in the status of the
    /// Node object.
    #[default]
    Found,
    /// The first of each family in the status of the Node object, InternalIPs before ExternalIPs.
    Primary,
    /// Those in these ranges; of a family without a range as [`Self::Found`].
    Ranges(Vec<IpNet>),
}

/// What is chosen from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidates<'a> {
    /// Every address of this node.
    pub all: &'a BTreeSet<IpAddr>,
    /// Those in the status of the Node object, in their order.
    pub of_status: &'a [IpAddr],
    /// Names in the setting `devices`.
    pub devices: &'a [String],
}

impl NodePortAddresses {
    /// The addresses, and what of the setting chooses nothing.
    pub(super) fn choose(
        &self,
        candidates: Candidates<'_>,
        snapshot: &Snapshot,
    ) -> (BTreeSet<IpAddr>, Vec<String>) {
        let found = || found(candidates, snapshot);
        match self {
            Self::Found => (found(), Vec::new()),
            Self::Primary => {
                let mut primary = BTreeMap::new();
                for address in candidates.of_status {
                    primary.entry(Family::of(*address)).or_insert(*address);
                }
                (primary.into_values().collect(), Vec::new())
            }
            Self::Ranges(ranges) => {
                let has_range = |address: &IpAddr| {
                    let family = Family::of(*address);
                    ranges
                        .iter()
                        .any(|range| Family::of(range.addr()) == family)
                };
                let others = found().into_iter().filter(|address| !has_range(address));
                let in_ranges = candidates.all.iter().copied();
                let in_ranges =
                    in_ranges.filter(|address| ranges.iter().any(|range| range.contains(address)));
                let useless = ranges
                    .iter()
                    .filter(|range| !candidates.all.iter().any(|address| range.contains(address)));
                let problem = |range: &IpNet| {
                    format!(
                        "no address of this node lies in {range} of the setting `nodeport-addresses`: \
                         NodePorts are not served there; correct the setting, or the node's addresses"
                    )
                };
                (
                    others.chain(in_ranges).collect(),
                    useless.map(problem).collect(),
                )
            }
        }
    }
}

fn found(candidates: Candidates<'_>, snapshot: &Snapshot) -> BTreeSet<IpAddr> {
    let is_chosen = |ifindex: u32| {
        let mut links = snapshot.links.iter();
        snapshot.default_route_devices.contains(&ifindex)
            || links.any(|link| link.ifindex == ifindex && candidates.devices.contains(&link.name))
    };
    let on_devices = snapshot.addresses.iter();
    let on_devices = on_devices
        .filter(|a| is_chosen(a.ifindex))
        .map(|a| a.address.addr());
    on_devices
        .chain(candidates.of_status.iter().copied())
        .filter(|address| candidates.all.contains(address))
        .collect()
}
