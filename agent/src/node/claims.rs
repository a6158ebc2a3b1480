//! Who owns which pod range and address. Two nodes cannot have the same: the claim of one is
//! refused, the same one on every node that sees the same objects.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::model;

/// Ranges and addresses with the node that has them; ranges are disjoint.
#[derive(Debug, Default)]
pub(super) struct Claims<'a> {
    pub(super) ranges: BTreeMap<IpNet, &'a str>,
    pub(super) addresses: BTreeMap<IpAddr, &'a str>,
    pub(super) problems: Vec<String>,
}

impl<'a> Claims<'a> {
    /// This node's claims first, because the pods that exist here are facts, then the others' in
    /// the order of their names.
    pub(super) fn new(own: &str, nodes: &'a BTreeMap<String, model::Node>) -> Self {
        let mut claims = Self::default();
        let this = nodes.get_key_value(own);
        let others = nodes.iter().filter(|(name, _)| *name != own);
        for (name, node) in this.into_iter().chain(others) {
            for range in &node.pod_cidrs {
                claims.claim_range(name, range.trunc());
            }
            for address in &node.addresses {
                claims.claim_address(name, *address);
            }
        }
        claims
    }

    fn claim_range(&mut self, node: &'a str, range: IpNet) {
        if range.prefix_len() == 0 {
            self.problems.push(format!(
                "the pod range {range} of node {node} is the whole address space and is not used"
            ));
            return;
        }
        match self.overlapping(range) {
            None => {
                self.ranges.insert(range, node);
            }
            Some((taken, owner)) if owner == node && taken == range => {}
            Some((taken, owner)) => self.problems.push(format!(
                "the pod range {range} of node {node} overlaps {taken} of node {owner} and is not \
                 used; correct spec.podCIDRs of one of them"
            )),
        }
    }

    /// As the ranges are disjoint, one that contains `range` is its predecessor, and if any is
    /// contained in it, its successor is.
    fn overlapping(&self, range: IpNet) -> Option<(IpNet, &'a str)> {
        let before = self.ranges.range(..=range).next_back();
        let after = self.ranges.range(range..).next();
        before
            .into_iter()
            .chain(after)
            .find(|(taken, _)| taken.contains(&range) || range.contains(*taken))
            .map(|(taken, owner)| (*taken, *owner))
    }

    fn claim_address(&mut self, node: &'a str, address: IpAddr) {
        match self.addresses.entry(address) {
            Entry::Vacant(entry) => {
                entry.insert(node);
            }
            Entry::Occupied(entry) if *entry.get() == node => {}
            Entry::Occupied(entry) => self.problems.push(format!(
                "node {node} and node {} both have the address {address} in their status; it is \
                 taken to be the latter's",
                entry.get()
            )),
        }
    }
}
