//! The two sets of endpoints of a Service port, and frontends that lead to them: what stands where,
//! and that a frontend which changes its set is neither missing nor before its endpoints. The order is
//! seen by having the kernel refuse the later step.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::atomic::{AtomicBool, Ordering},
};

use weir_agent::{
    model::{EndpointSet, Frontend, FrontendKind, Scope, ServicePort},
    objects::Family,
};
use weir_common::{
    Ipv4,
    service::{self, FrontendKey, ServiceState, backend_state, flag},
};

use crate::support::{BpfFs, FAMILIES, ReadOnly, backend_address, cluster_ip, key, port};

use EndpointSet::{Cluster, Local};

const EXTERNAL: u32 = 77;

/// Frontend port 80 of an external address, and which endpoints are in which set.
fn external(family: Family, outside: EndpointSet, cluster: &[u32], local: &[u32]) -> ServicePort {
    let mut desired = port(family, 1, cluster.iter().chain(local).copied());
    for (address, backend) in &mut desired.backends {
        let is_in = |set: &[u32]| set.iter().any(|i| backend_address(family, *i) == *address);
        (backend.cluster, backend.local) = (is_in(cluster), is_in(local));
    }
    let address = Some(cluster_ip(family, EXTERNAL));
    desired.frontends = [(Scope::Inside, Cluster), (Scope::Outside, outside)]
        .map(|(scope, set)| Frontend {
            address,
            port: 80,
            kind: FrontendKind::ExternalIp,
            scope,
            set,
        })
        .into();
    desired
}

/// Only clients outside, as no Service has it: one frontend shows the order best.
fn outside_only(family: Family, set: EndpointSet, endpoints: &[u32]) -> ServicePort {
    let (cluster, local) = match set {
        Cluster => (endpoints, &[][..]),
        Local => (&[][..], endpoints),
    };
    let mut desired = external(family, set, cluster, local);
    desired.frontends.retain(|f| f.scope == Scope::Outside);
    desired
}

fn outside(fs: &BpfFs, family: Family) -> Option<u32> {
    fs.frontend_row(cluster_ip(family, EXTERNAL), 80, Scope::Outside)
}

fn row(number: u32, set: EndpointSet) -> u32 {
    service::state_row(number, set.number())
}

fn frontends(family: Family) -> &'static str {
    match family {
        Family::V4 => "FRONTENDS_V4",
        Family::V6 => "FRONTENDS_V6",
    }
}

#[test]
fn every_set_holds_its_endpoints_and_only_those_used_are_filled() {
    for family in FAMILIES {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        let desired = external(family, Local, &[1, 2], &[2, 3]);
        let applied = datapath
            .apply_service(&key(family, 1), Some(&desired))
            .unwrap();
        let number = |index| applied.backends[&backend_address(family, index)];
        let inside = fs.frontend_row(cluster_ip(family, EXTERNAL), 80, Scope::Inside);
        assert_eq!(inside, Some(row(applied.number, Cluster)));
        assert_eq!(outside(&fs, family), Some(row(applied.number, Local)));
        for (set, members) in [(Cluster, [1, 2]), (Local, [2, 3])] {
            let spread = fs.spread_of(applied.number, set);
            let mut members = members.map(number);
            members.sort();
            assert!(spread.keys().eq(&members), "{set:?} {spread:?}");
            assert_eq!(fs.state_of(applied.number, set).flags(), flag::IN_USE);
        }
        assert_eq!([1, 2, 3].map(|i| fs.backend(number(i)).sets), [1, 3, 2]);
        assert_eq!(applied.slots, fs.state_of(applied.number, Cluster).slots());
        assert_eq!(
            applied.local_slots,
            fs.state_of(applied.number, Local).slots()
        );

        // Nobody is led to Local any more.
        let desired = external(family, Cluster, &[1, 2], &[]);
        datapath
            .apply_service(&key(family, 1), Some(&desired))
            .unwrap();
        assert_eq!(fs.state_of(applied.number, Local), ServiceState::default());
        assert_eq!([1, 2].map(|i| fs.backend(number(i)).sets), [1, 1]);
        assert_eq!(fs.backend(number(3)).state, backend_state::FREE);
        assert_eq!(outside(&fs, family), Some(row(applied.number, Cluster)));

        datapath.apply_service(&key(family, 1), None).unwrap();
        assert_eq!(outside(&fs, family), None);
        for set in EndpointSet::ALL {
            assert_eq!(fs.state_of(applied.number, set), ServiceState::default());
        }
        assert!(datapath.ipcache().entries().is_empty());
    }
}

