//! `weir bpf lb list`: frontend → Service port and set → slots → backends, in one view.

use std::collections::HashMap;

use aya::{
    Pod,
    maps::{Array, MapData},
};
use serde::Serialize;
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    service::{Backend, FrontendKey, ServiceState, flag, frontend, service_port_of_row},
};

use super::{
    Pins, frontend_address, frontend_text, frontends, names,
    slots::{Share, Slots},
};
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
    endpoint_set: String,
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

pub fn list(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let mut tables = Tables {
        states: pins.map("SERVICE_STATE")?,
        slots: Slots::open(pins)?,
        backends: pins.map("BACKENDS")?,
        services: HashMap::new(),
    };
    let mut rows = tables.family::<Ipv4>(pins, "FRONTENDS_V4")?;
    rows.extend(tables.family::<Ipv6>(pins, "FRONTENDS_V6")?);
    output::list(format, &rows, table)
}

struct Tables {
    states: Array<MapData, ServiceState>,
    slots: Slots,
    backends: Array<MapData, Backend>,
    /// By row of `SERVICE_STATE`: frontends share them.
    services: HashMap<u32, Service>,
}

impl Tables {
    fn family<A>(&mut self, pins: &Pins, name: &str) -> anyhow::Result<Vec<Row>>
    where
        A: Address + Ord,
        FrontendKey<A>: Pod,
    {
        let row = |(key, value): (FrontendKey<A>, u32)| {
            let state_row = value & frontend::ROW_MASK;
            Ok(Row {
                address: frontend_address(&key),
                port: key.port.get(),
                protocol: names::protocol(key.protocol),
                scope: names::frontend_scope(key.scope),
                endpoint_set: names::endpoint_set(state_row),
                service_port: service_port_of_row(state_row),
                service: self.service::<A>(state_row)?,
            })
        };
        frontends::<A>(pins, name)?.into_iter().map(row).collect()
    }

    fn service<A: Address>(&mut self, state_row: u32) -> anyhow::Result<Service> {
        if let Some(service) = self.services.get(&state_row) {
            return Ok(service.clone());
        }
        let state = self.states.get(&state_row, 0)?;
        let service = Service {
            in_use: state.flags() & flag::IN_USE != 0,
            first_slot: state.first_slot(),
            slots: state.slots(),
            backends: self.slots.shares(state, &self.backends, |backend| {
                backend.address::<A>().to_ip().to_string()
            })?,
        };
        self.services.insert(state_row, service.clone());
        Ok(service)
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new([
        "FRONTEND",
        "SCOPE",
        "SET",
        "SERVICE-PORT",
        "SLOTS",
        "BACKEND",
        "NUMBER",
        "STATE",
        "SHARE",
    ]);
    for row in rows {
        let service = &row.service;
        let each = |show: fn(&Share) -> String| Cell::lines(service.backends.iter().map(show));
        let places = if service.in_use {
            each(|share| share.backend.place())
        } else {
            Cell::coloured("going away", Colour::Yellow)
        };
        table.row([
            frontend_text(&row.address, row.port, &row.protocol).into(),
            row.scope.as_str().into(),
            row.endpoint_set.as_str().into(),
            Cell::number(row.service_port),
            Cell::number(service.slots),
            places,
            each(|share| share.backend.number.to_string()),
            each(|share| share.backend.state.clone()),
            each(Share::percent),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::{super::slots::BackendRow, *};

    #[test]
    fn a_frontend_shows_its_backends_with_their_shares() {
        let share = |number, slots| {
            let backend = BackendRow {
                number,
                address: format!("10.0.1.{number}"),
                port: 8080,
                state: "active".into(),
                generation: 1,
            };
            Share::new(backend, slots, 251)
        };
        let row = Row {
            address: "10.96.0.1".into(),
            port: 80,
            protocol: "TCP".into(),
            scope: "inside".into(),
            endpoint_set: "cluster".into(),
            service_port: 4,
            service: Service {
                in_use: true,
                first_slot: 0,
                slots: 251,
                backends: vec![share(5, 126), share(6, 125)],
            },
        };
        assert_eq!(
            table(std::slice::from_ref(&row)).render(false),
            "FRONTEND          SCOPE   SET      SERVICE-PORT  SLOTS  BACKEND        NUMBER  STATE   SHARE\n\
             10.96.0.1:80/TCP  inside  cluster             4    251  10.0.1.5:8080  5       active  50.20%\n\
             \u{20}                                                       10.0.1.6:8080  6       active  49.80%\n"
        );
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!(json["slots"], 251);
        assert_eq!(json["backends"][1]["share"], 49.8);
        assert_eq!(json["backends"][1]["number"], 6);
    }
}
