//! The host side of a pod: a route and a permanent neighbour for each of its addresses, and the
//! switches of its device. The endpoint manager calls it; the device itself is the CNI plugin's.
//!
//! The neighbour is permanent so that nothing is learnt from the wire and no first packet waits
//! for ARP or neighbour discovery.

use std::{collections::BTreeSet, net::IpAddr};

use super::{Change, Netlink, NetlinkError, Route, sysctl};

/// What the host has to know of a pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostSide {
    /// Interface index of the host side of the veth pair, in the namespace of the [`Netlink`].
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Addresses of the pod.
    pub addresses: Vec<IpAddr>,
    /// Ethernet address of the pod's side.
    pub pod_mac: [u8; 6],
}

/// Sets the device up, enters the pod's routes and neighbours by one system call, and sets the
/// device's switches. Idempotent. On an error the rest is done all the same; [`remove`] undoes it.
///
/// # Errors
///
/// The first failure, naming the route, neighbour or switch.
pub async fn install(netlink: &Netlink, pod: &HostSide) -> Result<(), InstallError> {
    let mut changes = vec![Change::SetLinkUp(pod.ifindex)];
    for &address in &pod.addresses {
        changes.push(Change::ReplaceRoute(Route::to_pod(address, pod.ifindex)));
        changes.push(Change::ReplaceNeighbour {
            ifindex: pod.ifindex,
            address,
            mac: pod.pod_mac,
        });
    }
    // Before the device is up: it would else begin duplicate address detection.
    let switches = sysctl::set_pod_device(&pod.name);
    let failures = netlink.apply(changes).await;
    if let Some(error) = failures.into_iter().next() {
        return Err(error.into());
    }
    Ok(switches?)
}

/// Removes the pod's routes and neighbours if they are there. The device may be gone, and with it
/// the routes.
///
/// # Errors
///
/// All failures; everything that could be removed has been.
pub async fn remove(netlink: &Netlink, ifindex: u32, addresses: &[IpAddr]) -> Vec<NetlinkError> {
    let mut changes = Vec::with_capacity(addresses.len() * 2);
    for &address in addresses {
        changes.push(Change::RemoveRoute(Route::to_pod(address, ifindex)));
        changes.push(Change::RemoveNeighbour { ifindex, address });
    }
    netlink.apply(changes).await
}

/// Removes all routes to pods whose address is not in `keep`; returns the addresses.
///
/// # Errors
///
/// When the routes cannot be listed, or the first that cannot be removed.
pub async fn sweep(
    netlink: &Netlink,
    keep: &BTreeSet<IpAddr>,
) -> Result<Vec<IpAddr>, NetlinkError> {
    let stale: Vec<Route> = netlink
        .own_routes()
        .await?
        .into_iter()
        .filter(|route| route.is_to_pod() && !keep.contains(&route.destination.addr()))
        .collect();
    let mut changes = Vec::with_capacity(stale.len() * 2);
    for route in &stale {
        changes.push(Change::RemoveRoute(*route));
        if let super::RouteTarget::Link { ifindex } = route.target {
            changes.push(Change::RemoveNeighbour {
                ifindex,
                address: route.destination.addr(),
            });
        }
    }
    match netlink.apply(changes).await.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(stale.iter().map(|route| route.destination.addr()).collect()),
    }
}

/// Why the host side of a pod is not complete.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A route or neighbour.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A switch of the device.
    #[error(transparent)]
    Sysctl(#[from] sysctl::SysctlError),
}