#[test]
fn a_change_of_one_set_leaves_the_other_alone() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let key = key(Family::V4, 1);
    let apply = |datapath: &mut weir_agent::datapath::Datapath, cluster: &[u32], local: &[u32]| {
        let desired = external(Family::V4, Local, cluster, local);
        datapath.apply_service(&key, Some(&desired)).unwrap()
    };
    let before = apply(&mut datapath, &[1, 2, 3], &[2]);
    let words = || EndpointSet::ALL.map(|set| fs.state_of(before.number, set));
    let first = words();
    // One endpoint comes to Local: it has its row already.
    let after = apply(&mut datapath, &[1, 2, 3], &[2, 3]);
    assert_eq!(after.backends, before.backends);
    let second = words();
    assert_eq!(second[0], first[0]);
    assert_ne!(second[1], first[1]);
    // One leaves Cluster and stays in Local: its row stays, generation and all.
    apply(&mut datapath, &[1, 2], &[2, 3]);
    let third = words();
    assert_ne!(third[0], second[0]);
    assert_eq!(third[1], second[1]);
    let moved = fs.backend(before.backends[&backend_address(Family::V4, 3)]);
    assert_eq!((moved.sets, moved.generation), (2, 1));
}

#[test]
fn a_frontend_changes_its_set_in_one_update_after_the_sets_word() {
    for family in FAMILIES {
        for (from, to) in [(Cluster, Local), (Local, Cluster)] {
            let fs = BpfFs::new();
            let mut datapath = fs.open();
            let key = key(family, 1);
            let before = outside_only(family, from, &[1, 2]);
            let applied = datapath.apply_service(&key, Some(&before)).unwrap();
            let old_word = fs.state_of(applied.number, from);

            let after = outside_only(family, to, &[2, 3]);
            let refused = ReadOnly::new(&fs, frontends(family));
            for _ in 0..2 {
                datapath.apply_service(&key, Some(&after)).unwrap_err();
                // It leads to all it led to, and where it will lead is complete.
                assert_eq!(outside(&fs, family), Some(row(applied.number, from)));
                assert_eq!(fs.state_of(applied.number, from), old_word);
                assert_eq!(fs.spread_of(applied.number, from).len(), 2);
                assert_eq!(fs.spread_of(applied.number, to).len(), 2);
                for number in applied.backends.values() {
                    assert_eq!(fs.backend(*number).state, backend_state::ACTIVE);
                }
            }
            drop(refused);
            let now = datapath.apply_service(&key, Some(&after)).unwrap();
            assert_eq!(now.number, applied.number);
            assert_eq!(outside(&fs, family), Some(row(applied.number, to)));
            assert_eq!(fs.state_of(applied.number, from), ServiceState::default());
            let gone = applied.backends[&backend_address(family, 1)];
            assert_eq!(fs.backend(gone).state, backend_state::FREE);
            let kept = applied.backends[&backend_address(family, 2)];
            assert_eq!(now.backends[&backend_address(family, 2)], kept);
        }
    }
}

#[test]
fn a_set_goes_only_when_its_word_can_be_stored() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let key = key(Family::V4, 1);
    let applied = datapath
        .apply_service(&key, Some(&outside_only(Family::V4, Cluster, &[1])))
        .unwrap();
    // Gives the mappings back.
    datapath.prune().unwrap();
    let after = outside_only(Family::V4, Local, &[2]);
    let refused = ReadOnly::new(&fs, "SERVICE_STATE");
    for _ in 0..2 {
        datapath.apply_service(&key, Some(&after)).unwrap_err();
        let cluster = row(applied.number, Cluster);
        assert_eq!(
            outside(&fs, Family::V4),
            Some(cluster),
            "nothing is half done"
        );
        assert_eq!(fs.spread_of(applied.number, Cluster).len(), 1);
    }
    drop(refused);
    datapath.apply_service(&key, Some(&after)).unwrap();
    assert_eq!(outside(&fs, Family::V4), Some(row(applied.number, Local)));
    assert_eq!(fs.spread_of(applied.number, Local).len(), 1);
    // Regions and rows of the failed attempts are not lost.
    datapath.apply_service(&key, None).unwrap();
    let fill = datapath.services().fill();
    assert_eq!(fill.services.0 + fill.backends.0, fill.quarantined - 2);
}

#[test]
fn a_frontend_that_another_port_has_taken_returns_to_the_set_of_now() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let (first, second) = (key(Family::V6, 1), key(Family::V6, 2));
    let a = datapath
        .apply_service(&first, Some(&outside_only(Family::V6, Cluster, &[1])))
        .unwrap();
    let b = datapath
        .apply_service(&second, Some(&outside_only(Family::V6, Cluster, &[2])))
        .unwrap();
    datapath
        .apply_service(&first, Some(&outside_only(Family::V6, Local, &[1])))
        .unwrap();
    let now = || outside(&fs, Family::V6);
    assert_eq!(now(), Some(row(b.number, Cluster)), "it is not taken back");
    datapath.apply_service(&second, None).unwrap();
    assert_eq!(now(), Some(row(a.number, Local)));
    datapath.apply_service(&first, None).unwrap();
    assert_eq!(now(), None);
    assert!(datapath.ipcache().entries().is_empty());
}

