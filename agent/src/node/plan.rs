//! What is wanted, computed without I/O: a [`Cluster`] is made of the Node objects, says which
//! addresses must be resolved and which routes should be there, and makes the [`NodePlan`] of a
//! [`Snapshot`] of this node's network.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use weir_common::ipcache::{class, flag};

use super::{
    HopOutcome, HopRef, IpcacheChange, IpcacheTarget, NodeHop, NodeSettings,
    claims::Claims,
    devices::{self, SourceAddresses},
    node_ports::Candidates,
};
use crate::{
    model,
    netlink::{Address, Link, LinkLayer, Readiness, ResolvedRoute, Route},
    objects::Family,
};

/// MTU when no device tells one, bytes.
const DEFAULT_MTU: u32 = 1500;
/// The largest that an IP packet can be, bytes; loopback devices have a greater MTU.
const MAX_MTU: u32 = 65_535;
/// The least MTU of an IPv6 link, bytes (RFC 8200, section 5).
const MIN_IPV6_MTU: u32 = 1280;

/// This node's network as the kernel tells it.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Devices.
    pub links: Vec<Link>,
    /// Addresses.
    pub addresses: Vec<Address>,
    /// Interface indices of the devices with a default route.
    pub default_route_devices: BTreeSet<u32>,
    /// Some IPv6 route of this node says which address to send from.
    pub ipv6_routes_have_sources: bool,
    /// Ways to the addresses that [`Cluster`] asks for, or why there is none.
    pub resolved: BTreeMap<IpAddr, Result<ResolvedRoute, String>>,
}

/// What the data path should know.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NodePlan {
    /// Devices to attach to: interface index and name.
    pub devices: BTreeMap<u32, String>,
    /// Those of them by which this node is reached or reaches others, by interface index; all that the setting `devices`
    /// names.
    pub leading: BTreeSet<u32>,
    /// What every device of the node sends from, by interface index, those of `devices` included; the
    /// loopback device, pods' and Weir's own are not among them.
    pub sources: BTreeMap<u32, SourceAddresses>,
    /// Next hop of every other node for every family it has an address or a pod range of.
    pub hops: BTreeMap<(String, Family), HopOutcome>,
    /// Content of the ipcache, Services' addresses apart. Entries of the class `SERVICE` for the
    /// same address are to be preferred: a Service address may stand on a device.
    pub ipcache: BTreeMap<IpNet, IpcacheTarget>,
    /// Every address on any device of this node, also those that nothing is served at, but for those that are somebody
    /// else's.
    pub addresses: BTreeSet<IpAddr>,
    /// Pod ranges of this node.
    pub pod_cidrs: Vec<IpNet>,
    /// MTU of the pods' devices, bytes.
    pub mtu: u32,
    /// What is wrong, for people.
    pub problems: Vec<String>,
    /// Routes that could not be entered; the next reconciliation tries again.
    pub failing: usize,
}

/// The difference between two plans.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PlanChanges {
    /// Devices to attach to.
    pub attach: BTreeMap<u32, String>,
    /// Devices to detach from; they may be gone.
    pub detach: BTreeMap<u32, String>,
    /// Devices that have come, or send from other addresses, by interface index; `None`: gone.
    pub sources: BTreeMap<u32, Option<SourceAddresses>>,
    /// Next hops that are new or different; `None`: nobody needs it any more.
    pub hops: BTreeMap<(String, Family), Option<HopOutcome>>,
    /// Ipcache entries.
    pub ipcache: Vec<IpcacheChange>,
}

/// The Node objects, sorted out.
#[derive(Debug)]
pub struct Cluster<'a> {
    own: &'a str,
    nodes: &'a BTreeMap<String, model::Node>,
    claims: Claims<'a>,
    /// Ranges that are in use, by node.
    ranges: BTreeMap<&'a str, Vec<IpNet>>,
}

