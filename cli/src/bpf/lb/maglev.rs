//! `weir bpf lb list --maglev`: what share of its region of slots each backend has, for every set
//! of every Service port.

use aya::maps::{Array, MapData};
use serde::Serialize;
use weir_common::service::{Backend, ServiceState, flag, service_port_of_row};

use super::{
    Families, Pins, names,
    slots::{Share, Slots},
};
use crate::{
    Format, output,
    table::{Cell, Table},
};

#[derive(Clone, Debug, Serialize)]
struct Row {
    service_port: u32,
    endpoint_set: String,
    affinity: bool,
    first_slot: u32,
    slots: u32,
    backends: Vec<Share>,
}

pub fn list(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let families = Families::read(pins)?;
    let states: Array<MapData, ServiceState> = pins.map("SERVICE_STATE")?;
    let backends: Array<MapData, Backend> = pins.map("BACKENDS")?;
    let mut slots = Slots::open(pins)?;
    let mut rows = Vec::new();
    for (number, state) in (0u32..).zip(states.iter()) {
        let state = state?;
        if state.flags() & flag::IN_USE == 0 {
            continue;
        }
        let service_port = service_port_of_row(number);
        let shares = slots.shares(state, &backends, |backend| {
            families.address(service_port, backend.address)
        })?;
        rows.push(row(number, state, shares));
    }
    output::list(format, &rows, table)
}

fn row(number: u32, state: ServiceState, backends: Vec<Share>) -> Row {
    Row {
        service_port: service_port_of_row(number),
        endpoint_set: names::endpoint_set(number),
        affinity: state.flags() & flag::AFFINITY != 0,
        first_slot: state.first_slot(),
        slots: state.slots(),
        backends,
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new([
        "SERVICE-PORT",
        "SET",
        "FIRST-SLOT",
        "SLOTS",
        "BACKEND",
        "NUMBER",
        "OF-SLOTS",
        "SHARE",
    ]);
    for row in rows {
        let each = |show: fn(&Share) -> String| Cell::lines(row.backends.iter().map(show));
        table.row([
            Cell::number(row.service_port),
            row.endpoint_set.as_str().into(),
            Cell::number(row.first_slot),
            Cell::number(row.slots),
            each(|share| share.backend.place()),
            each(|share| share.backend.number.to_string()),
            each(|share| share.slots.to_string()),
            each(Share::percent),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use weir_common::service::{endpoint_set, state_row};

    use super::{super::slots::BackendRow, *};

    #[test]
    fn a_set_shows_its_shares() {
        let share = |number, slots| {
            let backend = BackendRow {
                number,
                address: "fd00::1".into(),
                port: 8080,
                state: "active".into(),
                generation: 1,
            };
            Share::new(backend, slots, 251)
        };
        let used = ServiceState::new(502, 251, flag::IN_USE | flag::AFFINITY);
        let empty = ServiceState::new(0, 0, flag::IN_USE);
        let rows = [
            row(
                state_row(3, endpoint_set::CLUSTER),
                used,
                vec![share(5, 126), share(6, 125)],
            ),
            row(state_row(3, endpoint_set::LOCAL), empty, Vec::new()),
        ];
        assert!(rows[0].affinity && !rows[1].affinity);
        assert_eq!(
            table(&rows).render(false),
            "SERVICE-PORT  SET      FIRST-SLOT  SLOTS  BACKEND         NUMBER  OF-SLOTS  SHARE\n\
             \u{20}          3  cluster         502    251  [fd00::1]:8080  5       126       50.20%\n\
             \u{20}                                         [fd00::1]:8080  6       125       49.80%\n\
             \u{20}          3  local             0      0  -               -       -         -\n"
        );
    }
}
