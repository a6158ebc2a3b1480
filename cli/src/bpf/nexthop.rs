//! `weir bpf nexthop list`: the rows of the next hop table that are in use.

use aya::maps::{Array, MapData};
use serde::Serialize;
use weir_common::{
    Ipv4, Ipv6,
    address::Address as _,
    next_hop::{FIRST_ROW, NextHop, kind},
};

use super::{Pins, names};
use crate::{
    Format, output,
    table::{Cell, Table},
};

#[derive(Clone, Debug, Serialize)]
struct Row {
    number: u32,
    kind: String,
    device: String,
    ifindex: u32,
    gateway: Option<String>,
    mtu: u16,
    generation: u32,
}

pub fn list(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let hops: Array<MapData, NextHop> = pins.map("NEXT_HOPS")?;
    let mut rows = Vec::new();
    for (number, hop) in (FIRST_ROW..).zip(hops.iter()) {
        let hop = hop?;
        if hop.kind != kind::NONE {
            rows.push(row(number, &hop));
        }
    }
    output::list(format, &rows, table)
}

fn row(number: u32, hop: &NextHop) -> Row {
    Row {
        number,
        kind: names::next_hop_kind(hop.kind),
        device: names::device(hop.ifindex),
        ifindex: hop.ifindex,
        gateway: match hop.gateway_family {
            4 => Some(Ipv4::from_shared(hop.gateway).to_ip().to_string()),
            6 => Some(Ipv6::from_shared(hop.gateway).to_ip().to_string()),
            _ => None,
        },
        mtu: hop.mtu,
        generation: hop.generation,
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new([
        "NUMBER",
        "KIND",
        "GATEWAY",
        "DEVICE",
        "IFINDEX",
        "MTU",
        "GENERATION",
    ]);
    for row in rows {
        table.row([
            Cell::number(row.number),
            row.kind.as_str().into(),
            row.gateway.as_deref().unwrap_or("-").into(),
            row.device.as_str().into(),
            Cell::number(row.ifindex),
            Cell::number(row.mtu),
            Cell::number(row.generation),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_has_the_family_that_the_row_says() {
        for (family, text) in [(4, "192.0.2.1"), (6, "fe80::1")] {
            let hop = NextHop {
                kind: kind::NEIGHBOUR,
                gateway_family: family,
                gateway: Ipv6::from_ip(text.parse().unwrap()),
                ..NextHop::default()
            };
            assert_eq!(row(FIRST_ROW, &hop).gateway.as_deref(), Some(text));
        }
        let host = NextHop {
            kind: kind::HOST,
            ..NextHop::default()
        };
        assert!(
            table(&[row(FIRST_ROW, &host)])
                .render(false)
                .contains("host  -")
        );
    }
}
