use std::{collections::BTreeSet, fs, os::unix::fs::symlink};

use aya::maps::{Array, MapData, MapInfo};
use weir_agent::datapath::{Datapath, DatapathError, DatapathOptions};
use weir_common::{ABI_VERSION, config::Config, limits};

use crate::support::{BpfFs, key, port};

#[test]
fn every_map_is_pinned_and_used_again() {
    let fs = BpfFs::new();
    let names = || -> BTreeSet<String> {
        fs::read_dir(fs.root().join("maps"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "~layouts")
            .collect()
    };
    let ids = || -> Vec<u32> {
        names()
            .iter()
            .map(|name| MapInfo::from_pin(fs.pin(name)).unwrap().id())
            .collect()
    };
    let datapath = fs.open();
    let before = (names(), ids());
    assert_eq!(before.0.len(), 32, "{:?}", before.0);
    assert!(before.0.contains("FLOWS_V4") && !before.0.contains("SCRATCH"));
    assert!(datapath.migrations().is_empty());
    drop(datapath);
    let datapath = fs.open();
    assert!(datapath.migrations().is_empty());
    assert_eq!((names(), ids()), before);
    let info = MapInfo::from_pin(fs.pin("FLOWS_V6")).unwrap();
    assert_eq!(info.max_entries(), limits::flows(fs.options().connections));
}

#[test]
fn a_map_of_another_layout_is_made_anew() {
    let fs = BpfFs::new();
    drop(fs.open());
    // NEXT_HOPS with a value that is too small: writes would be cut without a word.
    fs::remove_file(fs.pin("NEXT_HOPS")).unwrap();
    let other = Array::<MapData, u64>::create(8192, 0).unwrap();
    other.pin(fs.pin("NEXT_HOPS")).unwrap();
    let mut datapath = fs.open();
    let changed: BTreeSet<&str> = datapath
        .migrations()
        .iter()
        .map(|m| m.map.as_str())
        .collect();
    assert!(changed.contains("NEXT_HOPS"));
    // Its generations are lost, so flows cannot be trusted either.
    assert!(
        changed.contains("FLOWS_V4") && changed.contains("FLOW_RING_V6"),
        "{changed:?}"
    );
    let reason = &datapath
        .migrations()
        .iter()
        .find(|m| m.map == "NEXT_HOPS")
        .unwrap()
        .reason;
    assert!(
        reason.contains("bytes of a value 8 instead of 44"),
        "{reason}"
    );
    datapath.prune().unwrap();
    assert_eq!(
        MapInfo::from_pin(fs.pin("NEXT_HOPS")).unwrap().value_size(),
        44
    );
    drop(datapath);
    assert!(fs.open().migrations().is_empty());
}

/// What established connections need.
const KEPT: [&str; 20] = [
    "AFFINITY",
    "AFFINITY_TIMEOUTS",
    "BACKENDS",
    "ENDPOINTS",
    "ENDPOINT_FLOWS",
    "FLOWS_V4",
    "FLOWS_V6",
    "FLOW_RING_STATE",
    "FLOW_RING_V4",
    "FLOW_RING_V6",
    "FRONTENDS_V4",
    "FRONTENDS_V6",
    "IPCACHE_V4",
    "IPCACHE_V6",
    "NEXT_HOPS",
    "SERVICE_STATE",
    "SLOTS",
    "SOURCE_RANGES_V4",
    "SOURCE_RANGES_V6",
    "CONFIG",
];

/// What an agent of another version has left: `CONFIG` says so, and the note if there is one.
fn set_abi_version(fs: &BpfFs, version: u32) {
    let note = fs.pin("~layouts");
    if let Ok(text) = fs::read_link(&note) {
        let text = text.into_os_string().into_string().unwrap();
        let (_, groups) = text.split_once(',').unwrap();
        fs::remove_file(&note).unwrap();
        symlink(format!("abi={version},{groups}"), &note).unwrap();
    }
    set_config_version(fs, version);
}

fn set_config_version(fs: &BpfFs, version: u32) {
    let mut config = fs.array::<Config>("CONFIG");
    let mut row = config.get(&0, 0).unwrap();
    row.abi_version = version;
    config.set(0, row, 0).unwrap();
}

fn written() -> BpfFs {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    datapath.config_mut().apply(&Default::default()).unwrap();
    drop(datapath);
    assert!(fs.open().migrations().is_empty());
    fs
}

#[test]
fn another_abi_version_leaves_what_connections_need() {
    let fs = written();
    for version in [ABI_VERSION + 1, ABI_VERSION - 1] {
        set_abi_version(&fs, version);
        let mut datapath = fs.open();
        let anew: BTreeSet<&str> = datapath
            .migrations()
            .iter()
            .map(|migration| migration.map.as_str())
            .collect();
        let (config, kept) = KEPT.split_last().unwrap();
        assert!(kept.iter().all(|map| !anew.contains(map)), "{anew:?}");
        assert!(anew.contains(config));
        assert_eq!(anew.len(), 32 - kept.len());
        assert!(datapath.migrations().iter().all(|m| !m.kept));
        assert_eq!(datapath.config().row().abi_version, 0);
        datapath.prune().unwrap();
    }
}

#[test]
fn a_note_of_other_maps_says_nothing() {
    let fs = written();
    // An agent that knows of no note has made the maps anew.
    set_config_version(&fs, 2);
    let mut datapath = fs.open();
    let dropped = |map: &str| {
        let mut migrations = datapath.migrations().iter();
        migrations.any(|migration| migration.map == map && !migration.kept)
    };
    for map in ["FLOWS_V4", "FLOWS_V6", "BACKENDS", "NEXT_HOPS"] {
        assert!(dropped(map), "{map}");
    }
    datapath.prune().unwrap();
    drop(datapath);
    assert!(fs.open().migrations().is_empty(), "it is noted anew");
}

#[test]
fn what_nobody_has_noted_is_known_of_one_version_only() {
    for (version, dropped) in [(2, true), (3, false), (ABI_VERSION + 1, true)] {
        let fs = written();
        fs::remove_file(fs.pin("~layouts")).unwrap();
        set_abi_version(&fs, version);
        let mut datapath = fs.open();
        let flows = datapath.migrations().iter().find(|m| m.map == "FLOWS_V4");
        assert_eq!(flows.is_some(), dropped, "{version}");
        datapath.prune().unwrap();
        assert!(fs.pin("~layouts").is_symlink());
        drop(datapath);
        assert!(fs.open().migrations().is_empty());
    }
}

/// Which of these endpoints have entries in the flow table, as far as the programs are told.
fn has_flows(fs: &BpfFs) -> [u32; 3] {
    let rows = fs.array::<u32>("ENDPOINT_FLOWS");
    [0, 7, 4095].map(|row| rows.get(&row, 0).unwrap())
}

/// Puts a map with fewer rows in the place of `ENDPOINT_FLOWS`, which says the same.
fn shrink_has_flows(fs: &BpfFs) {
    fs::remove_file(fs.pin("ENDPOINT_FLOWS")).unwrap();
    let mut smaller = Array::<MapData, u32>::create(4096, 0).unwrap();
    smaller.set(7, 1, 0).unwrap();
    smaller.pin(fs.pin("ENDPOINT_FLOWS")).unwrap();
}

#[test]
fn with_the_flow_tables_it_stays_known_who_has_entries() {
    // The tables stay in their place, and the programs of the earlier agent with them: whom those give entries
    // meanwhile is not known.
    let fs = written();
    shrink_has_flows(&fs);
    let mut datapath = fs.open();
    assert_eq!(datapath.migrations().len(), 1);
    assert!(datapath.migrations()[0].kept);
    datapath.prune().unwrap();
    drop(datapath);
    assert_eq!(has_flows(&fs), [1, 1, 1]);

    // They are made anew together.
    let fs = written();
    shrink_has_flows(&fs);
    let options = DatapathOptions {
        connections: 4096,
        ..fs.options()
    };
    let mut datapath = Datapath::open(&options).unwrap();
    assert_eq!(datapath.migrations().len(), 5);
    assert!(datapath.migrations().iter().all(|m| m.kept));
    datapath.prune().unwrap();
    drop(datapath);
    assert_eq!(has_flows(&fs), [0, 1, 0]);
    // Another size of the flow tables alone.
    let mut datapath = fs.open();
    assert_eq!(datapath.migrations().len(), 4);
    datapath.prune().unwrap();
    drop(datapath);
    assert_eq!(has_flows(&fs), [0, 1, 0]);

    // Somebody has removed the pin.
    fs::remove_file(fs.pin("ENDPOINT_FLOWS")).unwrap();
    drop(fs.open());
    assert_eq!(has_flows(&fs), [1, 1, 1]);
}

#[test]
fn a_pin_that_nobody_knows_is_removed() {
    let fs = BpfFs::new();
    drop(fs.open());
    let other = Array::<MapData, u64>::create(1, 0).unwrap();
    other.pin(fs.pin("OLD_FEATURE")).unwrap();
    let mut datapath = fs.open();
    assert_eq!(datapath.migrations().len(), 1);
    datapath.prune().unwrap();
    assert!(!fs.pin("OLD_FEATURE").exists());
}

#[test]
fn services_survive_larger_and_smaller_tables() {
    let family = weir_agent::objects::Family::V4;
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let before = datapath
        .apply_service(&key(family, 1), Some(&port(family, 1, 1..=3)))
        .unwrap();
    let rows: Vec<_> = before.backends.values().map(|n| fs.backend(*n)).collect();
    drop(datapath);

    let larger = DatapathOptions {
        services_max: 4096,
        backends_max: 8192,
        ..fs.options()
    };
    let mut datapath = Datapath::open(&larger).unwrap();
    assert!(
        datapath.migrations().iter().all(|m| m.kept),
        "{:?}",
        datapath.migrations()
    );
    let after = datapath
        .apply_service(&key(family, 1), Some(&port(family, 1, 1..=3)))
        .unwrap();
    assert_eq!(after, before);
    datapath.prune().unwrap();
    assert_eq!(
        rows,
        after
            .backends
            .values()
            .map(|n| fs.backend(*n))
            .collect::<Vec<_>>()
    );
    drop(datapath);

    // Smaller: the numbers of Service ports begin anew, rows of backends are not given away.
    let mut datapath = fs.open();
    let after = datapath
        .apply_service(&key(family, 1), Some(&port(family, 1, 1..=3)))
        .unwrap();
    assert!(
        after
            .backends
            .values()
            .all(|n| !before.backends.values().any(|old| old == n))
    );
    datapath.prune().unwrap();
    assert!(
        before
            .backends
            .values()
            .all(|n| fs.backend(*n).generation == 2)
    );
    assert_eq!(datapath.services().fill().services.0, 1);
}

#[test]
fn another_file_system_is_refused_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let options = DatapathOptions {
        bpf_root: folder.path().join("weir"),
        ..DatapathOptions::default()
    };
    let error = Datapath::open(&options).unwrap_err();
    assert!(matches!(error, DatapathError::NoBpffs { .. }));
    assert!(
        error.to_string().contains("mount -t bpf bpf /sys/fs/bpf"),
        "{error}"
    );
}
