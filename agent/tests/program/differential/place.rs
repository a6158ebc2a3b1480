//! Where addresses are in a random world: what the agent's node manager would make of its Node
//! objects and the devices of the bed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use weir_agent::{
    datapath::HopRef,
    model::FrontendKind,
    objects::{Family, Object},
};
use weir_common::ipcache::{class, flag};

use crate::{
    bed::{Bed, CLIENT, OTHER, SERVER},
    support::FAMILIES,
    world::{World, reference::Reference},
};

/// What is at an address, Services apart.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// A pod of this node.
    Pod(u32),
    /// The other node and its pods.
    Remote,
    /// This node, the outside, or nobody.
    Stack,
}

/// The places of a world. The pod range of this node is always the bed's.
#[derive(Clone, Debug, Default)]
pub struct Places {
    pods: BTreeMap<IpAddr, u32>,
    /// By prefix, a class of the ipcache.
    classes: BTreeMap<IpNet, u8>,
}

impl Places {
    /// The bed alone.
    pub fn of_bed(bed: &mut Bed) -> Self {
        let mut places = Self::default();
        for family in FAMILIES {
            bed.family = family;
            for pod in [CLIENT, SERVER, OTHER] {
                places.pods.insert(bed.pod(pod), pod);
            }
            for (prefix, class) in [
                (bed.remote_pods(), class::REMOTE_PODS),
                (bed.remote_node().into(), class::REMOTE_NODE),
                (bed.node().into(), class::THIS_NODE),
            ] {
                places.classes.insert(prefix, class);
            }
        }
        places
    }

    /// The same with the nodes of a world: all but this one are behind the bed's other node.
    pub fn with(&self, world: &World) -> Self {
        let mut places = self.clone();
        let nodes = || {
            world.objects.values().filter_map(|object| match object {
                Object::Node(node) => Some(node),
                _ => None,
            })
        };
        let others = || nodes().filter(|node| node.name.name != world.node);
        let this = nodes().filter(|node| node.name.name == world.node);
        for node in others() {
            for range in &node.pod_cidrs {
                places.classes.insert(range.trunc(), class::REMOTE_PODS);
            }
        }
        for (nodes, class) in [
            (others().collect::<Vec<_>>(), class::REMOTE_NODE),
            (this.collect(), class::THIS_NODE),
        ] {
            for node in nodes {
                for address in node.internal_ips.iter().chain(&node.external_ips) {
                    places.classes.insert((*address).into(), class);
                }
            }
        }
        places
    }

    /// Makes the ipcache say so, which said `before`.
    pub fn apply(&self, bed: &mut Bed, before: &Self) {
        for prefix in before.classes.keys() {
            if !self.classes.contains_key(prefix) {
                bed.datapath.remove_ipcache(*prefix).unwrap();
            }
        }
        for (prefix, class, flags) in self.prefixes() {
            let hop = match class {
                class::THIS_NODE => HopRef::Host,
                _ => HopRef::Node("node2", Family::of(prefix.addr())),
            };
            bed.datapath.set_ipcache(prefix, class, flags, hop).unwrap();
        }
    }

    /// Prefixes of the ipcache without Services: class and flags.
    pub fn prefixes(&self) -> impl Iterator<Item = (IpNet, u8, u8)> {
        self.classes.iter().map(|(prefix, class)| {
            let flags = match *class {
                class::THIS_NODE => flag::NODE_PORTS,
                _ => 0,
            };
            (*prefix, *class, flags)
        })
    }

    /// The large pod range of this node.
    pub fn own_range(&self) -> IpNet {
        "fd01::/64".parse().unwrap()
    }

    /// What is at an address.
    pub fn at(&self, address: IpAddr) -> Place {
        if let Some(pod) = self.pods.get(&address) {
            return Place::Pod(*pod);
        }
        let around = self.classes.iter().filter(|(p, _)| p.contains(&address));
        match around.max_by_key(|(prefix, _)| prefix.prefix_len()) {
            Some((_, &(class::REMOTE_PODS | class::REMOTE_NODE))) => Place::Remote,
            _ => Place::Stack,
        }
    }

    /// Whether it is an address of this node, where node ports are served.
    pub fn is_this_node(&self, address: IpAddr) -> bool {
        self.classes.get(&address.into()) == Some(&class::THIS_NODE)
    }

    /// Addresses of this node.
    pub fn this_node(&self) -> BTreeSet<IpAddr> {
        let addresses = self.classes.keys().map(IpNet::addr);
        addresses.filter(|a| self.is_this_node(*a)).collect()
    }

    /// Whether some port of an address is a Service's.
    pub fn is_served(&self, reference: &Reference, address: IpAddr) -> bool {
        let ports = reference.services.values();
        let mut frontends = ports.flat_map(|port| &port.frontends);
        frontends.any(|frontend| frontend.address == Some(address))
    }

    /// Whether a port that nobody serves is refused at an address: at a ClusterIP, and at a
    /// LoadBalancer address that is no node's.
    pub fn is_refused(&self, reference: &Reference, address: IpAddr) -> bool {
        let is_nodes = matches!(
            self.classes.get(&address.into()),
            Some(&(class::THIS_NODE | class::REMOTE_NODE))
        );
        let ports = reference.services.values();
        let mut frontends = ports.flat_map(|port| &port.frontends);
        frontends.any(|frontend| {
            frontend.address == Some(address)
                && match frontend.kind {
                    FrontendKind::ClusterIp => true,
                    FrontendKind::LoadBalancer => !is_nodes,
                    _ => false,
                }
        })
    }

    /// The bits that frontends at their own address add to its row.
    pub fn flags_of_frontends(&self, reference: &Reference, address: IpAddr) -> u8 {
        let ports = reference.services.values();
        let mut frontends = ports.flat_map(|port| &port.frontends);
        let is_cluster_ip = frontends.any(|frontend| {
            frontend.address == Some(address) && frontend.kind == FrontendKind::ClusterIp
        });
        let mut flags = flag::FRONTENDS;
        if self.is_refused(reference, address) {
            flags |= flag::REFUSE;
        }
        if is_cluster_ip {
            flags |= flag::CLUSTER_IP;
        }
        flags
    }
}
