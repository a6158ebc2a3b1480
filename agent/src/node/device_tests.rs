//! What the node sends from at each of its devices, and towards other nodes.

use std::{collections::BTreeMap, net::IpAddr};

use weir_common::ipcache::{class, flag};

use super::{
    NodePortAddresses, NodeSettings, Snapshot,
    plan::Cluster,
    plan_tests::{
        DOCKER0, ETH0, ETH1, LO, POD, TUN, address, link, node, nodes, on_link, own, plan, range,
        snapshot, through,
    },
};
use crate::{
    netlink::{Address, Link, LinkLayer, Readiness, ResolvedRoute},
    objects::Family,
};

fn on(ifindex: u32, text: &str, preferred: bool) -> Address {
    Address {
        ifindex,
        address: range(text),
        preferred,
        second_choice: !preferred,
        readiness: Readiness::Ready,
    }
}

#[test]
fn every_device_of_the_node_has_the_addresses_that_it_sends_from() {
    let nodes = nodes(&[own()]);
    let mut snapshot = snapshot();
    snapshot.links.extend([
        Link {
            kind: "veth".to_owned(),
            ..link(20, "weir-host", 1500, "veth")
        },
        link(21, "weir-net", 1500, "veth"),
        link(22, "weir-defrag", 1500, "veth"),
        // Somebody else's, whatever its name says.
        link(23, "weir-host", 1500, "dummy"),
    ]);
    snapshot.addresses.extend([
        on(ETH1, "198.51.100.7/24", false),
        on(ETH1, "198.51.100.8/24", true),
        on(ETH1, "fe80::7/64", true),
        on(ETH1, "fd00:9::7/64", false),
    ]);
    let plan = plan(&nodes, &snapshot);
    let sources: BTreeMap<u32, (Option<String>, Option<String>)> = plan
        .sources
        .iter()
        .map(|(ifindex, source)| {
            let text = |address: Option<IpAddr>| address.map(|address| address.to_string());
            let (v4, v6) = (source.v4.map(IpAddr::V4), source.v6.map(IpAddr::V6));
            (*ifindex, (text(v4), text(v6)))
        })
        .collect();
    let some = |v4: &str, v6: &str| (Some(v4.to_owned()), Some(v6.to_owned()));
    let expected = BTreeMap::from([
        (ETH0, some("192.0.2.1", "2001:db8::1")),
        // Its own where it has one that may be used, else the node's.
        (ETH1, some("198.51.100.8", "2001:db8::1")),
        (DOCKER0, some("172.17.0.1", "2001:db8::1")),
        (TUN, some("192.0.2.1", "2001:db8::1")),
        (23, some("192.0.2.1", "2001:db8::1")),
    ]);
    assert_eq!(sources, expected);
    assert!(!plan.sources.contains_key(&LO) && !plan.sources.contains_key(&POD));
}

#[test]
fn a_deprecated_address_is_a_source_where_there_is_no_other() {
    let mut snapshot = snapshot();
    snapshot.addresses.retain(|a| a.ifindex == LO);
    snapshot.addresses.extend([
        on(ETH0, "192.0.2.9/24", false),
        on(ETH0, "2001:db8::9/64", false),
        on(ETH1, "198.51.100.8/24", true),
    ]);
    let nodes = nodes(&[("m", node(&["198.51.100.8"], &[]))]);
    let plan = plan(&nodes, &snapshot);
    let of_eth0 = plan.sources[&ETH0];
    assert_eq!(of_eth0.v4, Some([198, 51, 100, 8].into()));
    assert_eq!(of_eth0.v6, Some("2001:db8::9".parse().unwrap()));
    for served in ["192.0.2.9/32", "2001:db8::9/128"] {
        assert!(plan.ipcache.contains_key(&range(served)), "{served}");
    }
}

