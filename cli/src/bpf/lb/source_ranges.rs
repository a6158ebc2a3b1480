//! `weir bpf lb list --source-ranges`: who may use the load balancer addresses of a Service port.

use std::collections::{BTreeMap, BTreeSet};

use aya::{
    Pod,
    maps::{LpmTrie, MapData},
};
use serde::Serialize;
use weir_api::v1::{Frontend, ServicePort};
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    service::{FrontendKey, SourceRangeKey, frontend, service_port_of_row},
};

use super::{Pins, frontend_address, frontend_text, frontends, names};
use crate::{
    Format, output,
    table::{Cell, Table},
};

/// Bits of a key before the address.
const NUMBER_BITS: u32 = 32;

/// A Service port with frontends that are restricted.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
struct Row {
    service_port: u32,
    /// `NAMESPACE/NAME`; empty where no agent tells it.
    service: String,
    family: &'static str,
    /// The Service restricts the other family alone.
    everybody: bool,
    /// Without one, nobody is served there, but for `everybody`.
    ranges: Vec<String>,
    /// None while ranges are about to be used, or no longer.
    frontends: Vec<String>,
}

/// `services` are those that the agent tells, or none: the tables know numbers, and what is restricted.
pub fn list(pins: &Pins, services: &[ServicePort], format: Format) -> anyhow::Result<()> {
    let mut rows = family::<Ipv4>(pins, "FRONTENDS_V4", "SOURCE_RANGES_V4")?;
    rows.extend(family::<Ipv6>(pins, "FRONTENDS_V6", "SOURCE_RANGES_V6")?);
    tell_services(&mut rows, services);
    rows.sort_by_key(|row| row.service_port);
    output::list(format, &rows, table)
}

fn family<A>(pins: &Pins, frontends_map: &str, ranges_map: &str) -> anyhow::Result<Vec<Row>>
where
    A: Address + Ord,
    FrontendKey<A>: Pod,
    SourceRangeKey<A>: Pod,
{
    let map: LpmTrie<MapData, SourceRangeKey<A>, u32> = pins.map(ranges_map)?;
    let mut ranges = Vec::new();
    for entry in map.iter() {
        let (key, _) = entry?;
        ranges.push((key.data(), key.prefix_len()));
    }
    Ok(joined(&frontends::<A>(pins, frontends_map)?, ranges))
}

fn joined<A: Address + Ord>(
    frontends: &[(FrontendKey<A>, u32)],
    mut ranges: Vec<(SourceRangeKey<A>, u32)>,
) -> Vec<Row> {
    let mut rows: BTreeMap<u32, Row> = BTreeMap::new();
    let empty = |service_port| Row {
        service_port,
        family: if A::BITS == 128 { "IPv6" } else { "IPv4" },
        ..Row::default()
    };
    for (key, value) in frontends {
        if value & frontend::SOURCE_RANGES == 0 {
            continue;
        }
        let number = service_port_of_row(*value);
        let protocol = names::protocol(key.protocol);
        let text = frontend_text(&frontend_address(key), key.port.get(), &protocol);
        let row = rows.entry(number).or_insert_with(|| empty(number));
        // It stands there for clients inside and outside.
        if !row.frontends.contains(&text) {
            row.frontends.push(text);
        }
    }
    ranges.sort_by_key(|(key, length)| (key.service_port, key.address, *length));
    // A deletion while we walk may start the walk anew.
    ranges.dedup();
    for (key, length) in ranges {
        let number = u32::from_be_bytes(key.service_port);
        let length = length.saturating_sub(NUMBER_BITS);
        let row = rows.entry(number).or_insert_with(|| empty(number));
        row.ranges.push(format!("{}/{length}", key.address.to_ip()));
    }
    rows.into_values().collect()
}

