//! What `weir` shows of a running node, for people and for programs, with and without an agent.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use serde_json::Value;
use weir_tests::{Cluster, Node, Pod, TestResult, cluster::cluster_ips, node::number, traffic};

const PORT: u16 = 8080;

struct Bed {
    cluster: Cluster,
    pods: Vec<Pod>,
}

impl Bed {
    fn new(name: &str) -> Result<Self> {
        let cluster = Cluster::builder(name).start()?;
        let pods = vec![cluster.pod("node1", "a")?, cluster.pod("node2", "b")?];
        let both: Vec<_> = pods.iter().collect();
        cluster.service_of_pods("web", &cluster_ips(10), PORT, &both)?;
        Ok(Self { cluster, pods })
    }

    fn node(&self) -> &Node {
        self.cluster.node("node1")
    }

    /// A list is a JSON array.
    fn list(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        let value = self.node().weir_json(arguments)?;
        let list = value.as_array().with_context(|| format!("{value}"))?;
        Ok(list.clone())
    }

    /// What people get.
    fn text(&self, arguments: &[&str]) -> Result<String> {
        let output = self.node().agent().weir(arguments)?;
        anyhow::ensure!(output.status.success(), "{arguments:?}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    }
}

#[test]
fn status_says_what_runs() -> TestResult {
    let bed = Bed::new("status")?;
    let status = bed.node().weir_json(&["status"])?;
    assert_eq!(status["node_name"], "node1", "{status}");
    assert_eq!(status["source"]["synced"], true, "{status}");
    let revision = |name: &str| number(&status["source"][name]);
    assert_eq!(
        revision("revision"),
        revision("applied_revision"),
        "{status}"
    );
    assert_eq!(
        number(&status["pid"]),
        bed.node().agent().pid().map(u64::from)
    );
    let attachments = status["attachments"].to_string();
    for program in ["from_pod", "to_pod", "from_netdev", "to_netdev"] {
        assert!(attachments.contains(program), "no {program}: {attachments}");
    }
    for map in status["maps"].as_array().context("maps")? {
        let entries = number(&map["entries"]).context("entries")?;
        let room = number(&map["max_entries"]).context("max_entries")?;
        assert!(entries <= room, "{map}");
    }
    assert_eq!(status["problems"], serde_json::json!([]), "{status}");
    let text = bed.text(&["status"])?;
    for word in ["node1", "from_pod", "eth0"] {
        assert!(text.contains(word), "no {word}:\n{text}");
    }
    Ok(())
}

#[test]
fn services_are_listed_by_port_and_family() -> TestResult {
    let bed = Bed::new("service list")?;
    let services = bed.list(&["service", "list"])?;
    // TCP and UDP of two families.
    assert_eq!(services.len(), 4, "{services:?}");
    for service in &services {
        assert_eq!(service["namespace"], "default");
        assert_eq!(service["name"], "web");
        assert_eq!(service["status"], "applied");
        assert_eq!(service["frontends"].as_array().map(Vec::len), Some(1));
        assert_eq!(service["backends"].as_array().map(Vec::len), Some(2));
    }
    let text = bed.text(&["service", "list"])?;
    for ip in cluster_ips(10) {
        assert!(text.contains(&ip.to_string()), "no {ip}:\n{text}");
    }
    Ok(())
}

#[test]
fn endpoints_and_nodes_are_listed() -> TestResult {
    let bed = Bed::new("lists")?;
    let endpoints = bed.list(&["endpoint", "list"])?;
    assert_eq!(endpoints.len(), 1, "only this node's: {endpoints:?}");
    let endpoint = &endpoints[0];
    assert_eq!(endpoint["pod_name"], "a");
    assert_eq!(endpoint["state"], "ready");
    let addresses: Vec<String> = bed.pods[0]
        .addresses
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(endpoint["addresses"], serde_json::json!(addresses));
    let nodes = bed.list(&["node", "list"])?;
    let names: Vec<&Value> = nodes.iter().map(|node| &node["name"]).collect();
    assert_eq!(names, ["node1", "node2"]);
    assert_eq!(nodes[0]["this_node"], true);
    for route in nodes[1]["routes"].as_array().context("routes")? {
        let route = route.as_str().context("a route")?;
        assert!(
            route.contains("native via 192.168.77.12") || route.contains("native via fd00:77::"),
            "{route}"
        );
    }
    Ok(())
}

#[test]
fn maps_are_listed_with_and_without_an_agent() -> TestResult {
    let bed = Bed::new("maps")?;
    let _servers = bed.pods[1].serve(PORT)?;
    for vip in cluster_ips(10) {
        // Until the remote endpoint was chosen: that flow is there for sure.
        weir_tests::wait_until("a flow", traffic::TIMEOUT, || {
            let to = SocketAddr::new(vip, 80);
            Ok(bed.pods[0].run(|| traffic::udp_name(to, 8)).is_ok())
        })?;
    }
    for map in ["lb", "flow", "endpoint", "nexthop", "metrics"] {
        let rows = bed.list(&["bpf", map, "list"])?;
        assert!(!rows.is_empty(), "{map} is empty");
        assert!(!bed.text(&["bpf", map, "list"])?.is_empty());
    }
    bed.node().kill9_agent()?;
    for map in ["lb", "flow", "endpoint", "nexthop", "metrics"] {
        let rows = bed.list(&["bpf", map, "list"])?;
        assert!(!rows.is_empty(), "{map} is empty without an agent");
    }
    let output = bed.node().agent().weir(&["status"])?;
    assert_eq!(output.status.code(), Some(1));
    Ok(())
}

#[test]
fn tables_of_services_are_listed_each_by_itself() -> TestResult {
    let bed = Bed::new("tables of services")?;
    let table = |which: &str| bed.list(&["bpf", "lb", "list", which]);
    let frontends = table("--frontends")?;
    // TCP and UDP of two families.
    assert_eq!(frontends.len(), 4, "{frontends:?}");
    let addresses = cluster_ips(10).map(|ip| ip.to_string());
    let mut service_ports = Vec::new();
    for frontend in &frontends {
        let address = frontend["address"].as_str().context("address")?;
        assert!(addresses.iter().any(|a| a == address), "{frontend}");
        assert_eq!(frontend["port"], 80);
        assert_eq!(frontend["endpoint_set"], "cluster");
        service_ports.push(number(&frontend["service_port"]));
    }
    service_ports.sort();
    service_ports.dedup();
    assert_eq!(service_ports.len(), 4, "{frontends:?}");

    let backends = table("--backends")?;
    assert_eq!(backends.len(), 8, "two pods for each: {backends:?}");
    for pod in &bed.pods {
        for address in &pod.addresses {
            let of_pod = backends.iter().filter(|backend| {
                backend["address"] == address.to_string() && backend["port"] == PORT
            });
            assert_eq!(of_pod.count(), 2, "TCP and UDP of {address}: {backends:?}");
        }
    }

    for service_port in service_ports {
        let sets = table("--maglev")?;
        let set = sets
            .iter()
            .find(|set| {
                number(&set["service_port"]) == service_port && set["endpoint_set"] == "cluster"
            })
            .with_context(|| format!("{service_port:?} in {sets:?}"))?;
        let slots = set["backends"].as_array().context("backends")?.iter();
        let slots: Vec<u64> = slots.filter_map(|share| number(&share["slots"])).collect();
        assert_eq!(slots.len(), 2, "{set}");
        assert_eq!(Some(slots.iter().sum()), number(&set["slots"]), "{set}");
        assert!(slots[0].abs_diff(slots[1]) <= 2, "{set}");
    }
    Ok(())
}

#[test]
fn a_table_that_is_not_there_is_said_to_be_missing() -> TestResult {
    let bed = Bed::new("missing table")?;
    // As after an agent that did not have it; one that never had it has no pin either.
    let _ = std::fs::remove_file(bed.node().bpf_root.join("maps/AFFINITY"));
    let output = bed
        .node()
        .agent()
        .weir(&["bpf", "lb", "list", "--affinity"])?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    for part in ["no map AFFINITY", "install and start the agent"] {
        assert!(text.contains(part), "{text}");
    }
    Ok(())
}

#[test]
fn monitor_shows_drops_with_pod_names() -> TestResult {
    let bed = Bed::new("monitor")?;
    let agent_socket = bed.node().agent().socket();
    let mut child = std::process::Command::new(weir_tests::agent::binary("weir")?)
        .arg("--socket")
        .arg(agent_socket)
        .args(["monitor", "-o", "json"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .context("start weir monitor")?;
    let stdout = child.stdout.take().context("stdout")?;
    let (send, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        use std::io::BufRead as _;
        for line in std::io::BufReader::new(stdout)
            .lines()
            .map_while(std::result::Result::ok)
        {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    // A port that no Service has, again until the monitor, which starts when it likes, saw it.
    let vip = cluster_ips(10)[0];
    let seen = weir_tests::wait_for("the drop", traffic::TIMEOUT, || {
        bed.pods[0].run(|| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            socket.send_to(b"lost", SocketAddr::new(vip, 999)).map(drop)
        })?;
        Ok(lines
            .try_iter()
            .filter_map(|line| serde_json::from_str::<Value>(&line).ok())
            .find(|event| event["reason"] == "SERVICE_PORT_NOT_FOUND"))
    });
    child.kill().context("end weir monitor")?;
    child.wait().context("end weir monitor")?;
    let seen = seen?;
    assert_eq!(seen["kind"], "drop", "{seen}");
    assert_eq!(seen["source_name"], "default/a", "{seen}");
    Ok(())
}

#[test]
fn version_is_told_without_an_agent() -> TestResult {
    let mut command = std::process::Command::new(weir_tests::agent::binary("weir")?);
    let text = weir_tests::process::run(
        command.args(["--socket", "/nonexistent.sock", "version"]),
        b"",
        traffic::TIMEOUT,
    )?;
    assert!(text.contains(env!("CARGO_PKG_VERSION")), "{text}");
    Ok(())
}
