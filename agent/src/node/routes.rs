//! Wanted routes against those in the kernel: only differences are written, and whatever of our
//! protocol nobody wants disappears, leftovers of a crash included. Routes to pods are not its business.

use std::collections::BTreeMap;

use ipnet::IpNet;

use crate::netlink::{Change, Netlink, NetlinkError, Route};

/// Makes the kernel's routes of our protocol, those to pods apart, the wanted ones. Returns what
/// failed; `sweep` says whether unwanted ones are removed.
pub(super) async fn apply(
    netlink: &Netlink,
    wanted: &[Route],
    sweep: bool,
) -> Result<Vec<NetlinkError>, NetlinkError> {
    let present = netlink.own_routes().await?;
    Ok(netlink.apply(differences(&present, wanted, sweep)).await)
}

/// The changes from the routes that are there to those wanted.
fn differences(present: &[Route], wanted: &[Route], sweep: bool) -> Vec<Change> {
    // Destination and metric are the identity of a route.
    let mut unwanted: BTreeMap<(IpNet, u32), &Route> = present
        .iter()
        .filter(|route| route.is_to_node())
        .map(|route| ((route.destination, route.metric), route))
        .collect();
    let mut changes = Vec::new();
    for route in wanted {
        if unwanted.remove(&(route.destination, route.metric)) != Some(route) {
            changes.push(Change::ReplaceRoute(*route));
        }
    }
    if sweep {
        changes.extend(unwanted.into_values().copied().map(Change::RemoveRoute));
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn via(destination: &str, gateway: &str) -> Route {
        Route::via(destination.parse().unwrap(), 2, gateway.parse().unwrap())
    }

    #[test]
    fn only_differences_are_written() {
        let kept = via("10.0.1.0/24", "192.0.2.1");
        let moved = via("fd00:2::/64", "2001:db8::2");
        let moved_from = via("fd00:2::/64", "2001:db8::9");
        let gone = via("10.0.3.0/24", "192.0.2.3");
        let pod = Route::to_pod("10.0.0.7".parse().unwrap(), 9);
        let present = [kept, moved_from, gone, pod];
        let wanted = [kept, moved];
        assert_eq!(
            differences(&present, &wanted, true),
            [Change::ReplaceRoute(moved), Change::RemoveRoute(gone)]
        );
        assert_eq!(
            differences(&present, &wanted, false),
            [Change::ReplaceRoute(moved)]
        );
        assert_eq!(differences(&[kept, moved, pod], &wanted, true), []);
    }
}
