//! Reads the service tables back at start: frontends lead to numbers, numbers to regions, and
//! rows of backends name the number they belong to. What does not fit together is left out, and
//! so rewritten by the first apply or swept by prune.

use std::{collections::HashMap, io, net::IpAddr, sync::atomic::Ordering};

use aya::maps::{HashMap as BpfHashMap, MapData};
use weir_common::{
    address::Address,
    service::{self, Backend, FrontendKey, ServiceState, backend_state},
};

use super::{
    TableError, io_error,
    numbers::Numbers,
    regions::Regions,
    services::{
        AffinityTable, BACKEND_WORDS, BACKENDS, FRONTENDS_V4, FRONTENDS_V6, FrontendAddress,
        FrontendMaps, Port, Row, SERVICE_STATE, Set,
    },
    slots::Slots,
};
use crate::{
    datapath::{mapped::MappedArray, sys},
    model::{BackendAddress, EndpointSet},
};

/// Where to read.
pub(super) struct Source<'a> {
    pub frontends: &'a FrontendMaps,
    pub state: &'a mut MappedArray,
    pub services_max: u32,
    pub backends: &'a mut MappedArray,
    pub backends_max: u32,
    pub slots: &'a mut Slots,
    pub affinity: &'a mut AffinityTable,
}

/// What was found.
pub(super) struct Found {
    pub ports: HashMap<u32, Port>,
    /// The row of `SERVICE_STATE` that each leads to.
    pub owners: HashMap<FrontendAddress, u32>,
    pub numbers: Numbers,
    pub backend_numbers: Numbers,
    pub regions: Regions,
    pub stray_backends: Vec<u32>,
}

pub(super) fn recover(source: Source<'_>) -> Result<Found, TableError> {
    let mut regions = Regions::default();
    for chunk in source.slots.chunks() {
        regions.add_chunk(chunk);
    }

    let mut ports = HashMap::new();
    let mut numbers = Vec::new();
    for number in 1..source.services_max {
        let mut port = Port {
            number,
            ..Port::default()
        };
        for set in EndpointSet::ALL {
            let row = service::state_row(number, set.number());
            let word = read_state(source.state, row)
                .map_err(|error| TableError::kernel(SERVICE_STATE, row, error))?;
            if word.flags() & service::flag::IN_USE == 0 {
                continue;
            }
            let region = (word.first_slot(), word.slots());
            port.sets[set.number() as usize] = Set {
                word,
                region: regions.reserve(region.0, region.1).then_some(region),
                unverified: true,
            };
            if word.flags() & service::flag::AFFINITY != 0 {
                port.affinity = source.affinity.timeout(number)?;
            }
        }
        if port.sets.iter().any(|set| set.unverified) {
            numbers.push(number);
            ports.insert(number, port);
        }
    }

    let (mut backend_numbers, mut stray_backends) = (Vec::new(), Vec::new());
    for number in 1..source.backends_max {
        let row = read_backend(source.backends, number)
            .map_err(|error| TableError::kernel(BACKENDS, number, error))?;
        if row.state == backend_state::FREE {
            continue;
        }
        backend_numbers.push(number);
        match ports.get_mut(&row.service_port) {
            Some(port) => port.backends.push(Row {
                // The family is that of the port's frontends, which are read below.
                address: BackendAddress {
                    address: IpAddr::V6(row.address.into()),
                    port: row.port.get(),
                },
                number,
                state: row.state,
                sets: row.sets,
                written_sets: row.sets,
            }),
            None => stray_backends.push(number),
        }
    }

    let mut owners = HashMap::new();
    read_frontends(&source.frontends.v4, FRONTENDS_V4, &mut owners)?;
    read_frontends(&source.frontends.v6, FRONTENDS_V6, &mut owners)?;
    let numbers_there_are = 1..source.services_max;
    owners.retain(|_, row| numbers_there_are.contains(&service::service_port_of_row(*row)));
    for (frontend, row) in &owners {
        let number = service::service_port_of_row(*row);
        if let Some(port) = ports.get_mut(&number) {
            port.found.push(*frontend);
        } else {
            // A frontend without its port: keep the number from being given to another port.
            ports.insert(
                number,
                Port {
                    number,
                    found: vec![*frontend],
                    ..Port::default()
                },
            );
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    for port in ports.values_mut() {
        finish_backends(port, &mut stray_backends);
    }
    source.state.unmap();
    source.backends.unmap();
    Ok(Found {
        ports,
        owners,
        numbers: Numbers::with_used(1, source.services_max, numbers),
        backend_numbers: Numbers::with_used(1, source.backends_max, backend_numbers),
        regions,
        stray_backends,
    })
}

/// Gives the addresses their family and order. Should two rows have one address, the second is
/// nobody's.
fn finish_backends(port: &mut Port, stray: &mut Vec<u32>) {
    if port.found.iter().any(|f| f.address.is_ipv4()) {
        for row in &mut port.backends {
            if let IpAddr::V6(shared) = row.address.address {
                row.address.address = weir_common::Ipv4::from_shared(shared.into()).to_ip();
            }
        }
    }
    port.backends.sort_by_key(|row| row.address);
    port.backends.dedup_by(|second, first| {
        let same = second.address == first.address;
        if same {
            stray.push(second.number);
        }
        same
    });
}

fn read_state(state: &mut MappedArray, row: u32) -> io::Result<ServiceState> {
    let words = state.words(row)?;
    Ok(ServiceState(words[0].load(Ordering::Acquire)))
}

fn read_backend(backends: &mut MappedArray, number: u32) -> io::Result<Backend> {
    let words = backends.words(number)?;
    let words: [u64; BACKEND_WORDS] = std::array::from_fn(|i| words[i].load(Ordering::Relaxed));
    Ok(sys::from_bytes(sys::bytes_of(&words)))
}

fn read_frontends<A>(
    map: &BpfHashMap<MapData, FrontendKey<A>, u32>,
    name: &'static str,
    owners: &mut HashMap<FrontendAddress, u32>,
) -> Result<(), TableError>
where
    A: Address,
    FrontendKey<A>: aya::Pod,
{
    for item in map.iter() {
        let (key, row) =
            item.map_err(|error| TableError::kernel(name, "all entries", io_error(error)))?;
        owners.insert(
            FrontendAddress {
                address: key.address.to_ip(),
                port: key.port.get(),
                protocol: key.protocol,
                scope: key.scope,
            },
            row,
        );
    }
    Ok(())
}
