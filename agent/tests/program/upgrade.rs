//! An agent of another version takes over: connections with addresses and ports of the node go on, though some of the
//! maps are made anew.

use std::{fs, os::unix::fs::symlink};

use weir_agent::{
    datapath::{Datapath, Migration, flows},
    objects::Protocol,
};
use weir_common::{
    ABI_VERSION, Ipv4, Ipv6,
    address::Address,
    config::Config,
    flow::{self, FlowEntry, FlowKey},
    metrics::outcome,
};

use crate::{
    bed::{Bed, CLIENT, Case, ESTABLISHED, OTHER, SERVER, Verdict, for_both_families},
    outside::{NODE_PORT, ROUTED, add_device, add_device_row, node_port, port_of},
    packet::{ACK, L4, Packet, SYN, tcp, udp},
};

const PORT: u16 = 40000;

/// What an agent of another version would have noted.
fn change_versions(bed: &Bed, groups: &[&str]) {
    let mut config = bed.fs.array::<Config>("CONFIG");
    let mut row = config.get(&0, 0).unwrap();
    row.abi_version = ABI_VERSION + 1;
    config.set(0, row, 0).unwrap();
    let note = bed.fs.pin("~layouts");
    let mut text = fs::read_link(&note)
        .unwrap()
        .into_os_string()
        .into_string()
        .unwrap();
    text = text.replace(
        &format!("abi={ABI_VERSION}"),
        &format!("abi={}", ABI_VERSION + 1),
    );
    for group in groups {
        let changed = text.replace(&format!("{group}=1"), &format!("{group}=7"));
        assert_ne!(text, changed);
        text = changed;
    }
    fs::remove_file(&note).unwrap();
    symlink(text, &note).unwrap();
}

/// Connections of a client outside by way of a NodePort, and of a pod to the outside: first and later packets, and the
/// later ones as they leave the node.
struct Connections {
    from_outside: Vec<(Packet, Packet)>,
    from_pod: Vec<(Packet, Packet)>,
}

type MakeL4 = fn(u16, u16, u8) -> L4;
const KINDS: [(Protocol, MakeL4); 2] = [
    (Protocol::Tcp, tcp),
    (Protocol::Udp, |source, destination, _| {
        udp(source, destination)
    }),
];

fn service(bed: &mut Bed, protocol: Protocol) {
    node_port(bed, protocol, (bed.remote_pod(9), 8080));
}

fn begin(bed: &mut Bed, kinds: &[(Protocol, MakeL4)]) -> Connections {
    begin_at(bed, kinds, PORT)
}

/// As [`begin`], from another port of the clients.
fn begin_at(bed: &mut Bed, kinds: &[(Protocol, MakeL4)], client_port: u16) -> Connections {
    let mut connections = Connections {
        from_outside: Vec::new(),
        from_pod: Vec::new(),
    };
    for (protocol, l4) in kinds {
        service(bed, *protocol);
        let packet =
            |flags| bed.incoming(bed.outside(), bed.node(), l4(client_port, NODE_PORT, flags));
        let (first, later) = (packet(SYN), packet(ACK));
        let seen = bed.wire_brings(&first);
        assert_eq!(seen.verdict, Verdict::Remote);
        let port = port_of(bed, &seen.output.frame, 0);
        let out = later.clone().from(bed.node()).to(bed.remote_pod(9));
        let out = out.source_port(port).destination_port(8080).forwarded();
        connections.from_outside.push((later, out));

        let packet = |flags| bed.leaving(CLIENT, bed.outside(), l4(client_port, 443, flags));
        let (first, later) = (packet(SYN), packet(ACK));
        let seen = bed.pod_sends(CLIENT, &first);
        assert_eq!(seen.verdict, Verdict::Routed);
        let port = port_of(bed, &seen.output.frame, 0);
        let out = later.clone().from(bed.node()).source_port(port).forwarded();
        connections.from_pod.push((later, out));
    }
    connections
}

