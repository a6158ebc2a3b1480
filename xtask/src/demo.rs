//! `cargo xtask demo`: a two-node cluster at work, on the same test bed as the tests.

mod outside;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use weir_tests::{
    Cluster, Pod,
    cluster::cluster_ips,
    load::Load,
    outside::Outside,
    reaper,
    traffic::{self, Connection, Protocol, Server},
};

use crate::{
    build, setup,
    ui::{self, Colour, paint},
};

/// Where the pods listen.
const PORT: u16 = 8080;
/// Connections of one look at the spread.
const TRIES: usize = 400;
/// Bytes each way of the transfer that outlives the agents.
const TRANSFER: u64 = 512 << 20;
/// Deadline for traffic to go on.
const TIMEOUT: Duration = Duration::from_secs(10);
/// What a newcomer would take for a fault.
const ABOUT_STALE: &str = "STALE_ENDPOINT at a start is no traffic of anybody: the kernel itself announces its multicast \
    groups on a pod's device\nwhile the pod is being wired. The programs are there first, so that nothing of a pod ever \
    passes unchecked.";

/// Sets up, builds if wanted, shows, and cleans up unless told to keep.
pub fn run(keep: bool, should_build: bool) -> Result<()> {
    setup::ensure(setup::Scope::Run)?;
    if should_build {
        build::build()?;
    }
    let start = Instant::now();
    let demo = Demo::start()?;
    demo.pods_reach_each_other()?;
    demo.services_balance()?;
    demo.clients_outside_are_served()?;
    demo.pods_talk_to_the_outside()?;
    demo.status()?;
    demo.weir(&["service", "list"])?;
    demo.endpoints_come_and_go()?;
    demo.the_agents_die()?;
    heading(&format!("Done in {}", ui::seconds(start.elapsed())));
    if keep { demo.keep() } else { Ok(()) }
}

/// Removes clusters that were kept.
pub fn clean() -> Result<()> {
    let kept = reaper::kept();
    for id in &kept {
        reaper::remove(id);
        ui::line(Colour::Green, "removed", &format!("cluster {id}"));
    }
    if kept.is_empty() {
        ui::line(Colour::Grey, "", "there is no cluster that was kept");
    }
    Ok(())
}

fn heading(text: &str) {
    println!("\n{}", paint(Colour::Cyan, &format!("── {text}")));
}

struct Demo {
    cluster: Cluster,
    outside: Outside,
    /// The client first, then the servers.
    pods: Vec<Pod>,
    _servers: Vec<Server>,
}

impl Demo {
    fn start() -> Result<Self> {
        heading("Two nodes, an agent on each");
        let builder = Cluster::builder("demo").agent_arguments(&["--log", "info"]);
        let (cluster, outside) = Outside::start(builder)?;
        for node in cluster.nodes() {
            let addresses = join(&node.addresses);
            let text = format!("{addresses}, pods {}", node.pod_cidrs.join(" "));
            ui::line(Colour::Green, &node.name, &text);
        }
        heading("Six pods, wired by the CNI plugin");
        let mut pods = Vec::new();
        let mut servers = Vec::new();
        for (name, node) in [
            ("client", "node1"),
            ("web1", "node1"),
            ("web2", "node1"),
            ("web3", "node2"),
            ("web4", "node2"),
            ("web5", "node2"),
        ] {
            let begin = Instant::now();
            let pod = cluster.pod(node, name)?;
            let time = begin.elapsed().as_secs_f64() * 1e3;
            let text = format!("on {node}, {}, {time:.1} ms", join(&pod.addresses));
            ui::line(Colour::Green, name, &text);
            servers.extend(pod.serve(PORT)?);
            pods.push(pod);
        }
        heading("Two Services: web, dual-stack, five endpoints; names, IPv4, two endpoints");
        let all: Vec<&Pod> = pods[1..].iter().collect();
        cluster.service_of_pods("web", &cluster_ips(10), PORT, &all)?;
        cluster.service_of_pods("names", &cluster_ips(20)[..1], PORT, &all[3..])?;
        for (name, ips) in [
            ("web", &cluster_ips(10)[..]),
            ("names", &cluster_ips(20)[..1]),
        ] {
            ui::line(Colour::Green, name, &format!("{}, port 80", join(ips)));
        }
        servers.extend(outside::prepare(&cluster, &outside, &pods[1], &pods[3])?);
        Ok(Self {
            cluster,
            outside,
            pods,
            _servers: servers,
        })
    }

