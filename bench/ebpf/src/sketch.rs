//! The least that a flow table with one lookup can cost: IPv4 and TCP only, no source check, no
//! policy, no counters but the entry's own, every target the same. What Weir needs more than this
//! is the price of everything it does besides.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_NO_PREALLOC, BPF_F_PSEUDO_HDR, BPF_NOEXIST, TC_ACT_SHOT},
    btf_maps::{HashMap, LruHashMap},
    helpers::{
        bpf_get_prandom_u32, bpf_ktime_get_coarse_ns, bpf_l4_csum_replace, bpf_redirect_peer,
    },
    macros::btf_map,
    programs::TcContext,
};
use weir_common::{
    Ipv4, Port, checksum, config,
    flow::{FlowEntry, FlowKey, now_from_nanoseconds, scope},
    protocol,
};

/// Entries; as many as Weir's table has by default.
const ENTRIES: usize = 262_144;

type Key = FlowKey<Ipv4>;
type Entry = FlowEntry<Ipv4>;

#[btf_map]
pub static SKETCH_HASH: HashMap<Key, Entry, ENTRIES> = HashMap::new();
#[btf_map]
pub static SKETCH_ON_DEMAND: HashMap<Key, Entry, ENTRIES, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();
#[btf_map]
pub static SKETCH_NAT: HashMap<Key, Entry, ENTRIES> = HashMap::new();
#[btf_map]
pub static SKETCH_LRU: LruHashMap<Key, Entry, ENTRIES> = LruHashMap::new();

/// Where connections go.
const TARGET_PORT: Port = Port([0x1f, 0x90]);

/// This node, as the source of what comes from outside.
const NODE: Ipv4 = Ipv4([192, 168, 77, 11]);
/// Random ports that are tried for a connection.
const PORTS_TRIED: u32 = 16;

/// What the sketch translates.
#[derive(Clone, Copy, Eq, PartialEq)]
pub enum Changed {
    /// Destination address and port.
    Destination,
    /// Those, and source address and port.
    Both,
}

/// A hash of any kind.
pub trait Table {
    /// The element of a key.
    fn find(&self, key: &Key) -> Option<*mut Entry>;
    /// Adds an element.
    fn add(&self, key: &Key, entry: &Entry, flags: u64) -> bool;
}

impl<const N: usize, const F: usize> Table for HashMap<Key, Entry, N, F> {
    #[inline(always)]
    fn find(&self, key: &Key) -> Option<*mut Entry> {
        self.get_ptr_mut(key)
    }
    #[inline(always)]
    fn add(&self, key: &Key, entry: &Entry, flags: u64) -> bool {
        self.insert(key, entry, flags).is_ok()
    }
}

impl<const N: usize, const F: usize> Table for LruHashMap<Key, Entry, N, F> {
    #[inline(always)]
    fn find(&self, key: &Key) -> Option<*mut Entry> {
        self.get_ptr_mut(key)
    }
    #[inline(always)]
    fn add(&self, key: &Key, entry: &Entry, flags: u64) -> bool {
        self.insert(key, entry, flags).is_ok()
    }
}

/// IPv4 without options, and the part of TCP that matters.
#[repr(C)]
struct Headers {
    version: u8,
    tos: u8,
    words: [u16; 3],
    ttl: u8,
    protocol: u8,
    checksum: u16,
    source: Ipv4,
    destination: Ipv4,
    source_port: Port,
    destination_port: Port,
}

const ETHERNET: usize = 14;
const _: () = assert!(size_of::<Headers>() == 20 + 4);

const TCP_CHECKSUM: u32 = 14 + 20 + 16;

