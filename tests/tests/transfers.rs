//! Many bytes and large packets: transfers with and without offloads, datagrams larger than the MTU, path MTU.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use weir_tests::{
    Cluster, Pod, TestResult,
    cluster::{Way, cluster_ips},
    traffic::{self, Connection},
    wait_until,
};

const PORT: u16 = 8080;
/// Bytes of a large transfer, each way.
const LARGE: u64 = 32 << 20;

/// One client on node1, one server on each node behind a Service of its own.
struct Bed {
    cluster: Cluster,
    client: Pod,
    servers: Vec<(Pod, [IpAddr; 2])>,
    _running: Vec<traffic::Server>,
}

impl Bed {
    fn new(name: &str, mtu: u32) -> Result<Self> {
        // At the socket a transfer through a Service is one to its endpoint.
        let cluster = Cluster::builder(name)
            .mtu(mtu)
            .translation(Way::ByPacket)
            .start()?;
        let client = cluster.pod("node1", "client")?;
        let mut servers = Vec::new();
        let mut running = Vec::new();
        for (number, node) in [(1, "node1"), (2, "node2")] {
            let pod = cluster.pod(node, &format!("server{number}"))?;
            running.extend(pod.serve(PORT)?);
            let vips = cluster_ips(10 + number);
            cluster.service_of_pods(&format!("web{number}"), &vips, PORT, &[&pod])?;
            servers.push((pod, vips));
        }
        Ok(Self {
            cluster,
            client,
            servers,
            _running: running,
        })
    }

    /// Pod addresses and ClusterIPs, all that the client can talk to.
    fn targets(&self) -> Vec<SocketAddr> {
        let mut all = Vec::new();
        for (pod, vips) in &self.servers {
            all.extend(pod.addresses.iter().map(|a| SocketAddr::new(*a, PORT)));
            all.extend(vips.iter().map(|a| SocketAddr::new(*a, 80)));
        }
        all
    }

    fn transfer_everywhere(&self) -> Result<()> {
        for to in self.targets() {
            self.client
                .run(|| Connection::open(to)?.transfer(LARGE, LARGE))
                .with_context(|| format!("large transfer to {to}"))?;
        }
        Ok(())
    }

    fn set_offloads(&self, on: bool) -> Result<()> {
        self.cluster.set_offloads(on)?;
        self.client.netns.set_offloads(on)?;
        for (pod, _) in &self.servers {
            pod.netns.set_offloads(on)?;
        }
        Ok(())
    }
}

#[test]
fn large_transfers_with_offloads() -> TestResult {
    Bed::new("transfers with offloads", 1500)?.transfer_everywhere()?;
    Ok(())
}

#[test]
fn large_transfers_and_datagrams_without_offloads() -> TestResult {
    // With veth's offloads on, wrong checksums pass unseen.
    let bed = Bed::new("transfers without offloads", 1500)?;
    bed.set_offloads(false)?;
    bed.transfer_everywhere()?;
    for to in bed.targets() {
        for length in [0, 1, 1000, 1400] {
            bed.client.run(|| traffic::udp_name(to, length))?;
        }
    }
    Ok(())
}

#[test]
fn datagrams_larger_than_the_mtu() -> TestResult {
    let bed = Bed::new("large datagrams", 1500)?;
    for offloads in [true, false] {
        bed.set_offloads(offloads)?;
        for to in bed.targets() {
            for length in [1500, 3000, 8000, 60_000] {
                bed.client.run(|| traffic::udp_name(to, length))?;
            }
        }
    }
    Ok(())
}

#[test]
fn pods_have_the_mtu_of_the_underlay() -> TestResult {
    let bed = Bed::new("mtu", 1400)?;
    let links: serde_json::Value = serde_json::from_str(
        &bed.client
            .netns
            .tool("ip", &["-j", "link", "show", "eth0"])?,
    )
    .context("ip -j link")?;
    assert_eq!(links[0]["mtu"], 1400);
    bed.transfer_everywhere()?;
    Ok(())
}

#[test]
fn pings_as_large_as_the_mtu_pass_and_larger_ones_are_told() -> TestResult {
    let bed = Bed::new("large pings", 1500)?;
    let server = &bed.servers[1].0;
    for (v6, headers) in [(false, 28), (true, 48)] {
        let to = server.address(v6)?.to_string();
        let ping = |size: usize| {
            let size = size.to_string();
            bed.client.netns.tool(
                "ping",
                &["-n", "-c", "1", "-W", "2", "-M", "do", "-s", &size, &to],
            )
        };
        ping(1500 - headers)?;
        let error = ping(1501 - headers).expect_err("larger than the pod's own MTU");
        assert!(format!("{error:#}").contains("mtu"), "{error:#}");
    }
    Ok(())
}

/// The nodes' devices get narrower than the pods': the node must answer "too big", and what the client learns
/// must serve it.
#[test]
fn the_path_mtu_is_found() -> TestResult {
    let bed = Bed::new("path mtu", 1500)?;
    // The pods were made before: they go on sending what their own devices can.
    for node in bed.cluster.nodes() {
        node.netns
            .tool("ip", &["link", "set", "eth0", "mtu", "1300"])?;
    }
    let (server, vips) = &bed.servers[1];
    for v6 in [false, true] {
        let address = server.address(v6)?;
        let headers = if v6 { 48 } else { 28 };
        let to = address.to_string();
        let ping = |size: usize| {
            let size = size.to_string();
            bed.client.netns.tool(
                "ping",
                &["-n", "-c", "1", "-W", "1", "-M", "do", "-s", &size, &to],
            )
        };
        wait_until("the route's MTU to be told", traffic::TIMEOUT, || {
            Ok(ping(1400 - headers)
                .err()
                .is_some_and(|error| format!("{error:#}").contains("1300")))
        })?;
        ping(1300 - headers)?;
        // Also where the address that the client knows is not the one on the wire.
        for to in [
            SocketAddr::new(address, PORT),
            SocketAddr::new(vips[usize::from(v6)], 80),
        ] {
            bed.client
                .run(|| Connection::open(to)?.transfer(1 << 20, 1 << 20))
                .with_context(|| format!("transfer to {to} over a narrow path"))?;
        }
    }
    Ok(())
}