    fn client(&self) -> &Pod {
        &self.pods[0]
    }

    fn pods_reach_each_other(&self) -> Result<()> {
        heading("The client talks to pods on both nodes");
        for server in [&self.pods[1], &self.pods[3]] {
            for address in &server.addresses {
                let to = SocketAddr::new(*address, PORT);
                let mut times = Vec::new();
                for protocol in Protocol::ALL {
                    let begin = Instant::now();
                    let name = self.client().run(|| traffic::name(protocol, to))?;
                    ensure!(name == server.name, "{to} says it is {name}");
                    let time = begin.elapsed().as_micros();
                    times.push(format!("{} {time} µs", protocol.name()));
                }
                let text = format!("{to} on {}: {}", server.node, times.join(", "));
                ui::line(Colour::Green, &server.name, &text);
            }
        }
        Ok(())
    }

    fn services_balance(&self) -> Result<()> {
        heading(&format!(
            "{TRIES} connections or datagrams to each ClusterIP"
        ));
        for vip in cluster_ips(10) {
            for protocol in Protocol::ALL {
                self.show_spread("web", vip, protocol)?;
            }
        }
        self.show_spread("names", cluster_ips(20)[0], Protocol::Udp)?;
        Ok(())
    }

    /// Shows how clients of a ClusterIP spread, and returns who answered.
    fn show_spread(&self, service: &str, vip: IpAddr, protocol: Protocol) -> Result<Vec<String>> {
        let to = SocketAddr::new(vip, 80);
        let counts = self.client().run(|| {
            let mut counts = BTreeMap::<String, usize>::new();
            for _ in 0..TRIES {
                *counts.entry(traffic::name(protocol, to)?).or_default() += 1;
            }
            anyhow::Ok(counts)
        })?;
        let bars: Vec<String> = counts
            .iter()
            .map(|(name, count)| {
                let bar = "▇".repeat((count * 20).div_ceil(TRIES));
                format!("{name} {} {count}", paint(Colour::Green, &bar))
            })
            .collect();
        let what = format!("{} {to}", protocol.name());
        ui::line(
            Colour::Yellow,
            service,
            &format!("{what:<26} {}", bars.join("  ")),
        );
        Ok(counts.into_keys().collect())
    }

    fn status(&self) -> Result<()> {
        let text = self.weir(&["status"])?;
        if text.contains("STALE_ENDPOINT") {
            println!("\n{ABOUT_STALE}");
        }
        Ok(())
    }

