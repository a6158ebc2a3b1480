//! `weir bpf ipcache list`: what is known of addresses and prefixes.

use aya::{
    Pod,
    maps::{LpmTrie, MapData},
};
use serde::Serialize;
use weir_common::{Ipv4, Ipv6, address::Address, ipcache::IpcacheEntry};

use super::{Pins, names};
use crate::{
    Format, output,
    table::{Cell, Table},
};

#[derive(Clone, Debug, Serialize)]
struct Row {
    prefix: String,
    class: String,
    flags: Vec<String>,
    next_hop: String,
    next_hop_number: u32,
    identity: u32,
}

pub fn list(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let mut rows = family::<Ipv4>(&pins.map("IPCACHE_V4")?)?;
    rows.extend(family::<Ipv6>(&pins.map("IPCACHE_V6")?)?);
    output::list(format, &rows, table)
}

fn family<A>(ipcache: &LpmTrie<MapData, A, IpcacheEntry>) -> anyhow::Result<Vec<Row>>
where
    A: Address + Ord + Pod,
{
    let mut found = Vec::new();
    for entry in ipcache.iter() {
        let (key, value) = entry?;
        found.push((key.data(), key.prefix_len(), value));
    }
    found.sort_by_key(|(address, length, _)| (*address, *length));
    // A deletion while we walk may start the walk anew.
    found.dedup();
    Ok(found
        .into_iter()
        .map(|(address, length, entry)| Row {
            prefix: format!("{}/{length}", address.to_ip()),
            class: names::ipcache_class(entry.class),
            flags: names::ipcache_flags(entry.flags),
            next_hop: names::next_hop(entry.next_hop),
            next_hop_number: entry.next_hop,
            identity: entry.identity,
        })
        .collect())
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(["PREFIX", "CLASS", "FLAGS", "NEXT-HOP", "IDENTITY"]);
    for row in rows {
        table.row([
            row.prefix.as_str().into(),
            row.class.as_str().into(),
            names::listed(&row.flags).into(),
            row.next_hop.as_str().into(),
            Cell::number(row.identity),
        ]);
    }
    table
}
