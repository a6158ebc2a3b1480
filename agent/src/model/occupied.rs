//! The addresses that belong to nodes and their pods, and can therefore be no Service's: traffic
//! to them would be taken for the Service's. Kept by the model as nodes come and go.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;

use super::Node;
use crate::objects::Family;

/// What a node has a range for.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Purpose {
    /// It is one of the node's addresses.
    Address,
    /// Addresses of its pods.
    Pods,
}

/// A range and the node that has it. The order is the order in which they are named.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Occupant {
    pub(super) purpose: Purpose,
    pub(super) node: String,
}

/// Ranges by network.
#[derive(Debug, Default)]
pub(super) struct Occupied {
    /// Never empty; more than one only while nodes contradict each other.
    occupants: HashMap<IpNet, BTreeSet<Occupant>>,
    /// How many ranges there are of each prefix length: a look-up tries only these.
    lengths: BTreeMap<(Family, u8), usize>,
}

impl Occupied {
    /// Who has `address`, and as part of which range.
    pub(super) fn get(&self, address: IpAddr) -> Option<(IpNet, &Occupant)> {
        self.find(address, BTreeSet::first)
    }

    /// Whose pods' range `address` lies in.
    pub(super) fn pods(&self, address: IpAddr) -> Option<(IpNet, &Occupant)> {
        let is_pods = |occupant: &&Occupant| occupant.purpose == Purpose::Pods;
        self.find(address, |occupants| occupants.iter().find(is_pods))
    }

    /// Whether `address` is one of the addresses of node `name`.
    pub(super) fn is_address_of(&self, address: IpAddr, name: &str) -> bool {
        let occupants = self.occupants.get(&IpNet::from(address));
        let is_it =
            |occupant: &Occupant| occupant.purpose == Purpose::Address && occupant.node == name;
        occupants.is_some_and(|occupants| occupants.iter().any(is_it))
    }

    /// The narrowest range around `address` of which `choose` chooses an occupant.
    fn find<'a>(
        &'a self,
        address: IpAddr,
        choose: impl Fn(&'a BTreeSet<Occupant>) -> Option<&'a Occupant>,
    ) -> Option<(IpNet, &'a Occupant)> {
        let family = Family::of(address);
        let lengths = self.lengths.range((family, 0)..=(family, u8::MAX)).rev();
        lengths.into_iter().find_map(|((_, length), _)| {
            let range = IpNet::new(address, *length).ok()?.trunc();
            Some((range, choose(self.occupants.get(&range)?)?))
        })
    }

    /// Node `name` has become `after`. The ranges that it has lost or won.
    pub(super) fn replace(
        &mut self,
        name: &str,
        before: Option<&Node>,
        after: Option<&Node>,
    ) -> Vec<IpNet> {
        let before = before.map(ranges).unwrap_or_default();
        let after = after.map(ranges).unwrap_or_default();
        let occupant = |purpose| Occupant {
            purpose,
            node: name.to_owned(),
        };
        for (range, purpose) in before.difference(&after) {
            self.remove(*range, &occupant(*purpose));
        }
        for (range, purpose) in after.difference(&before) {
            self.insert(*range, occupant(*purpose));
        }
        let changed = before.symmetric_difference(&after);
        changed.map(|(range, _)| *range).collect()
    }

    fn insert(&mut self, range: IpNet, occupant: Occupant) {
        let occupants = self.occupants.entry(range).or_default();
        if occupants.is_empty() {
            *self.lengths.entry(length(range)).or_default() += 1;
        }
        occupants.insert(occupant);
    }

    fn remove(&mut self, range: IpNet, occupant: &Occupant) {
        let Some(occupants) = self.occupants.get_mut(&range) else {
            return;
        };
        occupants.remove(occupant);
        if !occupants.is_empty() {
            return;
        }
        self.occupants.remove(&range);
        if let Some(count) = self.lengths.get_mut(&length(range)) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&length(range));
            }
        }
    }
}

fn length(range: IpNet) -> (Family, u8) {
    (Family::of(range.addr()), range.prefix_len())
}

fn ranges(node: &Node) -> BTreeSet<(IpNet, Purpose)> {
    let addresses = node.addresses.iter();
    let pods = node
        .pod_cidrs
        .iter()
        .map(|cidr| (cidr.trunc(), Purpose::Pods));
    addresses
        .map(|address| (IpNet::from(*address), Purpose::Address))
        .chain(pods)
        .collect()
}