#[test]
fn an_address_that_is_not_ready_is_not_the_node_s() {
    let nodes = nodes(&[("m", node(&["2001:db8::1", "2001:db8:f::1"], &[]))]);
    let mut snapshot = snapshot();
    let new = range("2001:db8:9::1/64");
    let plan_with = |snapshot: &mut Snapshot, readiness| {
        let is_ready = readiness == Readiness::Ready;
        // One of the status, and one besides.
        snapshot.addresses.retain(|a| a.address != new);
        snapshot.addresses.push(on(ETH1, "2001:db8:9::1/64", true));
        for a in &mut snapshot.addresses {
            if a.address == new || a.address == range("2001:db8::1/64") {
                (a.readiness, a.preferred) = (readiness, is_ready);
                a.second_choice = false;
            }
        }
        plan(&nodes, snapshot)
    };
    for readiness in [Readiness::Tentative, Readiness::Taken] {
        let ready = plan_with(&mut snapshot, Readiness::Ready);
        assert_eq!(ready.problems, [""; 0]);
        let pending = plan_with(&mut snapshot, readiness);
        for address in ["2001:db8::1/128", "2001:db8:9::1/128"] {
            let own = ready.ipcache[&range(address)].class;
            assert_eq!(own, class::THIS_NODE, "{address}");
            assert!(!pending.ipcache.contains_key(&range(address)), "{address}");
        }
        // No device has it: it is translated elsewhere.
        assert!(pending.ipcache.contains_key(&range("2001:db8:f::1/128")));
        for device in [ETH0, ETH1] {
            assert!(ready.sources[&device].v6.is_some());
            assert_eq!(pending.sources[&device].v6, None);
        }
        assert!(
            pending.devices.contains_key(&ETH1),
            "its programs are there before"
        );
        let is_taken = readiness == Readiness::Taken;
        assert_eq!(pending.problems.len(), if is_taken { 2 } else { 0 });
        assert_eq!(pending.addresses.contains(&new.addr()), !is_taken);
        if is_taken {
            assert!(
                pending.problems[0].contains("2001:db8::1 too"),
                "{:?}",
                pending.problems
            );
        }
        // It is, once it is ready.
        let changes = ready.changes_since(&pending);
        assert_eq!(changes.ipcache.len(), 2);
        assert!(changes.ipcache.iter().all(|change| change.entry.is_some()));
    }
}

#[test]
fn an_address_in_the_status_comes_before_others_and_counts_only_on_a_device() {
    let mut snapshot = snapshot();
    snapshot.addresses.extend([
        on(ETH1, "198.51.100.7/24", true),
        on(ETH1, "198.51.100.8/24", true),
    ]);
    let second = nodes(&[("m", node(&["198.51.100.8"], &[]))]);
    let sources = plan(&second, &snapshot).sources;
    assert_eq!(sources[&ETH1].v4, Some([198, 51, 100, 8].into()));
    assert_eq!(sources[&TUN].v4, Some([198, 51, 100, 8].into()));
    // A cloud's external address is translated elsewhere: nothing can be sent from it here.
    let elsewhere = nodes(&[("m", node(&["203.0.113.99"], &[]))]);
    let sources = plan(&elsewhere, &snapshot).sources;
    assert_eq!(sources[&TUN].v4, None);
    assert_eq!(sources[&ETH0].v4, Some([192, 0, 2, 1].into()));
}

#[test]
fn the_source_towards_a_node_is_that_of_the_route_or_of_the_device() {
    let nodes = nodes(&[
        own(),
        ("b", node(&["192.0.2.2", "2001:db8::2"], &[])),
        ("c", node(&["198.51.100.3"], &[])),
        ("d", node(&["2001:db8::4"], &["10.0.3.0/24"])),
    ]);
    let mut snapshot = snapshot();
    let preferred = |source: &str| ResolvedRoute {
        source: Some(address(source)),
        ..on_link(ETH0).unwrap()
    };
    snapshot.resolved = BTreeMap::from([
        (address("192.0.2.2"), Ok(preferred("192.0.2.77"))),
        (address("2001:db8::2"), Ok(preferred("2001:db8::77"))),
        (address("198.51.100.3"), through(DOCKER0, "172.17.0.9")),
        // The gateway is of the other family (RFC 5549).
        (address("10.0.3.0"), through(ETH0, "2001:db8::4")),
        (address("2001:db8::4"), Ok(preferred("fe80::1"))),
    ]);
    let before = plan(&nodes, &snapshot);
    let source = |node: &str, family| {
        before.hops[&(node.to_owned(), family)]
            .clone()
            .unwrap()
            .source
    };
    assert_eq!(source("b", Family::V4), Some(address("192.0.2.77")));
    assert_eq!(source("b", Family::V6), Some(address("2001:db8::77")));
    assert_eq!(source("c", Family::V4), Some(address("172.17.0.1")));
    assert_eq!(source("d", Family::V4), Some(address("192.0.2.1")));
    assert_eq!(source("d", Family::V6), Some(address("2001:db8::1")));
}

