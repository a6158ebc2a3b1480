//! The test bed itself, without an agent: when this fails, look here first.

use std::{fs, net::SocketAddr};

use anyhow::Context as _;
use weir_tests::{
    Cluster, TestResult, netns, reaper,
    traffic::{self, Connection, Protocol},
};

const PORT: u16 = 8080;

#[test]
fn nodes_reach_each_other_over_the_underlay() -> TestResult {
    let cluster = Cluster::builder("underlay").nodes(3).mtu(1400).wire()?;
    for node in cluster.nodes() {
        let _servers = node.serve(PORT)?;
        for client in cluster.nodes() {
            for address in &node.addresses {
                let to = SocketAddr::new(*address, PORT);
                for protocol in Protocol::ALL {
                    let name = client.run(|| traffic::name(protocol, to))?;
                    assert_eq!(name, node.name);
                }
                client.run(|| traffic::udp_name(to, 60_000))?;
                client.run(|| Connection::open(to)?.transfer(3_000_001, 999_999))?;
            }
        }
    }
    Ok(())
}

#[test]
fn transfers_work_without_offloads() -> TestResult {
    let cluster = Cluster::builder("offloads").wire()?;
    cluster.set_offloads(false)?;
    let _servers = cluster.node("node2").serve(PORT)?;
    for address in &cluster.node("node2").addresses {
        let to = SocketAddr::new(*address, PORT);
        let client = cluster.node("node1");
        client.run(|| Connection::open(to)?.transfer(1 << 20, 1 << 20))?;
    }
    Ok(())
}

#[test]
fn a_dropped_cluster_leaves_nothing() -> TestResult {
    let cluster = Cluster::builder("dropped").wire()?;
    let id = cluster.id().to_owned();
    let prefix = reaper::namespace_name(&id, "");
    let mut sleeper = cluster
        .node("node1")
        .netns
        .command("sleep")?
        .arg("60")
        .spawn()
        .context("start a process in the node")?;
    let left = || {
        fs::read_dir(netns::DIRECTORY)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .count()
    };
    assert_eq!(left(), 3);
    assert!(reaper::state_directory(&id).exists());
    drop(cluster);
    assert_eq!(left(), 0);
    assert!(!reaper::state_directory(&id).exists());
    let status = sleeper.wait().context("wait for the process")?;
    assert!(!status.success(), "it was killed");
    Ok(())
}
