//! `weir bpf flow list`: the flow table, one row for each direction.

use std::{collections::HashMap, hash::Hash};

use aya::{
    Pod,
    maps::{HashMap as BpfHashMap, MapData},
};
use serde::Serialize;
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    flow::{ConnectionState, FlowEntry, FlowKey, TICKS_PER_SECOND, age, flag, lasted},
    protocol,
};

use super::{Pins, names};
use crate::{
    Format, output,
    table::{Cell, Colour, Table},
};

#[derive(Clone, Debug, Serialize)]
struct Row {
    scope: String,
    protocol: String,
    source: String,
    source_port: u16,
    destination: String,
    destination_port: u16,
    reply: bool,
    hairpin: bool,
    new_source: String,
    new_source_port: u16,
    new_destination: String,
    new_destination_port: u16,
    next_hop: String,
    device: String,
    source_endpoint: u32,
    backend: u32,
    /// Of the connection, from both entries; `half` when the other direction's is missing.
    state: &'static str,
    tcp_flags: String,
    created_seconds_ago: u32,
    idle_seconds: u32,
    packets: u64,
    bytes: u64,
    egress_set: u32,
    ingress_set: u32,
    ring: u32,
}

pub fn list(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let rows = rows(pins, directions::<Ipv4>, directions::<Ipv6>)?;
    output::list(format, &rows, table)
}

/// What is to be shown of the flow tables of both families, at this moment.
pub fn rows<R>(
    pins: &Pins,
    v4: fn(&Entries<Ipv4>, u32) -> Vec<R>,
    v6: fn(&Entries<Ipv6>, u32) -> Vec<R>,
) -> anyhow::Result<Vec<R>> {
    let now = super::now()?;
    let mut rows = v4(&entries(pins, "FLOWS_V4")?, now);
    rows.extend(v6(&entries(pins, "FLOWS_V6")?, now));
    Ok(rows)
}

/// Entries of a flow table by their keys.
pub type Entries<A> = HashMap<FlowKey<A>, FlowEntry<A>>;

/// Reads a flow table.
fn entries<A>(pins: &Pins, name: &str) -> anyhow::Result<Entries<A>>
where
    A: Address + Hash,
    FlowKey<A>: Pod,
    FlowEntry<A>: Pod,
{
    // The kernel adds and removes entries while we walk, which can start the walk anew: each
    // entry is kept once, and the walk ends even if the table never rests.
    let flows: BpfHashMap<MapData, FlowKey<A>, FlowEntry<A>> = pins.map(name)?;
    let capacity = pins.capacity(name)?;
    let mut entries = HashMap::new();
    for entry in flows.iter().take(capacity.saturating_mul(2)) {
        let (key, value) = entry?;
        entries.insert(key, value);
    }
    Ok(entries)
}

/// Every entry.
fn directions<A: Address + Hash + Ord>(entries: &Entries<A>, now: u32) -> Vec<Row> {
    let mut keys: Vec<_> = entries.keys().copied().collect();
    // Both directions of a connection stand together, the older connection first.
    keys.sort_by_key(|key| {
        let entry = &entries[key];
        let forward = entry.flags & flag::REPLY == 0;
        let pair = if forward {
            *key
        } else {
            entry.partner_key(key.protocol)
        };
        (
            u32::MAX - age(now, entry.created),
            (
                pair.source,
                pair.source_port,
                pair.destination,
                pair.destination_port,
            ),
            !forward,
        )
    });
    let rows = keys.iter().map(|key| {
        let entry = &entries[key];
        let partner = entries.get(&entry.partner_key(key.protocol));
        row(key, entry, partner, now)
    });
    rows.collect()
}

fn row<A: Address>(
    key: &FlowKey<A>,
    entry: &FlowEntry<A>,
    partner: Option<&FlowEntry<A>>,
    now: u32,
) -> Row {
    let reply = entry.flags & flag::REPLY != 0;
    let state = state(key, entry, partner);
    Row {
        scope: names::flow_scope(key.scope),
        protocol: names::protocol(key.protocol),
        source: key.source.to_ip().to_string(),
        source_port: key.source_port.get(),
        destination: key.destination.to_ip().to_string(),
        destination_port: key.destination_port.get(),
        reply,
        hairpin: entry.flags & flag::HAIRPIN != 0,
        new_source: entry.new_source.to_ip().to_string(),
        new_source_port: entry.new_source_port.get(),
        new_destination: entry.new_destination.to_ip().to_string(),
        new_destination_port: entry.new_destination_port.get(),
        next_hop: names::next_hop(entry.next_hop),
        device: names::device(entry.ifindex),
        source_endpoint: entry.source_endpoint,
        backend: entry.backend,
        state,
        tcp_flags: if key.protocol == protocol::TCP {
            names::tcp_flags(entry.tcp_flags)
        } else {
            String::new()
        },
        created_seconds_ago: age(now, entry.created) / TICKS_PER_SECOND,
        idle_seconds: age(now, entry.last_seen) / TICKS_PER_SECOND,
        packets: entry.packets,
        bytes: entry.bytes,
        egress_set: entry.egress_set,
        ingress_set: entry.ingress_set,
        ring: entry.ring,
    }
}