    /// Runs `weir` on node1, shows what it prints, and gives it.
    fn weir(&self, arguments: &[&str]) -> Result<String> {
        heading(&format!("weir {}   (on node1)", arguments.join(" ")));
        let output = self.cluster.node("node1").agent().weir(arguments)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        print!("{text}");
        ensure!(
            output.status.success(),
            "weir {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(text)
    }

    fn endpoints_come_and_go(&self) -> Result<()> {
        let vip = cluster_ips(10)[0];
        for (what, servers) in [
            ("Two endpoints are removed", &self.pods[1..4]),
            ("And added again", &self.pods[1..]),
        ] {
            heading(&format!("{what}, while connections are made"));
            let load =
                Load::default().connections(&self.client().netns, SocketAddr::new(vip, 80))?;
            load.wait_for(50, TIMEOUT)?;
            let endpoints: Vec<_> = servers.iter().flat_map(Pod::endpoints).collect();
            let begin = Instant::now();
            self.cluster.endpoints("web", PORT, &endpoints)?;
            self.cluster.wait_applied()?;
            let time = begin.elapsed().as_secs_f64() * 1e3;
            ui::line(
                Colour::Green,
                "applied",
                &format!("on both nodes in {time:.1} ms"),
            );
            let answered = self.show_spread("web", vip, Protocol::Tcp)?;
            ensure!(
                answered.len() == servers.len(),
                "{answered:?} answered, expected {} endpoints",
                servers.len()
            );
            let report = load.stop();
            report.check(100)?;
            let text = format!("{} connections, none failed", report.successes);
            ui::line(Colour::Green, "meanwhile", &text);
        }
        Ok(())
    }

    fn the_agents_die(&self) -> Result<()> {
        heading("Both agents are killed (-9) while a transfer runs");
        let to = SocketAddr::new(cluster_ips(10)[1], 80);
        let begin = Instant::now();
        let transfer = self
            .client()
            .netns
            .spawn(move || Connection::open(to)?.transfer(TRANSFER, TRANSFER))?;
        let load = Load::default()
            .connections(&self.client().netns, to)?
            .datagrams(&self.client().netns, to)?
            .long_connection(&self.client().netns, to)?;
        load.wait_for(100, TIMEOUT)?;
        for node in self.cluster.nodes() {
            node.agent().stop(Signal::SIGKILL)?;
            ui::line(Colour::Red, "killed", &format!("agent of {}", node.name));
        }
        load.wait_for(1000, TIMEOUT).context("agents dead")?;
        let text = "new connections, datagrams and echoes go on without an agent";
        ui::line(Colour::Green, "alive", text);
        for node in self.cluster.nodes() {
            let begin = Instant::now();
            node.start_agent()?;
            let time = begin.elapsed().as_millis();
            ui::line(
                Colour::Green,
                "back",
                &format!("agent of {} after {time} ms", node.name),
            );
        }
        self.cluster.wait_applied()?;
        match transfer.join() {
            Ok(result) => result.context("the transfer")?,
            Err(_) => bail!("the transfer panicked"),
        }
        let rate = (2 * TRANSFER * 8) as f64 / begin.elapsed().as_secs_f64() / 1e9;
        let text = format!(
            "{} MiB each way through the ClusterIP, every byte checked, {rate:.1} Gbit/s",
            TRANSFER >> 20
        );
        ui::line(Colour::Green, "transfer", &text);
        let report = load.stop();
        report.check(1000)?;
        let text = format!(
            "{} connections, datagrams and echoes, none failed",
            report.successes
        );
        ui::line(Colour::Green, "meanwhile", &text);
        Ok(())
    }

    /// Leaves the cluster up and says how to enter it. The servers end with this process.
    fn keep(self) -> Result<()> {
        heading("The cluster stays up");
        let client = self.client().netns.path();
        let socket = self.cluster.node("node1").agent().socket();
        let state = reaper::state_directory(self.cluster.id());
        let weir = weir_tests::agent::binary("weir")?;
        let node = self.cluster.node("node1").netns.path();
        println!(
            "  a shell in the client pod   nsenter --net={}",
            client.display()
        );
        println!(
            "  a shell on node1            nsenter --net={}",
            node.display()
        );
        println!(
            "  a shell at the one outside   nsenter --net={}",
            self.outside.client.path().display()
        );
        println!(
            "  ask the agent of node1      {} --socket {} status",
            weir.display(),
            socket.display()
        );
        println!(
            "  the objects, to be edited   {}",
            self.cluster.objects().directory().display()
        );
        println!(
            "  the agents' logs            {}",
            state.join("node*.log").display()
        );
        println!("  servers end with the demo; to start one over TCP in each of their pods:");
        println!("{}", start_servers(&self.pods[1..]));
        println!("  remove every kept cluster   cargo xtask demo --clean");
        self.cluster.keep()
    }
}

/// A loop of the shell over the pods, to be pasted.
fn start_servers(pods: &[Pod]) -> String {
    let paths: Vec<String> = pods
        .iter()
        .map(|pod| format!("      {}", pod.netns.path().display()))
        .collect();
    format!(
        "    for pod in \\\n{}\n    do nsenter --net=$pod python3 -m http.server {PORT} --bind :: & done",
        paths.join(" \\\n")
    )
}

fn join(addresses: &[IpAddr]) -> String {
    let all: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    all.join(" ")
}