impl<'a> Cluster<'a> {
    /// As the node `own` sees it.
    pub fn new(own: &'a str, nodes: &'a BTreeMap<String, model::Node>) -> Self {
        let claims = Claims::new(own, nodes);
        let mut ranges: BTreeMap<&str, Vec<IpNet>> = BTreeMap::new();
        for (range, owner) in &claims.ranges {
            ranges.entry(owner).or_default().push(*range);
        }
        Self {
            own,
            nodes,
            claims,
            ranges,
        }
    }

    /// Addresses of the other nodes, to be resolved before [`Self::routes`].
    pub fn node_addresses(&self) -> BTreeSet<IpAddr> {
        self.others()
            .flat_map(|(_, node)| node.addresses.iter().copied())
            .collect()
    }

    /// The first address of the other nodes' pod ranges, to be resolved before [`Self::plan`], when
    /// the routes are in the kernel.
    pub fn range_addresses(&self) -> BTreeSet<IpAddr> {
        self.others()
            .flat_map(|(name, _)| self.ranges_of(name))
            .map(IpNet::addr)
            .collect()
    }

    /// The routes that should be there: pod ranges of this node lead nowhere (pods have routes of
    /// their own), those of a node on one of our links lead to it.
    pub fn routes(&self, snapshot: &Snapshot) -> Vec<Route> {
        let mut routes: Vec<Route> = self
            .ranges_of(self.own)
            .iter()
            .map(|range| Route::unreachable(*range))
            .collect();
        let links = by_index(snapshot);
        for (name, node) in self.others() {
            for range in self.ranges_of(name) {
                let Some(gateway) = gateway_for(node, family_of(range)) else {
                    continue;
                };
                if let Some(Ok(way)) = snapshot.resolved.get(&gateway)
                    && is_on_link(way)
                    && is_usable(&links, way.ifindex)
                {
                    routes.push(Route::via(*range, way.ifindex, gateway));
                }
            }
        }
        routes
    }

    /// Everything the data path should know.
    pub fn plan(&self, settings: &NodeSettings, snapshot: &Snapshot) -> NodePlan {
        let mut plan = NodePlan {
            addresses: snapshot
                .addresses
                .iter()
                .filter(|a| a.readiness != Readiness::Taken)
                .map(|a| a.address.addr())
                .collect(),
            pod_cidrs: self.ranges_of(self.own).to_vec(),
            problems: self.claims.problems.clone(),
            ..NodePlan::default()
        };
        if !self.nodes.contains_key(self.own) {
            plan.problems.push(format!(
                "there is no Node object named {:?}: this node has no pod range; is node-name right?",
                self.own
            ));
        }
        plan.sources = devices::source_addresses(snapshot, self.own_addresses());
        plan.hops = self.hops(snapshot, &plan.sources);
        self.fill_ipcache(settings, snapshot, &mut plan);
        let leading = self.choose_devices(settings, snapshot, &mut plan);
        choose_mtu(settings, snapshot, &leading, &mut plan);
        plan.leading = leading;
        let vrfs = devices::in_vrfs(snapshot, &plan.devices);
        plan.problems.extend(vrfs);
        plan
    }

    fn others(&self) -> impl Iterator<Item = (&'a str, &'a model::Node)> {
        let own = self.own;
        self.nodes
            .iter()
            .map(|(name, node)| (name.as_str(), node))
            .filter(move |(name, _)| *name != own)
    }

    fn ranges_of(&self, node: &str) -> &[IpNet] {
        self.ranges.get(node).map_or(&[], Vec::as_slice)
    }

    /// Addresses in the status of this node's Node object.
    fn own_addresses(&self) -> &[IpAddr] {
        self.nodes
            .get(self.own)
            .map_or(&[][..], |node| node.addresses.as_slice())
    }

