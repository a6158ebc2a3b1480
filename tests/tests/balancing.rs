//! How connections spread over endpoints, and what happens while endpoints come and go.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use weir_tests::{
    Cluster, Pod, TestResult,
    cluster::{Way, cluster_ips},
    load::Load,
    node::number,
    traffic::{self, Protocol, Server, UdpClient},
};

const PORT: u16 = 8080;

fn servers(cluster: &Cluster, count: usize) -> Result<(Vec<Pod>, Vec<Server>)> {
    let mut pods = Vec::new();
    let mut running = Vec::new();
    for number in 0..count {
        let node = &cluster.nodes()[number % cluster.nodes().len()].name;
        let pod = cluster.pod(node, &format!("server{number}"))?;
        running.extend(pod.serve(PORT)?);
        pods.push(pod);
    }
    Ok((pods, running))
}

/// Names of the servers that answer, each with the number of answers.
fn spread(
    client: &Pod,
    protocol: Protocol,
    to: SocketAddr,
    tries: u32,
) -> Result<BTreeMap<String, u32>> {
    client.run(|| {
        let mut counts = BTreeMap::new();
        for _ in 0..tries {
            *counts.entry(traffic::name(protocol, to)?).or_default() += 1;
        }
        Ok(counts)
    })
}

#[test]
fn connections_spread_over_all_endpoints() -> TestResult {
    for way in Way::BOTH {
        let cluster = Cluster::builder("spread").translation(way).start()?;
        let client = cluster.pod("node1", "client")?;
        let (pods, _running) = servers(&cluster, 5)?;
        let vips = cluster_ips(10);
        cluster.service_of_pods("web", &vips, PORT, &pods.iter().collect::<Vec<_>>())?;
        const TRIES: u32 = 1000;
        for vip in vips {
            for protocol in Protocol::ALL {
                let counts = spread(&client, protocol, SocketAddr::new(vip, 80), TRIES)?;
                assert_eq!(counts.len(), pods.len(), "{protocol:?} {vip}: {counts:?}");
                // 200 each are expected; the standard deviation of such a count is 12.6.
                for (name, count) in &counts {
                    assert!(
                        (140..=260).contains(count),
                        "{name} got {count}: {counts:?}"
                    );
                }
            }
        }
        let translated = cluster.translated_at_sockets()?;
        assert_eq!(translated, way.translated(2 * u64::from(TRIES)));
    }
    Ok(())
}

#[test]
fn a_removed_endpoint_gets_nothing_once_that_is_applied() -> TestResult {
    const TRIES: u32 = 60;
    for way in Way::BOTH {
        let cluster = Cluster::builder("removed endpoint")
            .translation(way)
            .start()?;
        let client = cluster.pod("node1", "client")?;
        let (pods, _running) = servers(&cluster, 3)?;
        let vips = cluster_ips(10);
        cluster.service_of_pods("web", &vips, PORT, &pods.iter().collect::<Vec<_>>())?;
        for (removed, gone) in pods.iter().enumerate() {
            let left: Vec<_> = pods
                .iter()
                .enumerate()
                .filter(|(number, _)| *number != removed)
                .flat_map(|(_, pod)| pod.endpoints())
                .collect();
            cluster.endpoints("web", PORT, &left)?;
            cluster.wait_applied()?;
            for vip in vips {
                for protocol in Protocol::ALL {
                    let counts = spread(&client, protocol, SocketAddr::new(vip, 80), TRIES)?;
                    assert_eq!(
                        counts.get(&gone.name),
                        None,
                        "{protocol:?} {vip}: {counts:?}"
                    );
                    assert_eq!(counts.len(), 2, "{protocol:?} {vip}: {counts:?}");
                }
            }
        }
        // From each of three removals to both addresses.
        let translated = cluster.translated_at_sockets()?;
        assert_eq!(translated, way.translated(3 * 2 * u64::from(TRIES)));
    }
    Ok(())
}

#[test]
fn a_udp_flow_leaves_a_removed_endpoint_at_its_next_packet() -> TestResult {
    let cluster = Cluster::builder("udp moves").start()?;
    let client = cluster.pod("node1", "client")?;
    let (pods, _running) = servers(&cluster, 2)?;
    let vips = cluster_ips(10);
    for vip in vips {
        cluster.service_of_pods("web", &vips, PORT, &[&pods[0], &pods[1]])?;
        let socket = client.run(|| UdpClient::new(SocketAddr::new(vip, 80)))?;
        let first = socket.ask(b"first", traffic::TIMEOUT)?;
        let again = socket.ask(b"again", traffic::TIMEOUT)?;
        assert_eq!(first, again, "a flow stays where it is");
        let other = pods
            .iter()
            .find(|pod| pod.name != first)
            .context("an endpoint that did not answer")?;
        cluster.endpoints("web", PORT, &other.endpoints())?;
        cluster.wait_applied()?;
        // One packet only: it must not be lost.
        assert_eq!(socket.ask(b"moved", traffic::TIMEOUT)?, other.name);
    }
    Ok(())
}

