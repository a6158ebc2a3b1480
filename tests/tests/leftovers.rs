//! Nothing is left behind: by reboots, crashes, missed calls, and many at once.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use weir_tests::{
    Cluster, Pod, TestResult, cluster::cluster_ips, objects::Endpoint, rounds, snapshot::Snapshot,
    traffic, wait_for,
};

const PORT: u16 = 8080;

/// Waits until the node is as it was; leftovers may take a moment to be found.
fn wait_same(before: &Snapshot, cluster: &Cluster, node: &str) -> Result<()> {
    wait_for("the node to be as it was", traffic::TIMEOUT, || {
        before.check_same(&Snapshot::take(cluster.node(node))?)?;
        Ok(Some(()))
    })
}

#[test]
fn add_and_del_leave_nothing() -> TestResult {
    let cluster = Cluster::builder("add and del").nodes(1).start()?;
    let node = &cluster.nodes()[0];
    let before = Snapshot::take(node)?;
    let pod = cluster.pod("node1", "pod")?;
    cluster.wait_applied()?;
    before
        .check_same(&Snapshot::take(node)?)
        .expect_err("the snapshot sees a pod");
    pod.delete()?;
    cluster.wait_applied()?;
    wait_same(&before, &cluster, "node1")?;
    Ok(())
}

#[test]
fn calls_are_idempotent() -> TestResult {
    let cluster = Cluster::builder("idempotence").nodes(1).start()?;
    let node = &cluster.nodes()[0];
    let before = Snapshot::take(node)?;
    let pod = cluster.pod("node1", "pod")?;
    let add = pod.call("ADD");
    let del = pod.call("DEL");
    // The specification lets a second ADD of what is there fail; it must not harm the first.
    let _ = add.run(&node.netns)?;
    assert!(!pod.netns.devices()?.is_empty(), "the pod keeps its device");
    pod.delete()?;
    for _ in 0..2 {
        assert_eq!(del.result(&node.netns)?, serde_json::Value::Null);
    }
    wait_same(&before, &cluster, "node1")?;
    Ok(())
}

#[test]
fn del_works_with_the_agent_down_and_the_namespace_gone() -> TestResult {
    let cluster = Cluster::builder("del without agent").nodes(1).start()?;
    let node = &cluster.nodes()[0];
    let before = Snapshot::take(node)?;
    let first = cluster.pod("node1", "first")?;
    let second = cluster.pod("node1", "second")?;
    node.kill9_agent()?;
    first.delete()?;
    let mut del = second.call("DEL");
    second.vanish()?;
    del.result(&node.netns)?;
    del.unset("CNI_NETNS");
    del.result(&node.netns)?;
    node.start_agent()?;
    cluster.wait_applied()?;
    wait_same(&before, &cluster, "node1")?;
    Ok(())
}

#[test]
fn a_pod_that_vanished_without_del_is_found() -> TestResult {
    let cluster = Cluster::builder("vanished pod").nodes(1).start()?;
    let before = Snapshot::take(&cluster.nodes()[0])?;
    let pod = cluster.pod("node1", "pod")?;
    pod.vanish()?;
    wait_same(&before, &cluster, "node1")?;
    Ok(())
}

#[test]
fn a_hundred_adds_at_once_all_succeed() -> TestResult {
    const PODS: usize = 100;
    let cluster = Cluster::builder("hundred adds").nodes(1).start()?;
    let before = Snapshot::take(&cluster.nodes()[0])?;
    let pods: Vec<Pod> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..PODS)
            .map(|number| {
                let cluster = &cluster;
                scope.spawn(move || cluster.pod("node1", &format!("pod{number}")))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect::<Result<_>>()
    })?;
    let addresses: BTreeSet<_> = pods.iter().flat_map(|pod| &pod.addresses).collect();
    assert_eq!(addresses.len(), 2 * PODS, "no address is shared");
    // The last one works.
    let server = &pods[PODS - 1];
    let _servers = server.serve(PORT)?;
    for address in &server.addresses {
        let name = pods[0].run(|| traffic::tcp_name(SocketAddr::new(*address, PORT)))?;
        assert_eq!(name, server.name);
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = pods
            .into_iter()
            .map(|pod| scope.spawn(|| pod.delete()))
            .collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    cluster.wait_applied()?;
    wait_same(&before, &cluster, "node1")?;
    Ok(())
}

