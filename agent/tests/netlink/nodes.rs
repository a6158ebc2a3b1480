//! The node manager against the kernel's routes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::Instant,
};

use weir_agent::{
    model::Node,
    netlink::{Address, LinkLayer, Netlink, NetlinkEvent, Readiness, Route, RouteTarget},
    node::{HopRef, NodeManager, NodeSettings},
    objects::Family,
};
use weir_common::ipcache::class;

use crate::support::{address, ifindex, in_namespace, ip, make_underlay, next_event, range};

fn node(addresses: &[&str], pod_cidrs: &[&str]) -> Node {
    Node {
        addresses: addresses.iter().map(|a| address(a)).collect(),
        pod_cidrs: pod_cidrs.iter().map(|r| range(r)).collect(),
        zone: String::new(),
    }
}

fn nodes(list: &[(&str, Node)]) -> BTreeMap<String, Node> {
    list.iter()
        .map(|(name, node)| ((*name).to_owned(), node.clone()))
        .collect()
}

fn cluster() -> BTreeMap<String, Node> {
    nodes(&[
        (
            "a",
            node(
                &["192.0.2.1", "2001:db8::1"],
                &["10.0.0.0/24", "fd00:0:0:1::/64"],
            ),
        ),
        (
            "b",
            node(
                &["192.0.2.2", "2001:db8::2"],
                &["10.0.1.0/24", "fd00:0:0:2::/64"],
            ),
        ),
        // Behind the router.
        (
            "c",
            node(
                &["198.51.100.3", "2001:db8:9::3"],
                &["10.0.2.0/24", "fd00:0:0:3::/64"],
            ),
        ),
    ])
}

#[test]
fn pod_ranges_of_nodes_on_the_link_get_routes_and_others_do_not() {
    in_namespace(async {
        make_underlay();
        let eth0 = ifindex("eth0");
        let netlink = Netlink::new().unwrap();
        let mut manager = NodeManager::new("a", NodeSettings::default());
        let plan = manager.reconcile(&cluster(), true, &netlink).await.unwrap();

        let mut routes = netlink.own_routes().await.unwrap();
        routes.sort();
        assert_eq!(
            routes,
            [
                Route::unreachable(range("10.0.0.0/24")),
                Route::via(range("10.0.1.0/24"), eth0, address("192.0.2.2")),
                Route::unreachable(range("fd00:0:0:1::/64")),
                Route::via(range("fd00:0:0:2::/64"), eth0, address("2001:db8::2")),
            ]
        );
        let shown = ip("route show proto 157");
        assert!(shown.contains("unreachable 10.0.0.0/24"), "{shown}");
        assert!(
            shown.contains("10.0.1.0/24 via 192.0.2.2 dev eth0"),
            "{shown}"
        );
        let shown = ip("-6 route show proto 157");
        assert!(shown.contains("unreachable fd00:0:0:1::/64"), "{shown}");
        assert!(
            shown.contains("fd00:0:0:2::/64 via 2001:db8::2 dev eth0"),
            "{shown}"
        );

        let hop = |node: &str, family| {
            let hop = plan.hops[&(node.to_owned(), family)].clone().unwrap();
            (hop.ifindex, hop.gateway, hop.mtu)
        };
        assert_eq!(hop("b", Family::V4), (eth0, address("192.0.2.2"), 1400));
        assert_eq!(hop("b", Family::V6), (eth0, address("2001:db8::2"), 1400));
        assert_eq!(hop("c", Family::V4), (eth0, address("192.0.2.254"), 1400));
        assert_eq!(hop("c", Family::V6), (eth0, address("2001:db8::fe"), 1400));
        assert_eq!(plan.devices, BTreeMap::from([(eth0, "eth0".to_owned())]));
        assert_eq!(plan.mtu, 1400);
        assert_eq!(plan.problems, Vec::<String>::new());
        assert_eq!(plan.ipcache[&range("192.0.2.1/32")].class, class::THIS_NODE);
        assert_eq!(
            plan.ipcache[&range("2001:db8:9::3/128")].hop,
            HopRef::Node("c".to_owned(), Family::V6)
        );

        let again = manager.reconcile(&cluster(), true, &netlink).await.unwrap();
        assert!(again.changes_since(&plan).is_empty());
    });
}

