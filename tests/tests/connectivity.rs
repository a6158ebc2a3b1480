//! Who reaches whom: TCP, UDP and ICMP echo, both families, directly and through a ClusterIP.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use weir_tests::{
    Cluster, Pod, TestResult,
    cluster::{Way, cluster_ips},
    netns::NetNs,
    objects::Endpoint,
    traffic::{self, Protocol},
};

const PORT: u16 = 8080;

/// Over TCP and UDP the server at `to` must be `server`.
fn reaches(from: &NetNs, to: IpAddr, port: u16, server: &str) -> Result<()> {
    for protocol in Protocol::ALL {
        let to = SocketAddr::new(to, port);
        let name = from
            .run(|| traffic::name(protocol, to))
            .with_context(|| format!("{} to {to} over {protocol:?}", from.name()))?;
        ensure!(name == server, "{to} is {name}, expected {server}");
    }
    Ok(())
}

/// ICMP echo, without loss.
fn pings(from: &NetNs, to: IpAddr) -> Result<()> {
    from.tool(
        "ping",
        &["-n", "-c", "3", "-i", "0.05", "-W", "2", &to.to_string()],
    )?;
    Ok(())
}

#[test]
fn pods_reach_pods_on_the_same_node() -> TestResult {
    let cluster = Cluster::builder("same node").nodes(1).start()?;
    let client = cluster.pod("node1", "client")?;
    let server = cluster.pod("node1", "server")?;
    let _servers = server.serve(PORT)?;
    for address in &server.addresses {
        reaches(&client.netns, *address, PORT, "server")?;
        pings(&client.netns, *address)?;
    }
    Ok(())
}

#[test]
fn pods_reach_pods_on_other_nodes() -> TestResult {
    let cluster = Cluster::builder("other node").start()?;
    let client = cluster.pod("node1", "client")?;
    let server = cluster.pod("node2", "server")?;
    let _servers = server.serve(PORT)?;
    for address in &server.addresses {
        reaches(&client.netns, *address, PORT, "server")?;
        pings(&client.netns, *address)?;
    }
    Ok(())
}

#[test]
fn nodes_reach_pods() -> TestResult {
    let cluster = Cluster::builder("node to pod").start()?;
    let server = cluster.pod("node1", "server")?;
    let _servers = server.serve(PORT)?;
    for node in cluster.nodes() {
        for address in &server.addresses {
            reaches(&node.netns, *address, PORT, "server")?;
            pings(&node.netns, *address)?;
        }
    }
    Ok(())
}

#[test]
fn pods_reach_nodes() -> TestResult {
    let cluster = Cluster::builder("pod to node").start()?;
    let client = cluster.pod("node1", "client")?;
    for node in cluster.nodes() {
        let _servers = node.serve(PORT)?;
        for address in &node.addresses {
            reaches(&client.netns, *address, PORT, &node.name)?;
            pings(&client.netns, *address)?;
        }
    }
    Ok(())
}

/// A pod on node1 reaches a dual-stack Service with the given endpoints, whichever it gets, and this `way`.
fn reaches_service(
    cluster: &Cluster,
    way: Way,
    client: &Pod,
    endpoints: &[Endpoint],
) -> Result<()> {
    const TRIES: u64 = 20;
    let vips = cluster_ips(10);
    let before = cluster.translated_at_sockets()?;
    cluster.service("web", &vips, PORT, endpoints)?;
    for (vip, protocol) in vips.iter().flat_map(|ip| Protocol::ALL.map(|p| (*ip, p))) {
        let to = SocketAddr::new(vip, 80);
        for _ in 0..TRIES {
            let name = client
                .run(|| traffic::name(protocol, to))
                .with_context(|| format!("{to} over {protocol:?}"))?;
            ensure!(
                endpoints.iter().any(|e| e.pod == name || e.node == name),
                "{name} is no endpoint of the Service"
            );
        }
        // Enough bytes for full segments, both ways.
        if protocol == Protocol::Tcp {
            client.run(|| traffic::Connection::open(to)?.transfer(1 << 20, 1 << 20))?;
        }
    }
    let translated = cluster.translated_at_sockets()? - before;
    // To both addresses, with a transfer each.
    let expected = way.translated(2 * (TRIES + 1));
    ensure!(
        translated == expected,
        "{way:?}: {translated} connections were translated at the socket instead of {expected}"
    );
    Ok(())
}

