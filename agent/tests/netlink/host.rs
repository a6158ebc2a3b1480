//! The host side of pods, switches of the node, and errors.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Instant,
};

use ipnet::IpNet;
use weir_agent::{
    netlink::{
        Change, Netlink, NetlinkError, Route, pod,
        sysctl::{self, Sysctls},
    },
    node::{NodeManager, NodeSettings},
};
use weir_common::endpoint::{host_mac, pod_mac};

use crate::support::{address, ifindex, in_namespace, ip, make_underlay, range, read_sysctl};

fn make_pod_device(number: u32) -> u32 {
    let mac = host_mac(number);
    ip(&format!(
        "link add pod{number} address {mac} type veth peer name inner{number}"
    ));
    ip(&format!("link set inner{number} up"));
    ifindex(&format!("pod{number}"))
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
        manager
            .reconcile(&BTreeMap::new(), true, &netlink)
            .await
            .unwrap();
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
                Change::ReplaceRoute(Route::via(range("10.8.0.0/16"), eth0, address("192.0.2.8"))),
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
            assert!(
                text.contains(cause) || text.contains("unreachable"),
                "{text}"
            );
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
fn switches_of_the_node_are_set_and_put_back() {
    in_namespace(async {
        make_underlay();
        let run_dir = tempfile::tempdir().unwrap();
        let keys = [
            "net/ipv4/ip_forward",
            "net/ipv6/conf/all/forwarding",
            "net/ipv6/conf/eth0/accept_ra",
        ];
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "0").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_ra", "1").unwrap();
        let mut sysctls = Sysctls::open(run_dir.path());
        sysctls.set_node(["eth0", "lo"]).unwrap();
        assert_eq!(keys.map(read_sysctl), ["1", "1", "2"]);
        assert!(Sysctls::open(run_dir.path()).restore().is_empty());
        assert_eq!(keys.map(read_sysctl), ["0", "0", "1"]);

        assert_eq!(sysctl::strict_rp_filter(), None);
        std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "1").unwrap();
        assert!(sysctl::strict_rp_filter().is_some());
    });
}

/// Whether a socket of this namespace gets another port of two than 30080.
fn gets_another(family: &str) -> bool {
    let socket = std::net::UdpSocket::bind((family, 0)).unwrap();
    let port = socket.local_addr().unwrap().port();
    assert!((30_080..=30_081).contains(&port), "{port}");
    port != 30_080
}

#[test]
fn the_kernel_gives_nobody_a_port_that_is_served() {
    in_namespace(async {
        const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
        let list = || {
            use std::io::Read as _;
            let mut buffer = vec![0; 1 << 18];
            let length = std::fs::File::open(RESERVED)
                .unwrap()
                .read(&mut buffer)
                .unwrap();
            String::from_utf8_lossy(&buffer[..length]).trim().to_owned()
        };
        let range = "/proc/sys/net/ipv4/ip_local_port_range";
        std::fs::write(range, "30080 30081\n").unwrap();
        let run_dir = tempfile::tempdir().unwrap();
        let mut sysctls = Sysctls::open(run_dir.path());
        let nat = 61_000..=65_534;
        sysctls
            .reserve_ports(nat.clone(), Some([30_080].into_iter()))
            .unwrap();
        assert_eq!(list(), "30080");
        for family in ["0.0.0.0", "::"] {
            for _ in 0..20 {
                assert!(gets_another(family), "{family} got the NodePort");
            }
        }
        // The last one goes, and the list is empty again.
        sysctls
            .reserve_ports(nat.clone(), Some(std::iter::empty()))
            .unwrap();
        assert_eq!(list(), "");

        // A list of others that is longer than any small reader's room, and one of ours longer than the kernel
        // takes at once.
        std::fs::write(range, "30000 50000\n").unwrap();
        let odd = |ports: std::ops::Range<u16>| ports.filter(|port| port % 2 == 1);
        let text: Vec<String> = odd(20_000..20_200).map(|port| port.to_string()).collect();
        let others = text.join(",");
        std::fs::write(RESERVED, format!("{others}\n")).unwrap();
        sysctls
            .reserve_ports(nat, Some(odd(30_000..34_000)))
            .unwrap();
        let all: Vec<String> = odd(20_000..20_200)
            .chain(odd(30_000..34_000))
            .map(|port| port.to_string())
            .collect();
        assert_eq!(list(), all.join(","));
        assert!(Sysctls::open(run_dir.path()).restore().is_empty());
        assert_eq!(list(), others);
    });
}