#[test]
fn a_tcp_connection_outlives_the_removal_of_its_endpoint() -> TestResult {
    for way in Way::BOTH {
        let cluster = Cluster::builder("tcp drains").translation(way).start()?;
        let client = cluster.pod("node1", "client")?;
        let (pods, _running) = servers(&cluster, 2)?;
        let vips = cluster_ips(10);
        cluster.service_of_pods("web", &vips, PORT, &[&pods[0]])?;
        for vip in vips {
            cluster.endpoints("web", PORT, &pods[0].endpoints())?;
            cluster.wait_applied()?;
            let mut connection =
                client.run(|| traffic::Connection::open(SocketAddr::new(vip, 80)))?;
            assert_eq!(connection.server, pods[0].name);
            connection.start_echo()?;
            connection.echo(b"before")?;
            cluster.endpoints("web", PORT, &pods[1].endpoints())?;
            cluster.wait_applied()?;
            connection.echo(b"after")?;
            let name = client.run(|| traffic::tcp_name(SocketAddr::new(vip, 80)))?;
            assert_eq!(name, pods[1].name);
        }
        assert_eq!(cluster.translated_at_sockets()?, way.translated(4));
    }
    Ok(())
}

/// Revisions of the objects that the nodes have in the kernel.
fn revisions(cluster: &Cluster) -> Result<Vec<u64>> {
    let nodes = cluster.nodes().iter();
    nodes
        .map(|node| {
            let status = node.weir_json(&["status"])?;
            let revision = &status["source"]["applied_revision"];
            number(revision).with_context(|| format!("no revision in {status}"))
        })
        .collect()
}

/// 200 changes a second until 2,000 have reached each kernel: the endpoint that comes and goes serves all the time, so that
/// no connection has a reason to fail.
#[test]
fn endpoints_change_200_times_a_second_under_load() -> TestResult {
    const CHANGES: u32 = 2000;
    const INTERVAL: Duration = Duration::from_millis(5);
    const DEADLINE: Duration = Duration::from_secs(60);
    let cluster = Cluster::builder("churn")
        .agent_arguments(&["--log", "info"])
        .start()?;
    let client = cluster.pod("node1", "client")?;
    let (pods, _running) = servers(&cluster, 4)?;
    let vips = cluster_ips(10);
    cluster.service_of_pods("web", &vips, PORT, &pods.iter().collect::<Vec<_>>())?;
    let mut load = Load::default();
    for vip in vips {
        let to = SocketAddr::new(vip, 80);
        load = load
            .connections(&client.netns, to)?
            .long_connection(&client.netns, to)?
            .datagrams(&client.netns, to)?;
    }
    load.wait_for(100, traffic::TIMEOUT)?;
    let before = revisions(&cluster)?;
    let applied = |before: &[u64]| {
        let after = revisions(&cluster)?;
        let differences = after
            .iter()
            .zip(before)
            .map(|(after, before)| after - before);
        anyhow::Ok(differences.min().unwrap_or(0))
    };
    let start = Instant::now();
    let mut last = Vec::new();
    for change in 0.. {
        // A busy machine puts changes together; the load goes on until each node has had them all.
        if change >= CHANGES && change % 100 == 0 && applied(&before)? >= CHANGES.into() {
            break;
        }
        assert!(start.elapsed() < DEADLINE, "{} changes", applied(&before)?);
        // Two of four are there at any time, never the same set twice in a row.
        let first = usize::try_from(change).unwrap_or(0) % pods.len();
        last = vec![&pods[first], &pods[(first + 1) % pods.len()]];
        let endpoints: Vec<_> = last.iter().flat_map(|pod| pod.endpoints()).collect();
        cluster.endpoints("web", PORT, &endpoints)?;
        let due = start + INTERVAL * (change + 1);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    cluster.wait_applied()?;
    let report = load.stop();
    for vip in vips {
        for protocol in Protocol::ALL {
            let counts = spread(&client, protocol, SocketAddr::new(vip, 80), 40)?;
            let names: Vec<&String> = counts.keys().collect();
            let mut expected: Vec<&String> = last.iter().map(|pod| &pod.name).collect();
            expected.sort();
            assert_eq!(names, expected, "{protocol:?} {vip}");
        }
    }
    report.check(1000)?;
    // No packet saw half of a change, nor an endpoint that was gone.
    for node in cluster.nodes() {
        for reason in ["SERVICE_BACKEND_NOT_FOUND", "SERVICE_PORT_NOT_FOUND"] {
            assert_eq!(node.drops(reason)?, 0, "{reason} on {}", node.name);
        }
    }
    Ok(())
}

#[test]
fn a_service_without_endpoints_comes_to_life() -> TestResult {
    let cluster = Cluster::builder("no endpoints").start()?;
    let client = cluster.pod("node1", "client")?;
    let (pods, _running) = servers(&cluster, 1)?;
    let vips = cluster_ips(10);
    cluster.service("web", &vips, PORT, &[])?;
    for vip in vips {
        for protocol in Protocol::ALL {
            client
                .run(|| traffic::name(protocol, SocketAddr::new(vip, 80)))
                .expect_err("nobody is there");
        }
    }
    cluster.endpoints("web", PORT, &pods[0].endpoints())?;
    cluster.wait_applied()?;
    for vip in vips {
        for protocol in Protocol::ALL {
            let name = client.run(|| traffic::name(protocol, SocketAddr::new(vip, 80)))?;
            assert_eq!(name, pods[0].name);
        }
    }
    Ok(())
}