/// Each goes on with the translation that it had, after one look at the flow table.
fn go_on(bed: &mut Bed, connections: &Connections, what: &str) {
    for (packet, out) in &connections.from_outside {
        let case = Case::from_netdev(what, packet, Verdict::Remote);
        bed.check(case.out(out).lookups(ESTABLISHED));
    }
    for (packet, out) in &connections.from_pod {
        let case = Case::from_pod(what, CLIENT, packet, Verdict::Routed);
        bed.check(case.out(out).lookups(ROUTED));
    }
}

fn take_over(bed: &mut Bed, kinds: &[(Protocol, MakeL4)]) -> Vec<Migration> {
    bed.restart();
    for (protocol, _) in kinds {
        service(bed, *protocol);
    }
    let migrations = bed.datapath.migrations().to_vec();
    bed.datapath.prune().unwrap();
    add_device_row(bed);
    migrations
}

/// The next agent, with flow tables of another size, has loaded its programs and knows what it should. Gives the earlier
/// one, whose programs are still attached and have maps of their own.
fn load_next(bed: &mut Bed) -> Datapath {
    let mut options = bed.fs.options();
    options.count_lookups = true;
    options.connections *= 4;
    let next = Datapath::open(&options).unwrap();
    let earlier = std::mem::replace(&mut bed.datapath, next);
    let flows = bed.datapath.migrations().iter().filter(is_flow_map);
    assert_eq!(flows.filter(|migration| migration.kept).count(), 4);
    let config = bed.node_config();
    bed.datapath.config_mut().apply(&config).unwrap();
    for pod in [CLIENT, SERVER, OTHER] {
        bed.add_pod(pod, pod);
    }
    bed.add_nodes();
    for (protocol, _) in KINDS {
        service(bed, protocol);
    }
    earlier
}

/// Packets of the connections of a port of the clients, in the direction that makes them.
fn packets(bed: &Bed, client_port: u16) -> Vec<u64> {
    let flows = bed.flows().into_iter();
    let of_port = flows.filter(|(key, _)| key.source_port.get() == client_port);
    let mut counts: Vec<u64> = of_port.map(|(_, entry)| entry.packets).collect();
    counts.sort_unstable();
    counts
}

#[test]
fn connections_that_begin_before_the_programs_are_replaced_go_on_as_well() {
    for_both_families(|bed| {
        add_device(bed);
        let before = begin(bed, &KINDS);
        let mut other = load_next(bed);
        // The programs of the earlier agent go on.
        std::mem::swap(&mut bed.datapath, &mut other);
        let meanwhile = begin_at(bed, &KINDS, PORT + 1);
        go_on(bed, &before, "by the old programs");
        go_on(bed, &meanwhile, "by the old programs");
        let counted = [packets(bed, PORT), packets(bed, PORT + 1)];
        assert!(counted.iter().all(|counts| counts.len() == 4));
        // Nobody knows yet how long connections have been idle.
        std::mem::swap(&mut bed.datapath, &mut other);
        let far = flows::now().unwrap() + (1 << 26);
        for _ in 0..8 {
            let report = bed.datapath.sweep_flows_at(far, 4096).unwrap();
            assert_eq!(report.removed, 0);
        }

        // The first program is replaced.
        bed.datapath.prune().unwrap();
        assert_eq!([packets(bed, PORT), packets(bed, PORT + 1)], counted);
        go_on(bed, &before, "from before");
        go_on(bed, &meanwhile, "from between loading and replacing");

        // Others are not.
        std::mem::swap(&mut bed.datapath, &mut other);
        let late = begin_at(bed, &KINDS, PORT + 2);
        std::mem::swap(&mut bed.datapath, &mut other);
        let new = begin_at(bed, &KINDS, PORT + 3);
        let (entries, counted) = (bed.flows().len(), packets(bed, PORT));
        bed.datapath.carry_over().unwrap();
        assert_eq!(bed.flows().len(), entries + 8);
        assert_eq!(packets(bed, PORT), counted, "old counts take nothing back");
        for (connections, what) in [
            (&before, "from before, still"),
            (&meanwhile, "from the time between, still"),
            (&late, "from before the last was replaced"),
            (&new, "of the new programs"),
        ] {
            go_on(bed, connections, what);
        }
        bed.datapath.end_carrying_over();
        let mut removed = 0;
        for _ in 0..8 {
            removed += bed.datapath.sweep_flows_at(far, 4096).unwrap().removed;
        }
        assert_eq!(removed, 16);
    });
}