/// See the module.
#[inline(always)]
pub fn sketch(ctx: &TcContext, table: &impl Table, changed: Changed) -> i32 {
    translate(ctx, table, changed).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn translate(ctx: &TcContext, table: &impl Table, changed: Changed) -> Option<i32> {
    let start = ctx.data() + ETHERNET;
    if start + size_of::<Headers>() > ctx.data_end() {
        return None;
    }
    let headers = start as *mut Headers;
    // SAFETY: readable, checked above; BPF reads unaligned words.
    let key = unsafe {
        if (*headers).version != 0x45 || (*headers).protocol != protocol::TCP {
            return None;
        }
        Key {
            source: (*headers).source,
            destination: (*headers).destination,
            source_port: (*headers).source_port,
            destination_port: (*headers).destination_port,
            protocol: protocol::TCP,
            scope: scope::POD,
            reserved: 0,
        }
    };
    let (addresses, ports) = match table.find(&key) {
        Some(entry) => {
            // SAFETY: an element of the map; an own test run is all that writes it.
            unsafe {
                (*entry).last_seen = now();
                (*entry).packets += 1;
                (*entry).bytes += u64::from(ctx.len());
                (*headers).destination = (*entry).new_destination;
                (*headers).destination_port = (*entry).new_destination_port;
                if changed == Changed::Both {
                    (*headers).source = (*entry).new_source;
                    (*headers).source_port = (*entry).new_source_port;
                }
                ((*entry).address_difference, (*entry).port_difference)
            }
        }
        None if changed == Changed::Both => enter_with_port(&key, table)?,
        None => enter(&key, table)?,
    };
    // SAFETY: as above.
    unsafe {
        (*headers).ttl -= 1;
        (*headers).checksum = checksum::apply((*headers).checksum, addresses);
    }
    for (difference, flags) in [(addresses, u64::from(BPF_F_PSEUDO_HDR)), (ports, 0)] {
        // SAFETY: the context is valid; the helper checks the offset.
        let result = unsafe {
            bpf_l4_csum_replace(ctx.skb.skb, TCP_CHECKSUM, 0, u64::from(difference), flags)
        };
        if result != 0 {
            return None;
        }
    }
    // SAFETY: no preconditions; a test run goes nowhere.
    Some(unsafe { bpf_redirect_peer(1, 0) } as i32)
}

/// Enters both directions.
#[inline(always)]
fn enter(key: &Key, table: &impl Table) -> Option<(u32, u32)> {
    // A target for each Service, or the reply tuples of two connections would be one.
    let [_, _, _, service] = key.destination.0;
    let target = Ipv4([10, 244, 2, service]);
    let reply_key = Key {
        source: target,
        destination: key.source,
        source_port: TARGET_PORT,
        destination_port: key.source_port,
        scope: scope::UNDERLAY,
        ..*key
    };
    let now = now();
    let mut entry = Entry {
        new_source: key.destination,
        new_destination: key.source,
        new_source_port: key.destination_port,
        new_destination_port: key.source_port,
        last_seen: now,
        created: now,
        ..Entry::default()
    };
    // An LRU may have evicted one half only.
    let _ = table.add(&reply_key, &entry, u64::from(BPF_NOEXIST));
    entry.new_source = key.source;
    entry.new_destination = target;
    entry.new_source_port = key.source_port;
    entry.new_destination_port = TARGET_PORT;
    entry.address_difference = checksum::difference(key.destination, target);
    entry.port_difference = checksum::difference(key.destination_port, TARGET_PORT);
    entry.packets = 1;
    if !table.add(key, &entry, u64::from(BPF_ANY)) {
        return None;
    }
    Some((entry.address_difference, entry.port_difference))
}

/// Enters both directions, with a random port of the node that is free.
#[inline(always)]
fn enter_with_port(key: &Key, table: &impl Table) -> Option<(u32, u32)> {
    // As many targets as Weir's Services have, told apart by the address or the port that was asked for.
    let [_, _, _, address] = key.destination.0;
    let (Port([_, port]), Port([_, turn])) = (key.destination_port, key.source_port);
    let target = Ipv4([10, 244, address.wrapping_add(port), turn & 7]);
    let mut reply_key = Key {
        source: target,
        destination: NODE,
        source_port: TARGET_PORT,
        destination_port: Port([0, 0]),
        scope: scope::UNDERLAY,
        ..*key
    };
    let now = now();
    let mut entry = Entry {
        new_source: key.destination,
        new_destination: key.source,
        new_source_port: key.destination_port,
        new_destination_port: key.source_port,
        last_seen: now,
        created: now,
        ..Entry::default()
    };
    let mut tried = 0;
    loop {
        if tried == PORTS_TRIED {
            return None;
        }
        tried += 1;
        // SAFETY: no preconditions.
        let random = unsafe { bpf_get_prandom_u32() } % u32::from(config::NAT_PORT_COUNT);
        reply_key.destination_port = Port::new(config::NAT_PORT_FIRST + random as u16);
        if table.add(&reply_key, &entry, u64::from(BPF_NOEXIST)) {
            break;
        }
    }
    entry.new_source = NODE;
    entry.new_destination = target;
    entry.new_source_port = reply_key.destination_port;
    entry.new_destination_port = TARGET_PORT;
    entry.address_difference = checksum::add(
        checksum::difference(key.destination, target),
        checksum::difference(key.source, NODE),
    );
    entry.port_difference = checksum::add(
        checksum::difference(key.destination_port, TARGET_PORT),
        checksum::difference(key.source_port, entry.new_source_port),
    );
    entry.packets = 1;
    if !table.add(key, &entry, u64::from(BPF_ANY)) {
        return None;
    }
    Some((entry.address_difference, entry.port_difference))
}

#[inline(always)]
fn now() -> u32 {
    // SAFETY: no preconditions.
    now_from_nanoseconds(unsafe { bpf_ktime_get_coarse_ns() })
}
