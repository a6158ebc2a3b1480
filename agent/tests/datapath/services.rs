use std::time::Instant;

use weir_agent::{
    datapath::{Datapath, TableError},
    model::{BackendState, Frontend},
    objects::Family,
};
use weir_common::{
    Ipv4,
    ipcache::{IpcacheEntry, class},
    limits,
    service::{ServiceState, backend_state, flag},
};

use crate::support::{BpfFs, FAMILIES, backend, backend_address, cluster_ip, key, port};

#[test]
fn a_service_is_found_as_a_program_finds_it_and_leaves_nothing() {
    for family in FAMILIES {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        let applied = datapath
            .apply_service(&key(family, 1), Some(&port(family, 1, 1..=3)))
            .unwrap();
        assert_eq!(applied.backends.len(), 3);

        assert_eq!(fs.frontend(family, 1, 80), Some(applied.number));
        let word = fs.state(applied.number);
        assert_eq!(word.flags(), flag::IN_USE);
        assert_eq!(word.slots(), applied.slots);
        let spread = fs.spread(applied.number);
        assert_eq!(
            spread.keys().collect::<Vec<_>>(),
            applied.backends.values().collect::<Vec<_>>()
        );
        let fair = word.slots() / 3;
        assert!(
            spread.values().all(|&n| n == fair || n == fair + 1),
            "{spread:?}"
        );
        for (address, &number) in &applied.backends {
            let row = fs.backend(number);
            assert_eq!(row.state, backend_state::ACTIVE);
            assert_eq!(row.address, weir_common::Ipv6::from_ip(address.address));
            assert_eq!(row.port.get(), address.port);
            assert_eq!(row.service_port, applied.number);
            assert_eq!(row.generation, 1);
        }
        let prefix = ipnet::IpNet::from(cluster_ip(family, 1));
        assert_eq!(datapath.ipcache().entries()[&prefix].class, class::SERVICE);

        datapath.apply_service(&key(family, 1), None).unwrap();
        assert_eq!(fs.frontend(family, 1, 80), None);
        assert_eq!(fs.state(applied.number), ServiceState::default());
        for &number in applied.backends.values() {
            let row = fs.backend(number);
            assert_eq!((row.state, row.generation), (backend_state::FREE, 2));
        }
        assert!(datapath.ipcache().entries().is_empty());
        datapath.apply_service(&key(family, 1), None).unwrap();
    }
}

#[test]
fn a_change_touches_only_what_changes() {
    for family in FAMILIES {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        let before = datapath
            .apply_service(&key(family, 1), Some(&port(family, 1, 1..=4)))
            .unwrap();
        let word = fs.state(before.number);

        // The same again: nothing is stored.
        let same = datapath
            .apply_service(&key(family, 1), Some(&port(family, 1, 1..=4)))
            .unwrap();
        assert_eq!(same, before);
        assert_eq!(fs.state(before.number), word);

        // Another state of one endpoint changes its row, not the slots.
        let mut desired = port(family, 1, 1..=4);
        desired.backends.insert(
            backend_address(family, 2),
            backend(BackendState::Terminating),
        );
        datapath
            .apply_service(&key(family, 1), Some(&desired))
            .unwrap();
        assert_eq!(fs.state(before.number), word);
        let terminating = fs.backend(before.backends[&backend_address(family, 2)]);
        assert_eq!(terminating.state, backend_state::TERMINATING);
        assert_eq!(terminating.generation, 1);

        // One endpoint replaced by another: the others keep number and generation.
        let after = datapath
            .apply_service(&key(family, 1), Some(&port(family, 1, [1, 3, 4, 5])))
            .unwrap();
        assert_ne!(fs.state(before.number), word);
        for index in [1, 3, 4] {
            let address = backend_address(family, index);
            assert_eq!(after.backends[&address], before.backends[&address]);
        }
        let removed = before.backends[&backend_address(family, 2)];
        assert_eq!(fs.backend(removed).state, backend_state::FREE);
        assert!(!fs.spread(after.number).contains_key(&removed));

        // No endpoints: the frontend stays and says so.
        let none = datapath
            .apply_service(&key(family, 1), Some(&port(family, 1, [])))
            .unwrap();
        assert_eq!(fs.frontend(family, 1, 80), Some(none.number));
        let word = fs.state(none.number);
        assert_eq!((word.slots(), word.flags()), (0, flag::IN_USE));
    }
}