#[test]
fn a_changed_route_changes_the_hop_and_leftovers_go_once_synced() {
    in_namespace(async {
        make_underlay();
        let netlink = Netlink::new().unwrap();
        let mut manager = NodeManager::new("a", NodeSettings::default());
        let before = manager.reconcile(&cluster(), true, &netlink).await.unwrap();

        ip("route replace default via 192.0.2.253");
        let now = manager.reconcile(&cluster(), true, &netlink).await.unwrap();
        let changes = now.changes_since(&before);
        assert_eq!(changes.hops.len(), 1);
        let hop = changes.hops[&("c".to_owned(), Family::V4)].clone();
        assert_eq!(hop.unwrap().unwrap().gateway, address("192.0.2.253"));
        assert!(changes.ipcache.is_empty() && changes.attach.is_empty());

        // Another agent's turn: it knows no node yet.
        let mut manager = NodeManager::new("a", NodeSettings::default());
        let none = BTreeMap::new();
        manager.reconcile(&none, false, &netlink).await.unwrap();
        assert_eq!(netlink.own_routes().await.unwrap().len(), 4);
        let plan = manager.reconcile(&none, true, &netlink).await.unwrap();
        assert_eq!(netlink.own_routes().await.unwrap(), []);
        assert!(plan.problems[0].contains("no Node object named \"a\""));
        let changes = plan.changes_since(&now);
        assert!(changes.hops.values().all(Option::is_none));
        assert_eq!(changes.hops.len(), 4);
    });
}

#[test]
fn routes_of_strangers_are_left_alone() {
    in_namespace(async {
        make_underlay();
        ip("route add 10.0.0.0/24 via 192.0.2.9 proto bird");
        ip("route add 10.0.1.0/24 via 192.0.2.9");
        ip("-6 route add fd00:0:0:2::/64 via 2001:db8::9 metric 1024");
        let strangers = |except: &str| {
            let all = ip("route show table main") + &ip("-6 route show table main");
            all.lines()
                .filter(|line| !line.contains(except))
                .map(str::to_owned)
                .collect::<BTreeSet<_>>()
        };
        let before = strangers("proto 157");
        let netlink = Netlink::new().unwrap();
        let mut manager = NodeManager::new("a", NodeSettings::default());
        let plan = manager.reconcile(&cluster(), true, &netlink).await.unwrap();
        assert_eq!(plan.problems, Vec::<String>::new());
        assert_eq!(netlink.own_routes().await.unwrap().len(), 4);
        assert_eq!(strangers("proto 157"), before);
        // What the kernel prefers is what the data path does.
        let hop = plan.hops[&("b".to_owned(), Family::V4)].clone().unwrap();
        assert_eq!(hop.gateway, address("192.0.2.9"));

        // Removing ours by destination and metric never takes a stranger's with it.
        for metric in [0, 1024] {
            for destination in ["10.0.1.0/24", "fd00:0:0:2::/64"] {
                let route = Route {
                    destination: range(destination),
                    metric,
                    target: RouteTarget::Unreachable,
                };
                netlink.remove_route(route).await.unwrap();
            }
        }
        manager
            .reconcile(&BTreeMap::new(), true, &netlink)
            .await
            .unwrap();
        assert_eq!(strangers("proto 157"), before);
    });
}

#[test]
fn an_ipv4_range_goes_through_an_ipv6_address_where_there_is_no_other() {
    in_namespace(async {
        make_underlay();
        let netlink = Netlink::new().unwrap();
        let nodes = nodes(&[
            ("a", node(&["2001:db8::1"], &["10.0.0.0/24"])),
            ("b", node(&["2001:db8::2"], &["10.0.1.0/24"])),
        ]);
        let mut manager = NodeManager::new("a", NodeSettings::default());
        let plan = manager.reconcile(&nodes, true, &netlink).await.unwrap();
        assert_eq!(plan.problems, Vec::<String>::new());
        let shown = ip("route show proto 157");
        assert!(
            shown.contains("10.0.1.0/24 via inet6 2001:db8::2 dev eth0"),
            "{shown}"
        );
        let hop = plan.hops[&("b".to_owned(), Family::V4)].clone().unwrap();
        assert_eq!(hop.gateway, address("2001:db8::2"));
        let again = manager.reconcile(&nodes, true, &netlink).await.unwrap();
        assert!(again.changes_since(&plan).is_empty());
    });
}

