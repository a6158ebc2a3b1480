use weir_agent::datapath::Datapath;
use weir_common::{
    Ipv4, Ipv6, Port,
    address::Address,
    flow::{FlowEntry, FlowKey, TICKS_PER_SECOND, Timeouts, VERSION, flag, scope},
    metrics::{self, Counter, FlowRingState, Hook, outcome},
    protocol::{TCP, UDP},
};

use crate::support::BpfFs;

pub fn pair<A: Address>(
    source: A,
    destination: A,
    port: u16,
    protocol: u8,
    ring: u32,
) -> [(FlowKey<A>, FlowEntry<A>); 2] {
    let key = FlowKey {
        source,
        destination,
        source_port: Port::new(port),
        destination_port: Port::new(80),
        protocol,
        scope: scope::POD,
        reserved: 0,
    };
    let entry = FlowEntry {
        version: VERSION,
        new_source: source,
        new_destination: destination,
        new_source_port: key.source_port,
        new_destination_port: key.destination_port,
        flags: u16::from(scope::UNDERLAY) << flag::PARTNER_SCOPE_SHIFT,
        packets: 1,
        ring,
        ..FlowEntry::default()
    };
    let reply = FlowEntry {
        version: VERSION,
        new_source: destination,
        new_destination: source,
        new_source_port: key.destination_port,
        new_destination_port: key.source_port,
        flags: flag::REPLY | u16::from(scope::POD) << flag::PARTNER_SCOPE_SHIFT,
        ring,
        ..FlowEntry::default()
    };
    [(key, entry), (entry.partner_key(protocol), reply)]
}

const V4: (Ipv4, Ipv4) = (Ipv4([10, 0, 0, 1]), Ipv4([10, 0, 0, 2]));
const V6: (Ipv6, Ipv6) = (Ipv6([1; 16]), Ipv6([2; 16]));

/// Time-outs: UDP 30 s, answered 120 s; TCP without answer 120 s.
const TIMEOUTS: Timeouts = Timeouts::DEFAULT;

fn sweep_all(datapath: &mut Datapath, seconds: u32) -> u32 {
    let mut removed = 0;
    loop {
        let report = datapath
            .sweep_flows_at(seconds * TICKS_PER_SECOND, 7)
            .unwrap();
        assert!(report.visited < 1000);
        removed += report.removed;
        if report.finished {
            return removed;
        }
    }
}

#[test]
fn both_entries_go_when_the_newer_is_too_old() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    datapath.config_mut().apply(&Default::default()).unwrap();
    assert_eq!(datapath.config().row().timeouts, TIMEOUTS);
    let mut v4 = fs.hash::<FlowKey<Ipv4>, FlowEntry<Ipv4>>("FLOWS_V4");
    let mut v6 = fs.hash::<FlowKey<Ipv6>, FlowEntry<Ipv6>>("FLOWS_V6");
    for (i, protocol) in [(1, UDP), (2, UDP), (3, TCP)] {
        for (key, entry) in pair(V4.0, V4.1, i, protocol, u32::from(i)) {
            v4.insert(key, entry, 0).unwrap();
        }
        for (key, entry) in pair(V6.0, V6.1, i, protocol, u32::from(i)) {
            v6.insert(key, entry, 0).unwrap();
        }
    }
    // The second UDP connection was answered, at second 20.
    let [_, (key, mut reply)] = pair(V4.0, V4.1, 2, UDP, 2);
    (reply.packets, reply.last_seen) = (1, 20 * TICKS_PER_SECOND);
    v4.insert(key, reply, 0).unwrap();
    let counter = |created: u64| {
        let map: aya::maps::PerCpuArray<_, Counter> = fs.map("METRICS").try_into().unwrap();
        let mut map: aya::maps::PerCpuArray<_, Counter> = map;
        let cpus = aya::util::nr_cpus().unwrap();
        let values = vec![
            Counter {
                packets: created,
                bytes: 0
            };
            cpus
        ];
        let row = metrics::index(Hook::FromPod, outcome::FLOW_CREATED);
        map.set(row, aya::maps::PerCpuValues::try_from(values).unwrap(), 0)
            .unwrap();
    };
    counter(1);

    assert_eq!(sweep_all(&mut datapath, 29), 0);
    // UDP without answer: one of IPv4, two of IPv6.
    assert_eq!(sweep_all(&mut datapath, 31), 3);
    assert_eq!(v4.keys().count(), 4);
    assert_eq!(v6.keys().count(), 2);
    // TCP without answer; UDP with an answer has until 140.
    assert_eq!(sweep_all(&mut datapath, 121), 2);
    assert_eq!(sweep_all(&mut datapath, 139), 0);
    assert_eq!(v4.keys().count(), 2);
    assert_eq!(sweep_all(&mut datapath, 141), 1);
    assert_eq!((v4.keys().count(), v6.keys().count()), (0, 0));

    // Empty and nothing new: no table is read.
    sweep_all(&mut datapath, 142);
    for (key, entry) in pair(V4.0, V4.1, 9, UDP, 9) {
        v4.insert(key, entry, 0).unwrap();
    }
    let report = datapath
        .sweep_flows_at(200 * TICKS_PER_SECOND, 100)
        .unwrap();
    assert_eq!((report.visited, report.finished), (0, true));
    counter(2);
    assert_eq!(sweep_all(&mut datapath, 200), 1);
}