    fn hops(
        &self,
        snapshot: &Snapshot,
        sources: &BTreeMap<u32, SourceAddresses>,
    ) -> BTreeMap<(String, Family), HopOutcome> {
        let links = by_index(snapshot);
        let mut hops = BTreeMap::new();
        for (name, node) in self.others() {
            for family in [Family::V4, Family::V6] {
                let range = self.ranges_of(name).iter().find(|r| family_of(r) == family);
                let address = node.addresses.iter().find(|a| Family::of(**a) == family);
                let Some(target) = range.map(IpNet::addr).or(address.copied()) else {
                    continue;
                };
                let mut hop = hop_to(target, range.is_some(), &links, snapshot, sources);
                if let (Err(reason), None) = (&mut hop, gateway_for(node, family)) {
                    reason.insert_str(
                        0,
                        &format!("node {name} has no {} address, and ", family.name()),
                    );
                }
                hops.insert((name.to_owned(), family), hop);
            }
        }
        hops
    }

    fn fill_ipcache(&self, settings: &NodeSettings, snapshot: &Snapshot, plan: &mut NodePlan) {
        let links = by_index(snapshot);
        for (name, _) in self.others() {
            for range in self.ranges_of(name) {
                let target = IpcacheTarget {
                    class: class::REMOTE_PODS,
                    flags: 0,
                    hop: HopRef::Node(name.to_owned(), family_of(range)),
                };
                plan.ipcache.insert(*range, target);
            }
        }
        for (address, owner) in &self.claims.addresses {
            if *owner == self.own || is_nobodys(*address) {
                continue;
            }
            let target = IpcacheTarget {
                class: class::REMOTE_NODE,
                flags: 0,
                hop: self.hop_of_address(owner, *address, snapshot, plan),
            };
            plan.ipcache.insert((*address).into(), target);
        }
        let of_node = || {
            snapshot.addresses.iter().filter(|a| {
                links
                    .get(&a.ifindex)
                    .is_some_and(|link| !link.is_pod_device())
            })
        };
        let with = |readiness| {
            of_node()
                .filter(move |a| a.readiness == readiness)
                .map(|a| a.address.addr())
        };
        let ready: BTreeSet<IpAddr> = with(Readiness::Ready).collect();
        let taken: BTreeSet<IpAddr> = with(Readiness::Taken).collect();
        // What the status names and no device has may be translated elsewhere.
        let is_pending = |address: &IpAddr| {
            !ready.contains(address) && of_node().any(|a| a.address.addr() == *address)
        };
        let in_status = self.own_addresses().iter().copied();
        let in_status = in_status.filter(|address| !is_pending(address));
        let all: BTreeSet<IpAddr> = ready
            .iter()
            .copied()
            .chain(in_status)
            .filter(|a| !is_nobodys(*a))
            .collect();
        plan.problems.extend(taken.iter().map(|address| {
            format!(
                "another host on the link has the address {address} too (duplicate address detection has failed): \
                 nothing is served there; remove it from one of them"
            )
        }));
        let candidates = Candidates {
            all: &all,
            of_status: self.own_addresses(),
            devices: &settings.devices,
        };
        let (with_node_ports, problems) = settings.node_port_addresses.choose(candidates, snapshot);
        plan.problems.extend(problems);
        for address in all {
            let node_ports = if with_node_ports.contains(&address) {
                flag::NODE_PORTS
            } else {
                0
            };
            let this_node = IpcacheTarget {
                class: class::THIS_NODE,
                flags: node_ports | flag::HOST_PORTS,
                hop: HopRef::Host,
            };
            let before = plan.ipcache.insert(address.into(), this_node);
            if before.is_some_and(|b| b.class == class::REMOTE_NODE) {
                plan.problems.push(format!(
                    "this node has the address {address}, which is in the status of node {} too",
                    self.claims.addresses.get(&address).unwrap_or(&"?")
                ));
            }
        }
    }

    /// The node's next hop where the kernel would send to its address the same way, else the
    /// host's stack: a node's address and its pods need not be behind the same router.
    fn hop_of_address(
        &self,
        node: &str,
        address: IpAddr,
        snapshot: &Snapshot,
        plan: &NodePlan,
    ) -> HopRef {
        let key = (node.to_owned(), Family::of(address));
        match (plan.hops.get(&key), snapshot.resolved.get(&address)) {
            (Some(Ok(hop)), Some(Ok(way)))
                if !way.local
                    && way.ifindex == hop.ifindex
                    && way.gateway.unwrap_or(address) == hop.gateway =>
            {
                HopRef::Node(key.0, key.1)
            }
            _ => HopRef::Host,
        }
    }

