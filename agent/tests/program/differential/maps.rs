//! What the service tables and the ipcache must hold by the reference, row by row: none may be
//! missing, and none may be there that nobody asked for.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use aya::maps::MapData;
use ipnet::IpNet;
use weir_agent::{
    datapath::sys::{self, Cursor, RawMap},
    model::{BackendState, EndpointSet, Frontend, FrontendKind, ServicePort, ServicePortKey},
    objects::Family,
};
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    affinity::{Affinity, AffinityKey},
    ipcache::{IpcacheEntry, class, flag as address_flag},
    limits::SLOTS_PER_CHUNK,
    next_hop,
    service::{
        Backend, FrontendKey, ServiceState, SlotIndex, backend_state, flag,
        frontend as frontend_bits, service_port_of_row, state_row,
    },
};

use super::place::Places;
use crate::{support::BpfFs, world::reference::Reference};

/// Address, port, protocol and scope.
type FrontendPlace = (IpAddr, u16, u8, u8);

/// Reads the maps, and panics where they say anything else than the reference. `is_swept`: session
/// affinity has just been swept.
pub fn compare(fs: &BpfFs, reference: &Reference, places: &Places, is_swept: bool) {
    let numbers = compare_frontends(fs, reference);
    let backends = compare_backends(fs, reference, &numbers);
    compare_sets(fs, reference, &numbers, &backends);
    compare_affinity(fs, reference, &numbers, is_swept);
    assert_eq!(
        ipcache(fs),
        wanted_ipcache(reference, places),
        "the ipcache"
    );
}

/// Each frontend leads to the set of its own Service port, whose number is the same for all of its
/// frontends and nobody else's. Gives the numbers.
fn compare_frontends<'r>(
    fs: &BpfFs,
    reference: &'r Reference,
) -> BTreeMap<&'r ServicePortKey, u32> {
    let mut rows = BTreeMap::new();
    read_frontends::<Ipv4>(fs, "FRONTENDS_V4", &mut rows);
    read_frontends::<Ipv6>(fs, "FRONTENDS_V6", &mut rows);
    let mut numbers = BTreeMap::new();
    for (key, port) in &reference.services {
        for frontend in &port.frontends {
            let place = place_of(key, frontend);
            let row = rows.remove(&place);
            let row = row.unwrap_or_else(|| panic!("no frontend at {place:?} of {key:?}"));
            let number = *numbers.entry(key).or_insert(service_port_of_row(row));
            assert_eq!(
                row,
                state_row(number, frontend.set.number()) | bits(port, frontend),
                "{place:?} of {key:?}"
            );
        }
    }
    assert_eq!(rows, BTreeMap::new(), "frontends that nobody wants");
    let distinct: BTreeSet<u32> = numbers.values().copied().collect();
    assert_eq!(distinct.len(), numbers.len(), "{numbers:?}");
    assert!(!distinct.contains(&0), "{numbers:?}");
    numbers
}

/// What a frontend's value says beside the row.
fn bits(port: &ServicePort, frontend: &Frontend) -> u32 {
    match frontend.kind {
        FrontendKind::NodePort => frontend_bits::NODE_PORT,
        FrontendKind::LoadBalancer if port.source_ranges.is_some() => frontend_bits::SOURCE_RANGES,
        _ => 0,
    }
}

fn place_of(key: &ServicePortKey, frontend: &Frontend) -> FrontendPlace {
    let every: IpAddr = match key.family {
        Family::V4 => "0.0.0.0".parse().unwrap(),
        Family::V6 => "::".parse().unwrap(),
    };
    (
        frontend.address.unwrap_or(every),
        frontend.port,
        key.protocol.number(),
        frontend.scope.number(),
    )
}

fn read_frontends<A: Address>(fs: &BpfFs, map: &str, into: &mut BTreeMap<FrontendPlace, u32>)
where
    FrontendKey<A>: aya::Pod,
{
    for row in fs.hash::<FrontendKey<A>, u32>(map).iter() {
        let (key, row) = row.unwrap();
        let place = (key.address.to_ip(), key.port.get(), key.protocol, key.scope);
        into.insert(place, row);
    }
}

/// A row of `BACKENDS` without its number: Service port, address, port, state, sets.
type BackendRow = (u32, IpAddr, u16, u8, u8);