#[test]
fn a_frontend_moves_between_ports_without_being_absent() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let family = Family::V4;
    let (old, new) = (key(family, 1), key(family, 2));
    let desired = port(family, 7, [1]);
    let a = datapath.apply_service(&old, Some(&desired)).unwrap();
    let b = datapath.apply_service(&new, Some(&desired)).unwrap();
    assert_ne!(a.number, b.number);
    assert_eq!(fs.frontend(family, 7, 80), Some(b.number));
    // The former owner goes: the frontend is not its any more.
    datapath.apply_service(&old, None).unwrap();
    assert_eq!(fs.frontend(family, 7, 80), Some(b.number));
    // Both want it and the owner goes: it returns to the other.
    let a = datapath.apply_service(&old, Some(&desired)).unwrap();
    assert_eq!(fs.frontend(family, 7, 80), Some(a.number));
    datapath.apply_service(&old, None).unwrap();
    assert_eq!(fs.frontend(family, 7, 80), Some(b.number));
    datapath.apply_service(&new, None).unwrap();
    assert_eq!(fs.frontend(family, 7, 80), None);
    assert!(
        datapath.ipcache().entries().is_empty(),
        "counted references"
    );
}

#[test]
fn ports_of_one_address_share_its_prefix() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    for family in FAMILIES {
        let mut two = port(family, 1, [1]);
        two.frontends
            .insert(Frontend::cluster_ip(cluster_ip(family, 1), 443));
        datapath.apply_service(&key(family, 1), Some(&two)).unwrap();
        let one = port(family, 1, [1]);
        datapath.apply_service(&key(family, 1), Some(&one)).unwrap();
        let prefix = ipnet::IpNet::from(cluster_ip(family, 1));
        assert!(datapath.ipcache().entries().contains_key(&prefix));
        assert_eq!(fs.frontend(family, 1, 443), None);
        datapath.apply_service(&key(family, 1), None).unwrap();
    }
    assert!(datapath.ipcache().entries().is_empty());
}

#[test]
fn a_restart_keeps_numbers_generations_and_regions() {
    for family in FAMILIES {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        let mut before = Vec::new();
        for index in 1..=20 {
            // Churn, so that numbers and generations are not those of a fresh table.
            let first = port(family, index, index..index + 5);
            datapath
                .apply_service(&key(family, index), Some(&first))
                .unwrap();
            let desired = port(family, index, index + 1..index + 6);
            let applied = datapath
                .apply_service(&key(family, index), Some(&desired))
                .unwrap();
            let rows: Vec<_> = applied.backends.values().map(|n| fs.backend(*n)).collect();
            before.push((desired, fs.state(applied.number), rows, applied));
        }
        drop(datapath);

        let mut datapath = fs.open();
        assert!(datapath.migrations().is_empty());
        // Another order than before, and one Service has disappeared meanwhile.
        for index in (1..=19).rev() {
            let (desired, word, rows, applied) = &before[index as usize - 1];
            let again = datapath
                .apply_service(&key(family, index), Some(desired))
                .unwrap();
            assert_eq!(again, *applied);
            assert_eq!(fs.state(again.number), *word);
            let now: Vec<_> = again.backends.values().map(|n| fs.backend(*n)).collect();
            assert_eq!(now, *rows);
        }
        let gone = &before[19].3;
        assert_eq!(
            fs.frontend(family, 20, 80),
            Some(gone.number),
            "in force until pruned"
        );
        let pruned = datapath.prune().unwrap();
        assert_eq!((pruned.services, pruned.prefixes), (1, 1));
        assert_eq!(fs.frontend(family, 20, 80), None);
        assert_eq!(fs.state(gone.number), ServiceState::default());
        assert!(
            gone.backends
                .values()
                .all(|n| fs.backend(*n).state == backend_state::FREE)
        );
        assert_eq!(datapath.ipcache().entries().len(), 19);
        assert_eq!(datapath.prune().unwrap(), Default::default());
    }
}

