//! The kernel's side of `netlink` and `node`, in network namespaces made for each test. They need
//! root (CAP_NET_ADMIN and CAP_SYS_ADMIN) and the programs `ip` and `sysctl`'s files.

mod netlink_support;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use netlink_support::{Family4And6, in_namespace, ip, ip_batch, next_event, read_sysctl};
use weir_agent::{
    model::Node,
    netlink::{Change, Netlink, NetlinkError, NetlinkEvent, Route, RouteTarget, pod},
    node::{HopRef, NodeManager, NodeSettings},
    objects::Family,
};
use weir_common::{
    endpoint::{host_mac, pod_mac},
    ipcache::class,
};

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn range(text: &str) -> IpNet {
    text.parse().unwrap()
}

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

/// A node with one device on 192.0.2.0/24 and 2001:db8::/64 and a default route of each family.
fn make_underlay() {
    ip("link add eth0 type veth peer name fabric");
    ip("link set fabric up");
    ip("link set eth0 mtu 1400 up");
    ip("addr add 192.0.2.1/24 dev eth0");
    ip("addr add 2001:db8::1/64 dev eth0 nodad");
    ip("route add default via 192.0.2.254");
    ip("-6 route add default via 2001:db8::fe");
}

fn make_pod_device(number: u32) -> u32 {
    let mac = host_mac(number);
    ip(&format!(
        "link add pod{number} address {mac} type veth peer name inner{number}"
    ));
    ip(&format!("link set inner{number} up"));
    ifindex(&format!("pod{number}"))
}

fn ifindex(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).unwrap()
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
        manager.reconcile(&BTreeMap::new(), true, &netlink).await.unwrap();
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
fn the_host_side_of_a_pod_is_made_and_removed() {
    in_namespace(async {
        ip("link set lo up");
        let netlink = Netlink::new().unwrap();
        for number in 1..=8 {
            let ifindex = make_pod_device(number);
            let pod = pod::HostSide {
                ifindex,
                name: format!("pod{number}"),
                addresses: vec![
                    address(&format!("10.0.0.{number}")),
                    address(&format!("fd00:0:0:1::{number}")),
                ],
                pod_mac: pod_mac(number).0,
            };
            let start = Instant::now();
            pod::install(&netlink, &pod).await.unwrap();
            println!("installed in {:?}", start.elapsed());
            pod::install(&netlink, &pod).await.unwrap();
        }
        let shown = ip("-d route show proto 157");
        assert!(shown.contains("10.0.0.1 dev pod1 scope link"), "{shown}");
        let shown = ip("-6 route show proto 157");
        assert!(shown.contains("fd00:0:0:1::1 dev pod1"), "{shown}");
        for address in ["10.0.0.1", "fd00:0:0:1::1"] {
            let shown = ip(&format!("neigh show {address} dev pod1"));
            let wanted = format!("{address} lladdr {} PERMANENT", pod_mac(1));
            assert!(shown.contains(&wanted), "{shown}");
        }
        assert_eq!(read_sysctl("net/ipv4/conf/pod1/rp_filter"), "0");
        assert_eq!(read_sysctl("net/ipv4/conf/pod1/forwarding"), "1");
        assert_eq!(read_sysctl("net/ipv6/conf/pod1/accept_ra"), "0");
        assert_eq!(read_sysctl("net/ipv6/conf/pod1/accept_dad"), "0");
        let way = netlink.route_get(address("fd00:0:0:1::2")).await.unwrap();
        assert_eq!((way.ifindex, way.gateway), (ifindex("pod2"), None));

        let both = [address("10.0.0.1"), address("fd00:0:0:1::1")];
        for _ in 0..2 {
            assert_eq!(removal(&netlink, ifindex("pod1"), &both).await, "");
        }
        assert_eq!(ip("neigh show dev pod1 nud permanent"), "");
        assert_eq!(netlink.own_routes().await.unwrap().len(), 14);

        // The device goes first, as with a pod that is killed.
        let pod2 = ifindex("pod2");
        netlink.remove_link(pod2).await.unwrap();
        netlink.remove_link(pod2).await.unwrap();
        let both = [address("10.0.0.2"), address("fd00:0:0:1::2")];
        assert_eq!(removal(&netlink, pod2, &both).await, "");

        // Node routes are no pods' and pods' are no nodes'.
        let kept = Route::unreachable(range("10.0.0.0/24"));
        netlink.replace_route(kept).await.unwrap();
        let keep = BTreeSet::from([address("10.0.0.3"), address("fd00:0:0:1::4")]);
        let swept = pod::sweep(&netlink, &keep).await.unwrap();
        assert_eq!(swept.len(), 10);
        assert_eq!(ip("neigh show dev pod5 nud permanent"), "");
        let mut manager = NodeManager::new("a", NodeSettings::default());
        manager.reconcile(&BTreeMap::new(), true, &netlink).await.unwrap();
        let left: BTreeSet<IpNet> = netlink
            .own_routes()
            .await
            .unwrap()
            .iter()
            .map(|route| route.destination)
            .collect();
        assert_eq!(left, keep.into_iter().map(IpNet::from).collect());
    });
}

