//! From objects to maps inside one process: what a change costs once it has arrived.

use std::{net::IpAddr, time::Instant};

use anyhow::Result;
use weir_agent::{
    datapath::{Datapath, DatapathOptions},
    model::Model,
    objects::{
        EndpointSlice, Family, Object, ObjectName, Protocol, Service, ServicePort, SliceEndpoint,
        SlicePort,
    },
    source::Change,
};

use super::{ENDPOINTS, SERVICES, endpoint_address, service_address};
use crate::{
    packets,
    report::{Section, Table},
    statistics::quantile,
};

/// Measures on a thread with namespaces of its own.
///
/// # Errors
///
/// The kernel's, or the data path's.
pub fn run(section: &mut Section, changes: usize) -> Result<()> {
    let table = std::thread::spawn(move || measure(changes))
        .join()
        .map_err(|_| anyhow::anyhow!("the measurement panicked"))??;
    section.table(&table);
    Ok(())
}

fn measure(changes: usize) -> Result<Table> {
    packets::isolate()?;
    let mut datapath = Datapath::open(&DatapathOptions {
        bpf_root: "/sys/fs/bpf/tables".into(),
        ..DatapathOptions::default()
    })?;
    let mut model = Model::default();
    let begin = Instant::now();
    for service in 0..SERVICES {
        model.apply(Change::Upsert(Object::Service(service_object(service))));
        model.apply(Change::Upsert(Object::EndpointSlice(slice(
            service, ENDPOINTS,
        ))));
    }
    let delta = model.take_delta();
    let modelled = begin.elapsed();
    let begin = Instant::now();
    for (key, desired) in &delta.services {
        datapath.apply_service(key, desired.as_ref())?;
    }
    let written = begin.elapsed();
    drop(delta);

    let mut times = Vec::new();
    for turn in 0..changes {
        let number = u32::try_from(turn)? * 7919 % SERVICES;
        let begin = Instant::now();
        let changed = slice(number, ENDPOINTS - 1);
        model.apply(Change::Upsert(Object::EndpointSlice(changed)));
        for (key, desired) in &model.take_delta().services {
            datapath.apply_service(key, desired.as_ref())?;
        }
        times.push(begin.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);

    let mut table = Table::new(
        &format!(
            "From objects to maps, in one process: {SERVICES} Services of {ENDPOINTS} endpoints, IPv4"
        ),
        &["", ""],
    );
    table.row([
        "all: model".into(),
        format!("{:.0} ms", modelled.as_secs_f64() * 1e3),
    ]);
    table.row([
        "all: maps".into(),
        format!("{:.0} ms", written.as_secs_f64() * 1e3),
    ]);
    for (name, at) in [("p50", 0.5), ("p99", 0.99), ("slowest", 1.0)] {
        table.row([
            format!("one endpoint removed, model and maps, {name} of {changes}"),
            format!("{:.3} ms", quantile(&times, at) * 1e3),
        ]);
    }
    Ok(table)
}

fn service_object(number: u32) -> Service {
    Service {
        name: name(number),
        cluster_ips: vec![service_address(number)],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: 0,
        }],
        ..Service::default()
    }
}

fn slice(service: u32, endpoints: u32) -> EndpointSlice {
    let endpoint = |address: IpAddr| SliceEndpoint {
        address: Some(address),
        ready: true,
        serving: true,
        ..SliceEndpoint::default()
    };
    EndpointSlice {
        name: ObjectName::new("bench", format!("service-{service}-ipv4")),
        service: name(service).name,
        family: Some(Family::V4),
        endpoints: (0..endpoints)
            .map(|number| endpoint(endpoint_address(service, number)))
            .collect(),
        ports: vec![SlicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 8080,
        }],
    }
}

fn name(service: u32) -> ObjectName {
    ObjectName::new("bench", format!("service-{service}"))
}
