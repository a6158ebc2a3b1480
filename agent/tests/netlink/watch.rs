//! What a watcher tells of, and of what not.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use weir_agent::netlink::{Netlink, NetlinkEvent, Route, pod};
use weir_common::endpoint::{host_mac, pod_mac};

use crate::support::{
    Family4And6, OtherNamespace, address, ifindex, in_namespace, ip, ip_batch, make_underlay,
    next_event, range,
};

#[test]
fn a_watcher_tells_of_others_changes_only() {
    in_namespace(async {
        make_underlay();
        let elsewhere = OtherNamespace::new();
        let mac = host_mac(1);
        let pid = elsewhere.pid();
        ip(&format!(
            "link add pod1 address {mac} type veth peer name eth0 netns {pid}"
        ));
        let pod1 = ifindex("pod1");
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
        let silence = Duration::from_millis(100);
        let event = tokio::time::timeout(silence, events.recv()).await;
        assert!(event.is_err(), "{event:?}");
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
