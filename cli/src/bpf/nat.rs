//! `weir bpf nat list`: connections that have an address of this node in place of their own, one row for each. They are
//! entries of the flow table; there is no other table.

use std::hash::Hash;

use serde::Serialize;
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    flow::{FlowEntry, FlowKey, TICKS_PER_SECOND, age, flag},
};

use super::{
    Pins,
    flow::{self, Entries},
    names,
};
use crate::{
    Format, output,
    table::{Cell, Colour, Table},
};

#[derive(Clone, Debug, Serialize)]
struct Row {
    family: &'static str,
    protocol: String,
    source: String,
    /// Or the identifier of an ICMP echo, here and below.
    source_port: u16,
    translated_source: String,
    translated_source_port: u16,
    /// As the client has asked for it.
    destination: String,
    destination_port: u16,
    /// Where its packets go.
    reached: String,
    reached_port: u16,
    /// `half` when the entry of the other direction is missing.
    state: &'static str,
    created_seconds_ago: u32,
    /// Since the last packet in either direction.
    idle_seconds: u32,
}

pub fn list(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let rows = flow::rows(pins, translated::<Ipv4>, translated::<Ipv6>)?;
    output::list(format, &rows, table)
}

/// The translated connections among all, the oldest first.
fn translated<A: Address + Hash + Ord>(entries: &Entries<A>, now: u32) -> Vec<Row> {
    let mut forward: Vec<_> = entries
        .iter()
        .filter(|(_, entry)| entry.flags & (flag::SOURCE_NAT | flag::REPLY) == flag::SOURCE_NAT)
        .collect();
    forward.sort_by_key(|(key, entry)| {
        (
            u32::MAX - age(now, entry.created),
            (key.source, key.source_port),
            (key.destination, key.destination_port),
            (key.protocol, key.scope),
        )
    });
    let rows = forward.into_iter().map(|(key, entry)| {
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
    let idle = age(now, entry.last_seen);
    let idle = partner.map_or(idle, |partner| idle.min(age(now, partner.last_seen)));
    Row {
        family: if A::BITS == 128 { "IPv6" } else { "IPv4" },
        protocol: names::protocol(key.protocol),
        source: key.source.to_ip().to_string(),
        source_port: key.source_port.get(),
        translated_source: entry.new_source.to_ip().to_string(),
        translated_source_port: entry.new_source_port.get(),
        destination: key.destination.to_ip().to_string(),
        destination_port: key.destination_port.get(),
        reached: entry.new_destination.to_ip().to_string(),
        reached_port: entry.new_destination_port.get(),
        state: flow::state(key, entry, partner),
        created_seconds_ago: age(now, entry.created) / TICKS_PER_SECOND,
        idle_seconds: idle / TICKS_PER_SECOND,
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new([
        "PROTOCOL",
        "SOURCE",
        "TRANSLATED-SOURCE",
        "DESTINATION",
        "REACHED",
        "STATE",
        "AGE",
        "IDLE",
    ]);
    for row in rows {
        let colour = if row.state == "half" {
            Colour::Yellow
        } else {
            Colour::Plain
        };
        table.row([
            row.protocol.as_str().into(),
            output::address_port(&row.source, row.source_port).into(),
            output::address_port(&row.translated_source, row.translated_source_port).into(),
            output::address_port(&row.destination, row.destination_port).into(),
            output::address_port(&row.reached, row.reached_port).into(),
            Cell::coloured(row.state, colour),
            Cell::number(output::duration(row.created_seconds_ago.into())),
            Cell::number(output::duration(row.idle_seconds.into())),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use weir_common::{Port, flow::scope, protocol};

    use super::*;

    const NOW: u32 = 1_000_000;

    fn seconds_ago(seconds: u32) -> u32 {
        NOW - seconds * TICKS_PER_SECOND
    }

    /// Both entries of a connection through NodePort 30080 that began a minute ago.
    fn connection<A: Address>(
        [client, node, pod]: [A; 3],
        port: u16,
    ) -> [(FlowKey<A>, FlowEntry<A>); 2] {
        let key = FlowKey {
            source: client,
            destination: node,
            source_port: Port::new(port),
            destination_port: Port::new(30_080),
            protocol: protocol::UDP,
            scope: scope::UNDERLAY,
            reserved: 0,
        };
        let forward = FlowEntry {
            flags: flag::SOURCE_NAT | u16::from(scope::UNDERLAY) << flag::PARTNER_SCOPE_SHIFT,
            new_source: node,
            new_source_port: Port::new(61_000 + port % 100),
            new_destination: pod,
            new_destination_port: Port::new(8080),
            created: seconds_ago(60),
            last_seen: seconds_ago(20),
            packets: 1,
            ..FlowEntry::default()
        };
        let reply = FlowEntry {
            flags: forward.flags | flag::REPLY,
            new_source: key.destination,
            new_source_port: key.destination_port,
            new_destination: key.source,
            new_destination_port: key.source_port,
            last_seen: seconds_ago(5),
            ..forward
        };
        [(key, forward), (forward.partner_key(key.protocol), reply)]
    }

    fn v4(text: &str) -> Ipv4 {
        text.parse::<Ipv4Addr>().unwrap().into()
    }

    fn v6(text: &str) -> Ipv6 {
        text.parse::<Ipv6Addr>().unwrap().into()
    }

    #[test]
    fn a_translated_connection_is_one_row() {
        let addresses = [v4("198.51.100.10"), v4("192.0.2.1"), v4("10.10.2.6")];
        let later = connection(addresses, 4001).map(|(key, mut entry)| {
            entry.created = seconds_ago(30);
            (key, entry)
        });
        let mut entries: Entries<Ipv4> = connection(addresses, 4000).into_iter().collect();
        entries.extend(later);
        // Not translated.
        let own = connection([v4("10.10.1.5"), v4("10.96.0.1"), v4("10.10.2.6")], 4002);
        entries.extend(own.map(|(key, mut entry)| {
            entry.flags &= !flag::SOURCE_NAT;
            (key, entry)
        }));
        let rows = translated(&entries, NOW);
        let text = table(&rows).render(false);
        assert_eq!(
            text,
            "PROTOCOL  SOURCE              TRANSLATED-SOURCE  DESTINATION      REACHED         STATE      AGE  IDLE\n\
             UDP       198.51.100.10:4000  192.0.2.1:61000    192.0.2.1:30080  10.10.2.6:8080  answered  1m0s    5s\n\
             UDP       198.51.100.10:4001  192.0.2.1:61001    192.0.2.1:30080  10.10.2.6:8080  answered   30s    5s\n"
        );
        let json = serde_json::to_value(&rows[0]).unwrap();
        assert_eq!(json["family"], "IPv4");
        assert_eq!(json["translated_source_port"], 61_000);
        assert_eq!(json["idle_seconds"], 5);
    }

    #[test]
    fn both_families_have_their_name() {
        let addresses = [v6("2001:db8::10"), v6("2001:db8::1"), v6("fd10:2::6")];
        let [forward, _] = connection(addresses, 4000);
        let rows = translated(&Entries::from([forward]), NOW);
        let row = rows.first().unwrap();
        assert_eq!((row.family, row.state), ("IPv6", "half"));
        assert_eq!(
            row.reached.parse(),
            Ok(IpAddr::V6("fd10:2::6".parse().unwrap()))
        );
        let text = table(&rows).render(false);
        assert!(text.contains("[2001:db8::1]:61000"), "{text}");
    }
}
