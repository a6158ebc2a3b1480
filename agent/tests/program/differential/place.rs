//! Where addresses are in a random world: what the agent's node manager would make of its Node
//! objects and the devices of the bed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use weir_agent::{
    datapath::{HopRef, NodeConfig},
    model::FrontendKind,
    objects::{Family, Object},
};
use weir_common::ipcache::{class, flag};

use crate::{
    bed::{Bed, CLIENT, OTHER, SERVER},
    support::FAMILIES,
    world::{World, random::Random, reference::Reference},
};

/// Ranges of which some are in `non-masquerade-cidrs`: that of the outside, and one of addresses that
/// nodes and Services may have, for each family.
const KEPT: [&str; 4] = [
    "203.0.113.0/24",
    "10.0.0.4/31",
    "2001:db8::/64",
    "fd00::4/127",
];

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

/// What the node's settings say of what pods send to the outside.
#[derive(Clone, Debug)]
pub struct Masquerade {
    v4: bool,
    v6: bool,
    kept: Vec<IpNet>,
}

impl Default for Masquerade {
    fn default() -> Self {
        Self {
            v4: true,
            v6: true,
            kept: Vec::new(),
        }
    }
}

impl Masquerade {
    pub fn random(random: &mut Random) -> Self {
        let ranges = KEPT.into_iter().filter(|_| random.one_in(3));
        Self {
            kept: ranges.map(|range| range.parse().unwrap()).collect(),
            v4: !random.one_in(5),
            v6: !random.one_in(5),
        }
    }

    /// Whether pods keep their address towards another one.
    fn is_kept(&self, address: IpAddr) -> bool {
        let is_on = match address {
            IpAddr::V4(_) => self.v4,
            IpAddr::V6(_) => self.v6,
        };
        !is_on || self.kept.iter().any(|range| range.contains(&address))
    }
}

/// The places of a world. The pod range of this node is always the bed's.
#[derive(Clone, Debug, Default)]
pub struct Places {
    pods: BTreeMap<IpAddr, u32>,
    /// By prefix, a class of the ipcache.
    classes: BTreeMap<IpNet, u8>,
    pub masquerade: Masquerade,
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

    /// Makes the configuration and the ipcache say so, which said `before`.
    pub fn apply(&self, bed: &mut Bed, before: &Self) {
        let config = NodeConfig {
            refusals_per_second: 0,
            masquerade_v4: self.masquerade.v4,
            masquerade_v6: self.masquerade.v6,
            non_masquerade_cidrs: self.masquerade.kept.clone(),
            ..bed.node_config()
        };
        bed.datapath.config_mut().apply(&config).unwrap();
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
                class::THIS_NODE => flag::NODE_PORTS | flag::HOST_PORTS,
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

    /// Whether pods that send to an address do so as the node: it is no node's and in no pod range, and
    /// no setting says otherwise.
    pub fn is_masqueraded(&self, address: IpAddr) -> bool {
        let mut ranges = self.classes.keys();
        !self.pods.contains_key(&address)
            && !ranges.any(|range| range.contains(&address))
            && !self.own_range().contains(&address)
            && !self.masquerade.is_kept(address)
    }

    /// Ranges to which pods keep their address.
    pub fn kept_ranges(&self) -> &[IpNet] {
        &self.masquerade.kept
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

    /// Whether it is the ClusterIP of a Service.
    pub fn is_cluster_ip(&self, reference: &Reference, address: IpAddr) -> bool {
        let ports = reference.services.values();
        let mut frontends = ports.flat_map(|port| &port.frontends);
        frontends.any(|frontend| {
            frontend.address == Some(address) && frontend.kind == FrontendKind::ClusterIp
        })
    }

    /// The bits that frontends at their own address add to its row.
    pub fn flags_of_frontends(&self, reference: &Reference, address: IpAddr) -> u8 {
        let is_cluster_ip = self.is_cluster_ip(reference, address);
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
