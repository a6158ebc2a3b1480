//! What the ipcache says of addresses that have frontends.

use std::net::IpAddr;

use weir_agent::{
    datapath::{Datapath, HopRef, NodeConfig},
    model::{EndpointSet, Frontend, FrontendKind, Scope, ServicePort},
    objects::Family,
};
use weir_common::{
    ipcache::{
        IpcacheEntry, class,
        flag::{CLUSTER_IP, FRONTENDS, NO_MASQUERADE, NODE_PORTS, REFUSE},
    },
    next_hop,
};

use crate::support::{BpfFs, FAMILIES, cluster_ip, key, port};

use FrontendKind::{ClusterIp, ExternalIp, HostPort, LoadBalancer};

/// A Service port with one frontend of each kind at one address.
fn at(family: Family, kinds: &[FrontendKind]) -> ServicePort {
    let frontend = |(index, kind): (usize, &FrontendKind)| Frontend {
        address: Some(cluster_ip(family, 1)),
        port: 80 + index as u16,
        kind: *kind,
        scope: Scope::Inside,
        set: EndpointSet::Cluster,
    };
    ServicePort {
        frontends: kinds.iter().enumerate().map(frontend).collect(),
        ..port(family, 1, [1])
    }
}

fn class_and_flags(fs: &BpfFs, address: IpAddr) -> Option<(u8, u8)> {
    fs.ipcache(address).map(|entry| (entry.class, entry.flags))
}

#[test]
fn frontends_mark_their_address_and_cluster_ips_own_it() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    // Kinds, the node manager's entry, and what is written.
    for (kinds, explicit, expected) in [
        (
            &[ClusterIp][..],
            None,
            (class::SERVICE, FRONTENDS | REFUSE | CLUSTER_IP),
        ),
        (&[ExternalIp], None, (class::SERVICE, FRONTENDS)),
        (&[HostPort], None, (class::SERVICE, FRONTENDS)),
        (&[LoadBalancer], None, (class::SERVICE, FRONTENDS | REFUSE)),
        (
            &[ExternalIp, LoadBalancer],
            None,
            (class::SERVICE, FRONTENDS | REFUSE),
        ),
        (
            &[ExternalIp],
            Some((class::THIS_NODE, NODE_PORTS)),
            (class::THIS_NODE, FRONTENDS | NODE_PORTS),
        ),
        (
            &[LoadBalancer],
            Some((class::THIS_NODE, NODE_PORTS)),
            (class::THIS_NODE, FRONTENDS | NODE_PORTS),
        ),
        (
            &[LoadBalancer],
            Some((class::REMOTE_NODE, 0)),
            (class::REMOTE_NODE, FRONTENDS),
        ),
        (
            &[ClusterIp],
            Some((class::THIS_NODE, NODE_PORTS)),
            (class::SERVICE, FRONTENDS | REFUSE | CLUSTER_IP),
        ),
        (
            &[ClusterIp, ExternalIp],
            Some((class::REMOTE_NODE, 0)),
            (class::SERVICE, FRONTENDS | REFUSE | CLUSTER_IP),
        ),
    ] {
        for family in FAMILIES {
            for explicit_first in [false, true] {
                let address = cluster_ip(family, 1);
                let set = |datapath: &mut Datapath| {
                    if let Some((class, flags)) = explicit {
                        datapath
                            .set_ipcache(address.into(), class, flags, HopRef::Host)
                            .unwrap();
                    }
                };
                if explicit_first {
                    set(&mut datapath);
                }
                datapath
                    .apply_service(&key(family, 1), Some(&at(family, kinds)))
                    .unwrap();
                if !explicit_first {
                    set(&mut datapath);
                }
                let found = fs.ipcache(address).unwrap();
                let about = format!("{kinds:?} {explicit:?} {explicit_first}");
                assert_eq!((found.class, found.flags), expected, "{about}");
                let hop = match expected.0 {
                    class::SERVICE => 0,
                    _ => next_hop::HOST,
                };
                assert_eq!(found.next_hop, hop, "{about}");
                datapath.apply_service(&key(family, 1), None).unwrap();
                assert_eq!(class_and_flags(&fs, address), explicit, "{about}");
                datapath.remove_ipcache(address.into()).unwrap();
                assert!(datapath.ipcache().entries().is_empty(), "{about}");
            }
        }
    }
}

#[test]
fn a_frontend_of_another_kind_changes_the_flags() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let (key, address) = (key(Family::V6, 1), cluster_ip(Family::V6, 1));
    for (kinds, flags) in [
        ([LoadBalancer], FRONTENDS | REFUSE),
        ([ExternalIp], FRONTENDS),
        ([ClusterIp], FRONTENDS | REFUSE | CLUSTER_IP),
    ] {
        let desired = at(Family::V6, &kinds);
        datapath.apply_service(&key, Some(&desired)).unwrap();
        assert_eq!(class_and_flags(&fs, address), Some((class::SERVICE, flags)));
    }
    datapath.apply_service(&key, None).unwrap();
    assert!(datapath.ipcache().entries().is_empty());
}

