//! The agent may die: nothing that is established breaks, nothing new is refused, and what changed meanwhile
//! is applied at the next start.

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use weir_tests::{
    Cluster, Node, Pod, TestResult,
    cluster::{Way, cluster_ips},
    held::Held,
    load::Load,
    node::number,
    objects::{self, Port},
    process, rounds,
    traffic::{self, Connection, Protocol, Server},
    wait_for, wait_until,
};

const PORT: u16 = 8080;
/// For connections past the Service. On the port of its endpoints one of a hundred thousand new connections
/// through the Service gets the client's port of a direct one (docs/datapath.md, limits known).
const DIRECT_PORT: u16 = 8081;
const NODE_PORT: u16 = 30_080;

/// Two nodes with a client on the first, a server on each, and a Service of both with a NodePort. The nodes'
/// own devices look whether the way back to a sender leads through them, as distributions have it.
struct Bed {
    cluster: Cluster,
    client: Pod,
    servers: Vec<Pod>,
    _running: Vec<Server>,
}

impl Bed {
    fn new(name: &str, arguments: &[&str]) -> Result<Self> {
        // What the programs translate is what can be lost.
        let cluster = Cluster::builder(name)
            .translation(Way::ByPacket)
            .agent_arguments(arguments)
            .start()?;
        let client = cluster.pod("node1", "client")?;
        let servers = vec![
            cluster.pod("node1", "server1")?,
            cluster.pod("node2", "server2")?,
        ];
        let mut running = Vec::new();
        for server in &servers {
            running.extend(server.serve(PORT)?);
            running.extend(server.serve(DIRECT_PORT)?);
        }
        let both: Vec<_> = servers.iter().collect();
        cluster.service_of_pods("web", &cluster_ips(10), PORT, &both)?;
        let mut service = objects::service("web", &cluster_ips(10), &Port::both(80, PORT));
        service["spec"]["type"] = "NodePort".into();
        for port in 0..2 {
            service["spec"]["ports"][port]["nodePort"] = NODE_PORT.into();
        }
        cluster.apply(&service)?;
        cluster.wait_applied()?;
        for node in cluster.nodes() {
            node.netns.sysctl("net/ipv4/conf/eth0/rp_filter", "1")?;
        }
        Ok(Self {
            cluster,
            client,
            servers,
            _running: running,
        })
    }

    /// What processes of node1 reach the Service at: its ClusterIPs and the node's own addresses.
    fn frontends_of_node(&self) -> Vec<SocketAddr> {
        let cluster_ips = cluster_ips(10).map(|vip| SocketAddr::new(vip, 80));
        let own = self.cluster.node("node1").addresses.iter();
        let own = own.map(|address| SocketAddr::new(*address, NODE_PORT));
        cluster_ips.into_iter().chain(own).collect()
    }

    /// New and long connections and datagrams: to the ClusterIPs and straight to the pods, and from the first
    /// node itself.
    fn load(&self) -> Result<Load> {
        let mut load = Load::default();
        for vip in cluster_ips(10) {
            let to = SocketAddr::new(vip, 80);
            load = load
                .connections(&self.client.netns, to)?
                .long_connection(&self.client.netns, to)?
                .datagrams(&self.client.netns, to)?;
        }
        for server in &self.servers {
            let to = SocketAddr::new(server.address(false)?, DIRECT_PORT);
            load = load.long_connection(&self.client.netns, to)?;
        }
        let node = &self.cluster.node("node1").netns;
        for to in self.frontends_of_node() {
            load = load.long_connection(node, to)?.datagrams(node, to)?;
        }
        load.wait_for(100, traffic::TIMEOUT)?;
        Ok(load)
    }
}

#[test]
fn twenty_kills_under_load_break_nothing() -> TestResult {
    let bed = Bed::new("kills", &[])?;
    let load = bed.load()?;
    let transfer = bed.client.netns.spawn(|| {
        let to = SocketAddr::new(cluster_ips(10)[0], 80);
        // One long transfer spans several kills.
        Connection::open(to)?.transfer(256 << 20, 256 << 20)
    })?;
    for round in 0..rounds(20, 200) {
        for node in bed.cluster.nodes() {
            node.kill9_agent()?;
        }
        // Dead for a while that traffic shows, not a clock.
        load.wait_for(20, traffic::TIMEOUT)
            .with_context(|| format!("agents dead, round {round}"))?;
        for node in bed.cluster.nodes() {
            node.start_agent()?;
        }
        bed.cluster.wait_applied()?;
        load.wait_for(20, traffic::TIMEOUT)
            .with_context(|| format!("agents back, round {round}"))?;
    }
    load.stop().check(1000)?;
    transfer
        .join()
        .map_err(|_| anyhow::anyhow!("the transfer panicked"))??;
    Ok(())
}

