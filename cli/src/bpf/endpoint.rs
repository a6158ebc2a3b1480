//! `weir bpf endpoint list`: the rows of the endpoint table that are in use.

use aya::maps::{Array, MapData};
use serde::Serialize;
use weir_common::{address::Address as _, endpoint::Endpoint};

use super::{Pins, names};
use crate::{
    Format, output,
    table::{Cell, Table},
};

#[derive(Clone, Debug, Serialize)]
struct Row {
    number: u32,
    addresses: Vec<String>,
    device: String,
    ifindex: u32,
    host_mac: String,
    pod_mac: String,
    netns_cookie: u64,
    generation: u32,
    egress_set: u32,
    ingress_set: u32,
    identity: u32,
    mtu: u16,
    flags: Vec<String>,
}

pub fn list(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let endpoints: Array<MapData, Endpoint> = pins.map("ENDPOINTS")?;
    let mut rows = Vec::new();
    for (number, endpoint) in (0u32..).zip(endpoints.iter()) {
        let endpoint = endpoint?;
        if endpoint.ifindex != 0 {
            rows.push(row(number, &endpoint));
        }
    }
    output::list(format, &rows, table)
}

fn row(number: u32, endpoint: &Endpoint) -> Row {
    let v4 = (endpoint.ipv4.word() != 0).then(|| endpoint.ipv4.to_ip().to_string());
    let v6 = (!endpoint.ipv6.is_zero()).then(|| endpoint.ipv6.to_ip().to_string());
    Row {
        number,
        addresses: v4.into_iter().chain(v6).collect(),
        device: names::device(endpoint.ifindex),
        ifindex: endpoint.ifindex,
        host_mac: endpoint.host_mac.to_string(),
        pod_mac: endpoint.pod_mac.to_string(),
        netns_cookie: endpoint.netns_cookie,
        generation: endpoint.generation,
        egress_set: endpoint.egress_set,
        ingress_set: endpoint.ingress_set,
        identity: endpoint.identity,
        mtu: endpoint.mtu,
        flags: names::endpoint_flags(endpoint.flags),
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new([
        "NUMBER",
        "ADDRESSES",
        "DEVICE",
        "IFINDEX",
        "POD-MAC",
        "HOST-MAC",
        "MTU",
        "EGRESS-SET",
        "INGRESS-SET",
        "GENERATION",
        "FLAGS",
    ]);
    for row in rows {
        table.row([
            Cell::number(row.number),
            Cell::lines(row.addresses.iter().cloned()),
            row.device.as_str().into(),
            Cell::number(row.ifindex),
            row.pod_mac.as_str().into(),
            row.host_mac.as_str().into(),
            Cell::number(row.mtu),
            Cell::number(row.egress_set),
            Cell::number(row.ingress_set),
            Cell::number(row.generation),
            names::listed(&row.flags).into(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use weir_common::{
        Ipv4,
        endpoint::{host_mac, pod_mac},
    };

    use super::*;

    #[test]
    fn an_endpoint_with_one_family_shows_one_address() {
        let endpoint = Endpoint {
            ifindex: 4_000_000,
            ipv4: Ipv4([10, 0, 0, 7]),
            pod_mac: pod_mac(7),
            host_mac: host_mac(7),
            flags: 0x3,
            ..Endpoint::default()
        };
        let row = row(7, &endpoint);
        assert_eq!(row.addresses, ["10.0.0.7"]);
        assert_eq!(row.flags, ["no-socket-translation", "0x2"]);
        assert_eq!(row.device, "if4000000");
        let text = table(&[row]).render(false);
        assert!(
            text.contains("0e:57:00:00:00:07  0a:57:00:00:00:07"),
            "{text}"
        );
    }
}
