use std::{collections::BTreeSet, fs};

use aya::maps::{Array, MapData, MapInfo};
use weir_agent::datapath::{Datapath, DatapathError, DatapathOptions};
use weir_common::{ABI_VERSION, config::Config};

use crate::support::{BpfFs, key, port};

#[test]
fn every_map_is_pinned_and_used_again() {
    let fs = BpfFs::new();
    let names = || -> BTreeSet<String> {
        fs::read_dir(fs.root().join("maps"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
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
    assert_eq!(before.0.len(), 29, "{:?}", before.0);
    assert!(before.0.contains("FLOWS_V4") && !before.0.contains("SCRATCH"));
    assert!(datapath.migrations().is_empty());
    drop(datapath);
    let datapath = fs.open();
    assert!(datapath.migrations().is_empty());
    assert_eq!((names(), ids()), before);
    let info = MapInfo::from_pin(fs.pin("FLOWS_V6")).unwrap();
    assert_eq!(info.max_entries(), 2 * fs.options().connections);
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
        reason.contains("bytes of a value 8 instead of 28"),
        "{reason}"
    );
    datapath.prune().unwrap();
    assert_eq!(
        MapInfo::from_pin(fs.pin("NEXT_HOPS")).unwrap().value_size(),
        28
    );
    drop(datapath);
    assert!(fs.open().migrations().is_empty());
}

#[test]
fn another_abi_version_starts_from_nothing() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    datapath.config_mut().apply(&Default::default()).unwrap();
    drop(datapath);
    assert!(fs.open().migrations().is_empty());
    let mut config = fs.array::<Config>("CONFIG");
    let mut row = config.get(&0, 0).unwrap();
    row.abi_version = ABI_VERSION + 1;
    config.set(0, row, 0).unwrap();
    let datapath = fs.open();
    assert_eq!(datapath.migrations().len(), 29);
    assert!(datapath.migrations().iter().all(|m| !m.kept));
    assert_eq!(datapath.config().row().abi_version, 0);
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
