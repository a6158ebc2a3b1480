//! Which devices of this node the programs are attached to, and which addresses the node sends from at
//! each of its devices. Pure functions of a [`Snapshot`], called by [`super::plan`].

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::plan::{Snapshot, is_nobodys};
use crate::netlink::Link;

/// The addresses that a device sends from; `None`: this node has none of the family.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SourceAddresses {
    /// IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6.
    pub v6: Option<Ipv6Addr>,
    /// `v6` is what the kernel would choose for everything that leaves by the device: its only preferred address, and
    /// no route says another.
    pub sole_v6: bool,
}

impl SourceAddresses {
    fn or(self, other: Self) -> Self {
        Self {
            v4: self.v4.or(other.v4),
            v6: self.v6.or(other.v6),
            sole_v6: false,
        }
    }

    fn first(mut addresses: impl Iterator<Item = IpAddr> + Clone) -> Self {
        Self {
            v4: addresses.clone().find_map(|address| match address {
                IpAddr::V4(v4) => Some(v4),
                IpAddr::V6(_) => None,
            }),
            v6: addresses.find_map(|address| match address {
                IpAddr::V6(v6) => Some(v6),
                IpAddr::V4(_) => None,
            }),
            sole_v6: false,
        }
    }

    /// The address of the family of `like`.
    pub fn of_family(self, like: IpAddr) -> Option<IpAddr> {
        match like {
            IpAddr::V4(_) => self.v4.map(IpAddr::V4),
            IpAddr::V6(_) => self.v6.map(IpAddr::V6),
        }
    }
}

/// The addresses that every device of the node sends from, by interface index: a preferred one of its own,
/// first one that is in the status of the Node object, else one of the status that another device of the
/// node has, else one of its own that is deprecated. `of_status` are the addresses in the status of this node's Node object.
pub(super) fn source_addresses(
    snapshot: &Snapshot,
    of_status: &[IpAddr],
) -> BTreeMap<u32, SourceAddresses> {
    let is_candidate = |address: &IpAddr| !is_nobodys(*address);
    let on_devices = |ifindex: Option<u32>, preferred: bool| {
        snapshot
            .addresses
            .iter()
            .filter(move |a| {
                if preferred {
                    a.preferred
                } else {
                    a.second_choice
                }
            })
            .filter(move |a| ifindex.is_none_or(|ifindex| a.ifindex == ifindex))
            .map(|a| a.address.addr())
            .filter(is_candidate)
    };
    let of_node = of_status
        .iter()
        .copied()
        .filter(|address| on_devices(None, true).any(|known| known == *address));
    let of_node = SourceAddresses::first(of_node);
    let sources = |link: &Link| {
        let own = on_devices(Some(link.ifindex), true);
        let others = on_devices(Some(link.ifindex), false);
        let named = own.clone().filter(|address| of_status.contains(address));
        let is_alone = own.clone().filter(IpAddr::is_ipv6).count() == 1;
        let chosen = SourceAddresses::first(named)
            .or(SourceAddresses::first(own))
            .or(of_node)
            .or(SourceAddresses::first(others));
        SourceAddresses {
            sole_v6: is_alone && !snapshot.ipv6_routes_have_sources,
            ..chosen
        }
    };
    snapshot
        .links
        .iter()
        .filter(|link| link.is_of_node())
        .map(|link| (link.ifindex, sources(link)))
        .collect()
}

/// Devices by which this node is reached or reaches others: with a default route, with an address of the
/// status of the Node object, or with the route to another node (`of_hops`).
pub(super) fn leading(
    snapshot: &Snapshot,
    of_status: &[IpAddr],
    of_hops: impl IntoIterator<Item = u32>,
) -> BTreeSet<u32> {
    let with_own_address = snapshot
        .addresses
        .iter()
        .filter(|a| of_status.contains(&a.address.addr()))
        .map(|a| a.ifindex);
    let is_usable = |ifindex: &u32| {
        let mut links = snapshot.links.iter();
        links.any(|link| link.ifindex == *ifindex && link.is_of_node())
    };
    snapshot
        .default_route_devices
        .iter()
        .copied()
        .chain(with_own_address)
        .chain(of_hops)
        .filter(is_usable)
        .collect()
}

/// Every other device that pods' traffic can leave by: up, with an address that others can send to, and no
/// port of a bridge or bond, nor in a VRF. Bridges of container engines and tunnels are among them. An address that is not ready yet
/// counts: once it is, the programs must be there.
pub(super) fn addressed(snapshot: &Snapshot) -> BTreeSet<u32> {
    snapshot
        .links
        .iter()
        .filter(|link| link.up && link.master.is_none() && link.is_of_node())
        .filter(|link| has_address(snapshot, link))
        .map(|link| link.ifindex)
        .collect()
}

/// Tells of the devices of VRFs that others could send to: what is not served there. `served` are the devices
/// that the programs are attached to.
///
/// A VRF has routing tables of its own. The programs ask those of the node, as pods are in no VRF: they would answer
/// clients behind such a device by another one.
pub(super) fn in_vrfs(snapshot: &Snapshot, served: &BTreeMap<u32, String>) -> Vec<String> {
    let vrf_of = |link: &Link| {
        let mut links = snapshot.links.iter();
        let master = link.master?;
        links.find(|other| other.ifindex == master && other.kind == "vrf")
    };
    snapshot
        .links
        .iter()
        .filter(|link| link.is_of_node() && has_address(snapshot, link))
        .filter_map(|link| Some((link, vrf_of(link)?)))
        .map(|(link, vrf)| {
            let pods = if served.contains_key(&link.ifindex) {
                "get an address of the node, and no answers"
            } else {
                "keep their own address"
            };
            format!(
                "the device {} belongs to the VRF {}, whose routes are not asked: clients there reach no NodePort, \
                 external or load balancer address of this node, and pods that a route leads there {pods}; take it \
                 out of the VRF if they are to be served",
                link.name, vrf.name
            )
        })
        .collect()
}

/// Whether a device has an address that others can send to.
fn has_address(snapshot: &Snapshot, link: &Link) -> bool {
    let mut addresses = snapshot.addresses.iter();
    addresses.any(|a| a.ifindex == link.ifindex && !is_nobodys(a.address.addr()))
}