/// Gives the rows in use, by number.
fn compare_backends(
    fs: &BpfFs,
    reference: &Reference,
    numbers: &BTreeMap<&ServicePortKey, u32>,
) -> BTreeMap<u32, BackendRow> {
    let families = numbers.iter().map(|(key, number)| (*number, key.family));
    let families: BTreeMap<u32, Family> = families.collect();
    let mut rows = BTreeMap::new();
    for (number, row) in (0..).zip(elements::<Backend>(fs, "BACKENDS")) {
        if row.state == backend_state::FREE {
            assert_eq!(row.sets, 0, "free row {number} is in a set");
            continue;
        }
        let family = families.get(&row.service_port);
        let address = match family.unwrap_or_else(|| panic!("whose is {row:?}?")) {
            Family::V4 => row.address::<Ipv4>().to_ip(),
            Family::V6 => row.address::<Ipv6>().to_ip(),
        };
        let seen = (
            row.service_port,
            address,
            row.port.get(),
            row.state,
            row.sets,
        );
        rows.insert(number, seen);
    }
    let mut wanted = Vec::new();
    for (key, port) in &reference.services {
        for (address, backend) in &port.backends {
            let state = match backend.state {
                BackendState::Active => backend_state::ACTIVE,
                BackendState::Terminating => backend_state::TERMINATING,
            };
            let sets = u8::from(backend.cluster) | u8::from(backend.local) << 1;
            wanted.push((numbers[key], address.address, address.port, state, sets));
        }
    }
    let mut found: Vec<BackendRow> = rows.values().copied().collect();
    found.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(found, wanted, "BACKENDS");
    rows
}

/// `SERVICE_STATE` and `SLOTS`: each set that a frontend leads to, with its endpoints in even shares.
fn compare_sets(
    fs: &BpfFs,
    reference: &Reference,
    numbers: &BTreeMap<&ServicePortKey, u32>,
    backends: &BTreeMap<u32, BackendRow>,
) {
    let mut states = elements::<ServiceState>(fs, "SERVICE_STATE");
    let mut slots = Slots::new(fs);
    for (key, port) in &reference.services {
        for set in EndpointSet::ALL.into_iter().filter(|set| port.uses(*set)) {
            let row = state_row(numbers[key], set.number()) as usize;
            let state = std::mem::take(&mut states[row]);
            let affinity = port.affinity.map_or(0, |_| flag::AFFINITY);
            assert_eq!(state.flags(), flag::IN_USE | affinity, "{key:?} {set:?}");
            let shares = slots.shares(state);
            let mut found: Vec<(IpAddr, u16)> = shares
                .keys()
                .map(|number| backends.get(number))
                .map(|row| row.map(|&(_, address, port, ..)| (address, port)))
                .collect::<Option<_>>()
                .unwrap_or_else(|| panic!("{key:?} {set:?}: a slot names a free backend"));
            found.sort_unstable();
            assert_eq!(found, members(port, set), "{key:?} {set:?}");
            let (least, most) = (shares.values().min(), shares.values().max());
            assert!(
                most.is_none_or(|most| most - least.unwrap() <= 1),
                "{key:?} {set:?}: {shares:?}"
            );
        }
    }
    let rest = states
        .iter()
        .filter(|state| **state != ServiceState::default());
    assert_eq!(rest.count(), 0, "sets that nobody uses: {states:?}");
}

fn members(port: &ServicePort, set: EndpointSet) -> Vec<(IpAddr, u16)> {
    let members = port
        .backends
        .iter()
        .filter(|(_, backend)| backend.is_in(set));
    members.map(|(at, _)| (at.address, at.port)).collect()
}

fn compare_affinity(
    fs: &BpfFs,
    reference: &Reference,
    numbers: &BTreeMap<&ServicePortKey, u32>,
    is_swept: bool,
) {
    let found: BTreeMap<u32, u32> = (0..)
        .zip(elements::<u32>(fs, "AFFINITY_TIMEOUTS"))
        .filter(|(_, seconds)| *seconds != 0)
        .collect();
    let wanted = reference.services.iter();
    let wanted: BTreeMap<u32, u32> = wanted
        .filter_map(|(key, port)| Some((numbers[key], port.affinity?)))
        .collect();
    assert_eq!(found, wanted, "AFFINITY_TIMEOUTS");
    // Which clients came is for the packets to say; but a Service port without affinity keeps none
    // for long.
    if !is_swept {
        return;
    }
    for key in fs.hash::<AffinityKey, Affinity>("AFFINITY").keys() {
        let key = key.unwrap();
        assert!(wanted.contains_key(&key.service_port), "AFFINITY: {key:?}");
    }
}