#[test]
fn devices_that_come_go_or_change_their_address_are_told_of() {
    let nodes = nodes(&[own()]);
    let first = plan(&nodes, &snapshot());
    let mut later = snapshot();
    later.links.retain(|link| link.ifindex != DOCKER0);
    later.links.push(link(30, "eth9", 1500, ""));
    later.addresses.push(on(ETH1, "198.51.100.7/24", true));
    let changes = plan(&nodes, &later).changes_since(&first);
    let changed: Vec<u32> = changes.sources.into_keys().collect();
    assert_eq!(changed, [ETH1, DOCKER0, 30]);
    assert!(
        plan(&nodes, &later)
            .changes_since(&plan(&nodes, &later))
            .is_empty()
    );
}

/// The addresses at which NodePorts are served, and the problems.
fn node_ports(
    setting: NodePortAddresses,
    devices: &[&str],
    snapshot: &Snapshot,
) -> (Vec<String>, Vec<String>) {
    let settings = NodeSettings {
        node_port_addresses: setting,
        devices: devices.iter().map(|name| (*name).to_owned()).collect(),
        ..NodeSettings::default()
    };
    let nodes = nodes(&[(
        "m",
        node(&["198.51.100.7", "192.0.2.1", "2001:db8::1"], &[]),
    )]);
    let plan = Cluster::new("m", &nodes).plan(&settings, snapshot);
    let own = plan
        .ipcache
        .iter()
        .filter(|(_, target)| target.flags & flag::HOST_PORTS != 0);
    let served = own.clone().filter(|(_, t)| t.flags & flag::NODE_PORTS != 0);
    assert_eq!(own.count(), 6, "HostPorts are served at every address");
    let served = served
        .map(|(prefix, _)| prefix.addr().to_string())
        .collect();
    (served, plan.problems)
}

#[test]
fn node_ports_stand_at_the_addresses_that_the_setting_chooses() {
    let mut snapshot = snapshot();
    snapshot.addresses.push(on(ETH1, "fd00:9::7/64", true));
    let ranges = |ranges: &[&str]| {
        NodePortAddresses::Ranges(ranges.iter().map(|text| range(text)).collect())
    };
    // eth0 has the default route, docker0 and the loopback device have addresses of their own.
    for (setting, devices, served) in [
        (
            NodePortAddresses::Found,
            &[][..],
            &["192.0.2.1", "198.51.100.7", "2001:db8::1"][..],
        ),
        (
            NodePortAddresses::Found,
            &["docker0"],
            &["172.17.0.1", "192.0.2.1", "198.51.100.7", "2001:db8::1"],
        ),
        (
            NodePortAddresses::Primary,
            &["docker0"],
            &["198.51.100.7", "2001:db8::1"],
        ),
        (
            ranges(&["203.0.113.0/24", "172.16.0.0/12"]),
            &[],
            &["172.17.0.1", "203.0.113.200", "2001:db8::1"],
        ),
        (
            ranges(&["fd00::/8"]),
            &[],
            &["192.0.2.1", "198.51.100.7", "fd00:9::7"],
        ),
        (
            ranges(&["0.0.0.0/0", "::/0"]),
            &[],
            &[
                "172.17.0.1",
                "192.0.2.1",
                "198.51.100.7",
                "203.0.113.200",
                "2001:db8::1",
                "fd00:9::7",
            ],
        ),
    ] {
        let (found, problems) = node_ports(setting.clone(), devices, &snapshot);
        assert_eq!(found, served, "{setting:?} {devices:?}");
        assert_eq!(problems, [""; 0]);
    }
    let (found, problems) = node_ports(ranges(&["10.0.0.0/8", "192.0.2.0/24"]), &[], &snapshot);
    assert_eq!(found, ["192.0.2.1", "2001:db8::1"]);
    assert_eq!(problems.len(), 1);
    for part in ["10.0.0.0/8", "nodeport-addresses", "correct"] {
        assert!(problems[0].contains(part), "{part}: {problems:?}");
    }
}