#[test]
fn the_reason_why_a_node_cannot_be_reached_is_told() {
    in_namespace(async {
        ip("link add eth0 type veth peer name fabric");
        ip("link set fabric up");
        ip("link set eth0 up");
        ip("addr add 192.0.2.1/24 dev eth0");
        let netlink = Netlink::new().unwrap();
        let nodes = nodes(&[
            ("a", node(&["192.0.2.1"], &["10.0.0.0/24"])),
            (
                "c",
                node(&["198.51.100.3"], &["10.0.2.0/24", "fd00:0:0:3::/64"]),
            ),
        ]);
        let mut manager = NodeManager::new("a", NodeSettings::default());
        let plan = manager.reconcile(&nodes, true, &netlink).await.unwrap();
        let reason = |family| plan.hops[&("c".to_owned(), family)].clone().unwrap_err();
        assert_eq!(
            reason(Family::V4),
            "no route to 10.0.2.0: Network is unreachable"
        );
        assert_eq!(
            reason(Family::V6),
            "node c has no IPv6 address, and no route to fd00:0:0:3::: Network is unreachable"
        );
    });
}

#[test]
fn several_hundred_nodes_are_one_round() {
    in_namespace(async {
        make_underlay();
        let netlink = Netlink::new().unwrap();
        let mut nodes = cluster();
        for n in 1..=600_u32 {
            let (high, low) = (n / 200 + 1, n % 200 + 10);
            nodes.insert(
                format!("n{n}"),
                node(
                    &[
                        &format!("192.0.2.{}", low),
                        &format!("2001:db8::{:x}", n + 0x100),
                    ],
                    &[
                        &format!("10.{high}.{low}.0/24"),
                        &format!("fd01:0:0:{n:x}::/64"),
                    ],
                ),
            );
        }
        let mut manager = NodeManager::new("a", NodeSettings::default());
        let start = Instant::now();
        let plan = manager.reconcile(&nodes, true, &netlink).await.unwrap();
        println!("602 nodes from nothing: {:?}", start.elapsed());
        assert_eq!(plan.failing, 0);
        assert_eq!(netlink.own_routes().await.unwrap().len(), 2 + 2 * 601);
        let start = Instant::now();
        let again = manager.reconcile(&nodes, true, &netlink).await.unwrap();
        println!("602 nodes again: {:?}", start.elapsed());
        assert!(again.changes_since(&plan).is_empty());
    });
}

#[test]
fn routes_that_a_link_took_with_it_come_back() {
    in_namespace(async {
        make_underlay();
        let netlink = Netlink::new().unwrap();
        let mut events = netlink.watch().await.unwrap();
        let mut manager = NodeManager::new("a", NodeSettings::default());
        let before = manager.reconcile(&cluster(), true, &netlink).await.unwrap();
        ip("link set eth0 down");
        assert_eq!(next_event(&mut events).await, NetlinkEvent::Changed);
        let down = manager.reconcile(&cluster(), true, &netlink).await.unwrap();
        assert!(down.hops[&("b".to_owned(), Family::V4)].is_err());
        ip("link set eth0 up");
        ip("addr replace 2001:db8::1/64 dev eth0 nodad");
        ip("route add default via 192.0.2.254");
        ip("-6 route add default via 2001:db8::fe");
        assert_eq!(next_event(&mut events).await, NetlinkEvent::Changed);
        let after = manager.reconcile(&cluster(), true, &netlink).await.unwrap();
        assert!(after.changes_since(&before).is_empty());
        assert_eq!(netlink.own_routes().await.unwrap().len(), 4);
    });
}

