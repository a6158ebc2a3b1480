//! Objects and clients that several of these tests use.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use weir_tests::{
    Cluster, Pod,
    netns::NetNs,
    objects::{self, Endpoint, Port},
    traffic::{self, Protocol, Server},
};

pub use weir_tests::refusal::{is_dropped, is_refused, is_unreachable};

/// Where servers in pods listen.
pub const TARGET: u16 = 9376;
/// Port of Services.
pub const PORT: u16 = 80;
/// Requests after which every one of a few endpoints must have answered: one of three is missed
/// with a chance of 10^-17.
const TRIES: usize = 100;
/// Pods that serve [`TARGET`] for as long as this lives.
#[derive(Debug)]
pub struct Backends {
    /// The pods, in the order of the nodes they were asked for on.
    pub pods: Vec<Pod>,
    _servers: Vec<Server>,
}

impl Backends {
    /// One pod on each of the named nodes, called PREFIX1, PREFIX2 …
    pub fn start(cluster: &Cluster, prefix: &str, nodes: &[&str]) -> Result<Self> {
        let mut pods = Vec::new();
        let mut servers = Vec::new();
        for (number, node) in (1..).zip(nodes) {
            let pod = cluster.pod(node, &format!("{prefix}{number}"))?;
            servers.extend(pod.serve(TARGET)?);
            pods.push(pod);
        }
        Ok(Self {
            pods,
            _servers: servers,
        })
    }

    /// Their names.
    pub fn names(&self) -> Vec<&str> {
        self.pods.iter().map(|pod| pod.name.as_str()).collect()
    }

    /// As ready endpoints, of both families.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.pods.iter().flat_map(Pod::endpoints).collect()
    }

    /// Makes them the endpoints of a Service with ClusterIPs, TCP and UDP on [`PORT`]; `change`
    /// changes the Service before it is applied.
    pub fn serve(
        &self,
        cluster: &Cluster,
        name: &str,
        cluster_ips: &[IpAddr],
        change: impl FnOnce(&mut Value),
    ) -> Result<()> {
        let mut service = service(name, cluster_ips);
        change(&mut service);
        cluster.apply(&service)?;
        cluster.endpoints(name, TARGET, &self.endpoints())?;
        cluster.wait_applied()
    }
}

/// A Service with TCP and UDP on [`PORT`].
pub fn service(name: &str, cluster_ips: &[IpAddr]) -> Value {
    objects::service(name, cluster_ips, &Port::both(PORT, TARGET))
}

/// An EndpointSlice of the Service `service` with TCP and UDP; `change` changes each endpoint.
pub fn slice(
    service: &str,
    v6: bool,
    endpoints: &[Endpoint],
    change: impl Fn(usize, &mut Value),
) -> Value {
    let family: Vec<Endpoint> = endpoints
        .iter()
        .filter(|endpoint| endpoint.address.is_ipv6() == v6)
        .cloned()
        .collect();
    let mut slice = objects::endpoint_slice(service, v6, &family, &Port::both(PORT, TARGET));
    if let Some(endpoints) = slice["endpoints"].as_array_mut() {
        for (number, endpoint) in endpoints.iter_mut().enumerate() {
            change(number, endpoint);
        }
    }
    slice
}

/// Applies the slices of both families and waits until they are in the kernel.
pub fn apply_slices(
    cluster: &Cluster,
    service: &str,
    endpoints: &[Endpoint],
    change: impl Fn(usize, &mut Value),
) -> Result<()> {
    for v6 in [false, true] {
        cluster.apply(&slice(service, v6, endpoints, &change))?;
    }
    cluster.wait_applied()
}

/// Conditions of an endpoint whose pod is deleted and still serves.
pub fn terminating(endpoint: &mut Value) {
    endpoint["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
}

/// Names of those that answer, each with the number of answers.
pub fn answers(
    client: &NetNs,
    protocol: Protocol,
    to: SocketAddr,
    tries: usize,
) -> Result<BTreeMap<String, usize>> {
    client.run(|| {
        let mut counts = BTreeMap::new();
        for _ in 0..tries {
            let name =
                traffic::name(protocol, to).with_context(|| format!("{} {to}", protocol.name()))?;
            *counts.entry(name).or_default() += 1;
        }
        Ok(counts)
    })
}

/// Requires that all of `wanted` answer, no others, and none of the requests fails. Upstream:
/// `verifyServeHostnameServiceUp`, `DialFromTestContainer` with the names of all endpoints.
#[track_caller]
pub fn is_served_by(
    client: &NetNs,
    protocol: Protocol,
    to: SocketAddr,
    wanted: &[&str],
) -> Result<()> {
    let tries = if wanted.len() > 1 { TRIES } else { 10 };
    let counts = answers(client, protocol, to, tries)?;
    let mut wanted = wanted.to_vec();
    wanted.sort_unstable();
    let found: Vec<&str> = counts.keys().map(String::as_str).collect();
    ensure!(
        found == wanted,
        "{} {to}: {counts:?} answered instead of {wanted:?}",
        protocol.name()
    );
    Ok(())
}

/// As [`is_served_by`], on [`PORT`] of every address of `cluster_ips` and with TCP and UDP.
#[track_caller]
pub fn is_up(client: &NetNs, cluster_ips: &[IpAddr], wanted: &[&str]) -> Result<()> {
    for ip in cluster_ips {
        for protocol in Protocol::ALL {
            is_served_by(client, protocol, SocketAddr::new(*ip, PORT), wanted)?;
        }
    }
    Ok(())
}

/// As [`is_refused`], on [`PORT`] of every address and with TCP and UDP.
pub fn is_down(client: &NetNs, cluster_ips: &[IpAddr]) -> Result<()> {
    for ip in cluster_ips {
        for protocol in Protocol::ALL {
            is_refused(client, protocol, SocketAddr::new(*ip, PORT))?;
        }
    }
    Ok(())
}

/// Names of pods.
pub fn name(pod: &Pod) -> [&str; 1] {
    [&pod.name]
}