/// Routes of Weir in both families.
fn routes(node: &Node) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for family in ["-4", "-6"] {
        let arguments = [family, "route", "show", "table", "all", "proto", "157"];
        let said = node.netns.tool("ip", &arguments)?;
        all.extend(said.lines().map(str::to_owned));
    }
    all.sort();
    Ok(all)
}

/// An agent that does not know its objects yet, with the tables of the earlier one and with new ones: what
/// processes of the node get from Services does not wait for it.
#[test]
fn the_node_is_served_while_the_new_agent_knows_nothing_yet() -> TestResult {
    let bed = Bed::new("knows nothing", &[])?;
    let node = bed.cluster.node("node1");
    let before = routes(node)?;
    let works = || -> Result<()> {
        for to in bed.frontends_of_node() {
            // Both endpoints get some; only what comes from the other node is looked at by the device.
            for protocol in [Protocol::Udp, Protocol::Tcp] {
                for _ in 0..20 {
                    node.run(|| traffic::name(protocol, to))
                        .with_context(|| format!("{protocol:?} to {to}"))?;
                }
            }
        }
        Ok(())
    };
    works().context("before")?;
    let by_packet = ["--socket-translation", "false"];
    let new_tables = [by_packet, ["--services-max", "777"]].concat();
    for (what, arguments) in [
        ("old tables", by_packet.to_vec()),
        ("new tables", new_tables),
    ] {
        node.kill9_agent()?;
        let object = bed.cluster.objects().directory().join("node-node1.yaml");
        let held = Held::new(&object)?;
        node.agent().use_arguments(&arguments);
        node.start_agent()?;
        wait_for(
            "the agent to wait for its objects",
            traffic::TIMEOUT,
            || Ok(held.is_wanted().then_some(())),
        )?;
        // What it does without its objects is done.
        let status = wait_for("the devices to be seen to", traffic::TIMEOUT, || {
            let status = node.weir_json(&["status"])?;
            let uptime = number(&status["uptime_seconds"]);
            Ok((uptime >= Some(1)).then_some(status))
        })?;
        assert_eq!(status["source"]["synced"], false, "{what}: {status}");
        works().with_context(|| what.to_owned())?;
        assert_eq!(routes(node)?, before, "{what}");
        let status = node.weir_json(&["status"])?;
        assert_eq!(status["source"]["synced"], false, "{what}: {status}");
        drop(held);
        bed.cluster.wait_applied()?;
        works().with_context(|| format!("{what}, with its objects"))?;
        assert_eq!(routes(node)?, before, "{what}, with its objects");
    }
    Ok(())
}

#[test]
fn what_changed_while_the_agent_was_dead_is_applied_at_its_start() -> TestResult {
    let bed = Bed::new("changes while dead", &[])?;
    for node in bed.cluster.nodes() {
        node.kill9_agent()?;
    }
    // A Service changes, one comes, and a third that there was is gone.
    bed.cluster
        .endpoints("web", PORT, &bed.servers[1].endpoints())?;
    let ports = Port::both(80, PORT);
    let vips = cluster_ips(11);
    bed.cluster.apply(&objects::service("new", &vips, &ports))?;
    bed.cluster
        .endpoints("new", PORT, &bed.servers[0].endpoints())?;
    for node in bed.cluster.nodes() {
        node.start_agent()?;
    }
    bed.cluster.wait_applied()?;
    for (number, server) in [(10, 1), (11, 0)] {
        for vip in cluster_ips(number) {
            for protocol in Protocol::ALL {
                for _ in 0..20 {
                    let to = SocketAddr::new(vip, 80);
                    let name = bed.client.run(|| traffic::name(protocol, to))?;
                    assert_eq!(name, bed.servers[server].name, "{protocol:?} {vip}");
                }
            }
        }
    }
    bed.cluster.node("node1").kill9_agent()?;
    let service = objects::service("new", &[], &[]);
    bed.cluster.objects().delete(&service)?;
    for v6 in [false, true] {
        let slice = objects::endpoint_slice("new", v6, &[], &[]);
        bed.cluster.objects().delete(&slice)?;
    }
    bed.cluster.node("node1").start_agent()?;
    bed.cluster.wait_applied()?;
    let services = bed.cluster.node("node1").weir_json(&["service", "list"])?;
    let text = services.to_string();
    assert!(!text.contains("\"new\""), "{text}");
    let refused = bed
        .client
        .run(|| traffic::tcp_name(SocketAddr::new(vips[0], 80)));
    refused.expect_err("the Service is gone");
    Ok(())
}

