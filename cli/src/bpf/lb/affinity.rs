//! `weir bpf lb list --affinity`: clients that session affinity holds to an endpoint.

use aya::maps::{Array, HashMap as BpfHashMap, MapData};
use serde::Serialize;
use weir_common::{
    affinity::{Affinity, AffinityKey},
    flow::{TICKS_PER_SECOND, age},
    service::Backend,
};

use super::{Families, Pins};
use crate::{
    Format, bpf, output,
    table::{Cell, Colour, Table},
};

#[derive(Clone, Debug, Serialize)]
struct Row {
    /// An address, or `node` for processes of the node.
    client: String,
    service_port: u32,
    backend: u32,
    address: String,
    port: u16,
    generation: u32,
    age_seconds: u32,
    timeout_seconds: u32,
    /// `held`; `expired` or `stale` (the endpoint is gone): the next connection chooses anew.
    state: &'static str,
}

pub fn list(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let held: BpfHashMap<MapData, AffinityKey, Affinity> = pins.recent_map("AFFINITY")?;
    let timeouts: Array<MapData, u32> = pins.recent_map("AFFINITY_TIMEOUTS")?;
    let backends: Array<MapData, Backend> = pins.map("BACKENDS")?;
    let families = Families::read(pins)?;
    let now = bpf::now()?;
    let mut rows = Vec::new();
    for entry in held.iter() {
        let (key, value) = entry?;
        let backend = backends.get(&value.backend, 0)?;
        let timeout = timeouts.get(&key.service_port, 0)?;
        rows.push(row(&key, &value, &backend, timeout, now, &families));
    }
    rows.sort_by(|a, b| (a.service_port, &a.client).cmp(&(b.service_port, &b.client)));
    // A deletion while we walk may start the walk anew.
    rows.dedup_by(|a, b| (a.service_port, &a.client) == (b.service_port, &b.client));
    output::list(format, &rows, table)
}

fn row(
    key: &AffinityKey,
    value: &Affinity,
    backend: &Backend,
    timeout: u32,
    now: u32,
    families: &Families,
) -> Row {
    let age_seconds = age(now, value.last_used) / TICKS_PER_SECOND;
    Row {
        client: if key.client.is_zero() {
            "node".to_owned()
        } else {
            families.address(key.service_port, key.client)
        },
        service_port: key.service_port,
        backend: value.backend,
        address: families.address(key.service_port, backend.address),
        port: backend.port.get(),
        generation: value.generation,
        age_seconds,
        timeout_seconds: timeout,
        state: if backend.generation != value.generation || backend.service_port != key.service_port
        {
            "stale"
        } else if age_seconds >= timeout {
            "expired"
        } else {
            "held"
        },
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new([
        "CLIENT",
        "SERVICE-PORT",
        "BACKEND",
        "NUMBER",
        "AGE",
        "TIMEOUT",
        "STATE",
    ]);
    for row in rows {
        let (address, colour) = match row.state {
            "stale" => ("-".to_owned(), Colour::Yellow),
            _ => (output::address_port(&row.address, row.port), Colour::Plain),
        };
        table.row([
            row.client.as_str().into(),
            Cell::number(row.service_port),
            address.into(),
            Cell::number(row.backend),
            output::duration(row.age_seconds.into()).into(),
            output::duration(row.timeout_seconds.into()).into(),
            Cell::coloured(row.state, colour),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use weir_common::{Ipv6, Port};

    use super::*;

    #[test]
    fn an_entry_is_held_expired_or_stale() {
        let backend = Backend {
            address: Ipv6::from_ip("10.0.1.5".parse().unwrap()),
            port: Port::new(8080),
            generation: 3,
            service_port: 4,
            ..Backend::default()
        };
        let held = Affinity {
            backend: 12,
            generation: 3,
            last_used: 0,
            ..Affinity::default()
        };
        let client = AffinityKey {
            client: Ipv6::from_ip("10.0.1.9".parse().unwrap()),
            service_port: 4,
        };
        let node = AffinityKey {
            client: Ipv6::default(),
            ..client
        };
        let families = Families(HashMap::from([(4, false)]));
        let now = 100 * TICKS_PER_SECOND;
        let stale = Affinity {
            generation: 2,
            ..held
        };
        let rows = [
            row(&client, &held, &backend, 10_800, now, &families),
            row(&node, &held, &backend, 100, now, &families),
            row(&node, &stale, &backend, 100, now, &families),
        ];
        assert_eq!(
            table(&rows).render(false),
            "CLIENT    SERVICE-PORT  BACKEND        NUMBER  AGE    TIMEOUT  STATE\n\
             10.0.1.9             4  10.0.1.5:8080      12  1m40s  3h0m     held\n\
             node                 4  10.0.1.5:8080      12  1m40s  1m40s    expired\n\
             node                 4  -                  12  1m40s  1m40s    stale\n"
        );
    }
}