#[test]
fn what_changed_while_no_agent_ran_is_applied_to_the_same_port() {
    let fs = BpfFs::new();
    let family = Family::V6;
    let mut datapath = fs.open();
    let before = datapath
        .apply_service(&key(family, 1), Some(&port(family, 1, 1..=4)))
        .unwrap();
    drop(datapath);
    let mut datapath = fs.open();
    let after = datapath
        .apply_service(&key(family, 1), Some(&port(family, 1, 2..=5)))
        .unwrap();
    assert_eq!(after.number, before.number);
    for index in 2..=4 {
        let address = backend_address(family, index);
        assert_eq!(after.backends[&address], before.backends[&address]);
    }
    let removed = fs.backend(before.backends[&backend_address(family, 1)]);
    assert_eq!(removed.state, backend_state::FREE);
    assert_eq!(fs.spread(after.number).len(), 4);
}

#[test]
fn a_damaged_region_is_rewritten_at_start() {
    let fs = BpfFs::new();
    let family = Family::V4;
    let mut datapath = fs.open();
    let ports = [1, 2].map(|index| {
        datapath
            .apply_service(&key(family, index), Some(&port(family, index, 1..=3)))
            .unwrap()
    });
    drop(datapath);
    // The second port's word is made to name the first one's region.
    let mut states = fs.array::<ServiceState>("SERVICE_STATE");
    states
        .set(ports[1].number, fs.state(ports[0].number), 0)
        .unwrap();
    let mut datapath = fs.open();
    for index in [1, 2] {
        let applied = datapath
            .apply_service(&key(family, index), Some(&port(family, index, 1..=3)))
            .unwrap();
        assert_eq!(applied, ports[index as usize - 1]);
        let spread = fs.spread(applied.number);
        assert!(
            spread.keys().eq(applied.backends.values()),
            "{spread:?} {applied:?}"
        );
    }
    assert_ne!(
        fs.state(ports[0].number).first_slot(),
        fs.state(ports[1].number).first_slot()
    );
}

#[test]
fn regions_and_rows_are_used_again() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    for round in 0..3_000u32 {
        let backends = (0..4).map(|i| round + i);
        datapath
            .apply_service(&key(Family::V4, 1), Some(&port(Family::V4, 1, backends)))
            .unwrap();
    }
    let fill = datapath.services().fill();
    assert!(fill.slot_chunks.0 <= 2, "{fill:?}");
    assert!(fill.backends.0 <= 4 + fill.quarantined, "{fill:?}");
    assert_eq!(fill.services.0, 1);
}

#[test]
fn a_full_table_is_named_and_everything_else_goes_on() {
    let fs = BpfFs::new();
    let mut options = fs.options();
    options.backends_max = 16;
    options.services_max = 8;
    let mut datapath = Datapath::open(&options).unwrap();
    let family = Family::V4;
    let first = datapath
        .apply_service(&key(family, 1), Some(&port(family, 1, 0..10)))
        .unwrap();
    let full = datapath.apply_service(&key(family, 2), Some(&port(family, 2, 20..30)));
    assert!(
        matches!(
            full,
            Err(TableError::Full {
                map: "BACKENDS",
                entries: 16,
                ..
            })
        ),
        "{full:?}"
    );
    assert!(full.unwrap_err().to_string().contains("backends-max"));
    assert_eq!(
        fs.frontend(family, 2, 80),
        None,
        "a port without endpoints is not published"
    );
    // What fits is applied, to this port and to others, and the first is as it was.
    let second = datapath
        .apply_service(&key(family, 2), Some(&port(family, 2, 20..24)))
        .unwrap();
    assert_eq!(second.backends.len(), 4);
    assert_eq!(fs.spread(first.number).len(), 10);
    // Room is found as soon as someone leaves.
    datapath.apply_service(&key(family, 1), None).unwrap();
    let second = datapath
        .apply_service(&key(family, 2), Some(&port(family, 2, 20..30)))
        .unwrap();
    assert_eq!(second.backends.len(), 10);

    for index in 3..=8 {
        datapath
            .apply_service(&key(family, index), Some(&port(family, index, [])))
            .unwrap();
    }
    let full = datapath.apply_service(&key(family, 9), Some(&port(family, 9, [])));
    assert!(
        matches!(
            full,
            Err(TableError::Full {
                map: "SERVICE_STATE",
                ..
            })
        ),
        "{full:?}"
    );
}