/// The table holds 1,024 connections; with the agent dead twice as many are made, over each protocol and family, and each must
/// work: the kernel makes room by itself.
#[test]
fn with_the_agent_dead_the_flow_table_may_be_filled_twice_over() -> TestResult {
    const ROOM: u32 = 1024;
    let room = ROOM.to_string();
    let bed = Bed::new("full table", &["--connections", &room])?;
    for node in bed.cluster.nodes() {
        node.kill9_agent()?;
    }
    for vip in cluster_ips(10) {
        let to = SocketAddr::new(vip, 80);
        bed.client.run(|| {
            for number in 0..2 * ROOM {
                traffic::tcp_name(to).with_context(|| format!("TCP connection {number}"))?;
            }
            for number in 0..2 * ROOM {
                traffic::udp_name(to, 16).with_context(|| format!("UDP flow {number}"))?;
            }
            anyhow::Ok(())
        })?;
    }
    // And with the agent back it is no different.
    for node in bed.cluster.nodes() {
        node.start_agent()?;
    }
    bed.cluster.wait_applied()?;
    let name = bed
        .client
        .run(|| traffic::tcp_name(SocketAddr::new(cluster_ips(10)[0], 80)))?;
    assert!(name.starts_with("server"));
    Ok(())
}

#[test]
fn a_replaced_binary_takes_over() -> TestResult {
    let bed = Bed::new("replaced binary", &[])?;
    let load = bed.load()?;
    for node in bed.cluster.nodes() {
        let before = node.weir_json(&["status"])?;
        node.agent().stop(nix::sys::signal::Signal::SIGTERM)?;
        load.wait_for(20, traffic::TIMEOUT)?;
        node.agent().use_copy_of_binary()?;
        node.start_agent()?;
        let after = node.weir_json(&["status"])?;
        assert_ne!(before["pid"], after["pid"]);
        assert_eq!(
            before["attachments"].as_array().map(Vec::len),
            after["attachments"].as_array().map(Vec::len),
        );
    }
    bed.cluster.wait_applied()?;
    load.wait_for(100, traffic::TIMEOUT)?;
    load.stop().check(100)?;
    Ok(())
}

#[test]
fn a_second_agent_refuses_to_start() -> TestResult {
    let cluster = Cluster::builder("second agent").nodes(1).start()?;
    let node = &cluster.nodes()[0];
    let mut second = node.agent().command(&node.netns)?;
    let output = process::output(&mut second, b"", Duration::from_secs(10))?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    let pid = node.agent().pid().unwrap_or(0).to_string();
    assert!(said.contains(&pid), "the message names who runs: {said}");
    // The first one does not mind.
    node.wait_applied()?;
    Ok(())
}

#[test]
fn the_agent_ends_soon_after_sigterm_and_leaves_the_programs() -> TestResult {
    let bed = Bed::new("sigterm", &[])?;
    let node = bed.cluster.node("node1");
    let start = Instant::now();
    node.agent().stop(nix::sys::signal::Signal::SIGTERM)?;
    assert!(start.elapsed() < Duration::from_secs(5));
    for vip in cluster_ips(10) {
        bed.client
            .run(|| traffic::tcp_name(SocketAddr::new(vip, 80)))?;
    }
    Ok(())
}

/// A script that starts the agent anew and waits for it must not meet a refusal.
#[test]
fn a_wait_may_begin_while_the_agent_starts() -> TestResult {
    let cluster = Cluster::builder("wait at start").nodes(1).wire()?;
    let node = cluster.node("node1");
    let mut agent = node.agent();
    agent.start(&node.netns)?;
    let lock = agent.socket().with_file_name("agent.lock");
    let pid = agent.pid().context("no agent")?.to_string();
    wait_until("the lock", traffic::TIMEOUT, || {
        Ok(fs::read_to_string(&lock).is_ok_and(|text| text.trim() == pid))
    })?;
    let answer = agent.weir(&["wait", "--applied"])?;
    assert!(answer.status.success(), "{answer:?}");
    // Nobody is not waited for.
    drop(agent);
    node.kill9_agent()?;
    let answer = node.agent().weir(&["wait", "--applied"])?;
    let text = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(
        !answer.status.success() && text.contains("running"),
        "{text}"
    );
    Ok(())
}
