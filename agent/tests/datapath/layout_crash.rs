//! A migration that is interrupted: where an agent that is killed would have come to, the next
//! one starts. Dropping a data path does not touch a pin, as a kill does not.

use std::{collections::BTreeSet, fs, os::unix::fs::symlink};

use aya::maps::{Array, MapData, MapInfo};
use weir_agent::datapath::{Datapath, DatapathOptions};
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    flow::{FlowEntry, FlowKey},
    protocol::TCP,
};

use crate::{
    flows::pair,
    support::{BpfFs, key, port},
};

const FAMILY: weir_agent::objects::Family = weir_agent::objects::Family::V4;
const MADE_ANEW: [&str; 4] = ["FLOWS_V4", "FLOWS_V6", "FLOW_RING_V4", "FLOW_RING_V6"];

/// A Service and, in each family, these connections.
fn earlier_agent(connections: &[u16]) -> BpfFs {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    datapath
        .apply_service(&key(FAMILY, 1), Some(&port(FAMILY, 1, 1..=3)))
        .unwrap();
    drop(datapath);
    for &connection in connections {
        enter(
            &fs,
            "V4",
            Ipv4([10, 0, 0, 1]),
            Ipv4([10, 0, 0, 2]),
            connection,
        );
        enter(&fs, "V6", Ipv6([1; 16]), Ipv6([2; 16]), connection);
    }
    fs
}

fn enter<A>(fs: &BpfFs, family: &str, source: A, destination: A, connection: u16)
where
    A: Address,
    FlowKey<A>: aya::Pod,
    FlowEntry<A>: aya::Pod,
{
    let flows = pair(source, destination, connection, TCP, connection.into());
    fs.array::<FlowKey<A>>(&format!("FLOW_RING_{family}"))
        .set(connection.into(), flows[0].0, 0)
        .unwrap();
    let mut table = fs.hash::<FlowKey<A>, FlowEntry<A>>(&format!("FLOWS_{family}"));
    for (key, entry) in flows {
        table.insert(key, entry, 0).unwrap();
    }
}

fn larger(fs: &BpfFs) -> DatapathOptions {
    DatapathOptions {
        connections: 4096,
        ..fs.options()
    }
}

/// Entries of the flow tables under their own names.
fn entries(fs: &BpfFs) -> (usize, usize) {
    (
        fs.hash::<FlowKey<Ipv4>, FlowEntry<Ipv4>>("FLOWS_V4")
            .keys()
            .count(),
        fs.hash::<FlowKey<Ipv6>, FlowEntry<Ipv6>>("FLOWS_V6")
            .keys()
            .count(),
    )
}

fn size(fs: &BpfFs, name: &str) -> u32 {
    MapInfo::from_pin(fs.pin(name)).unwrap().max_entries()
}

fn pins(fs: &BpfFs) -> BTreeSet<String> {
    fs::read_dir(fs.root().join("maps"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// The migration is done, nothing is lost and nothing left over.
fn assert_done(fs: &BpfFs, connections: usize) {
    assert_eq!(entries(fs), (2 * connections, 2 * connections));
    for name in MADE_ANEW {
        let wanted = if name.starts_with("FLOWS") {
            8192
        } else {
            4096
        };
        assert_eq!(size(fs, name), wanted, "{name}");
    }
    assert_eq!(pins(fs).len(), 29, "{:?}", pins(fs));
}

/// The start after the crash, up to the end of the migration.
fn start_again(fs: &BpfFs) {
    let mut datapath = Datapath::open(&larger(fs)).unwrap();
    assert_eq!(
        datapath.migrations().len(),
        4,
        "programs are to be replaced late"
    );
    datapath.prune().unwrap();
    drop(datapath);
    assert!(
        Datapath::open(&larger(fs)).unwrap().migrations().is_empty(),
        "and only once"
    );
}

#[test]
fn until_the_new_maps_hold_everything_the_old_ones_count() {
    let fs = earlier_agent(&[5, 700]);
    for _ in 0..2 {
        let datapath = Datapath::open(&larger(&fs)).unwrap();
        assert_eq!(datapath.migrations().len(), 4);
        assert_eq!(
            size(&fs, "FLOWS_V4"),
            2048,
            "the old one is still in its place"
        );
        assert_eq!(entries(&fs), (4, 4));
        assert_eq!(pins(&fs).len(), 29 + 4, "{:?}", pins(&fs));
        // Killed.
        drop(datapath);
    }
    // The programs of the earlier agent went on meanwhile.
    enter(&fs, "V4", Ipv4([10, 0, 0, 1]), Ipv4([10, 0, 0, 2]), 900);
    enter(&fs, "V6", Ipv6([1; 16]), Ipv6([2; 16]), 900);
    start_again(&fs);
    assert_done(&fs, 3);
}

#[test]
fn a_new_map_that_was_not_filled_yet_is_not_taken() {
    let fs = earlier_agent(&[5, 700]);
    // Killed between making the maps and filling them, and one of another size altogether.
    for name in ["FLOWS_V4~new", "NOBODY_KNOWS~new"] {
        let empty = Array::<MapData, u64>::create(1, 0).unwrap();
        empty.pin(fs.pin(name)).unwrap();
    }
    start_again(&fs);
    assert_done(&fs, 2);
}

#[test]
fn the_renaming_goes_on_where_it_ended() {
    // As many of the pins have been renamed when the agent is killed.
    for renamed in 0..=MADE_ANEW.len() {
        let fs = earlier_agent(&[5, 700]);
        drop(Datapath::open(&larger(&fs)).unwrap());
        symlink("new", fs.pin("~ready")).unwrap();
        for name in &MADE_ANEW[..renamed] {
            fs::rename(fs.pin(&format!("{name}~new")), fs.pin(name)).unwrap();
        }
        let datapath = Datapath::open(&larger(&fs)).unwrap();
        assert!(
            datapath.migrations().is_empty(),
            "after {renamed} renamings"
        );
        assert_done(&fs, 2);
    }
}

#[test]
fn without_a_crash_the_services_keep_their_numbers() {
    let fs = earlier_agent(&[5]);
    let number = fs.frontend(FAMILY, 1, 80);
    let mut datapath = Datapath::open(&larger(&fs)).unwrap();
    datapath
        .apply_service(&key(FAMILY, 1), Some(&port(FAMILY, 1, 1..=3)))
        .unwrap();
    datapath.prune().unwrap();
    datapath.prune().unwrap();
    assert_eq!(fs.frontend(FAMILY, 1, 80), number);
    assert_done(&fs, 1);
}