/// Nodes are known before Services are.
#[test]
fn after_a_restart_an_address_stays_marked_until_services_are_known() {
    for (kind, gone) in [
        (ExternalIp, false),
        (ExternalIp, true),
        (ClusterIp, false),
        (ClusterIp, true),
    ] {
        let fs = BpfFs::new();
        let (key, address) = (key(Family::V4, 1), cluster_ip(Family::V4, 1));
        let node = (class::THIS_NODE, NODE_PORTS);
        let set_node = |datapath: &mut Datapath| {
            datapath
                .set_ipcache(address.into(), node.0, node.1, HopRef::Host)
                .unwrap();
        };
        let mut datapath = fs.open();
        set_node(&mut datapath);
        let desired = at(Family::V4, &[kind]);
        datapath.apply_service(&key, Some(&desired)).unwrap();
        let before: Option<IpcacheEntry> = fs.ipcache(address);
        drop(datapath);

        let mut datapath = fs.open();
        set_node(&mut datapath);
        assert_eq!(fs.ipcache(address), before, "{kind:?}");
        if !gone {
            datapath.apply_service(&key, Some(&desired)).unwrap();
            assert_eq!(fs.ipcache(address), before, "{kind:?}");
        }
        datapath.prune().unwrap();
        match gone {
            false => assert_eq!(fs.ipcache(address), before, "{kind:?}"),
            true => assert_eq!(class_and_flags(&fs, address), Some(node), "{kind:?}"),
        }
    }
}

/// The ports of a Service are entered one after another: the first does not make the others unknown.
#[test]
fn nothing_is_refused_before_all_ports_are_in_place() {
    for family in FAMILIES {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        datapath.refuse_later();
        let address = cluster_ip(family, 1);
        let flags = || class_and_flags(&fs, address).unwrap().1;
        let (first, second) = (key(family, 1), key(family, 2));
        let of_first = at(family, &[ClusterIp]);
        let mut of_second = of_first.clone();
        of_second.frontends = of_second
            .frontends
            .into_iter()
            .map(|frontend| Frontend {
                port: 443,
                ..frontend
            })
            .collect();
        datapath.apply_service(&first, Some(&of_first)).unwrap();
        assert_eq!(flags(), FRONTENDS | CLUSTER_IP);
        assert!(datapath.ipcache().is_lenient());
        datapath.apply_service(&second, Some(&of_second)).unwrap();
        assert_eq!(flags(), FRONTENDS | CLUSTER_IP);
        datapath.refuse().unwrap();
        assert_eq!(flags(), FRONTENDS | REFUSE | CLUSTER_IP);
        assert!(!datapath.ipcache().is_lenient());

        // A port more changes nothing there, nor does the next agent, which finds it so.
        datapath.apply_service(&second, None).unwrap();
        datapath.apply_service(&second, Some(&of_second)).unwrap();
        assert_eq!(flags(), FRONTENDS | REFUSE | CLUSTER_IP);
        drop(datapath);
        let mut datapath = fs.open();
        datapath.refuse_later();
        datapath.apply_service(&first, Some(&of_first)).unwrap();
        assert_eq!(flags(), FRONTENDS | REFUSE | CLUSTER_IP);
        assert!(!datapath.ipcache().is_lenient());

        // An address that goes before its turn has come leaves nothing.
        datapath.prune().unwrap();
        datapath.apply_service(&first, None).unwrap();
        datapath.apply_service(&first, Some(&of_first)).unwrap();
        datapath.apply_service(&first, None).unwrap();
        datapath.refuse().unwrap();
        assert!(datapath.ipcache().entries().is_empty());
    }
}

fn keep_addresses(datapath: &mut Datapath, ranges: &[&str]) {
    let config = NodeConfig {
        non_masquerade_cidrs: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        ..NodeConfig::default()
    };
    datapath.config_mut().apply(&config).unwrap();
}

/// Prefixes with class and flags as the kernel has them, read by the address of each.
fn entries(datapath: &Datapath) -> Vec<(String, u8, u8)> {
    let entries = datapath.ipcache().entries();
    let entry = |(prefix, entry): (&ipnet::IpNet, &IpcacheEntry)| {
        (prefix.to_string(), entry.class, entry.flags)
    };
    entries.iter().map(entry).collect()
}

fn set(datapath: &mut Datapath, prefix: &str, class: u8) {
    let prefix = prefix.parse().unwrap();
    datapath
        .set_ipcache(prefix, class, 0, HopRef::Host)
        .unwrap();
}

