//! Looks whether what was brought into the kernel is still there: programs that somebody detached, and
//! routes to pods that somebody removed or that went while a device was down, are put back. Called by
//! the agent's tick.

use std::{collections::HashSet, net::IpAddr};

use super::{Agent, Row};
use crate::{
    endpoint::{EndpointKey, EndpointState},
    netlink::RouteTarget,
};

impl Agent {
    /// Marks what is missing: devices as rows, pods in the endpoint manager, whose tick installs them
    /// again. `with_routes` asks the kernel for the routes to pods too, which is worth it after a
    /// change of the network only. Gives the number of things missing.
    pub(super) async fn find_drift(&mut self, with_routes: bool) -> usize {
        // Until the new maps hold everything the programs of an earlier agent are left alone.
        if self.late.waiting {
            return 0;
        }
        let devices: Vec<u32> = self
            .plan
            .devices
            .keys()
            .copied()
            .filter(|ifindex| !self.datapath.is_device_attached(*ifindex))
            // One that failed is tried again in its own time, and what waits for its turn is not missing.
            .filter(|ifindex| !self.rows.is_known(&Row::Device(*ifindex)))
            .collect();
        for ifindex in &devices {
            tracing::warn!(
                ifindex,
                "programs of a device were detached; attaching them again"
            );
            self.mark(Row::Device(*ifindex));
        }
        let routes = if with_routes {
            self.routes_to_pods().await
        } else {
            None
        };
        let missing: Vec<(EndpointKey, &str)> = self
            .endpoints
            .list()
            .filter(|endpoint| matches!(endpoint.state, EndpointState::Ready))
            .filter_map(|endpoint| {
                let spec = &endpoint.spec;
                let has_route = |address: &IpAddr| {
                    routes
                        .as_ref()
                        .is_none_or(|routes| routes.contains(&(*address, spec.host_ifindex)))
                };
                let what = if !self.datapath.is_endpoint_attached(spec.host_ifindex) {
                    "its programs were detached"
                } else if !spec.addresses.iter().all(has_route) {
                    "its routes on the node were removed"
                } else {
                    return None;
                };
                Some((spec.key.clone(), what))
            })
            .collect();
        for (key, what) in &missing {
            tracing::warn!(endpoint = %key, "{what}; installing it again");
            self.endpoints.suspect(key, what);
        }
        let own = self.find_host_drift(with_routes) + self.find_defrag_drift(with_routes);
        devices.len() + missing.len() + own
    }

    async fn routes_to_pods(&self) -> Option<HashSet<(IpAddr, u32)>> {
        match self.netlink.own_routes().await {
            Ok(routes) => Some(
                routes
                    .iter()
                    .filter(|route| route.is_to_pod())
                    .filter_map(|route| match route.target {
                        RouteTarget::Link { ifindex } => Some((route.destination.addr(), ifindex)),
                        _ => None,
                    })
                    .collect(),
            ),
            Err(error) => {
                tracing::warn!(%error, "cannot read the routes to pods");
                None
            }
        }
    }
}