/// Enters the names of Services, and rows for the family that a Service leaves open while it restricts the other.
fn tell_services(rows: &mut Vec<Row>, services: &[ServicePort]) {
    let name = |port: &ServicePort| format!("{}/{}", port.namespace, port.name);
    for row in rows.iter_mut() {
        let known = services.iter().find(|port| port.number == row.service_port);
        row.service = known.map(name).unwrap_or_default();
    }
    let restricted: BTreeSet<String> = rows.iter().map(|row| row.service.clone()).collect();
    let open = services
        .iter()
        .filter(|port| !port.restricted && restricted.contains(&name(port)));
    for port in open {
        let is_balanced = |frontend: &&Frontend| frontend.kind == "LoadBalancer";
        let text = |frontend: &Frontend| {
            let number = u16::try_from(frontend.port).unwrap_or_default();
            frontend_text(&frontend.address, number, &port.protocol)
        };
        let mut frontends: Vec<String> = port
            .frontends
            .iter()
            .filter(is_balanced)
            .map(text)
            .collect();
        // They stand there for clients inside and outside.
        frontends.sort();
        frontends.dedup();
        if frontends.is_empty() {
            continue;
        }
        rows.push(Row {
            service_port: port.number,
            service: name(port),
            family: if port.family == "IPv6" {
                "IPv6"
            } else {
                "IPv4"
            },
            everybody: true,
            ranges: Vec::new(),
            frontends,
        });
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(["SERVICE", "SERVICE-PORT", "FAMILY", "CLIENTS", "FRONTEND"]);
    for row in rows {
        let lines = |texts: &[String], none: &str| match texts {
            [] => none.into(),
            texts => Cell::lines(texts.iter().cloned()),
        };
        table.row([
            output::or_dash(&row.service).into(),
            Cell::number(row.service_port),
            row.family.into(),
            lines(
                &row.ranges,
                if row.everybody { "everybody" } else { "nobody" },
            ),
            lines(&row.frontends, "-"),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use weir_common::{
        Port, protocol,
        service::{endpoint_set, scope, state_row},
    };

    use super::*;

    #[test]
    fn restricted_frontends_and_their_clients_stand_together() {
        let frontend = |last, scope, value| {
            let key = FrontendKey {
                address: Ipv4([203, 0, 113, last]),
                port: Port::new(80),
                protocol: protocol::TCP,
                scope,
            };
            (key, value)
        };
        let row = |number| state_row(number, endpoint_set::CLUSTER);
        let frontends = [
            frontend(7, scope::INSIDE, row(1) | frontend::SOURCE_RANGES),
            frontend(7, scope::OUTSIDE, row(1) | frontend::SOURCE_RANGES),
            frontend(8, scope::OUTSIDE, row(2) | frontend::SOURCE_RANGES),
            frontend(9, scope::INSIDE, row(3)),
        ];
        let range = |number: u32, address, length: u32| {
            let key = SourceRangeKey {
                service_port: number.to_be_bytes(),
                address: Ipv4(address),
            };
            (key, NUMBER_BITS + length)
        };
        let ranges = vec![
            range(1, [198, 51, 100, 0], 24),
            range(4, [0, 0, 0, 0], 0),
            range(1, [192, 0, 2, 0], 25),
        ];
        assert_eq!(
            table(&joined(&frontends, ranges)).render(false),
            "SERVICE  SERVICE-PORT  FAMILY  CLIENTS          FRONTEND\n\
             -                   1  IPv4    192.0.2.0/25     203.0.113.7:80/TCP\n\
             \u{20}                              198.51.100.0/24\n\
             -                   2  IPv4    nobody           203.0.113.8:80/TCP\n\
             -                   4  IPv4    0.0.0.0/0        -\n"
        );
    }

    #[test]
    fn a_family_left_open_is_everybodys() {
        let port = |number, family: &str, restricted, address: &str| {
            let frontend = |kind: &str, scope: &str| Frontend {
                kind: kind.into(),
                address: address.into(),
                port: 80,
                scope: scope.into(),
                ..Frontend::default()
            };
            ServicePort {
                namespace: "default".into(),
                name: "web".into(),
                number,
                protocol: "TCP".into(),
                family: family.into(),
                restricted,
                frontends: vec![
                    frontend("ClusterIP", "inside"),
                    frontend("LoadBalancer", "inside"),
                    frontend("LoadBalancer", "outside"),
                ],
                ..ServicePort::default()
            }
        };
        let mut rows = vec![Row {
            service_port: 1,
            family: "IPv4",
            ranges: vec!["192.0.2.0/25".into()],
            frontends: vec!["203.0.113.7:80/TCP".into()],
            ..Row::default()
        }];
        let mut other = port(3, "IPv6", false, "2001:db8::8");
        other.name = "unrestricted".into();
        let services = [
            port(1, "IPv4", true, "203.0.113.7"),
            port(2, "IPv6", false, "2001:db8::7"),
            other,
        ];
        tell_services(&mut rows, &services);
        assert_eq!(
            table(&rows).render(false),
            "SERVICE      SERVICE-PORT  FAMILY  CLIENTS       FRONTEND\n\
             default/web             1  IPv4    192.0.2.0/25  203.0.113.7:80/TCP\n\
             default/web             2  IPv6    everybody     [2001:db8::7]:80/TCP\n"
        );
    }
}