#[test]
fn what_the_node_sends_from_is_that_of_the_route_the_device_or_the_node() {
    in_namespace(async {
        make_underlay();
        // The route to node b says from where, and a device has no address of its own.
        ip("addr add 192.0.2.9/32 dev eth0");
        ip("addr add 2001:db8::9/128 dev eth0 nodad");
        ip("route add 192.0.2.2/32 dev eth0 src 192.0.2.9");
        ip("-6 route add 2001:db8::2/128 dev eth0 src 2001:db8::9");
        ip("link add br0 type bridge");
        ip("link add port0 type veth peer name port1");
        ip("link set port0 master br0");
        ip("tuntap add dev tun0 mode tun");
        ip("addr add 198.18.0.1/24 dev br0");
        ip("addr add 198.18.0.2/24 dev br0");
        ip("addr add 2001:db8:7::1/64 dev br0 nodad preferred_lft 0");
        for device in ["br0", "port0", "tun0"] {
            ip(&format!("link set {device} up"));
        }
        let netlink = Netlink::new().unwrap();
        let mut manager = NodeManager::new("a", NodeSettings::default());
        let plan = manager.reconcile(&cluster(), true, &netlink).await.unwrap();
        let source = |node: &str, family| {
            plan.hops[&(node.to_owned(), family)]
                .clone()
                .unwrap()
                .source
        };
        // Pods of node b are reached by another route than the node.
        assert_eq!(source("b", Family::V4), Some(address("192.0.2.1")));
        assert!(source("b", Family::V6).is_some());
        assert_eq!(source("c", Family::V4), Some(address("192.0.2.1")));
        let of = |device: &str| plan.sources[&ifindex(device)];
        assert_eq!(of("eth0").v4, Some([192, 0, 2, 1].into()));
        assert_eq!(of("eth0").v6, Some("2001:db8::1".parse().unwrap()));
        assert_eq!(of("br0").v4, Some([198, 18, 0, 1].into()));
        assert_eq!(
            of("br0").v6,
            Some("2001:db8::1".parse().unwrap()),
            "deprecated"
        );
        assert_eq!(of("port0"), of("eth0"));
        assert_eq!(of("tun0"), of("eth0"));

        let links = netlink.links().await.unwrap();
        let link = |name: &str| links.iter().find(|link| link.name == name).unwrap();
        assert_eq!(link("port0").master, Some(ifindex("br0")));
        assert_eq!(link("br0").master, None);
        for device in ["eth0", "br0"] {
            assert_eq!(link(device).link_layer, LinkLayer::Ethernet, "{device}");
        }
        assert_eq!(link("tun0").link_layer, LinkLayer::None);
        let way = netlink.route_get(address("192.0.2.2")).await.unwrap();
        assert_eq!(way.source, Some(address("192.0.2.9")));
        let way = netlink.route_get(address("2001:db8::2")).await.unwrap();
        assert_eq!(way.source, Some(address("2001:db8::9")));
    });
}

/// Two devices on one link: what one has the other cannot have.
#[test]
fn an_address_is_the_node_s_when_no_other_host_has_it() {
    in_namespace(async {
        ip("link add a0 type veth peer name b0");
        // Long enough to be seen: each probe takes a second.
        fs::write("/proc/sys/net/ipv6/conf/a0/dad_transmits", "4").unwrap();
        for device in ["a0", "b0"] {
            ip(&format!("link set {device} up"));
        }
        let netlink = Netlink::new().unwrap();
        let mut events = netlink.watch().await.unwrap();
        ip("addr add 2001:db8::7/64 dev a0");
        ip("addr add 2001:db8::8/64 dev a0");
        ip("addr add 192.0.2.8/24 dev a0");
        let readiness = async |text: &str| {
            let addresses = netlink.addresses().await.unwrap();
            let is_meant =
                |a: &&Address| a.ifindex == ifindex("a0") && a.address.addr() == address(text);
            addresses.iter().find(is_meant).unwrap().readiness
        };
        assert_eq!(readiness("192.0.2.8").await, Readiness::Ready);
        assert_eq!(readiness("2001:db8::7").await, Readiness::Tentative);
        ip("addr add 2001:db8::7/64 dev b0 nodad");
        let mut manager = NodeManager::new("a", NodeSettings::default());
        let nodes = cluster();
        let mut seen = Vec::new();
        let found = loop {
            let plan = manager.reconcile(&nodes, true, &netlink).await.unwrap();
            let is_own = |text: &str| plan.ipcache.contains_key(&address(text).into());
            // That one is the other device's, which is ours as well.
            let now = (is_own("2001:db8::8"), plan.sources[&ifindex("a0")].v6);
            seen.push(now);
            if now.0 && readiness("2001:db8::7").await == Readiness::Taken {
                break plan;
            }
            // Each change of state is told of.
            next_event(&mut events).await;
        };
        assert_eq!(seen[0], (false, None));
        let (_, source) = seen.last().unwrap();
        assert_eq!(*source, Some("2001:db8::8".parse().unwrap()));
        let is_told = |problem: &String| problem.contains("has the address 2001:db8::7 too");
        assert!(found.problems.iter().any(is_told), "{:?}", found.problems);
    });
}