#[test]
fn a_reboot_leaves_nothing_and_everything_works_again() -> TestResult {
    let cluster = Cluster::builder("reboot").start()?;
    let node = cluster.node("node1");
    let before = Snapshot::take(node)?;
    let remote = cluster.pod("node2", "remote")?;
    let _servers = remote.serve(PORT)?;
    for round in 0..rounds(3, 20) {
        let pod = cluster.pod("node1", &format!("pod{round}"))?;
        for address in &remote.addresses {
            pod.run(|| traffic::tcp_name(SocketAddr::new(*address, PORT)))?;
        }
        pod.vanish()?;
        node.reboot()?;
        node.start_agent()?;
        cluster.wait_applied()?;
        wait_same(&before, &cluster, "node1").with_context(|| format!("reboot {round}"))?;
    }
    Ok(())
}

/// A small generator of pseudo-random numbers (splitmix64): a failing seed can be run again.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let bound = u64::try_from(bound).unwrap_or(u64::MAX).max(1);
        usize::try_from((z ^ (z >> 31)) % bound).unwrap_or(0)
    }
}

/// ADD, DEL, pods that vanish and agents that die, also in the middle of an ADD, in any order, with
/// connections through a Service; `WEIR_SEED` repeats one.
#[test]
fn random_sequences_leave_nothing() -> TestResult {
    let seed = match std::env::var("WEIR_SEED") {
        Ok(text) => text.parse().context("WEIR_SEED is a number")?,
        Err(_) => u64::from(std::process::id()),
    };
    println!("WEIR_SEED={seed}");
    let mut random = Random(seed);
    let cluster = Cluster::builder("random sequences").nodes(1).start()?;
    let node = &cluster.nodes()[0];
    // A server that stays, so that pods leave connections behind.
    let _server = node.serve(PORT)?;
    let vips = cluster_ips(10);
    let endpoint = |v6| anyhow::Ok(Endpoint::ready(node.address(v6)?, "node1", "node"));
    cluster.service("node", &vips, PORT, &[endpoint(false)?, endpoint(true)?])?;
    let before = Snapshot::take(node)?;
    let mut pods: Vec<Pod> = Vec::new();
    let mut failed: Vec<String> = Vec::new();
    let mut dead = false;
    for step in 0..rounds(50, 1000) {
        let name = format!("pod{step}");
        match random.below(8) {
            0..=2 if dead => {
                let added = cluster.pod("node1", &name);
                assert!(added.is_err(), "step {step}: ADD without an agent");
                failed.push(name);
            }
            5 if !dead && pods.len() < 20 => {
                let delay = Duration::from_micros(random.below(15_000) as u64);
                let added = std::thread::scope(|scope| {
                    let adding = scope.spawn(|| cluster.pod("node1", &name));
                    // Any moment of the ADD will do, the more different ones the better.
                    std::thread::sleep(delay);
                    node.kill9_agent()?;
                    dead = true;
                    let panicked = |panic| std::panic::resume_unwind(panic);
                    anyhow::Ok(adding.join().unwrap_or_else(panicked))
                })?;
                match added {
                    Ok(pod) => pods.push(pod),
                    Err(_) => failed.push(name),
                }
            }
            0..=2 if pods.len() < 20 => {
                let pod = cluster
                    .pod("node1", &name)
                    .with_context(|| format!("step {step}"))?;
                if let Some(other) = pods.last() {
                    let _servers = pod.serve(PORT)?;
                    let to = SocketAddr::new(pod.address(step % 2 == 0)?, PORT);
                    let name = other.run(|| traffic::tcp_name(to))?;
                    assert_eq!(name, pod.name, "step {step}");
                }
                let vip = SocketAddr::new(vips[step % 2], 80);
                pod.run(|| traffic::tcp_name(vip))
                    .with_context(|| format!("step {step}"))?;
                pods.push(pod);
            }
            3 if !pods.is_empty() => {
                let pod = pods.swap_remove(random.below(pods.len()));
                pod.delete().with_context(|| format!("step {step}"))?;
            }
            4 if !pods.is_empty() => {
                let pod = pods.swap_remove(random.below(pods.len()));
                pod.vanish()?;
            }
            _ if dead => {
                node.start_agent().with_context(|| format!("step {step}"))?;
                dead = false;
            }
            _ => {
                node.kill9_agent()?;
                dead = true;
            }
        }
    }
    if dead {
        node.start_agent()?;
    }
    for pod in pods {
        pod.delete()?;
    }
    for name in failed {
        let del = cluster.del_after_failed_add("node1", &name);
        del.result(&node.netns)?;
    }
    cluster.wait_applied()?;
    wait_same(&before, &cluster, "node1").with_context(|| format!("WEIR_SEED={seed}"))?;
    Ok(())
}
