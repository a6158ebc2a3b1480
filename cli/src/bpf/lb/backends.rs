//! `weir bpf lb list --backends`: the rows of `BACKENDS` that are in use.

use aya::maps::{Array, MapData};
use serde::Serialize;
use weir_common::service::{Backend, backend_state};

use super::{Families, Pins, names, slots::BackendRow};
use crate::{
    Format, output,
    table::{Cell, Table},
};

#[derive(Clone, Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    backend: BackendRow,
    /// The sets it belongs to: cluster, local.
    endpoint_sets: Vec<String>,
    service_port: u32,
}

pub fn list(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let families = Families::read(pins)?;
    let backends: Array<MapData, Backend> = pins.map("BACKENDS")?;
    let mut rows = Vec::new();
    for (number, backend) in (0u32..).zip(backends.iter()) {
        let backend = backend?;
        if backend.state != backend_state::FREE {
            rows.push(row(number, &backend, &families));
        }
    }
    output::list(format, &rows, table)
}

fn row(number: u32, backend: &Backend, families: &Families) -> Row {
    let address = families.address(backend.service_port, backend.address);
    Row {
        backend: BackendRow::new(number, backend, address),
        endpoint_sets: names::endpoint_sets(backend.sets),
        service_port: backend.service_port,
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new([
        "NUMBER",
        "BACKEND",
        "STATE",
        "SETS",
        "SERVICE-PORT",
        "GENERATION",
    ]);
    for row in rows {
        table.row([
            Cell::number(row.backend.number),
            row.backend.place().into(),
            row.backend.state.as_str().into(),
            names::listed(&row.endpoint_sets).into(),
            Cell::number(row.service_port),
            Cell::number(row.backend.generation),
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
    fn a_backend_shows_its_sets() {
        let backend = Backend {
            address: Ipv6::from_ip("10.0.1.5".parse().unwrap()),
            port: Port::new(8080),
            state: backend_state::TERMINATING,
            sets: 0b11,
            generation: 9,
            service_port: 4,
            ..Backend::default()
        };
        let row = row(12, &backend, &Families(HashMap::new()));
        assert_eq!(
            table(&[row]).render(false),
            "NUMBER  BACKEND        STATE        SETS           SERVICE-PORT  GENERATION\n\
             \u{20}   12  10.0.1.5:8080  terminating  cluster,local             4           9\n"
        );
    }
}
