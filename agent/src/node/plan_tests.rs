//! Tables of nodes and networks in, plans out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use weir_common::{
    endpoint::host_mac,
    ipcache::{class, flag},
};

use super::{
    HopRef, IpcacheTarget, NodePlan, NodeSettings, Snapshot,
    plan::{Cluster, PlanChanges},
};
use crate::{
    model::Node,
    netlink::{Address, Link, LinkLayer, Readiness, ResolvedRoute, Route},
    objects::Family,
};

pub(super) const LO: u32 = 1;
pub(super) const ETH0: u32 = 2;
pub(super) const ETH1: u32 = 3;
pub(super) const DOCKER0: u32 = 4;
pub(super) const POD: u32 = 5;
pub(super) const TUN: u32 = 6;

pub(super) fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn range(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(super) fn link(ifindex: u32, name: &str, mtu: u32, kind: &str) -> Link {
    Link {
        ifindex,
        name: name.to_owned(),
        mtu,
        up: true,
        mac: Some([2, 0, 0, 0, 0, 1]),
        kind: kind.to_owned(),
        link_layer: LinkLayer::Ethernet,
        master: None,
    }
}

pub(super) fn snapshot() -> Snapshot {
    let pod = Link {
        mac: Some(host_mac(7).0),
        ..link(POD, "pod7", 1500, "veth")
    };
    let tun = Link {
        mac: None,
        link_layer: LinkLayer::None,
        ..link(TUN, "tun0", 1420, "tun")
    };
    let on = |ifindex, text: &str| Address {
        ifindex,
        address: range(text),
        preferred: true,
        second_choice: false,
        readiness: Readiness::Ready,
    };
    Snapshot {
        links: vec![
            link(LO, "lo", 65_536, ""),
            link(ETH0, "eth0", 1500, ""),
            link(ETH1, "eth1", 9000, ""),
            link(DOCKER0, "docker0", 1300, "bridge"),
            pod,
            tun,
        ],
        addresses: vec![
            on(LO, "127.0.0.1/8"),
            on(LO, "::1/128"),
            on(LO, "203.0.113.200/32"),
            on(ETH0, "192.0.2.1/24"),
            on(ETH0, "2001:db8::1/64"),
            on(ETH0, "fe80::1/64"),
            on(DOCKER0, "172.17.0.1/16"),
            on(POD, "169.254.9.9/32"),
            on(POD, "10.99.99.99/32"),
        ],
        default_route_devices: BTreeSet::from([ETH0]),
        ipv6_routes_have_sources: false,
        resolved: BTreeMap::new(),
    }
}

pub(super) fn on_link(ifindex: u32) -> Result<ResolvedRoute, String> {
    Ok(ResolvedRoute {
        ifindex,
        gateway: None,
        mtu: None,
        local: false,
        source: None,
    })
}

pub(super) fn through(ifindex: u32, gateway: &str) -> Result<ResolvedRoute, String> {
    Ok(ResolvedRoute {
        ifindex,
        gateway: Some(address(gateway)),
        mtu: None,
        local: false,
        source: None,
    })
}

pub(super) fn node(addresses: &[&str], pod_cidrs: &[&str]) -> Node {
    Node {
        addresses: addresses.iter().map(|a| address(a)).collect(),
        pod_cidrs: pod_cidrs.iter().map(|r| range(r)).collect(),
        zone: String::new(),
    }
}

pub(super) fn nodes(list: &[(&str, Node)]) -> BTreeMap<String, Node> {
    list.iter()
        .map(|(name, node)| ((*name).to_owned(), node.clone()))
        .collect()
}

pub(super) fn plan(nodes: &BTreeMap<String, Node>, snapshot: &Snapshot) -> NodePlan {
    Cluster::new("m", nodes).plan(&NodeSettings::default(), snapshot)
}

pub(super) fn own() -> (&'static str, Node) {
    let ranges = ["10.0.0.0/24", "fd00:0:0:1::/64"];
    ("m", node(&["192.0.2.1", "2001:db8::1"], &ranges))
}

#[test]
fn the_ipcache_tells_whose_an_address_is() {
    let nodes = nodes(&[
        own(),
        (
            "b",
            node(
                &["192.0.2.2", "2001:db8::2", "203.0.113.2"],
                &["10.0.1.0/24", "fd00:0:0:2::/64"],
            ),
        ),
    ]);
    let mut snapshot = snapshot();
    snapshot.resolved = BTreeMap::from([
        (address("192.0.2.2"), on_link(ETH0)),
        (address("2001:db8::2"), on_link(ETH0)),
        (address("203.0.113.2"), through(ETH0, "192.0.2.254")),
        (address("10.0.1.0"), through(ETH0, "192.0.2.2")),
        (address("fd00:0:0:2::"), through(ETH0, "2001:db8::2")),
    ]);
    let plan = plan(&nodes, &snapshot);
    let of_b = |family| HopRef::Node("b".to_owned(), family);
    let wanted: BTreeMap<IpNet, IpcacheTarget> = [
        ("10.0.1.0/24", class::REMOTE_PODS, of_b(Family::V4)),
        ("fd00:0:0:2::/64", class::REMOTE_PODS, of_b(Family::V6)),
        ("192.0.2.2/32", class::REMOTE_NODE, of_b(Family::V4)),
        ("2001:db8::2/128", class::REMOTE_NODE, of_b(Family::V6)),
        // Not the way its pods are behind.
        ("203.0.113.2/32", class::REMOTE_NODE, HopRef::Host),
        ("192.0.2.1/32", class::THIS_NODE, HopRef::Host),
        ("2001:db8::1/128", class::THIS_NODE, HopRef::Host),
        ("172.17.0.1/32", class::THIS_NODE, HopRef::Host),
        ("203.0.113.200/32", class::THIS_NODE, HopRef::Host),
    ]
    .into_iter()
    .map(|(prefix, class, hop)| {
        let flags = match class {
            // NodePorts are served at the device with the default route, and at the addresses of the Node.
            class::THIS_NODE if ["192.0.2.1/32", "2001:db8::1/128"].contains(&prefix) => {
                flag::NODE_PORTS | flag::HOST_PORTS
            }
            class::THIS_NODE => flag::HOST_PORTS,
            _ => 0,
        };
        (range(prefix), IpcacheTarget { class, flags, hop })
    })
    .collect();
    assert_eq!(plan.ipcache, wanted);
    assert_eq!(plan.problems, Vec::<String>::new());
    assert_eq!(
        plan.describe_hop("b", Family::V6).unwrap(),
        "native via 2001:db8::2 dev eth0"
    );
}

#[test]
fn routes_lead_to_nodes_on_our_links_only() {
    let nodes = nodes(&[
        own(),
        (
            "b",
            node(&["192.0.2.2"], &["10.0.1.0/24", "fd00:0:0:2::/64"]),
        ),
        ("c", node(&["198.51.100.3"], &["10.0.2.0/24"])),
        ("d", node(&["2001:db8::4"], &["10.0.3.0/24"])),
        // Claims an address of ours, and one behind a pod's device.
        ("e", node(&["192.0.2.1"], &["10.0.4.0/24"])),
        ("f", node(&["192.0.2.6"], &["10.0.5.0/24"])),
    ]);
    let mut snapshot = snapshot();
    let local = ResolvedRoute {
        local: true,
        ..on_link(LO).unwrap()
    };
    snapshot.resolved = BTreeMap::from([
        (address("192.0.2.2"), on_link(ETH0)),
        (address("198.51.100.3"), through(ETH0, "192.0.2.254")),
        (address("2001:db8::4"), on_link(ETH1)),
        (address("192.0.2.1"), Ok(local)),
        (address("192.0.2.6"), on_link(POD)),
    ]);
    assert_eq!(
        Cluster::new("m", &nodes).routes(&snapshot),
        [
            Route::unreachable(range("10.0.0.0/24")),
            Route::unreachable(range("fd00:0:0:1::/64")),
            Route::via(range("10.0.1.0/24"), ETH0, address("192.0.2.2")),
            Route::via(range("10.0.3.0/24"), ETH1, address("2001:db8::4")),
        ]
    );
}

#[test]
fn a_hop_is_where_the_kernel_would_send_or_a_reason() {
    let nodes = nodes(&[
        own(),
        ("b", node(&["192.0.2.2"], &["10.0.1.0/24"])),
        (
            "c",
            node(&["198.51.100.3"], &["10.0.2.0/24", "fd00:0:0:3::/64"]),
        ),
        ("d", node(&["198.51.100.4"], &["10.0.3.0/24"])),
        ("e", node(&["198.51.100.5"], &["10.0.4.0/24"])),
        ("f", node(&["2001:db8::6"], &[])),
        ("g", node(&["198.51.100.7"], &["10.0.6.0/24"])),
    ]);
    let mut snapshot = snapshot();
    let narrow = ResolvedRoute {
        mtu: Some(1400),
        ..through(ETH1, "192.0.2.253").unwrap()
    };
    snapshot.resolved = BTreeMap::from([
        (address("10.0.1.0"), on_link(ETH0)),
        (address("10.0.2.0"), Ok(narrow)),
        (address("10.0.3.0"), on_link(TUN)),
        (address("10.0.4.0"), through(POD, "10.0.0.7")),
        (address("2001:db8::6"), on_link(ETH0)),
        (
            address("fd00:0:0:3::"),
            Err("Network is unreachable".to_owned()),
        ),
        (
            address("10.0.6.0"),
            Err("the route says unreachable".to_owned()),
        ),
    ]);
    let plan = plan(&nodes, &snapshot);
    let hop = |node: &str, family| {
        plan.hops[&(node.to_owned(), family)]
            .clone()
            .map(|hop| (hop.ifindex, hop.gateway.to_string(), hop.mtu))
    };
    let no = |text: &str| Err(text.to_owned());
    assert_eq!(
        hop("b", Family::V4),
        no(
            "the route to 10.0.1.0 has no gateway on eth0; the node's own address must be on that \
             link, or a route lead through a gateway"
        )
    );
    assert_eq!(
        hop("c", Family::V4),
        Ok((ETH1, "192.0.2.253".to_owned(), 1400))
    );
    assert_eq!(
        hop("c", Family::V6),
        no("node c has no IPv6 address, and no route to fd00:0:0:3::: Network is unreachable")
    );
    // Without Ethernet there are no neighbours to tell apart.
    assert_eq!(hop("d", Family::V4), Ok((TUN, "10.0.3.0".to_owned(), 1420)));
    assert_eq!(
        hop("e", Family::V4),
        no("the route to 10.0.4.0 leads into pod7")
    );
    assert_eq!(
        hop("f", Family::V6),
        Ok((ETH0, "2001:db8::6".to_owned(), 1500))
    );
    assert_eq!(
        hop("g", Family::V4),
        no("no route to 10.0.6.0: the route says unreachable")
    );
    assert!(!plan.hops.contains_key(&("f".to_owned(), Family::V4)));
    // A node that cannot be reached is known all the same: its packets get a reason.
    assert_eq!(
        plan.ipcache[&range("10.0.6.0/24")].hop,
        HopRef::Node("g".to_owned(), Family::V4)
    );
}

#[test]
fn overlapping_ranges_have_one_owner_whatever_the_order() {
    let nodes = nodes(&[
        own(),
        ("b", node(&[], &["10.1.0.0/16", "fd00:0:0:b::/64"])),
        ("c", node(&[], &["10.1.7.0/24", "10.2.0.0/24"])),
        ("d", node(&[], &["10.0.0.0/8", "fd00:0:0:b::/63"])),
        ("a", node(&[], &["10.0.0.128/25", "10.2.0.0/24"])),
        ("e", node(&["192.0.2.1"], &["0.0.0.0/0", "10.3.0.0/24"])),
    ]);
    let plan = plan(&nodes, &snapshot());
    let remote: Vec<String> = plan
        .ipcache
        .iter()
        .filter(|(_, target)| target.class == class::REMOTE_PODS)
        .map(|(prefix, target)| match &target.hop {
            HopRef::Node(name, _) => format!("{prefix} {name}"),
            hop => format!("{prefix} {hop:?}"),
        })
        .collect();
    assert_eq!(
        remote,
        [
            "10.1.0.0/16 b",
            "10.2.0.0/24 a",
            "10.3.0.0/24 e",
            "fd00:0:0:b::/64 b"
        ]
    );
    assert_eq!(
        plan.pod_cidrs,
        [range("10.0.0.0/24"), range("fd00:0:0:1::/64")]
    );
    let refused = |range: &str, node: &str, taken: &str, owner: &str| {
        format!(
            "the pod range {range} of node {node} overlaps {taken} of node {owner} and is not \
             used; correct spec.podCIDRs of one of them"
        )
    };
    assert_eq!(
        plan.problems,
        [
            refused("10.0.0.128/25", "a", "10.0.0.0/24", "m"),
            refused("10.1.7.0/24", "c", "10.1.0.0/16", "b"),
            refused("10.2.0.0/24", "c", "10.2.0.0/24", "a"),
            refused("10.0.0.0/8", "d", "10.0.0.0/24", "m"),
            refused("fd00:0:0:a::/63", "d", "fd00:0:0:b::/64", "b"),
            "the pod range 0.0.0.0/0 of node e is the whole address space and is not used"
                .to_owned(),
            "node e and node m both have the address 192.0.2.1 in their status; it is taken to be \
             the latter's"
                .to_owned(),
        ]
    );
}

#[test]
fn devices_are_those_that_lead_out() {
    let nodes = nodes(&[
        ("m", node(&["172.17.0.1"], &[])),
        ("b", node(&["192.0.2.2"], &[])),
    ]);
    let mut snapshot = snapshot();
    snapshot.default_route_devices = BTreeSet::from([ETH0, POD, LO]);
    snapshot.resolved = BTreeMap::from([(address("192.0.2.2"), on_link(ETH1))]);
    let found = plan(&nodes, &snapshot);
    let names: Vec<&str> = found.devices.values().map(String::as_str).collect();
    // docker0 carries this node's address here, eth1 has none and leads to b.
    assert_eq!(names, ["eth0", "eth1", "docker0"]);
    assert_eq!(found.mtu, 1300);

    let settings = NodeSettings {
        devices: vec!["eth1".to_owned(), "eth7".to_owned()],
        mtu: Some(1100),
        ..NodeSettings::default()
    };
    let set = Cluster::new("m", &nodes).plan(&settings, &snapshot);
    assert_eq!(set.devices, BTreeMap::from([(ETH1, "eth1".to_owned())]));
    assert_eq!(set.mtu, 1100);
    assert_eq!(
        set.problems,
        ["the device eth7 of the setting `devices` does not exist"]
    );

    let none = plan(&nodes, &Snapshot::default());
    assert_eq!(none.mtu, 1500);
    assert!(none.problems[0].starts_with("no device with a default route"));
}

#[test]
fn a_narrow_mtu_is_a_problem_for_ipv6_pods() {
    let nodes = nodes(&[own()]);
    let settings = NodeSettings {
        mtu: Some(1200),
        ..NodeSettings::default()
    };
    let plan = Cluster::new("m", &nodes).plan(&settings, &snapshot());
    assert!(plan.problems[0].contains("1200 bytes, less than the 1280 that IPv6 needs"));
}

#[test]
fn differences_lead_from_one_plan_to_the_next_and_back_to_nothing() {
    let both = nodes(&[
        own(),
        ("b", node(&["192.0.2.2"], &["10.0.1.0/24"])),
        ("c", node(&["2001:db8::3"], &["fd00:0:0:3::/64"])),
    ]);
    let mut before = snapshot();
    before.resolved = BTreeMap::from([
        (address("192.0.2.2"), on_link(ETH0)),
        (address("10.0.1.0"), through(ETH0, "192.0.2.2")),
        (address("2001:db8::3"), on_link(ETH0)),
        (address("fd00:0:0:3::"), through(ETH0, "2001:db8::3")),
    ]);
    let mut after = before.clone();
    after
        .resolved
        .insert(address("10.0.1.0"), through(ETH1, "192.0.2.2"));
    let steps = [
        NodePlan::default(),
        plan(&both, &before),
        plan(&both, &after),
        plan(&nodes(&[own()]), &after),
        NodePlan::default(),
    ];
    let mut state = NodePlan::default();
    for step in steps {
        let changes = step.changes_since(&state);
        apply(&mut state, &changes);
        state.addresses.clone_from(&step.addresses);
        state.pod_cidrs.clone_from(&step.pod_cidrs);
        state.mtu = step.mtu;
        state.problems.clone_from(&step.problems);
        state.leading.clone_from(&step.leading);
        assert_eq!(state, step);
        assert!(step.changes_since(&state).is_empty());
    }
}

fn apply(state: &mut NodePlan, changes: &PlanChanges) {
    state.devices.extend(changes.attach.clone());
    state
        .devices
        .retain(|ifindex, _| !changes.detach.contains_key(ifindex));
    for (ifindex, sources) in &changes.sources {
        match sources {
            Some(sources) => state.sources.insert(*ifindex, *sources),
            None => state.sources.remove(ifindex),
        };
    }
    for (key, hop) in &changes.hops {
        match hop {
            Some(hop) => state.hops.insert(key.clone(), hop.clone()),
            None => state.hops.remove(key),
        };
    }
    for change in &changes.ipcache {
        match &change.entry {
            Some(entry) => state.ipcache.insert(change.prefix, entry.clone()),
            None => state.ipcache.remove(&change.prefix),
        };
    }
}