#[test]
fn a_restart_keeps_both_sets_and_what_changed_meanwhile_is_applied() {
    for family in FAMILIES {
        let fs = BpfFs::new();
        let key = key(family, 1);
        let desired = external(family, Local, &[1, 2, 3], &[2, 3]);
        let mut datapath = fs.open();
        let before = datapath.apply_service(&key, Some(&desired)).unwrap();
        let words = || EndpointSet::ALL.map(|set| fs.state_of(before.number, set));
        let rows = || before.backends.values().map(|n| fs.backend(*n));
        let (words_before, rows_before) = (words(), rows().collect::<Vec<_>>());
        drop(datapath);

        let mut datapath = fs.open();
        let again = datapath.apply_service(&key, Some(&desired)).unwrap();
        assert_eq!(again, before);
        assert_eq!(words(), words_before);
        assert!(rows().eq(rows_before));
        assert_eq!(datapath.prune().unwrap(), Default::default());
        drop(datapath);

        // While no agent ran the policy became Cluster.
        let mut datapath = fs.open();
        let desired = external(family, Cluster, &[1, 2, 3], &[]);
        let after = datapath.apply_service(&key, Some(&desired)).unwrap();
        assert_eq!(after.backends, before.backends);
        assert_eq!(outside(&fs, family), Some(row(before.number, Cluster)));
        assert_eq!(words(), [words_before[0], ServiceState::default()]);
        assert!(rows().all(|row| row.sets == 1));
        drop(datapath);

        // And now the Service went.
        let mut datapath = fs.open();
        assert_eq!(datapath.prune().unwrap().services, 1);
        assert_eq!(outside(&fs, family), None);
        assert_eq!(words(), [ServiceState::default(); 2]);
    }
}

#[test]
fn node_ports_stand_once_for_all_addresses_of_the_node() {
    for family in FAMILIES {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        let mut desired = port(family, 1, [1]);
        desired.frontends = [Scope::Inside, Scope::Outside]
            .map(|scope| Frontend {
                address: None,
                port: 30_080,
                kind: FrontendKind::NodePort,
                scope,
                set: Cluster,
            })
            .into();
        let applied = datapath
            .apply_service(&key(family, 1), Some(&desired))
            .unwrap();
        let (own, other) = match family {
            Family::V4 => (
                IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            ),
            Family::V6 => (
                IpAddr::V6(Ipv6Addr::UNSPECIFIED),
                IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            ),
        };
        for scope in [Scope::Inside, Scope::Outside] {
            let wanted = Some(row(applied.number, Cluster) | service::frontend::NODE_PORT);
            assert_eq!(fs.frontend_row(own, 30_080, scope), wanted);
            assert_eq!(fs.frontend_row(other, 30_080, scope), None);
        }
        assert!(datapath.ipcache().entries().is_empty(), "no address of it");
        drop(datapath);
        let mut datapath = fs.open();
        let again = datapath
            .apply_service(&key(family, 1), Some(&desired))
            .unwrap();
        assert_eq!(again, applied, "the family is known without an address");
        datapath.apply_service(&key(family, 1), None).unwrap();
        assert_eq!(fs.frontend_row(own, 30_080, Scope::Inside), None);
    }
}

/// A reader that looks all the time finds the frontend every time.
#[test]
fn a_frontend_that_changes_its_set_is_never_missing() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let key = key(Family::V4, 1);
    let policies = [Cluster, Local].map(|set| outside_only(Family::V4, set, &[1]));
    datapath.apply_service(&key, Some(&policies[0])).unwrap();
    let IpAddr::V4(address) = cluster_ip(Family::V4, EXTERNAL) else {
        unreachable!()
    };
    let frontend = FrontendKey {
        address: Ipv4::from(address),
        port: weir_common::Port::new(80),
        protocol: weir_common::protocol::TCP,
        scope: Scope::Outside.number(),
    };
    let map = fs.hash::<FrontendKey<Ipv4>, u32>("FRONTENDS_V4");
    let stop = AtomicBool::new(false);
    let (looks, rows) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut looks, mut rows) = (0, BTreeSet::new());
            while !stop.load(Ordering::Relaxed) {
                rows.insert(map.get(&frontend, 0).ok());
                looks += 1;
            }
            (looks, rows)
        });
        for round in 0..4000 {
            let desired = &policies[(round + 1) % 2];
            datapath.apply_service(&key, Some(desired)).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(looks > 1000, "{looks}");
    let number = service::service_port_of_row(outside(&fs, Family::V4).unwrap());
    let both = [Cluster, Local].map(|set| Some(row(number, set)));
    assert_eq!(rows, BTreeSet::from(both));
}
