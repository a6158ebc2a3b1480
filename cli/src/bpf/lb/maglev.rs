//! `weir bpf lb list --maglev`: what share of its region of slots each backend has, for every set
//! of every Service port.

use aya::maps::{Array, MapData};
use serde::Serialize;
use weir_common::service::{Backend, ServiceState, flag, service_port_of_row};

use super::{
    Families, Pins, names,
    slots::{self, Slots},
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

#[derive(Clone, Debug, Serialize)]
struct Share {
    number: u32,
    address: String,
    port: u16,
    slots: u32,
    /// Percent of the region.
    share: f64,
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
        let mut shares = Vec::new();
        for (backend_number, count) in slots.count(state)? {
            let backend = backends.get(&backend_number, 0)?;
            shares.push(Share {
                number: backend_number,
                address: families.address(service_port, backend.address),
                port: backend.port.get(),
                slots: count,
                share: slots::share(count, state.slots()),
            });
        }
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
            each(|b| output::address_port(&b.address, b.port)),
            each(|b| b.number.to_string()),
            each(|b| b.slots.to_string()),
            each(|b| format!("{:.2}%", b.share)),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use weir_common::service::{endpoint_set, state_row};

    use super::*;

    #[test]
    fn a_set_shows_its_shares() {
        let share = |number, slots| Share {
            number,
            address: "fd00::1".into(),
            port: 8080,
            slots,
            share: slots::share(slots, 251),
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
