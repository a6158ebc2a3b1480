//! Fragments in order: the first leaves its ports in a table, later ones read them there.

use weir_common::{
    lookup::Lookup,
    metrics::{FragmentKey, FragmentPorts},
};

use crate::{
    family::Family,
    maps,
    packet::{Packet, fragment},
};

/// Notes the ports of a first fragment, or fills in those of a later one. Returns whether the
/// ports are known.
#[inline(always)]
pub fn resolve_ports<F: Family>(packet: &mut Packet<F::Address>) -> bool {
    if packet.fragment == fragment::WHOLE {
        return true;
    }
    let key = FragmentKey {
        source: packet.key.source,
        destination: packet.key.destination,
        identification: packet.identification,
        protocol: packet.key.protocol,
        scope: packet.key.scope,
        reserved: 0,
    };
    maps::count_lookup(Lookup::Fragment);
    if packet.fragment == fragment::FIRST {
        let ports = FragmentPorts {
            source: packet.key.source_port,
            destination: packet.key.destination_port,
        };
        // LRU: an insertion finds room; should it fail, the later fragments are dropped with a
        // reason.
        let _ = F::fragments().insert(&key, &ports, 0);
        return true;
    }
    // SAFETY: the value is four bytes, copied at once.
    match unsafe { F::fragments().get(&key) }.copied() {
        Some(ports) => {
            packet.key.source_port = ports.source;
            packet.key.destination_port = ports.destination;
            true
        }
        None => false,
    }
}