#[test]
fn services_with_endpoints_on_both_nodes() -> TestResult {
    for way in Way::BOTH {
        let cluster = Cluster::builder("service on both nodes")
            .translation(way)
            .start()?;
        let client = cluster.pod("node1", "client")?;
        let servers = [cluster.pod("node1", "s1")?, cluster.pod("node2", "s2")?];
        let mut running = Vec::new();
        for server in &servers {
            running.extend(server.serve(PORT)?);
        }
        let endpoints: Vec<_> = servers.iter().flat_map(Pod::endpoints).collect();
        reaches_service(&cluster, way, &client, &endpoints)?;
        for server in &running {
            assert!(server.accepted() > 0, "an endpoint got no connection");
        }
    }
    Ok(())
}

#[test]
fn services_with_endpoints_on_the_own_node_only() -> TestResult {
    for way in Way::BOTH {
        let cluster = Cluster::builder("service on own node")
            .translation(way)
            .start()?;
        let client = cluster.pod("node1", "client")?;
        let server = cluster.pod("node1", "server")?;
        let _servers = server.serve(PORT)?;
        reaches_service(&cluster, way, &client, &server.endpoints())?;
    }
    Ok(())
}

#[test]
fn a_pod_reaches_itself_through_its_service() -> TestResult {
    for way in Way::BOTH {
        let cluster = Cluster::builder("hairpin").translation(way).start()?;
        let client = cluster.pod("node1", "client")?;
        let _servers = client.serve(PORT)?;
        reaches_service(&cluster, way, &client, &client.endpoints())?;
    }
    Ok(())
}

#[test]
fn services_with_endpoints_in_the_host_network() -> TestResult {
    for way in Way::BOTH {
        let cluster = Cluster::builder("service in host network")
            .translation(way)
            .start()?;
        let client = cluster.pod("node1", "client")?;
        // The own node is the one where the reply does not come in from a device.
        for node in cluster.nodes() {
            let _servers = node.serve(PORT)?;
            let endpoints: Vec<_> = node
                .addresses
                .iter()
                .map(|address| Endpoint::ready(*address, &node.name, ""))
                .collect();
            reaches_service(&cluster, way, &client, &endpoints)?;
        }
    }
    Ok(())
}

#[test]
fn single_stack_clusters_work() -> TestResult {
    for families in [weir_tests::Families::V4, weir_tests::Families::V6] {
        let cluster = Cluster::builder("single stack")
            .families(families)
            .start()?;
        let v6 = families == weir_tests::Families::V6;
        let client = cluster.pod("node1", "client")?;
        let server = cluster.pod("node2", "server")?;
        let _servers = server.serve(PORT)?;
        assert_eq!(server.addresses.len(), 1);
        reaches(&client.netns, server.address(v6)?, PORT, "server")?;
        let vip = cluster_ips(10)[usize::from(v6)];
        cluster.service_of_pods("web", &[vip], PORT, &[&server])?;
        reaches(&client.netns, vip, 80, "server")?;
    }
    Ok(())
}

#[test]
fn two_services_with_one_endpoint_do_not_mix() -> TestResult {
    for way in Way::BOTH {
        let cluster = Cluster::builder("two services").translation(way).start()?;
        let client = cluster.pod("node1", "client")?;
        let server = cluster.pod("node2", "server")?;
        let _servers = server.serve(PORT)?;
        for number in [10, 11] {
            let name = format!("web{number}");
            cluster.service_of_pods(&name, &cluster_ips(number), PORT, &[&server])?;
        }
        for vip in [10, 11].into_iter().flat_map(cluster_ips) {
            reaches(&client.netns, vip, 80, "server")?;
        }
        assert_eq!(cluster.translated_at_sockets()?, way.translated(4));
    }
    Ok(())
}
