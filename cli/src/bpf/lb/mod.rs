//! `weir bpf lb list`: the tables of Services, all joined or each by itself: frontend → Service
//! port and set of endpoints → slots → backends, and the endpoints that clients are held to.

use std::{collections::HashMap, path::Path, time::Duration};

use aya::{
    Pod,
    maps::{HashMap as BpfHashMap, MapData},
};
use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    service::{FrontendKey, service_port_of_row},
};

use super::{Pins, names};
use crate::{Format, output, service};

mod affinity;
mod backends;
mod frontends;
mod joined;
mod maglev;
mod slots;
mod source_ranges;

/// How long the agent is waited for, for the names of Services.
const NAMES_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Subcommand)]
pub enum Lb {
    /// Lists frontends with the endpoints behind them, or one of the tables behind that.
    List(Arguments),
}

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    table: Which,
}

/// Which table; the joined view without any.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
struct Which {
    /// Only the frontends: which Service port and which of its two sets of endpoints serves them.
    #[arg(long)]
    frontends: bool,
    /// Only the endpoints of Service ports.
    #[arg(long)]
    backends: bool,
    /// The Maglev tables: the share that each endpoint has, by Service port and set.
    #[arg(long)]
    maglev: bool,
    /// Clients that session affinity holds to an endpoint.
    #[arg(long)]
    affinity: bool,
    /// Clients that may use load balancer addresses (loadBalancerSourceRanges), by Service port.
    #[arg(long)]
    source_ranges: bool,
}

/// Shows what was asked for.
pub async fn list(
    pins: &Pins,
    arguments: &Arguments,
    socket: &Path,
    format: Format,
) -> anyhow::Result<()> {
    let which = &arguments.table;
    if which.frontends {
        frontends::list(pins, format)
    } else if which.backends {
        backends::list(pins, format)
    } else if which.maglev {
        maglev::list(pins, format)
    } else if which.affinity {
        affinity::list(pins, format)
    } else if which.source_ranges {
        // Names help people; the tables are there without an agent, too.
        let services = service::all(socket, NAMES_TIMEOUT)
            .await
            .unwrap_or_default();
        source_ranges::list(pins, &services, format)
    } else {
        joined::list(pins, format)
    }
}

/// Keys and values of one map of frontends, in order.
fn frontends<A>(pins: &Pins, name: &str) -> anyhow::Result<Vec<(FrontendKey<A>, u32)>>
where
    A: Address + Ord,
    FrontendKey<A>: Pod,
{
    let map: BpfHashMap<MapData, FrontendKey<A>, u32> = pins.map(name)?;
    let mut found = Vec::new();
    for entry in map.iter() {
        found.push(entry?);
    }
    found.sort_by_key(|(key, _)| (key.address, key.port, key.protocol, key.scope));
    // A deletion while we walk may start the walk anew.
    found.dedup();
    Ok(found)
}

/// Address of a frontend for people: `*` is every address of the node that serves NodePorts.
fn frontend_address<A: Address>(key: &FrontendKey<A>) -> String {
    if key.address == A::default() {
        "*".to_owned()
    } else {
        key.address.to_ip().to_string()
    }
}

/// `10.96.0.1:80/TCP`, `[fd00::1]:80/TCP`, `*:30080/TCP`.
fn frontend_text(address: &str, port: u16, protocol: &str) -> String {
    format!("{}/{protocol}", output::address_port(address, port))
}

/// Which family each Service port belongs to, from the frontends that lead to it: the tables
/// behind them hold addresses of both in one form.
struct Families(HashMap<u32, bool>);

impl Families {
    fn read(pins: &Pins) -> anyhow::Result<Self> {
        let v4 = frontends::<Ipv4>(pins, "FRONTENDS_V4")?;
        let v6 = frontends::<Ipv6>(pins, "FRONTENDS_V6")?;
        let v4 = v4.iter().map(|(_, row)| (service_port_of_row(*row), false));
        let v6 = v6.iter().map(|(_, row)| (service_port_of_row(*row), true));
        Ok(Self(v4.chain(v6).collect()))
    }

    /// An address in the shared form. Of a Service port without a frontend, which is about to go
    /// away, only the form tells: IPv4 leaves twelve bytes zero.
    fn address(&self, service_port: u32, address: Ipv6) -> String {
        let v6 = self.0.get(&service_port).copied();
        if v6.unwrap_or_else(|| address != address.as_v4().to_shared()) {
            address.to_ip().to_string()
        } else {
            address.as_v4().to_ip().to_string()
        }
    }
}

#[cfg(test)]
mod tests {
    use weir_common::Port;

    use super::*;

    #[test]
    fn a_zero_address_is_every_address() {
        let mut key = FrontendKey {
            address: Ipv4::default(),
            port: Port::new(30_080),
            ..FrontendKey::default()
        };
        let text = |key: &FrontendKey<Ipv4>| frontend_text(&frontend_address(key), 30_080, "TCP");
        assert_eq!(text(&key), "*:30080/TCP");
        key.address = Ipv4([10, 0, 0, 1]);
        assert_eq!(text(&key), "10.0.0.1:30080/TCP");
        let key = FrontendKey::<Ipv6>::default();
        assert_eq!(frontend_address(&key), "*");
    }

    #[test]
    fn the_family_comes_from_the_frontend_and_else_from_the_form() {
        let families = Families(HashMap::from([(1, false), (2, true)]));
        let short = Ipv6::from_ip("2001:db8::".parse().unwrap());
        assert_eq!(families.address(1, short), "32.1.13.184");
        assert_eq!(families.address(2, short), "2001:db8::");
        assert_eq!(families.address(3, short), "32.1.13.184");
        let long = Ipv6::from_ip("fd00::1".parse().unwrap());
        assert_eq!(families.address(3, long), "fd00::1");
    }
}
