//! `weir bpf lb list --frontends`: the keys of `FRONTENDS_V4` and `FRONTENDS_V6` and what they
//! lead to.

use aya::Pod;
use serde::Serialize;
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    service::{FrontendKey, service_port_of_row},
};

use super::{Pins, frontend_address, frontend_text, frontends, names};
use crate::{
    Format, output,
    table::{Cell, Table},
};

#[derive(Clone, Debug, Serialize)]
struct Row {
    /// `*` for every address of the node.
    address: String,
    family: &'static str,
    port: u16,
    protocol: String,
    scope: String,
    /// Which of the Service port's sets of endpoints: cluster or local.
    endpoint_set: String,
    service_port: u32,
}

pub fn list(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let mut rows = family::<Ipv4>(pins, "FRONTENDS_V4")?;
    rows.extend(family::<Ipv6>(pins, "FRONTENDS_V6")?);
    output::list(format, &rows, table)
}

fn family<A>(pins: &Pins, name: &str) -> anyhow::Result<Vec<Row>>
where
    A: Address + Ord,
    FrontendKey<A>: Pod,
{
    let found = frontends::<A>(pins, name)?;
    Ok(found.iter().map(|(key, value)| row(key, *value)).collect())
}

fn row<A: Address>(key: &FrontendKey<A>, value: u32) -> Row {
    Row {
        address: frontend_address(key),
        family: if A::BITS == 128 { "IPv6" } else { "IPv4" },
        port: key.port.get(),
        protocol: names::protocol(key.protocol),
        scope: names::frontend_scope(key.scope),
        endpoint_set: names::endpoint_set(value),
        service_port: service_port_of_row(value),
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(["FRONTEND", "FAMILY", "SCOPE", "SET", "SERVICE-PORT"]);
    for row in rows {
        table.row([
            frontend_text(&row.address, row.port, &row.protocol).into(),
            row.family.into(),
            row.scope.as_str().into(),
            row.endpoint_set.as_str().into(),
            Cell::number(row.service_port),
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
    fn a_frontend_shows_its_set_and_service_port() {
        let key = FrontendKey {
            address: Ipv6::default(),
            port: Port::new(30_080),
            protocol: protocol::UDP,
            scope: scope::OUTSIDE,
        };
        let rows = [
            row(&key, state_row(7, endpoint_set::LOCAL)),
            row(&key, state_row(8, endpoint_set::CLUSTER)),
        ];
        assert_eq!(
            table(&rows).render(false),
            "FRONTEND     FAMILY  SCOPE    SET      SERVICE-PORT\n\
             *:30080/UDP  IPv6    outside  local               7\n\
             *:30080/UDP  IPv6    outside  cluster             8\n"
        );
    }
}
