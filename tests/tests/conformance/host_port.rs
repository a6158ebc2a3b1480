//! Upstream's `test/e2e/network/hostport.go`.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use weir_tests::{
    Cluster, Pod, TestResult,
    traffic::{Protocol, Server},
};

use super::support::{is_refused, is_served_by};

const HOST_PORT: u16 = 54_323;
const CONTAINER_PORT: u16 = 8080;

/// A pod whose runtime asks for a HostPort, with a server on each of its addresses.
fn pod_with_host_port(
    cluster: &Cluster,
    name: &str,
    host_ip: IpAddr,
    protocol: Protocol,
) -> Result<(Pod, Vec<Server>)> {
    let pod = cluster.pod("node1", name)?;
    let node = &cluster.node("node1").netns;
    // The test bed adds pods without mappings: once more, with one.
    pod.call("DEL").result(node)?;
    let mut call = pod.call("ADD");
    let mut configuration: Value = serde_json::from_str(&call.configuration)?;
    configuration["capabilities"] = json!({"portMappings": true});
    configuration["runtimeConfig"] = json!({"portMappings": [{
        "hostPort": HOST_PORT,
        "containerPort": CONTAINER_PORT,
        "protocol": protocol.name().to_lowercase(),
        "hostIP": host_ip,
    }]});
    call.configuration = configuration.to_string();
    let result = call.result(node)?;
    let addresses = result["ips"].as_array().context("ips")?.iter();
    let servers = addresses
        .map(|ip| {
            let text = ip["address"].as_str().unwrap_or_default();
            let (address, _) = text.split_once('/').context("an address with its length")?;
            let address = SocketAddr::new(address.parse()?, CONTAINER_PORT);
            Server::start(&pod.netns, address, name)
        })
        .collect::<Result<_>>()?;
    Ok((pod, servers))
}

/// "validates that there is no conflict between pods with same hostPort but different hostIP and
/// protocol [LinuxOnly]". Limit: 5 s for each connection.
#[test]
fn host_ports_are_told_apart_by_address_and_protocol() -> TestResult {
    let cluster = Cluster::builder("host port").start()?;
    let node = cluster.node("node1");
    for v6 in [false, true] {
        let localhost: IpAddr = if v6 {
            [0, 0, 0, 0, 0, 0, 0, 1].into()
        } else {
            [127, 0, 0, 1].into()
        };
        let own = node.address(v6)?;
        let asked = [
            ("pod1", localhost, Protocol::Tcp),
            ("pod2", own, Protocol::Tcp),
            ("pod3", own, Protocol::Udp),
        ];
        let mut pods = Vec::new();
        for (name, host_ip, protocol) in asked {
            let name = format!("{name}-v6-{v6}");
            pods.push(pod_with_host_port(&cluster, &name, host_ip, protocol)?);
        }
        for ((_, host_ip, protocol), (pod, _)) in asked.iter().zip(&pods) {
            let to = SocketAddr::new(*host_ip, HOST_PORT);
            is_served_by(&node.netns, *protocol, to, &[&pod.name])?;
        }
        for (pod, servers) in pods {
            drop(servers);
            pod.delete()?;
        }
        for (_, host_ip, protocol) in asked {
            is_refused(&node.netns, protocol, SocketAddr::new(host_ip, HOST_PORT))?;
        }
    }
    Ok(())
}