/// Class, flags, and whether the next hop is a neighbour.
type IpcacheRow = (u8, u8, bool);

fn ipcache(fs: &BpfFs) -> BTreeMap<IpNet, IpcacheRow> {
    let mut rows = BTreeMap::new();
    read_ipcache::<Ipv4>(fs, "IPCACHE_V4", &mut rows);
    read_ipcache::<Ipv6>(fs, "IPCACHE_V6", &mut rows);
    rows
}

fn read_ipcache<A: Address + aya::Pod>(
    fs: &BpfFs,
    map: &str,
    into: &mut BTreeMap<IpNet, IpcacheRow>,
) {
    for row in fs.trie::<A, IpcacheEntry>(map).iter() {
        let (key, entry) = row.unwrap();
        let prefix = IpNet::new({ key.data() }.to_ip(), key.prefix_len() as u8).unwrap();
        let is_neighbour = entry.next_hop >= next_hop::FIRST_ROW;
        into.insert(prefix, (entry.class, entry.flags, is_neighbour));
    }
}

fn wanted_ipcache(reference: &Reference, places: &Places) -> BTreeMap<IpNet, IpcacheRow> {
    let mut rows: BTreeMap<IpNet, IpcacheRow> = places
        .prefixes()
        .map(|(prefix, class, flags)| {
            let is_neighbour = matches!(class, class::REMOTE_PODS | class::REMOTE_NODE);
            (prefix, (class, flags, is_neighbour))
        })
        .collect();
    // Not all of this node's own range has rows of its own.
    rows.insert(places.own_range(), (class::THIS_NODE, 0, false));
    for address in reference
        .services
        .values()
        .flat_map(|port| &port.frontends)
        .filter_map(|frontend| frontend.address)
        .collect::<BTreeSet<_>>()
    {
        let row = rows.entry(address.into());
        let row = row.or_insert((class::SERVICE, 0, false));
        row.1 |= places.flags_of_frontends(reference, address);
    }
    for range in places.kept_ranges() {
        rows.entry(*range).or_insert((class::OUTSIDE, 0, false));
    }
    for (prefix, row) in &mut rows {
        if places
            .kept_ranges()
            .iter()
            .any(|range| range.contains(prefix))
        {
            row.1 |= address_flag::NO_MASQUERADE;
        }
    }
    rows
}

/// All elements of an array.
fn elements<V: aya::Pod>(fs: &BpfFs, map: &str) -> Vec<V> {
    read_all(&MapData::from_pin(fs.pin(map)).unwrap())
}

fn read_all<V: aya::Pod>(map: &MapData) -> Vec<V> {
    let map = RawMap::new(map).unwrap();
    let count = map.max_entries() as usize;
    let mut keys = vec![0; count * map.key_size()];
    let mut values = vec![0; count * map.value_size()];
    let batch = map.lookup_batch(&mut Cursor::default(), &mut keys, &mut values);
    assert_eq!(batch.unwrap().count, count);
    let values = values.chunks_exact(map.value_size());
    values.map(sys::from_bytes).collect()
}

/// The chunks of `SLOTS`, read when first asked for.
struct Slots {
    outer: RawMap,
    chunks: BTreeMap<u32, Vec<u64>>,
}

impl Slots {
    fn new(fs: &BpfFs) -> Self {
        Self {
            outer: RawMap::new(&MapData::from_pin(fs.pin("SLOTS")).unwrap()).unwrap(),
            chunks: BTreeMap::new(),
        }
    }

    /// How many slots of a set name each backend.
    fn shares(&mut self, state: ServiceState) -> BTreeMap<u32, u32> {
        let mut shares = BTreeMap::new();
        let first = state.first_slot();
        for slot in first..first + state.slots() {
            let index = SlotIndex::new(slot);
            let chunk = self.chunks.entry(index.chunk).or_insert_with(|| {
                let mut id = [0; 4];
                assert!(
                    self.outer
                        .lookup(&index.chunk.to_ne_bytes(), &mut id)
                        .unwrap()
                );
                read_all(&MapData::from_id(u32::from_ne_bytes(id)).unwrap())
            });
            assert_eq!(chunk.len() * 2, SLOTS_PER_CHUNK as usize);
            let backend = (chunk[index.element as usize] >> index.shift) as u32;
            *shares.entry(backend).or_default() += 1;
        }
        shares
    }
}
