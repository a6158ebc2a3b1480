//! Names for addresses, for events and listings. Kept by the model as objects come and go.

use std::{collections::HashMap, fmt, net::IpAddr};

use crate::objects::ObjectName;

/// An object that has an address. The order is the order of preference when several claim it.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum AddressOwner {
    /// A node, by name.
    Node(String),
    /// A pod.
    Pod(ObjectName),
    /// A Service.
    Service(ObjectName),
}

impl fmt::Display for AddressOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => f.write_str(name),
            Self::Pod(name) | Self::Service(name) => name.fmt(f),
        }
    }
}

/// Owners by address.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// Never empty, sorted; more than one only while objects contradict each other.
    owners: HashMap<IpAddr, Vec<AddressOwner>>,
}

impl Names {
    /// The owner of `address`.
    pub(super) fn get(&self, address: IpAddr) -> Option<&AddressOwner> {
        self.owners.get(&address)?.first()
    }

    /// `owner` has `after` instead of `before`.
    pub(super) fn replace(&mut self, owner: &AddressOwner, before: &[IpAddr], after: &[IpAddr]) {
        if before == after {
            return;
        }
        for address in before {
            if let Some(owners) = self.owners.get_mut(address) {
                owners.retain(|other| other != owner);
                if owners.is_empty() {
                    self.owners.remove(address);
                }
            }
        }
        for address in after {
            let owners = self.owners.entry(*address).or_default();
            if let Err(place) = owners.binary_search(owner) {
                owners.insert(place, owner.clone());
            }
        }
    }
}
