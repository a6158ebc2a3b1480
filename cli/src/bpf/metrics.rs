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
    /// What the outcome means.
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
        Some((_, name)) => ((*name).to_owned(), false, meaning(number)),
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

/// What an outcome means that is no drop.
fn meaning(number: u8) -> &'static str {
    match number {
        outcome::STACK => "handed to the node's stack, or to the next program",
        outcome::LOCAL => "delivered to a pod of this node, past the stack",
        outcome::REMOTE => "sent to another node, past the stack",
        outcome::ANSWERED => "answered in place: ARP, neighbour discovery, ICMP errors",
        outcome::TRANSLATED => "sockets whose destination was translated",
        outcome::DEFRAG => {
            "fragments sent to be put together; at from_defrag, those that came back"
        }
        outcome::ROUTED => "sent to the outside by the node's routes, past the stack",
        outcome::FLOW_CREATED => "new connections in the flow table",
        outcome::FLOW_EXPIRED => {
            "connections that left their place or port to others, idle for their time-out"
        }
        outcome::FLOW_EVICTED => {
            "connections that left their place or port to others before their time-out"
        }
        outcome::FLOW_PORT_CHANGED => {
            "connections that got another source port, as theirs was taken"
        }
        outcome::FLOW_STALE => {
            "entries removed whose endpoint, backend or next hop is another's now"
        }
        outcome::REFUSED => "dropped packets whose sender got a reset or ICMP port unreachable",
        outcome::REFUSAL_LIMITED => {
            "refusals and ICMP errors not sent, to keep within refusals-per-second"
        }
        outcome::NAT_PORT_TRIED => "ports of nat-ports tried for new connections",
        outcome::NAT_PORT_SEARCH => "searches of all nat-ports, after random tries found none free",
        outcome::EVENT_LOST => "events for which the ring buffer had no room",
        _ => "",
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
        for (number, name) in [
            (outcome::ROUTED, "ROUTED"),
            (outcome::NAT_PORT_TRIED, "NAT_PORT_TRIED"),
            (outcome::NAT_PORT_SEARCH, "NAT_PORT_SEARCH"),
        ] {
            let row = row(Hook::FromNetdev, number, 1, 0);
            assert_eq!((row.name.as_str(), row.drop), (name, false));
        }
        for (number, name) in outcome::ALL {
            let row = row(Hook::FromPod, *number, 1, 0);
            assert!(!row.description.is_empty(), "{name} has no description");
        }
        let future = row(Hook::ToPod, 250, 1, 60);
        assert_eq!((future.name.as_str(), future.drop), ("UNKNOWN_250", true));
        let text = table(&[forwarded, dropped]).render(false);
        assert!(
            text.starts_with("HOOK      OUTCOME                    PACKETS  BYTES"),
            "{text}"
        );
    }
}
