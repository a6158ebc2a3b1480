//! What the kernel refuses is kept and done at the next attempt. The refusal is real: the handle
//! on a map only reads for a while.

use weir_agent::{
    datapath::Datapath,
    model::{Frontend, ServicePort},
    objects::Family,
};
use weir_common::{
    ipcache::class,
    service::{FrontendKey, ServiceState, backend_state},
};

use crate::support::{BpfFs, FAMILIES, ReadOnly, cluster_ip, key, port};

const FAMILY: Family = Family::V4;

fn add_frontend(desired: &mut ServicePort, family: Family, index: u32, port: u16) {
    desired
        .frontends
        .insert(Frontend::cluster_ip(cluster_ip(family, index), port));
}

/// Everything of these Service ports is gone, and what follows finds the tables empty.
fn assert_empty(fs: &BpfFs, datapath: &Datapath, numbers: &[u32], backends: &[u32]) {
    let fill = datapath.services().fill();
    assert_eq!((fill.frontends_v4.0, fill.frontends_v6.0), (0, 0));
    for name in ["FRONTENDS_V4", "FRONTENDS_V6"] {
        let left = match name {
            "FRONTENDS_V4" => fs
                .hash::<FrontendKey<weir_common::Ipv4>, u32>(name)
                .keys()
                .count(),
            _ => fs
                .hash::<FrontendKey<weir_common::Ipv6>, u32>(name)
                .keys()
                .count(),
        };
        assert_eq!(left, 0, "{name}");
    }
    for number in numbers {
        assert_eq!(fs.state(*number), ServiceState::default());
    }
    for number in backends {
        let row = fs.backend(*number);
        assert_eq!((row.state, row.generation), (backend_state::FREE, 2));
    }
    assert!(datapath.ipcache().entries().is_empty());
    // Each was put into quarantine, and only once.
    assert_eq!(fill.services.0 as usize, numbers.len());
    assert_eq!(fill.backends.0 as usize, backends.len());
    assert_eq!(
        fill.quarantined as usize,
        2 * numbers.len() + backends.len(),
        "numbers, regions and backends"
    );
}

#[test]
fn prune_keeps_what_the_kernel_refuses() {
    for family in FAMILIES {
        for map in [
            match family {
                Family::V4 => "FRONTENDS_V4",
                Family::V6 => "FRONTENDS_V6",
            },
            "SERVICE_STATE",
            "BACKENDS",
        ] {
            let fs = BpfFs::new();
            let mut datapath = fs.open();
            let (mut numbers, mut backends) = (Vec::new(), Vec::new());
            for index in 1..=3 {
                let mut desired = port(family, index, index * 10..index * 10 + 3);
                add_frontend(&mut desired, family, index, 443);
                let applied = datapath
                    .apply_service(&key(family, index), Some(&desired))
                    .unwrap();
                numbers.push(applied.number);
                backends.extend(applied.backends.into_values());
            }
            drop(datapath);

            let mut datapath = fs.open();
            let refused = ReadOnly::new(&fs, map);
            for _ in 0..2 {
                let error = datapath.prune().unwrap_err().to_string();
                assert!(error.contains(map), "{error}");
            }
            drop(refused);
            assert_eq!(datapath.prune().unwrap().services, 3, "{map}");
            assert_empty(&fs, &datapath, &numbers, &backends);
            assert_eq!(datapath.prune().unwrap(), Default::default());
        }
    }
}

#[test]
fn prune_keeps_backends_that_belong_to_no_port() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let applied = datapath
        .apply_service(&key(FAMILY, 1), Some(&port(FAMILY, 1, 1..=5)))
        .unwrap();
    datapath.apply_service(&key(FAMILY, 1), None).unwrap();
    drop(datapath);
    // As a crash between the rows and the word leaves them.
    let mut rows = fs.array::<weir_common::service::Backend>("BACKENDS");
    for number in applied.backends.values() {
        let mut row = fs.backend(*number);
        (row.state, row.generation) = (backend_state::ACTIVE, 1);
        rows.set(*number, row, 0).unwrap();
    }
    let mut datapath = fs.open();
    let refused = ReadOnly::new(&fs, "BACKENDS");
    for _ in 0..2 {
        datapath.prune().unwrap_err();
    }
    drop(refused);
    datapath.prune().unwrap();
    for number in applied.backends.values() {
        let row = fs.backend(*number);
        assert_eq!((row.state, row.generation), (backend_state::FREE, 2));
    }
    assert_eq!(datapath.services().fill().quarantined, 5);
}

#[test]
fn a_port_is_removed_by_as_many_attempts_as_it_takes() {
    for map in ["FRONTENDS_V4", "SERVICE_STATE", "BACKENDS", "IPCACHE_V4"] {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        let applied = datapath
            .apply_service(&key(FAMILY, 1), Some(&port(FAMILY, 1, 1..=5)))
            .unwrap();
        // Gives the mappings back.
        datapath.prune().unwrap();
        let refused = ReadOnly::new(&fs, map);
        for _ in 0..2 {
            let error = datapath.apply_service(&key(FAMILY, 1), None).unwrap_err();
            assert!(error.to_string().contains(map), "{error}");
        }
        drop(refused);
        datapath.apply_service(&key(FAMILY, 1), None).unwrap();
        let backends: Vec<u32> = applied.backends.into_values().collect();
        assert_empty(&fs, &datapath, &[applied.number], &backends);
    }
}

