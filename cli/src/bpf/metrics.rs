//! `weir bpf metrics list`: the counters that are not zero, summed over all processors.

use aya::maps::{MapData, PerCpuArray};
use serde::Serialize;
use weir_common::{
    DropReason,
    metrics::{Counter, HOOKS, Hook, OUTCOMES, index, outcome},
};

use super::Pins;
use crate::{
    Format, output,
    table::{Cell, Colour, Table},
};

#[derive(Clone, Debug, Serialize)]
struct Row {
    hook: &'static str,
    name: String,
    drop: bool,
    packets: u64,
    bytes: u64,
    /// What a drop reason means.
    description: &'static str,
}

pub fn list(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let metrics: PerCpuArray<MapData, Counter> = pins.map("METRICS")?;
    let mut rows = Vec::new();
    for hook in HOOKS {
        for number in 0..OUTCOMES {
            let number = u8::try_from(number)?;
            let counters = metrics.get(&index(hook, number), 0)?;
            let (packets, bytes) = counters
                .iter()
                .fold((0, 0), |(p, b), c| (p + c.packets, b + c.bytes));
            if packets > 0 {
                rows.push(row(hook, number, packets, bytes));
            }
        }
    }
    output::list(format, &rows, table)
}

fn row(hook: Hook, number: u8, packets: u64, bytes: u64) -> Row {
    let known = outcome::ALL.iter().find(|(outcome, _)| *outcome == number);
    let (name, drop, description) = match known {
        Some((_, name)) => ((*name).to_owned(), false, ""),
        None => {
            let reason = DropReason::from_number(number);
            let name = if reason as u8 == number {
                reason.name().to_owned()
            } else {
                format!("{}_{number}", reason.name())
            };
            (name, true, reason.description())
        }
    };
    Row {
        hook: hook.name(),
        name,
        drop,
        packets,
        bytes,
        description,
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(["HOOK", "OUTCOME", "PACKETS", "BYTES", "DESCRIPTION"]);
    for row in rows {
        let colour = if row.drop { Colour::Red } else { Colour::Plain };
        table.row([
            row.hook.into(),
            Cell::coloured(row.name.as_str(), colour),
            Cell::number(row.packets),
            Cell::number(row.bytes),
            row.description.into(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_and_reasons_have_their_names() {
        let forwarded = row(Hook::FromPod, outcome::LOCAL, 1, 60);
        assert_eq!((forwarded.name.as_str(), forwarded.drop), ("LOCAL", false));
        let dropped = row(Hook::ToPod, DropReason::NoBackend as u8, 1, 60);
        assert_eq!(dropped.name, "SERVICE_BACKEND_NOT_FOUND");
        assert!(dropped.drop && !dropped.description.is_empty());
        let future = row(Hook::ToPod, 250, 1, 60);
        assert_eq!((future.name.as_str(), future.drop), ("UNKNOWN_250", true));
        let text = table(&[forwarded, dropped]).render(false);
        assert!(
            text.starts_with("HOOK      OUTCOME                    PACKETS  BYTES"),
            "{text}"
        );
    }
}
