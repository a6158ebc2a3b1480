//! Pods that are wired before their node's devices are served: they wait, and are refused with the CNI
//! specification's "try again later" when that takes too long. A folder where the agent is to pin a link keeps it
//! from attaching.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use weir_tests::{
    Cluster, Node, TestResult,
    cni::Call,
    netns::NetNs,
    outside::Outside,
    reaper,
    traffic::{self, Protocol, Server},
    wait_for, wait_until, witness,
};

const PORT: u16 = 8080;
/// Error code "try again later" of the CNI specification.
const TRY_AGAIN: u64 = 11;
/// How long a pod waits at least before it is refused.
const WAIT: Duration = Duration::from_secs(8);
/// What runtimes give a plugin is much more; the plugin itself gives up after ten seconds.
const LIMIT: Duration = Duration::from_secs(15);

/// What keeps the agent from serving a node's `eth0`.
struct Obstacle {
    path: PathBuf,
}

impl Obstacle {
    /// For an agent that has not started yet.
    fn new(node: &Node) -> Result<Self> {
        let ifindex = node.run(|| nix::net::if_::if_nametoindex("eth0"))?;
        let path = node.bpf_root.join(format!("links/from_netdev-{ifindex}"));
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self { path })
    }

    fn remove(self) -> Result<()> {
        fs::remove_dir(&self.path).with_context(|| format!("remove {}", self.path.display()))
    }
}

/// Starts an agent that cannot serve the node's device, and waits until it knows that.
fn start_hindered(node: &Node) -> Result<Obstacle> {
    let obstacle = Obstacle::new(node)?;
    node.start_agent()?;
    wait_until("the problem of eth0", traffic::TIMEOUT, || {
        let status = node.weir_json(&["status"])?;
        Ok(status["problems"].to_string().contains("eth0"))
    })?;
    Ok(obstacle)
}

fn says_that_a_pod_waits(node: &Node) -> bool {
    let log = node.agent().log_tail(1000);
    log.contains("the pod waits until the programs are attached")
}

#[test]
fn a_pod_waits_until_the_devices_of_its_node_are_served() -> TestResult {
    let cluster = Cluster::builder("pod waits").nodes(1).wire()?;
    let outside = Outside::join(&cluster)?;
    let node = cluster.node("node1");
    let obstacle = start_hindered(node)?;
    let pod = std::thread::scope(|scope| -> Result<_> {
        let adding = scope.spawn(|| cluster.pod("node1", "early"));
        wait_until("the pod to wait", traffic::TIMEOUT, || {
            ensure!(!adding.is_finished(), "the pod did not wait");
            Ok(says_that_a_pod_waits(node))
        })?;
        // Others are answered meanwhile.
        node.weir_json(&["status"])?;
        ensure!(!adding.is_finished(), "the pod did not wait");
        obstacle.remove()?;
        adding.join().expect("no panic")
    })?;
    // From its first packet it has all that pods have.
    for address in &outside.addresses {
        let to = SocketAddr::new(*address, PORT);
        let _server = Server::start(&outside.client, to, "outside")?;
        for protocol in Protocol::ALL {
            let seen = pod.run(|| witness::ask(protocol, to, traffic::TIMEOUT))?;
            assert_eq!(seen.client.ip(), node.address(to.is_ipv6())?);
        }
    }
    Ok(())
}

#[test]
fn a_pod_that_waited_for_too_long_is_to_be_tried_again() -> TestResult {
    let cluster = Cluster::builder("pod waits too long").nodes(1).wire()?;
    let node = cluster.node("node1");
    let obstacle = start_hindered(node)?;
    let devices = node.netns.devices()?;
    let pod = NetNs::create(&reaper::namespace_name(cluster.id(), "p-early"))?;
    let socket = node.agent().socket();
    let call = |command| {
        let (socket, netns) = (socket.to_string_lossy(), pod.path());
        Call::new(command, &socket, "early", &netns.to_string_lossy())
    };
    let begin = Instant::now();
    let output = call("ADD").run(&node.netns)?;
    let took = begin.elapsed();
    let error: Value = serde_json::from_slice(&output.stdout).context("an error of the plugin")?;
    assert!(!output.status.success(), "{error}");
    assert_eq!(error["code"], TRY_AGAIN, "{error}");
    let message = format!("{} {}", error["msg"], error["details"]);
    for word in ["eth0", "try again", "weir status"] {
        assert!(message.contains(word), "no {word:?} in {message}");
    }
    assert!(took > WAIT && took < LIMIT, "{took:?}");
    // Nothing is left of it, in the node nor in the pod.
    assert_eq!(node.netns.devices()?, devices);
    assert_eq!(pod.devices()?, Vec::<String>::new());
    let endpoints = node.weir_json(&["endpoint", "list"])?;
    assert_eq!(endpoints.as_array().map(Vec::len), Some(0), "{endpoints}");

    obstacle.remove()?;
    wait_for("the next try", traffic::TIMEOUT, || {
        call("ADD").result(&node.netns).map(Some)
    })?;
    call("DEL").result(&node.netns)?;
    Ok(())
}
