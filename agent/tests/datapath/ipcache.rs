//! What the ipcache says of addresses that have frontends.

use std::net::IpAddr;

use weir_agent::{
    datapath::HopRef,
    model::{EndpointSet, Frontend, FrontendKind, Scope, ServicePort},
    objects::Family,
};
use weir_common::{
    ipcache::{
        IpcacheEntry, class,
        flag::{CLUSTER_IP, FRONTENDS, NODE_PORTS, REFUSE},
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
                let set = |datapath: &mut weir_agent::datapath::Datapath| {
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
        let set_node = |datapath: &mut weir_agent::datapath::Datapath| {
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