async fn removal(netlink: &Netlink, ifindex: u32, addresses: &[IpAddr]) -> String {
    let failures = pod::remove(netlink, ifindex, addresses).await;
    failures
        .iter()
        .map(NetlinkError::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

#[test]
fn errors_name_the_object_and_the_cause() {
    in_namespace(async {
        make_underlay();
        let netlink = Netlink::new().unwrap();
        let eth0 = ifindex("eth0");
        let failures = netlink
            .apply(vec![
                Change::ReplaceRoute(Route::via(
                    range("10.9.0.0/16"),
                    eth0,
                    address("203.0.113.1"),
                )),
                Change::ReplaceRoute(Route::via(
                    range("10.8.0.0/16"),
                    eth0,
                    address("192.0.2.8"),
                )),
                Change::SetLinkUp(9999),
            ])
            .await;
        let texts: Vec<String> = failures.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                format!(
                    "cannot enter the route 10.9.0.0/16 via 203.0.113.1 dev #{eth0}: Network is \
                     unreachable (Nexthop has invalid gateway)"
                ),
                "cannot set device #9999 up: No such device".to_owned(),
            ]
        );
        // What stood between them is done.
        assert_eq!(netlink.own_routes().await.unwrap().len(), 1);

        ip("route add unreachable 10.7.0.0/16");
        ip("-6 route add unreachable fd07::/16");
        for (destination, cause) in [
            ("10.7.0.1", "No route to host"),
            ("fd07::1", "No route to host"),
        ] {
            let error = netlink.route_get(address(destination)).await.unwrap_err();
            let text = error.to_string();
            assert!(
                text.starts_with(&format!("no route to {destination}: ")),
                "{text}"
            );
            assert!(text.contains(cause) || text.contains("unreachable"), "{text}");
        }
        for own in ["192.0.2.1", "2001:db8::1"] {
            assert!(netlink.route_get(address(own)).await.unwrap().local);
        }
        ip("route add 10.6.0.0/16 via 192.0.2.6 mtu 1300");
        let way = netlink.route_get(address("10.6.0.1")).await.unwrap();
        assert_eq!(way.mtu, Some(1300));
    });
}

#[test]
fn a_watcher_tells_of_others_changes_only() {
    in_namespace(async {
        make_underlay();
        let pod1 = make_pod_device(1);
        ip("link add other type veth peer name rehto");
        let other = ifindex("other");
        let netlink = Netlink::new().unwrap();
        let mut events = netlink.watch().await.unwrap();

        for Family4And6 {
            address: new,
            route,
        } in Family4And6::BOTH
        {
            ip(&format!("addr add {new} dev eth0"));
            assert_eq!(next_event(&mut events).await, NetlinkEvent::Changed);
            ip(&format!("route add {route} dev eth0"));
            assert_eq!(next_event(&mut events).await, NetlinkEvent::Changed);
        }
        ip("link set eth0 mtu 1300");
        assert_eq!(next_event(&mut events).await, NetlinkEvent::Changed);

        // Our own changes and a pod's device are no news; its end is.
        let pod = pod::HostSide {
            ifindex: pod1,
            name: "pod1".to_owned(),
            addresses: vec![address("10.0.0.1"), address("fd00:0:0:1::1")],
            pod_mac: pod_mac(1).0,
        };
        pod::install(&netlink, &pod).await.unwrap();
        let route = Route::via(
            range("fd00:0:0:2::/64"),
            ifindex("eth0"),
            address("2001:db8::2"),
        );
        netlink.replace_route(route).await.unwrap();
        ip("link del pod1");
        let removed = next_event(&mut events).await;
        assert_eq!(removed, NetlinkEvent::LinkRemoved(pod1));

        // The peer goes with it, in either order; `Changed` follows.
        ip("link del other");
        let mut removed = BTreeSet::new();
        while removed.len() < 2 {
            if let NetlinkEvent::LinkRemoved(ifindex) = next_event(&mut events).await {
                removed.insert(ifindex);
            }
        }
        assert!(removed.contains(&other));
    });
}

#[test]
fn lost_notifications_are_made_up_for() {
    in_namespace(async {
        make_underlay();
        ip("link add other type veth peer name rehto");
        let other = ifindex("other");
        let netlink = Netlink::new().unwrap();
        let mut events = netlink.watch().await.unwrap();
        // More than the socket has room for, while this thread reads nothing.
        let flood: String = (0..30_000)
            .map(|n| {
                format!(
                    "route add 10.{}.{}.{}/32 dev eth0\n",
                    n / 65536,
                    n / 256 % 256,
                    n % 256
                )
            })
            .collect();
        ip_batch(&(flood + "link del other\n"));
        let mut seen = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !(seen.contains(&NetlinkEvent::LinkRemoved(other))
            && seen.contains(&NetlinkEvent::Changed))
        {
            assert!(Instant::now() < deadline, "{seen:?}");
            seen.push(next_event(&mut events).await);
        }
    });
}