#[test]
fn a_port_that_returns_while_it_is_being_removed_is_whole_again() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let desired = port(FAMILY, 1, 1..=5);
    let before = datapath
        .apply_service(&key(FAMILY, 1), Some(&desired))
        .unwrap();
    datapath.prune().unwrap();
    let refused = ReadOnly::new(&fs, "BACKENDS");
    datapath.apply_service(&key(FAMILY, 1), None).unwrap_err();
    drop(refused);
    let after = datapath
        .apply_service(&key(FAMILY, 1), Some(&desired))
        .unwrap();
    assert_eq!(fs.frontend(FAMILY, 1, 80), Some(after.number));
    assert!(
        fs.spread(after.number).keys().eq(after
            .backends
            .values()
            .collect::<std::collections::BTreeSet<_>>())
    );
    for number in before.backends.values() {
        assert_eq!(fs.backend(*number).state, backend_state::FREE);
    }
}

#[test]
fn endpoints_that_left_are_freed_at_the_next_attempt() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let before = datapath
        .apply_service(&key(FAMILY, 1), Some(&port(FAMILY, 1, 1..=5)))
        .unwrap();
    datapath.prune().unwrap();
    let refused = ReadOnly::new(&fs, "BACKENDS");
    // None is new, so only the freeing needs the map.
    let desired = port(FAMILY, 1, 1..=2);
    for _ in 0..2 {
        datapath
            .apply_service(&key(FAMILY, 1), Some(&desired))
            .unwrap_err();
    }
    drop(refused);
    let after = datapath
        .apply_service(&key(FAMILY, 1), Some(&desired))
        .unwrap();
    for number in before.backends.values() {
        let stays = after.backends.values().any(|n| n == number);
        let wanted = if stays {
            backend_state::ACTIVE
        } else {
            backend_state::FREE
        };
        assert_eq!(fs.backend(*number).state, wanted);
    }
}

#[test]
fn frontends_of_an_earlier_agent_go_at_the_next_attempt_and_do_not_return() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let mut desired = port(FAMILY, 1, [1]);
    for number in [443, 8443] {
        add_frontend(&mut desired, FAMILY, 1, number);
    }
    let before = datapath
        .apply_service(&key(FAMILY, 1), Some(&desired))
        .unwrap();
    drop(datapath);

    let mut datapath = fs.open();
    let desired = port(FAMILY, 1, [1]);
    let refused = ReadOnly::new(&fs, "FRONTENDS_V4");
    for _ in 0..2 {
        datapath
            .apply_service(&key(FAMILY, 1), Some(&desired))
            .unwrap_err();
    }
    drop(refused);
    assert_eq!(fs.frontend(FAMILY, 1, 443), Some(before.number));
    // Meanwhile another port takes one of them, and later gives it up.
    let mut other = port(FAMILY, 1, [2]);
    other.frontends.clear();
    add_frontend(&mut other, FAMILY, 1, 443);
    let other = (key(FAMILY, 2), other);
    let applied = datapath.apply_service(&other.0, Some(&other.1)).unwrap();
    datapath
        .apply_service(&key(FAMILY, 1), Some(&desired))
        .unwrap();
    assert_eq!(fs.frontend(FAMILY, 1, 80), Some(before.number));
    assert_eq!(fs.frontend(FAMILY, 1, 443), Some(applied.number));
    assert_eq!(fs.frontend(FAMILY, 1, 8443), None);
    datapath.apply_service(&other.0, None).unwrap();
    assert_eq!(fs.frontend(FAMILY, 1, 443), None);
}

#[test]
fn an_address_that_another_port_takes_meanwhile_stays_a_services() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    datapath
        .apply_service(&key(FAMILY, 1), Some(&port(FAMILY, 1, [1])))
        .unwrap();
    let refused = ReadOnly::new(&fs, "IPCACHE_V4");
    datapath.apply_service(&key(FAMILY, 1), None).unwrap_err();
    drop(refused);
    let mut other = port(FAMILY, 1, [2]);
    other.frontends.clear();
    add_frontend(&mut other, FAMILY, 1, 443);
    datapath
        .apply_service(&key(FAMILY, 2), Some(&other))
        .unwrap();
    datapath.apply_service(&key(FAMILY, 1), None).unwrap();
    let prefix = ipnet::IpNet::from(cluster_ip(FAMILY, 1));
    assert_eq!(datapath.ipcache().entries()[&prefix].class, class::SERVICE);
    datapath.apply_service(&key(FAMILY, 2), None).unwrap();
    assert!(datapath.ipcache().entries().is_empty());
}