#[test]
fn an_address_that_comes_or_goes_changes_what_is_served() {
    let nodes = nodes(&[own()]);
    let first = plan(&nodes, &snapshot());
    let mut later = snapshot();
    later.addresses.push(on(ETH0, "192.0.2.50/24", false));
    let second = plan(&nodes, &later);
    let change = |changes: super::PlanChanges| {
        let [change] = &changes.ipcache[..] else {
            panic!("{:?}", changes.ipcache);
        };
        (
            change.prefix.to_string(),
            change.entry.as_ref().map(|entry| entry.flags),
        )
    };
    assert_eq!(
        change(second.changes_since(&first)),
        (
            "192.0.2.50/32".to_owned(),
            Some(flag::NODE_PORTS | flag::HOST_PORTS)
        )
    );
    assert_eq!(
        change(first.changes_since(&second)),
        ("192.0.2.50/32".to_owned(), None)
    );
}

#[test]
fn every_device_with_an_address_is_served_but_for_ports_of_others() {
    let nodes = nodes(&[own()]);
    let mut snapshot = snapshot();
    let enslaved = Link {
        master: Some(DOCKER0),
        ..link(30, "port0", 1500, "veth")
    };
    let down = Link {
        up: false,
        ..link(31, "down0", 1500, "")
    };
    snapshot.links.extend([enslaved, down]);
    snapshot.links.push(link(32, "local0", 1500, ""));
    snapshot.links.push(link(33, "second0", 1500, "vlan"));
    snapshot.addresses.extend([
        on(30, "198.18.0.1/24", true),
        on(31, "198.18.1.1/24", true),
        on(32, "fe80::1/64", true),
        on(33, "2001:db8:9::1/64", true),
        on(TUN, "198.18.2.1/24", true),
    ]);
    let found = plan(&nodes, &snapshot);
    let names: Vec<&str> = found.devices.values().map(String::as_str).collect();
    assert_eq!(names, ["eth0", "docker0", "tun0", "second0"]);
    assert_eq!(
        found.mtu, 1500,
        "that of docker0 is less, and leads nowhere"
    );
    // NodePorts are served where they were.
    let flags = |prefix: &str| found.ipcache[&range(prefix)].flags;
    assert_eq!(flags("172.17.0.1/32"), flag::HOST_PORTS);
    assert_eq!(flags("2001:db8:9::1/128"), flag::HOST_PORTS);

    // One whose frames nobody knows is told of.
    for link in &mut snapshot.links {
        if link.ifindex == TUN {
            link.link_layer = LinkLayer::Other;
        }
    }
    let found = plan(&nodes, &snapshot);
    assert!(!found.devices.contains_key(&TUN));
    assert!(found.problems[0].contains("device tun0 have a header"));
    assert!(found.sources.contains_key(&TUN));
}

#[test]
fn devices_of_a_vrf_are_told_of() {
    let nodes = nodes(&[own()]);
    let mut snapshot = snapshot();
    let port = |ifindex, name, master| Link {
        master: Some(master),
        ..link(ifindex, name, 1500, "")
    };
    snapshot.links.extend([
        link(40, "blue", 65_575, "vrf"),
        port(41, "blue4", 40),
        port(42, "blue6", 40),
        // Without an address that others can send to, and of a bridge.
        port(43, "blue-none", 40),
        port(44, "port0", DOCKER0),
    ]);
    snapshot.addresses.extend([
        on(41, "198.18.0.1/24", true),
        on(42, "2001:db8:9::1/64", true),
        on(43, "fe80::1/64", true),
        on(44, "198.18.1.1/24", true),
    ]);
    let found = plan(&nodes, &snapshot);
    assert!(!found.devices.contains_key(&41) && !found.devices.contains_key(&42));
    assert_eq!(found.problems.len(), 2, "{:?}", found.problems);
    for (problem, device) in found.problems.iter().zip(["blue4", "blue6"]) {
        for part in [device, "VRF blue,", "NodePort", "keep their own address"] {
            assert!(problem.contains(part), "{part}: {problem}");
        }
    }
    // Somebody has named one.
    let settings = NodeSettings {
        devices: vec!["eth0".to_owned(), "blue4".to_owned()],
        ..NodeSettings::default()
    };
    let named = Cluster::new("m", &nodes).plan(&settings, &snapshot);
    assert!(named.devices.contains_key(&41));
    assert!(
        named.problems[0].contains("and no answers"),
        "{:?}",
        named.problems
    );
}