#[test]
fn ranges_that_are_not_masqueraded_mark_every_entry_in_them() {
    for (family, net, inner, node, apart) in [
        (
            Family::V4,
            "10.0.0.0/8",
            "10.96.0.0/16",
            "10.9.9.9/32",
            "192.0.2.1/32",
        ),
        (
            Family::V6,
            "fd00::/8",
            "fd96::/64",
            "fd09::9/128",
            "2001:db8::1/128",
        ),
    ] {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        set(&mut datapath, node, class::REMOTE_NODE);
        set(&mut datapath, apart, class::REMOTE_NODE);
        keep_addresses(&mut datapath, &[net, inner]);
        // Entries that come later are marked, too: here the ClusterIP of a Service.
        datapath
            .apply_service(&key(family, 1), Some(&port(family, 1, [1])))
            .unwrap();
        let cluster = FRONTENDS | REFUSE | CLUSTER_IP;
        let address = cluster_ip(family, 1);
        assert_eq!(
            class_and_flags(&fs, address),
            Some((class::SERVICE, cluster | NO_MASQUERADE))
        );
        let own = |class, flags, prefix: &str| (prefix.to_owned(), class, flags);
        let mut expected = vec![
            own(class::OUTSIDE, NO_MASQUERADE, net),
            own(class::OUTSIDE, NO_MASQUERADE, inner),
            own(class::REMOTE_NODE, NO_MASQUERADE, node),
            own(class::REMOTE_NODE, 0, apart),
            own(
                class::SERVICE,
                cluster | NO_MASQUERADE,
                &ipnet::IpNet::from(address).to_string(),
            ),
        ];
        let mut found = entries(&datapath);
        expected.sort();
        found.sort();
        assert_eq!(found, expected);

        keep_addresses(&mut datapath, &[]);
        let unmarked = entries(&datapath);
        assert!(
            unmarked
                .iter()
                .all(|(_, _, flags)| flags & NO_MASQUERADE == 0)
        );
        assert_eq!(unmarked.len(), 3, "{unmarked:?}");
    }
}

#[test]
fn a_range_within_the_pods_of_a_node_does_not_hide_them() {
    for (pods, range, inside) in [
        ("10.1.0.0/16", "10.1.7.0/24", "10.1.7.5"),
        ("fd00:1::/48", "fd00:1:0:7::/64", "fd00:1:0:7::5"),
    ] {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        keep_addresses(&mut datapath, &[range]);
        let inside: IpAddr = inside.parse().unwrap();
        assert_eq!(
            class_and_flags(&fs, inside),
            Some((class::OUTSIDE, NO_MASQUERADE))
        );
        set(&mut datapath, pods, class::REMOTE_PODS);
        assert_eq!(class_and_flags(&fs, inside), Some((class::REMOTE_PODS, 0)));
        datapath.remove_ipcache(pods.parse().unwrap()).unwrap();
        assert_eq!(
            class_and_flags(&fs, inside),
            Some((class::OUTSIDE, NO_MASQUERADE))
        );
        // The range itself may be a node's.
        set(&mut datapath, range, class::REMOTE_PODS);
        assert_eq!(
            class_and_flags(&fs, inside),
            Some((class::REMOTE_PODS, NO_MASQUERADE))
        );
        datapath.remove_ipcache(range.parse().unwrap()).unwrap();
        assert_eq!(
            class_and_flags(&fs, inside),
            Some((class::OUTSIDE, NO_MASQUERADE))
        );
    }
}

#[test]
fn a_restart_takes_nobodys_prefix_for_a_range() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    keep_addresses(&mut datapath, &["172.16.0.0/12", "198.51.100.0/24"]);
    for pods in ["10.1.0.0/16", "10.2.0.0/24"] {
        set(&mut datapath, pods, class::REMOTE_PODS);
    }
    drop(datapath);
    let mut datapath = fs.open();
    keep_addresses(
        &mut datapath,
        &["10.1.7.0/24", "10.2.0.0/24", "172.16.0.0/12"],
    );
    let at = |address: &str| class_and_flags(&fs, address.parse().unwrap());
    // The nodes are not known yet, and what leads to their pods stays.
    assert_eq!(at("10.1.7.5"), Some((class::REMOTE_PODS, 0)));
    assert_eq!(at("10.2.0.5"), Some((class::REMOTE_PODS, 0)));
    set(&mut datapath, "10.2.0.0/24", class::REMOTE_PODS);
    assert_eq!(at("10.2.0.5"), Some((class::REMOTE_PODS, NO_MASQUERADE)));
    datapath.prune().unwrap();
    assert_eq!(at("10.1.7.5"), Some((class::OUTSIDE, NO_MASQUERADE)));
    assert_eq!(at("10.1.8.5"), None);
    assert_eq!(at("172.16.0.1"), Some((class::OUTSIDE, NO_MASQUERADE)));
    assert_eq!(at("198.51.100.1"), None, "no longer in the setting");
}