    /// Gives those that lead to other nodes and outside: the MTU of pods is theirs.
    fn choose_devices(
        &self,
        settings: &NodeSettings,
        snapshot: &Snapshot,
        plan: &mut NodePlan,
    ) -> BTreeSet<u32> {
        if !settings.devices.is_empty() {
            for name in &settings.devices {
                match snapshot.links.iter().find(|link| link.name == *name) {
                    Some(link) => plan.serve(link),
                    None => plan.problems.push(format!(
                        "the device {name} of the setting `devices` does not exist"
                    )),
                }
            }
            return plan.devices.keys().copied().collect();
        }
        let of_hops = plan.hops.values().flatten().map(|hop| hop.ifindex);
        let leading = devices::leading(snapshot, self.own_addresses(), of_hops);
        if leading.is_empty() {
            plan.problems.push(
                "no device with a default route or an address of this node was found; name the \
                 devices in the setting `devices`"
                    .to_owned(),
            );
        }
        let links = by_index(snapshot);
        for ifindex in leading.union(&devices::addressed(snapshot)) {
            if let Some(link) = links.get(ifindex) {
                plan.serve(link);
            }
        }
        leading
    }
}

impl NodePlan {
    /// The programs are to be attached to a device, if there are any for its kind.
    fn serve(&mut self, link: &Link) {
        if link.link_layer == LinkLayer::Other {
            self.problems.push(format!(
                "the packets of device {} have a header that is neither Ethernet's nor none, so it is not served: \
                 what comes in there reaches no NodePort, and pods keep their own address there; name the devices \
                 to be served in `devices`, without it",
                link.name
            ));
        } else {
            self.devices.insert(link.ifindex, link.name.clone());
        }
    }

    /// What has changed from `before` to this plan.
    pub fn changes_since(&self, before: &Self) -> PlanChanges {
        let mut ipcache: Vec<IpcacheChange> = differences(&before.ipcache, &self.ipcache)
            .map(|(prefix, entry)| IpcacheChange {
                prefix: *prefix,
                entry: entry.cloned(),
            })
            .collect();
        // New entries before old ones go, so that an address that moves into a range of another
        // length is never unknown.
        ipcache.sort_by_key(|change| change.entry.is_none());
        PlanChanges {
            attach: missing(&self.devices, &before.devices),
            detach: missing(&before.devices, &self.devices),
            sources: differences(&before.sources, &self.sources)
                .map(|(ifindex, sources)| (*ifindex, sources.copied()))
                .collect(),
            hops: differences(&before.hops, &self.hops)
                .map(|(key, hop)| (key.clone(), hop.cloned()))
                .collect(),
            ipcache,
        }
    }

    /// How pods of a node are reached, for people: `native via 192.0.2.1 dev eth0`, or why not.
    pub fn describe_hop(&self, node: &str, family: Family) -> Option<String> {
        match self.hops.get(&(node.to_owned(), family))? {
            Ok(hop) => {
                let device = match self.devices.get(&hop.ifindex) {
                    Some(name) => name.clone(),
                    None => format!("#{}", hop.ifindex),
                };
                Some(format!("native via {} dev {device}", hop.gateway))
            }
            Err(reason) => Some(reason.clone()),
        }
    }
}

