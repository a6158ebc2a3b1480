//! Session affinity: the time stands before the word says that there is one, and nothing of it stays
//! when it is switched off, when its port goes, or when its time is over.

use aya::maps::{HashMap, MapData};
use weir_agent::{
    datapath::Datapath,
    model::{EndpointSet, ServicePort},
    objects::Family,
};
use weir_common::{
    Ipv6,
    affinity::{Affinity, AffinityKey},
    flow::TICKS_PER_SECOND,
    service::flag,
};

use crate::support::{BpfFs, FAMILIES, ReadOnly, key, port};

fn with_affinity(family: Family, seconds: Option<u32>) -> ServicePort {
    with_affinity_at(family, 1, seconds)
}

fn with_affinity_at(family: Family, service: u32, seconds: Option<u32>) -> ServicePort {
    ServicePort {
        affinity: seconds,
        ..port(family, service, 1..=3)
    }
}

fn table(fs: &BpfFs) -> HashMap<MapData, AffinityKey, Affinity> {
    fs.hash("AFFINITY")
}

/// As a program remembers a client.
fn remember(fs: &BpfFs, service_port: u32, client: u8, last_used: u32) {
    let mut address = Ipv6::default();
    address.0[15] = client;
    let key = AffinityKey {
        client: address,
        service_port,
    };
    let entry = Affinity {
        backend: 1,
        generation: 1,
        last_used,
        reserved: 0,
    };
    table(fs).insert(key, entry, 0).unwrap();
}

/// Service port and client of everything that is remembered.
fn remembered(fs: &BpfFs) -> Vec<(u32, u8)> {
    let keys = table(fs);
    let keys = keys.keys().map(|key| key.unwrap());
    let mut all: Vec<_> = keys.map(|k| (k.service_port, k.client.0[15])).collect();
    all.sort();
    all
}

#[test]
fn the_time_stands_before_the_word_and_goes_after_it() {
    for family in FAMILIES {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        let key = key(family, 1);
        let apply = |datapath: &mut Datapath, seconds| {
            datapath.apply_service(&key, Some(&with_affinity(family, seconds)))
        };
        let applied = apply(&mut datapath, None).unwrap();
        let flags = || fs.state(applied.number).flags();
        let region = fs.state(applied.number).first_slot();
        datapath.prune().unwrap();

        // Switched on: the time is refused, then the word.
        let refused = ReadOnly::new(&fs, "AFFINITY_TIMEOUTS");
        apply(&mut datapath, Some(600)).unwrap_err();
        assert_eq!(flags(), flag::IN_USE);
        drop(refused);
        let refused = ReadOnly::new(&fs, "SERVICE_STATE");
        apply(&mut datapath, Some(600)).unwrap_err();
        assert_eq!(
            (fs.affinity_timeout(applied.number), flags()),
            (600, flag::IN_USE)
        );
        drop(refused);
        apply(&mut datapath, Some(600)).unwrap();
        assert_eq!(flags(), flag::IN_USE | flag::AFFINITY);
        assert_eq!(
            fs.state(applied.number).first_slot(),
            region,
            "the same slots"
        );

        // Another time needs no new word.
        apply(&mut datapath, Some(60)).unwrap();
        assert_eq!(fs.affinity_timeout(applied.number), 60);

        // Switched off: first the word, then the time.
        let other = crate::support::key(family, 2);
        let others = with_affinity_at(family, 2, Some(60));
        let other = datapath.apply_service(&other, Some(&others)).unwrap();
        remember(&fs, applied.number, 7, 0);
        remember(&fs, other.number, 7, 0);
        let refused = ReadOnly::new(&fs, "AFFINITY_TIMEOUTS");
        apply(&mut datapath, None).unwrap_err();
        assert_eq!(
            (fs.affinity_timeout(applied.number), flags()),
            (60, flag::IN_USE)
        );
        drop(refused);
        apply(&mut datapath, None).unwrap();
        assert_eq!(fs.affinity_timeout(applied.number), 0);

        // Switched on again it knows nobody: what cannot be forgotten keeps it off.
        let refused = ReadOnly::new(&fs, "AFFINITY");
        apply(&mut datapath, Some(60)).unwrap_err();
        assert_eq!(
            (fs.affinity_timeout(applied.number), flags()),
            (0, flag::IN_USE)
        );
        drop(refused);
        apply(&mut datapath, Some(60)).unwrap();
        assert_eq!(flags(), flag::IN_USE | flag::AFFINITY);
        assert_eq!(remembered(&fs), [(other.number, 7)], "others stay");
    }
}

#[test]
fn both_sets_have_it() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let mut desired = with_affinity(Family::V4, Some(60));
    let mut local = *desired.frontends.first().unwrap();
    (local.port, local.set) = (81, EndpointSet::Local);
    desired.frontends.insert(local);
    let applied = datapath
        .apply_service(&key(Family::V4, 1), Some(&desired))
        .unwrap();
    for set in EndpointSet::ALL {
        let flags = fs.state_of(applied.number, set).flags();
        assert_eq!(flags, flag::IN_USE | flag::AFFINITY, "{set:?}");
    }
}