#[test]
fn half_a_connection_is_removed_too() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    datapath.config_mut().apply(&Default::default()).unwrap();
    let mut v4 = fs.hash::<FlowKey<Ipv4>, FlowEntry<Ipv4>>("FLOWS_V4");
    let [_, (key, reply)] = pair(V4.0, V4.1, 1, UDP, 1);
    v4.insert(key, reply, 0).unwrap();
    assert_eq!(sweep_all(&mut datapath, 31), 1);
    assert_eq!(v4.keys().count(), 0);
}

#[test]
fn connections_are_carried_over_to_a_table_of_another_size() {
    let fs = BpfFs::new();
    drop(fs.open());
    let places = [5u32, 1000, 700];
    {
        let mut v4 = fs.hash::<FlowKey<Ipv4>, FlowEntry<Ipv4>>("FLOWS_V4");
        let mut v6 = fs.hash::<FlowKey<Ipv6>, FlowEntry<Ipv6>>("FLOWS_V6");
        let mut ring_v4 = fs.array::<FlowKey<Ipv4>>("FLOW_RING_V4");
        let mut ring_v6 = fs.array::<FlowKey<Ipv6>>("FLOW_RING_V6");
        for place in places {
            let flows = pair(V4.0, V4.1, place as u16, TCP, place);
            ring_v4.set(place, flows[0].0, 0).unwrap();
            flows
                .into_iter()
                .for_each(|(key, entry)| v4.insert(key, entry, 0).unwrap());
            let flows = pair(V6.0, V6.1, place as u16, TCP, place);
            ring_v6.set(place, flows[0].0, 0).unwrap();
            flows
                .into_iter()
                .for_each(|(key, entry)| v6.insert(key, entry, 0).unwrap());
        }
    }
    for connections in [4096, 2] {
        let mut options = fs.options();
        options.connections = connections;
        let mut datapath = Datapath::open(&options).unwrap();
        assert!(
            datapath.migrations().iter().all(|m| m.kept),
            "{:?}",
            datapath.migrations()
        );
        assert_eq!(datapath.migrations().len(), 4);
        datapath.prune().unwrap();
        let kept = connections.min(3);
        check::<Ipv4>(&fs, "V4", 0, kept);
        check::<Ipv6>(&fs, "V6", 1, kept);
    }
}

fn check<A>(fs: &BpfFs, family: &str, row: u32, kept: u32)
where
    A: Address,
    FlowKey<A>: aya::Pod,
    FlowEntry<A>: aya::Pod,
{
    let flows = fs.hash::<FlowKey<A>, FlowEntry<A>>(&format!("FLOWS_{family}"));
    let ring = fs.array::<FlowKey<A>>(&format!("FLOW_RING_{family}"));
    assert_eq!(flows.keys().count() as u32, 2 * kept);
    for place in 0..kept {
        let key = ring.get(&place, 0).unwrap();
        let entry = flows.get(&key, 0).unwrap();
        assert_eq!(entry.ring, place);
        assert_eq!(
            flows.get(&entry.partner_key(key.protocol), 0).unwrap().ring,
            place
        );
    }
    let state: FlowRingState = fs.array("FLOW_RING_STATE").get(&row, 0).unwrap();
    assert_eq!(state.hand, u64::from(kept));
}

#[test]
fn connections_of_a_pod_that_is_gone_go_too() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let (row, config) = (
        crate::endpoints::row(7, 9),
        crate::endpoints::node_config(&["10.1.0.0/24", "fd01::/64"]),
    );
    datapath.config_mut().apply(&config).unwrap();
    datapath.insert_endpoint(&row).unwrap();
    let mut v4 = fs.hash::<FlowKey<Ipv4>, FlowEntry<Ipv4>>("FLOWS_V4");
    let generation = 1;
    let mut enter = |port, source_endpoint, next_hop| {
        let [(key, mut entry), (reply_key, mut reply)] =
            pair(V4.0, V4.1, port, TCP, u32::from(port));
        (entry.source_endpoint, entry.source_generation) = (source_endpoint, generation);
        (reply.next_hop, reply.next_hop_generation) = (next_hop, generation);
        v4.insert(key, entry, 0).unwrap();
        v4.insert(reply_key, reply, 0).unwrap();
    };
    // From the pod, to the pod, and one that has nothing to do with it.
    enter(1, 7, 7);
    enter(2, 0, 7);
    enter(3, 0, 0);
    assert_eq!(sweep_all(&mut datapath, 1), 0);
    datapath.remove_endpoint(7).unwrap();
    assert_eq!(sweep_all(&mut datapath, 1), 2);
    let v4 = fs.hash::<FlowKey<Ipv4>, FlowEntry<Ipv4>>("FLOWS_V4");
    assert_eq!(v4.keys().count(), 2);
}
