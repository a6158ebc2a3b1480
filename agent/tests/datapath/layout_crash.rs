//! A migration that is interrupted: where an agent that is killed would have come to, the next
//! one starts. Dropping a data path does not touch a pin, as a kill does not.

use std::{collections::BTreeSet, fs, os::unix::fs::symlink};

use aya::maps::{Array, MapData, MapInfo};
use weir_agent::datapath::{Datapath, DatapathOptions};
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    flow::{FlowEntry, FlowKey},
    limits,
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
        .filter(|name| name != "~layouts")
        .collect()
}

/// The migration is done, nothing is lost and nothing left over.
fn assert_done(fs: &BpfFs, connections: usize) {
    assert_eq!(entries(fs), (2 * connections, 2 * connections));
    for name in MADE_ANEW {
        let wanted = if name.starts_with("FLOWS") {
            limits::flows(4096)
        } else {
            4096
        };
        assert_eq!(size(fs, name), wanted, "{name}");
    }
    assert_eq!(pins(fs).len(), 32, "{:?}", pins(fs));
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
            limits::flows(fs.options().connections),
            "the old one is still in its place"
        );
        assert_eq!(entries(&fs), (4, 4));
        assert_eq!(pins(&fs).len(), 32 + 4, "{:?}", pins(&fs));
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

/// Tables of flows with fewer entries, which the ring leaves as it is: as from an agent without entries to spare.
fn with_smaller_tables() -> BpfFs {
    let fs = earlier_agent(&[]);
    smaller_table::<Ipv4>(&fs, "FLOWS_V4");
    smaller_table::<Ipv6>(&fs, "FLOWS_V6");
    fs
}

fn smaller_table<A: Address>(fs: &BpfFs, name: &str)
where
    FlowKey<A>: aya::Pod,
    FlowEntry<A>: aya::Pod,
{
    let flags = MapInfo::from_pin(fs.pin(name)).unwrap().map_flags();
    fs::remove_file(fs.pin(name)).unwrap();
    let entries = 2 * fs.options().connections;
    let table =
        aya::maps::HashMap::<MapData, FlowKey<A>, FlowEntry<A>>::create(entries, flags).unwrap();
    table.pin(fs.pin(name)).unwrap();
}

/// What the programs of the earlier agent do, from one step of the next agent to the other.
fn programs_go_on<A: Address>(family: &str, source: A, destination: A)
where
    FlowKey<A>: aya::Pod,
    FlowEntry<A>: aya::Pod,
{
    let fs = with_smaller_tables();
    let name = format!("FLOWS_{family}");
    let mut old = fs.hash::<FlowKey<A>, FlowEntry<A>>(&name);
    let mut ring = fs.array::<FlowKey<A>>(&format!("FLOW_RING_{family}"));
    let mut begin = |port: u16, created: u32| {
        let flows = pair(source, destination, port, TCP, port.into()).map(|(key, mut entry)| {
            (entry.created, entry.last_seen) = (created, created);
            (key, entry)
        });
        ring.set(port.into(), flows[0].0, 0).unwrap();
        flows
    };
    let now = weir_agent::datapath::flows::now().unwrap();
    let (known, closed) = (begin(5, now - 90_000), begin(6, now - 90_000));
    for (key, entry) in known.into_iter().chain(closed) {
        old.insert(key, entry, 0).unwrap();
    }

    let mut datapath = fs.open();
    let migrations = datapath.migrations();
    assert_eq!(migrations.len(), 2, "{migrations:?}");
    assert!(migrations.iter().all(|migration| migration.kept));
    // Known to be idle until now; one ends, another begins.
    let (key, mut entry) = known[0];
    (entry.last_seen, entry.packets, entry.tcp_flags) = (now, 9, 0x10);
    old.insert(key, entry, 0).unwrap();
    for (key, _) in closed {
        old.remove(&key).unwrap();
    }
    let meanwhile = begin(7, now);
    for (key, entry) in meanwhile {
        old.insert(key, entry, 0).unwrap();
    }
    datapath.prune().unwrap();
    let mut new = fs.hash::<FlowKey<A>, FlowEntry<A>>(&name);
    assert_eq!(new.get(&key, 0).unwrap(), entry);
    assert_eq!(new.get(&known[1].0, 0).unwrap(), known[1].1);
    for (key, entry) in meanwhile {
        assert_eq!(new.get(&key, 0).unwrap(), entry);
    }
    assert_eq!(new.keys().count(), 4);

    // The first programs of the new agent are in force: they have ended a connection, and begun another whose reply tuple
    // the old programs give away as well.
    for (key, _) in known {
        new.remove(&key).unwrap();
    }
    let now = weir_agent::datapath::flows::now().unwrap();
    let (late, taken) = (begin(8, now), begin(9, now));
    let (taken_key, mut own) = taken[1];
    own.packets = 77;
    new.insert(taken_key, own, 0).unwrap();
    for (key, entry) in late.into_iter().chain(taken) {
        old.insert(key, entry, 0).unwrap();
    }
    datapath.carry_over().unwrap();
    assert_eq!(new.get(&taken_key, 0).unwrap(), own);
    assert!(new.get(&taken[0].0, 0).is_err());
    assert!(new.get(&known[0].0, 0).is_err());
    for (key, entry) in late {
        assert_eq!(new.get(&key, 0).unwrap(), entry);
    }
    assert_eq!(new.keys().count(), 2 + 2 + 1);
    datapath.end_carrying_over();
    assert!(!datapath.is_carrying_over());
}

#[test]
fn the_programs_of_the_earlier_agent_go_on_with_the_old_table() {
    programs_go_on("V4", Ipv4([10, 0, 0, 1]), Ipv4([10, 0, 0, 2]));
    programs_go_on("V6", Ipv6([1; 16]), Ipv6([2; 16]));
}