#[test]
fn a_service_wins_over_what_else_has_its_address() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let address = cluster_ip(Family::V4, 1);
    let prefix = ipnet::IpNet::from(address);
    let class_of = || {
        let trie = fs.trie::<Ipv4, IpcacheEntry>("IPCACHE_V4");
        let std::net::IpAddr::V4(v4) = address else {
            unreachable!()
        };
        trie.get(&aya::maps::lpm_trie::Key::new(32, v4.into()), 0)
            .ok()
            .map(|e| e.class)
    };
    let desired = port(Family::V4, 1, [1]);
    datapath
        .apply_service(&key(Family::V4, 1), Some(&desired))
        .unwrap();
    assert_eq!(class_of(), Some(class::SERVICE));
    datapath
        .set_ipcache(
            prefix,
            class::THIS_NODE,
            0,
            weir_agent::datapath::HopRef::Host,
        )
        .unwrap();
    assert_eq!(class_of(), Some(class::SERVICE));
    datapath.apply_service(&key(Family::V4, 1), None).unwrap();
    assert_eq!(class_of(), Some(class::THIS_NODE));
    datapath.remove_ipcache(prefix).unwrap();
    assert_eq!(class_of(), None);
}

/// Prints figures; asserts nothing about time.
#[test]
fn ten_thousand_services() {
    let fs = BpfFs::new();
    let mut options = fs.options();
    options.services_max = limits::SERVICE_PORTS_DEFAULT;
    options.backends_max = limits::BACKENDS_DEFAULT;
    let begin = Instant::now();
    let mut datapath = Datapath::open(&options).unwrap();
    println!("open: {:?}", begin.elapsed());
    let desired: Vec<_> = (0..10_000)
        .map(|index| {
            (
                key(Family::V4, index),
                port(Family::V4, index, index * 10..index * 10 + 10),
            )
        })
        .collect();
    let begin = Instant::now();
    for (key, port) in &desired {
        datapath.apply_service(key, Some(port)).unwrap();
    }
    println!("10,000 services x 10 endpoints: {:?}", begin.elapsed());

    let mut times: Vec<_> = (0..500u32)
        .map(|i| {
            let index = i * 19 % 10_000;
            let changed = port(Family::V4, index, index * 10 + 1..index * 10 + 10);
            let begin = Instant::now();
            datapath
                .apply_service(&key(Family::V4, index), Some(&changed))
                .unwrap();
            begin.elapsed()
        })
        .collect();
    times.sort();
    println!(
        "one change: p50 {:?}, p99 {:?}, max {:?}",
        times[250], times[495], times[499]
    );
    println!("{:?}", datapath.services().fill());
    drop(datapath);

    let begin = Instant::now();
    let mut datapath = Datapath::open(&options).unwrap();
    println!("open with 10,000 services: {:?}", begin.elapsed());
    let begin = Instant::now();
    for (key, port) in &desired {
        datapath.apply_service(key, Some(port)).unwrap();
    }
    println!("applied again: {:?}", begin.elapsed());
    assert_eq!(datapath.prune().unwrap().services, 0);
    assert_eq!(datapath.services().fill().services.0, 10_000);
}