/// A sweep of the whole table at the time that entries were made.
fn sweep(datapath: &mut Datapath) -> u32 {
    datapath.sweep_affinity_at(0, u32::MAX).unwrap()
}

#[test]
fn nothing_is_remembered_of_a_port_that_is_gone() {
    let fs = BpfFs::new();
    let desired = with_affinity(Family::V6, Some(60));
    let mut datapath = fs.open();
    let key = key(Family::V6, 1);
    for restart in [false, true] {
        let applied = datapath.apply_service(&key, Some(&desired)).unwrap();
        remember(&fs, applied.number, 1, 0);
        if restart {
            drop(datapath);
            datapath = fs.open();
            datapath.prune().unwrap();
        } else {
            datapath.apply_service(&key, None).unwrap();
        }
        assert_eq!(fs.affinity_timeout(applied.number), 0);
        assert_eq!(sweep(&mut datapath), 1);
        assert_eq!(remembered(&fs), []);
    }
}

#[test]
fn many_ports_that_lose_it_cost_no_walk_and_those_that_get_it_again_one() {
    const PORTS: u32 = 50;
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let mut apply = |service, seconds| {
        let desired = with_affinity_at(Family::V4, service, seconds);
        datapath
            .apply_service(&key(Family::V4, service), Some(&desired))
            .map(|applied| applied.number)
    };
    for service in 1..=PORTS {
        let number = apply(service, Some(60)).unwrap();
        remember(&fs, number, 1, 0);
    }
    let refused = ReadOnly::new(&fs, "AFFINITY");
    for service in 1..=PORTS {
        apply(service, None).unwrap();
    }
    drop(refused);
    apply(1, Some(60)).unwrap();
    assert_eq!(remembered(&fs), []);
    let refused = ReadOnly::new(&fs, "AFFINITY");
    for service in 2..=PORTS {
        apply(service, Some(60)).unwrap();
    }
    drop(refused);
}

#[test]
fn a_restart_keeps_it() {
    let fs = BpfFs::new();
    let desired = with_affinity(Family::V4, Some(60));
    let mut datapath = fs.open();
    let before = datapath
        .apply_service(&key(Family::V4, 1), Some(&desired))
        .unwrap();
    let word = fs.state(before.number);
    remember(&fs, before.number, 1, 0);
    drop(datapath);
    let mut datapath = fs.open();
    datapath
        .apply_service(&key(Family::V4, 1), Some(&desired))
        .unwrap();
    datapath.prune().unwrap();
    assert_eq!(fs.state(before.number), word);
    assert_eq!(remembered(&fs), [(before.number, 1)]);
    // It is switched off while no agent runs.
    drop(datapath);
    let mut datapath = fs.open();
    datapath
        .apply_service(&key(Family::V4, 1), Some(&with_affinity(Family::V4, None)))
        .unwrap();
    assert_eq!(fs.state(before.number).flags(), flag::IN_USE);
    // And on again by one that never knew that it had been on.
    drop(datapath);
    let mut datapath = fs.open();
    datapath
        .apply_service(&key(Family::V4, 1), Some(&desired))
        .unwrap();
    assert_eq!(fs.state(before.number), word);
    assert_eq!(remembered(&fs), []);
}

#[test]
fn what_is_older_than_its_time_is_swept_a_piece_at_a_time() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    // Before any Service has affinity nothing is looked at.
    remember(&fs, 5, 1, 0);
    assert_eq!(datapath.sweep_affinity_at(1 << 30, 1000).unwrap(), 0);
    let applied = datapath
        .apply_service(
            &key(Family::V4, 1),
            Some(&with_affinity(Family::V4, Some(60))),
        )
        .unwrap();
    // Times wrap.
    let now: u32 = 10;
    for (client, seconds) in [(1, 0), (2, 59), (3, 61), (4, 1000)] {
        let then = now.wrapping_sub(seconds * TICKS_PER_SECOND);
        remember(&fs, applied.number, client, then);
    }
    // (What stood there before the first Service had affinity went then.)
    assert_eq!(datapath.sweep_affinity_at(now, 1000).unwrap(), 2);
    let left = [(applied.number, 1), (applied.number, 2)];
    assert_eq!(remembered(&fs), left);
    let fill = datapath.fill().into_iter().find(|f| f.map == "AFFINITY");
    assert_eq!(fill.unwrap().entries, 2);

    for client in 10..200 {
        remember(&fs, applied.number, client, now);
    }
    let later = now + 61 * TICKS_PER_SECOND;
    let mut pieces = 0;
    while !remembered(&fs).is_empty() {
        let before = remembered(&fs).len();
        let removed = datapath.sweep_affinity_at(later, 1).unwrap();
        assert_eq!(before - remembered(&fs).len(), removed as usize);
        pieces += 1;
        assert!(pieces < 1000, "it comes to an end");
    }
}