fn is_flow_map(migration: &&Migration) -> bool {
    migration.map.starts_with("FLOW") || migration.map == "ENDPOINT_FLOWS"
}

#[test]
fn connections_go_on_under_an_agent_whose_other_maps_are_different() {
    for_both_families(|bed| {
        add_device(bed);
        for (groups, kinds) in [
            (&[][..], &KINDS[..]),
            (&["ipcache"], &KINDS),
            // Numbers of endpoints are found by way of these.
            (&["ipcache", "services"], &KINDS[..1]),
        ] {
            let connections = begin(bed, kinds);
            let entries = bed.flows().len();
            change_versions(bed, groups);
            let migrations = take_over(bed, kinds);
            assert!(migrations.iter().any(|m| m.map == "CONFIG" && !m.kept));
            let flows: Vec<_> = migrations.iter().filter(is_flow_map).collect();
            assert_eq!(flows, Vec::<&Migration>::new(), "{groups:?}");
            assert_eq!(bed.flows().len(), entries, "{groups:?}");
            go_on(bed, &connections, &format!("{groups:?}"));
            let restarted = take_over(bed, kinds);
            assert_eq!(restarted, [], "the versions of this agent are noted");
            go_on(bed, &connections, "after a restart");
            for (protocol, _) in kinds {
                let key = bed.service_key(1, *protocol, NODE_PORT);
                bed.datapath.apply_service(&key, None).unwrap();
            }
        }
    });
}

#[test]
fn where_rows_that_connections_refer_to_are_lost_so_are_connections() {
    for_both_families(|bed| {
        add_device(bed);
        for group in [
            "endpoints",
            "next-hops",
            "backends",
            "flows",
            "endpoint-flows",
        ] {
            let connections = begin(bed, &KINDS[..1]);
            change_versions(bed, &[group]);
            let migrations = take_over(bed, &KINDS[..1]);
            let flows = migrations.iter().filter(is_flow_map).count();
            if group == "endpoint-flows" {
                // Then all are taken for endpoints with connections.
                assert_eq!(flows, 1);
                go_on(bed, &connections, group);
                bed.datapath.remove_endpoint(CLIENT).unwrap();
                continue;
            }
            assert_eq!(flows, 6, "{group}: {migrations:?}");
            assert_eq!(bed.flows().len(), 0, "{group}");
        }
    });
}

/// The tables hold one connection, whose entries another version has written.
fn change_entries<A: Address>(bed: &Bed, map: &str)
where
    FlowKey<A>: aya::Pod,
    FlowEntry<A>: aya::Pod,
{
    let mut flows = bed.fs.hash::<FlowKey<A>, FlowEntry<A>>(map);
    let rows: Vec<_> = flows.iter().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 4);
    for (key, mut entry) in rows {
        entry.version = flow::VERSION + 1;
        flows.insert(key, entry, 0).unwrap();
    }
}

#[test]
fn entries_of_another_version_are_dropped_and_told_of() {
    for_both_families(|bed| {
        add_device(bed);
        let connections = begin(bed, &KINDS[..1]);
        if bed.is_v4() {
            change_entries::<Ipv4>(bed, "FLOWS_V4");
        } else {
            change_entries::<Ipv6>(bed, "FLOWS_V6");
        }
        let migrations = take_over(bed, &KINDS[..1]);
        let flows: Vec<_> = migrations.iter().filter(is_flow_map).collect();
        assert_eq!(flows.len(), 6, "{migrations:?}");
        assert!(flows.iter().all(|migration| !migration.kept));
        let reason = "its entries are of version 2, this agent has 1";
        assert!(
            flows.iter().any(|migration| migration.reason == reason),
            "{flows:?}"
        );
        assert_eq!(migrations.len(), 6, "the rest stays");
        assert_eq!(bed.flows().len(), 0);
        let (packet, _) = &connections.from_outside[0];
        let seen = bed.wire_brings(packet);
        assert_eq!(seen.flow_counter(outcome::FLOW_CREATED), 1, "begins anew");
    });
}
