//! `weir bpf lb list`: frontend → Service port → slots → backends.

use std::collections::{BTreeMap, HashMap};

use aya::{
    Pod,
    maps::{Array, ArrayOfMaps, HashMap as BpfHashMap, MapData},
};
use serde::Serialize;
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    service::{Backend, FrontendKey, ServiceState, SlotIndex, flag, service_port_of_row},
};

use super::{Pins, names};
use crate::{
    Format, output,
    table::{Cell, Colour, Table},
};

#[derive(Clone, Debug, Serialize)]
struct Row {
    address: String,
    port: u16,
    protocol: String,
    scope: String,
    service_port: u32,
    #[serde(flatten)]
    service: Service,
}

#[derive(Clone, Debug, Default, Serialize)]
struct Service {
    in_use: bool,
    first_slot: u32,
    slots: u32,
    backends: Vec<Share>,
}

/// A backend and how many slots it has.
#[derive(Clone, Debug, Serialize)]
struct Share {
    number: u32,
    address: String,
    port: u16,
    state: String,
    generation: u32,
    slots: u32,
    /// Percent of the region.
    share: f64,
}

pub fn list(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let mut tables = Tables {
        states: pins.map("SERVICE_STATE")?,
        slots: pins.map("SLOTS")?,
        backends: pins.map("BACKENDS")?,
        chunks: HashMap::new(),
        services: HashMap::new(),
    };
    let mut rows = tables.family::<Ipv4>(&pins.map("FRONTENDS_V4")?)?;
    rows.extend(tables.family::<Ipv6>(&pins.map("FRONTENDS_V6")?)?);
    output::list(format, &rows, table)
}

struct Tables {
    states: Array<MapData, ServiceState>,
    slots: ArrayOfMaps<MapData, Array<MapData, u64>>,
    backends: Array<MapData, Backend>,
    chunks: HashMap<u32, Array<MapData, u64>>,
    /// By row of `SERVICE_STATE`: frontends share them.
    services: HashMap<u32, Service>,
}

impl Tables {
    fn family<A>(
        &mut self,
        frontends: &BpfHashMap<MapData, FrontendKey<A>, u32>,
    ) -> anyhow::Result<Vec<Row>>
    where
        A: Address + Ord,
        FrontendKey<A>: Pod,
    {
        let mut found = Vec::new();
        for entry in frontends.iter() {
            found.push(entry?);
        }
        found.sort_by_key(|(key, _)| (key.address, key.port, key.protocol, key.scope));
        // A deletion while we walk may start the walk anew.
        found.dedup();
        let v6 = A::BITS == 128;
        let row = |(key, state_row): (FrontendKey<A>, u32)| {
            Ok(Row {
                address: key.address.to_ip().to_string(),
                port: key.port.get(),
                protocol: names::protocol(key.protocol),
                scope: names::frontend_scope(key.scope),
                service_port: service_port_of_row(state_row),
                service: self.service(state_row, v6)?,
            })
        };
        found.into_iter().map(row).collect()
    }

    fn service(&mut self, state_row: u32, v6: bool) -> anyhow::Result<Service> {
        if let Some(service) = self.services.get(&state_row) {
            return Ok(service.clone());
        }
        let state = self.states.get(&state_row, 0)?;
        let service = Service {
            in_use: state.flags() & flag::IN_USE != 0,
            first_slot: state.first_slot(),
            slots: state.slots(),
            backends: self.shares(state, v6)?,
        };
        self.services.insert(state_row, service.clone());
        Ok(service)
    }

    fn shares(&mut self, state: ServiceState, v6: bool) -> anyhow::Result<Vec<Share>> {
        let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
        for offset in 0..state.slots() {
            let place = SlotIndex::new(state.first_slot().wrapping_add(offset));
            let backend = self.element(place.chunk, place.element)? >> place.shift;
            #[expect(
                clippy::cast_possible_truncation,
                reason = "the half that was shifted down"
            )]
            let backend = backend as u32;
            *counts.entry(backend).or_default() += 1;
        }
        let mut shares = Vec::with_capacity(counts.len());
        for (number, slots) in counts {
            let backend = self.backends.get(&number, 0)?;
            let address = if v6 {
                backend.address::<Ipv6>().to_ip()
            } else {
                backend.address::<Ipv4>().to_ip()
            };
            shares.push(Share {
                number,
                address: address.to_string(),
                port: backend.port.get(),
                state: names::backend_state(backend.state),
                generation: backend.generation,
                slots,
                share: (f64::from(slots) * 10_000.0 / f64::from(state.slots().max(1))).round()
                    / 100.0,
            });
        }
        Ok(shares)
    }

    fn element(&mut self, chunk: u32, element: u32) -> anyhow::Result<u64> {
        let inner = match self.chunks.entry(chunk) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.slots.get(&chunk, 0)?)
            }
        };
        Ok(inner.get(&element, 0)?)
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new([
        "FRONTEND",
        "SCOPE",
        "SERVICE-PORT",
        "SLOTS",
        "BACKEND",
        "NUMBER",
        "STATE",
        "SHARE",
    ]);
    for row in rows {
        let service = &row.service;
        let frontend = output::address_port(&row.address, row.port);
        let each = |show: fn(&Share) -> String| {
            if service.in_use {
                Cell::lines(service.backends.iter().map(show))
            } else {
                Cell::coloured("going away", Colour::Yellow)
            }
        };
        table.row([
            format!("{frontend}/{}", row.protocol).into(),
            row.scope.as_str().into(),
            Cell::number(row.service_port),
            Cell::number(service.slots),
            each(|b| output::address_port(&b.address, b.port)),
            Cell::lines(service.backends.iter().map(|b| b.number.to_string())),
            Cell::lines(service.backends.iter().map(|b| b.state.clone())),
            Cell::lines(service.backends.iter().map(|b| format!("{:.2}%", b.share))),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frontend_shows_its_backends_with_their_shares() {
        let share = |number, slots, share| Share {
            number,
            address: format!("10.0.1.{number}"),
            port: 8080,
            state: "active".into(),
            generation: 1,
            slots,
            share,
        };
        let row = Row {
            address: "10.96.0.1".into(),
            port: 80,
            protocol: "TCP".into(),
            scope: "inside".into(),
            service_port: 4,
            service: Service {
                in_use: true,
                first_slot: 0,
                slots: 251,
                backends: vec![share(5, 126, 50.2), share(6, 125, 49.8)],
            },
        };
        assert_eq!(
            table(std::slice::from_ref(&row)).render(false),
            "FRONTEND          SCOPE   SERVICE-PORT  SLOTS  BACKEND        NUMBER  STATE   SHARE\n\
             10.96.0.1:80/TCP  inside             4    251  10.0.1.5:8080  5       active  50.20%\n\
             \u{20}                                              10.0.1.6:8080  6       active  49.80%\n"
        );
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!(json["slots"], 251);
        assert_eq!(json["backends"][1]["share"], 49.8);
    }
}