/// State of a connection, from both entries; `half` when that of the other direction is missing.
pub fn state<A: Address>(
    key: &FlowKey<A>,
    entry: &FlowEntry<A>,
    partner: Option<&FlowEntry<A>>,
) -> &'static str {
    let reply = entry.flags & flag::REPLY != 0;
    partner.map_or("half", |partner| {
        let replied = if reply {
            entry.packets
        } else {
            partner.packets
        } > 0;
        let lasted = lasted(entry.created, entry.last_seen, partner.last_seen);
        let flags = (entry.tcp_flags, partner.tcp_flags);
        let state = ConnectionState::new(key.protocol, flags.0, flags.1, replied, lasted);
        match state {
            ConnectionState::TcpSynSent => "syn-sent",
            ConnectionState::TcpSynReceived => "syn-received",
            ConnectionState::TcpEstablished | ConnectionState::SctpEstablished => "established",
            ConnectionState::TcpFinWait => "fin-wait",
            ConnectionState::TcpTimeWait => "time-wait",
            ConnectionState::TcpClosed => "closed",
            ConnectionState::Unanswered | ConnectionState::SctpOpening => "unanswered",
            ConnectionState::Answered => "answered",
            ConnectionState::Exchanged => "exchanged",
            ConnectionState::IcmpEcho => "echo",
            ConnectionState::IcmpAnswered => "echo-answered",
        }
    })
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new([
        "SCOPE",
        "PROTOCOL",
        "SOURCE",
        "DESTINATION",
        "DIRECTION",
        "REWRITTEN-TO",
        "NEXT-HOP",
        "STATE",
        "FLAGS",
        "AGE",
        "IDLE",
        "PACKETS",
        "BYTES",
    ]);
    for row in rows {
        let both = |source: &str, source_port, destination: &str, destination_port| {
            (
                output::address_port(source, source_port),
                output::address_port(destination, destination_port),
            )
        };
        let old = both(
            &row.source,
            row.source_port,
            &row.destination,
            row.destination_port,
        );
        let new = both(
            &row.new_source,
            row.new_source_port,
            &row.new_destination,
            row.new_destination_port,
        );
        let rewritten = match (old.0 != new.0, old.1 != new.1) {
            (false, false) => "-".to_owned(),
            (true, false) => format!("from {}", new.0),
            (false, true) => format!("to {}", new.1),
            (true, true) => format!("from {} to {}", new.0, new.1),
        };
        let colour = if row.state == "half" {
            Colour::Yellow
        } else {
            Colour::Plain
        };
        table.row([
            row.scope.as_str().into(),
            row.protocol.as_str().into(),
            old.0.into(),
            old.1.into(),
            if row.reply { "reply" } else { "forward" }.into(),
            rewritten.into(),
            row.next_hop.as_str().into(),
            Cell::coloured(row.state, colour),
            output::or_dash(&row.tcp_flags).into(),
            Cell::number(output::duration(row.created_seconds_ago.into())),
            Cell::number(output::duration(row.idle_seconds.into())),
            Cell::number(row.packets),
            Cell::number(row.bytes),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use weir_common::{Port, flow::scope};

    use super::*;

    fn v6(text: &str) -> Ipv6 {
        text.parse::<Ipv6Addr>().unwrap().into()
    }

    #[test]
    fn a_translated_flow_shows_what_it_becomes() {
        let key = FlowKey {
            source: v6("fd00::7"),
            destination: v6("fd00:96::1"),
            source_port: Port::new(4000),
            destination_port: Port::new(80),
            protocol: protocol::TCP,
            scope: scope::POD,
            reserved: 0,
        };
        let entry = FlowEntry {
            new_source: key.source,
            new_source_port: key.source_port,
            new_destination: v6("fd00::9"),
            new_destination_port: Port::new(8080),
            tcp_flags: protocol::tcp_flag::SYN | protocol::tcp_flag::ACK,
            next_hop: 9,
            created: 1000,
            last_seen: 1000 + 4 * TICKS_PER_SECOND,
            packets: 3,
            ..FlowEntry::default()
        };
        let partner = FlowEntry {
            packets: 2,
            ..entry
        };
        let now = 1000 + 65 * TICKS_PER_SECOND;
        let row = row(&key, &entry, Some(&partner), now);
        assert_eq!(row.state, "established");
        let text = table(&[row]).render(false);
        for part in [
            "[fd00::7]:4000",
            "[fd00:96::1]:80",
            "to [fd00::9]:8080",
            "endpoint 9",
            "SA",
            "1m5s",
            "1m1s",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        assert_eq!(super::row(&key, &entry, None, now).state, "half");
    }
}
