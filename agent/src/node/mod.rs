//! The ways to other nodes: from the Node objects and the state of this node's network to routes in
//! the kernel, and to what the data path has to know: devices, next hops, ipcache.
//!
//! [`NodeManager::reconcile`] does the I/O (through [`crate::netlink`]); what is wanted is computed by
//! the pure functions of [`plan`]. The agent's event loop calls it whenever Node objects or the
//! network have changed, and applies the difference of two plans to the maps. It never touches a map.

mod claims;
#[cfg(test)]
mod device_tests;
pub mod devices;
mod node_ports;
pub mod plan;
#[cfg(test)]
mod plan_tests;
mod routes;

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

pub use self::{
    node_ports::NodePortAddresses,
    plan::{NodePlan, PlanChanges, Snapshot},
};
use crate::{
    model,
    netlink::{Netlink, NetlinkError},
    objects::Family,
};

/// What the operator has set.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NodeSettings {
    /// Names of the devices that the programs are attached to; empty: found.
    pub devices: Vec<String>,
    /// MTU of the pods' devices, bytes; `None`: the smallest of the devices.
    pub mtu: Option<u32>,
    /// Where NodePorts are served.
    pub node_port_addresses: NodePortAddresses,
}

/// How packets for the pods of a node are sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NodeHop {
    /// Interface index of the device.
    pub ifindex: u32,
    /// The neighbour to send to, on that device's link; may be of the other family (RFC 5549).
    pub gateway: IpAddr,
    /// MTU of the way, bytes (layer 3).
    pub mtu: u32,
    /// The address that this node sends from towards there, of the family of the packets, as the kernel's
    /// route tells, else the device's; `None`: it has none.
    pub source: Option<IpAddr>,
}

/// A node's next hop of one family, or why there is none.
pub type HopOutcome = Result<NodeHop, String>;

/// The next hop that an ipcache entry refers to.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum HopRef {
    /// None.
    None,
    /// This node's own stack routes it.
    Host,
    /// That of the node for the family, see [`NodePlan::hops`].
    Node(String, Family),
}

/// What the ipcache says of a prefix.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IpcacheTarget {
    /// One of [`weir_common::ipcache::class`].
    pub class: u8,
    /// Bits of [`weir_common::ipcache::flag`], those of Services' frontends apart.
    pub flags: u8,
    /// Next hop.
    pub hop: HopRef,
}

/// A difference between two contents of the ipcache.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IpcacheChange {
    /// Prefix, truncated.
    pub prefix: IpNet,
    /// New entry; `None`: gone.
    pub entry: Option<IpcacheTarget>,
}

/// Keeps this node's routes to the other nodes.
#[derive(Debug)]
pub struct NodeManager {
    name: String,
    settings: NodeSettings,
}

impl NodeManager {
    /// For the node of that name.
    pub fn new(name: impl Into<String>, settings: NodeSettings) -> Self {
        Self {
            name: name.into(),
            settings,
        }
    }

    /// Brings the kernel's routes in line with the Node objects and returns what the data path
    /// should know. Compare with the plan before by [`NodePlan::changes_since`].
    ///
    /// Routes of nodes that are not in `nodes` are removed only when the source is `synced`: a
    /// list that is not complete yet removes nothing. Routes that could not be entered are
    /// counted in [`NodePlan::failing`] and named in its problems; the next call tries again.
    ///
    /// # Errors
    ///
    /// When the state of the network cannot be read; then nothing has been changed.
    pub async fn reconcile(
        &mut self,
        nodes: &BTreeMap<String, model::Node>,
        synced: bool,
        netlink: &Netlink,
    ) -> Result<NodePlan, NetlinkError> {
        let cluster = plan::Cluster::new(&self.name, nodes);
        let routes = netlink.route_facts().await?;
        let mut snapshot = Snapshot {
            links: netlink.links().await?,
            addresses: netlink.addresses().await?,
            default_route_devices: routes.default_devices,
            ipv6_routes_have_sources: routes.ipv6_has_sources,
            resolved: netlink.route_get_all(cluster.node_addresses()).await?,
        };
        let wanted = cluster.routes(&snapshot);
        let failures = routes::apply(netlink, &wanted, synced).await?;
        let ranges = netlink.route_get_all(cluster.range_addresses()).await?;
        snapshot.resolved.extend(ranges);

        let mut plan = cluster.plan(&self.settings, &snapshot);
        plan.failing = failures.len();
        plan.problems
            .extend(failures.iter().map(ToString::to_string));
        Ok(plan)
    }
}