impl PlanChanges {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The address of a node that routes to its pod ranges of the family go through: its first of the
/// family, or an IPv6 address for IPv4 ranges (RFC 5549).
fn gateway_for(node: &model::Node, family: Family) -> Option<IpAddr> {
    let of = |family| {
        node.addresses
            .iter()
            .copied()
            .find(|a| Family::of(*a) == family)
    };
    of(family).or_else(|| match family {
        Family::V4 => of(Family::V6),
        Family::V6 => None,
    })
}

fn hop_to(
    target: IpAddr,
    is_pod_range: bool,
    links: &BTreeMap<u32, &Link>,
    snapshot: &Snapshot,
    sources: &BTreeMap<u32, SourceAddresses>,
) -> HopOutcome {
    let way = match snapshot.resolved.get(&target) {
        Some(Ok(way)) => way,
        Some(Err(cause)) => return Err(format!("no route to {target}: {cause}")),
        None => return Err(format!("the route to {target} is not known yet")),
    };
    if way.local {
        return Err(format!("{target} is an address of this node"));
    }
    let link = links
        .get(&way.ifindex)
        .ok_or_else(|| format!("the device of the route to {target} has gone"))?;
    if !is_usable(links, way.ifindex) {
        return Err(format!("the route to {target} leads into {}", link.name));
    }
    if is_pod_range && way.gateway.is_none() && link.mac.is_some() {
        // One next hop stands for the node; it cannot stand for each pod as a neighbour.
        return Err(format!(
            "the route to {target} has no gateway on {}; the node's own address must be on that \
             link, or a route lead through a gateway",
            link.name
        ));
    }
    let of_device = sources.get(&way.ifindex).copied().unwrap_or_default();
    Ok(NodeHop {
        source: way
            .source
            .filter(|source| !is_nobodys(*source))
            .or_else(|| of_device.of_family(target)),
        ifindex: way.ifindex,
        gateway: way.gateway.unwrap_or(target),
        mtu: way.mtu.unwrap_or(MAX_MTU).min(link.mtu).min(MAX_MTU),
    })
}

fn choose_mtu(
    settings: &NodeSettings,
    snapshot: &Snapshot,
    devices: &BTreeSet<u32>,
    plan: &mut NodePlan,
) {
    let smallest = snapshot
        .links
        .iter()
        .filter(|link| devices.contains(&link.ifindex))
        .map(|link| link.mtu.min(MAX_MTU))
        .min();
    plan.mtu = settings.mtu.or(smallest).unwrap_or(DEFAULT_MTU);
    if plan.mtu < MIN_IPV6_MTU && plan.pod_cidrs.iter().any(|r| family_of(r) == Family::V6) {
        plan.problems.push(format!(
            "the MTU of the pods is {} bytes, less than the {MIN_IPV6_MTU} that IPv6 needs; raise \
             that of the devices or set `mtu`",
            plan.mtu
        ));
    }
}

fn by_index(snapshot: &Snapshot) -> BTreeMap<u32, &Link> {
    snapshot
        .links
        .iter()
        .map(|link| (link.ifindex, link))
        .collect()
}

/// Whether a device can lead to other nodes: it exists, and is neither a pod's nor the loopback.
fn is_usable(links: &BTreeMap<u32, &Link>, ifindex: u32) -> bool {
    links
        .get(&ifindex)
        .is_some_and(|link| !link.is_pod_device() && link.name != "lo")
}

fn is_on_link(way: &ResolvedRoute) -> bool {
    !way.local && way.gateway.is_none()
}

/// Addresses that mean something on their own link or node only.
pub(super) fn is_nobodys(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    link_local || address.is_loopback() || address.is_unspecified() || address.is_multicast()
}

fn family_of(range: &IpNet) -> Family {
    Family::of(range.addr())
}

/// Keys whose values differ, with the new value.
fn differences<'a, K: Ord, V: PartialEq>(
    before: &'a BTreeMap<K, V>,
    now: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, Option<&'a V>)> {
    let changed = now
        .iter()
        .filter(|(key, value)| before.get(*key) != Some(*value))
        .map(|(key, value)| (key, Some(value)));
    let gone = before
        .keys()
        .filter(|key| !now.contains_key(*key))
        .map(|key| (key, None));
    changed.chain(gone)
}

/// What is in `of` and not in `from`, by key.
fn missing(of: &BTreeMap<u32, String>, from: &BTreeMap<u32, String>) -> BTreeMap<u32, String> {
    of.iter()
        .filter(|(ifindex, _)| !from.contains_key(ifindex))
        .map(|(ifindex, name)| (*ifindex, name.clone()))
        .collect()
}
