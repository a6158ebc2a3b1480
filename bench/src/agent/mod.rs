//! The agent and the plugin: start, memory, and how long changes take.

mod cni;
mod process;
mod tables;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use nix::sys::signal::Signal;
use weir_agent::datapath::sys::{RawMap, bytes_of};
use weir_common::{
    Ipv4, Port, protocol,
    service::{FrontendKey, scope},
};
use weir_tests::{
    Cluster, Families, Node,
    agent::binary,
    objects::{self, Endpoint, to_yaml},
};

use self::process::Memory;
use crate::{
    Effort,
    report::{Section, Table},
    statistics::{Spread, quantile},
};

/// The large cluster.
const SERVICES: u32 = 10_000;
/// Endpoints of each of its Services.
const ENDPOINTS: u32 = 10;
/// Services of the small one, of three endpoints each.
const FEW_SERVICES: u32 = 100;
/// Pods of the small one.
const FEW_PODS: usize = 10;
/// How long the large one may take.
const TIMEOUT: Duration = Duration::from_secs(120);
const MIB: f64 = 1024.0 * 1024.0;

/// Measures. `rival` is a folder with the plugins `bridge` and `host-local`.
///
/// # Errors
///
/// The cluster does not come up, or a call fails.
pub fn run(effort: Effort, rival: Option<&Path>) -> Result<Section> {
    let (starts, pods, changes) = match effort {
        Effort::Quick => (3, 30, 30),
        Effort::Full => (11, 100, 300),
    };
    let mut section = Section::new("agent", "Agent and plugin")?;
    small(&mut section, rival, starts, pods)?;
    large(&mut section, changes)?;
    tables::run(&mut section, changes * 10)?;
    Ok(section)
}

fn small(section: &mut Section, rival: Option<&Path>, starts: usize, pods: usize) -> Result<()> {
    let cluster = Cluster::builder("bench-agent")
        .nodes(2)
        .agent_arguments(&["--log", "info"])
        .wire()?;
    fill(&cluster, FEW_SERVICES, 3)?;
    let node = cluster.node("node1");
    let mut fresh = Vec::new();
    for round in 0..starts {
        if round > 0 {
            node.agent().stop(Signal::SIGTERM)?;
            forget(node)?;
        }
        fresh.push(start(node)?);
    }
    let attached: Vec<_> = (0..FEW_PODS)
        .map(|number| cluster.pod("node1", &format!("pod{number}")))
        .collect::<Result<_>>()?;
    wait_applied(node)?;
    let mut memories = vec![Memory::of(pid(node)?)?];
    let mut again = Vec::new();
    for _ in 0..starts {
        node.agent().stop(Signal::SIGTERM)?;
        again.push(start(node)?);
        memories.push(Memory::of(pid(node)?)?);
    }
    let mut table = Table::new(
        &format!("Start of the agent, {FEW_SERVICES} Services, milliseconds"),
        &["", "socket answers", "everything applied and attached"],
    );
    for (name, times) in [
        ("on a fresh node".to_owned(), &fresh),
        (format!("again, with {FEW_PODS} pods"), &again),
    ] {
        let spread = |which: fn(&Start) -> Duration| -> Result<String> {
            let values = times.iter().map(|start| which(start).as_secs_f64() * 1e3);
            Ok(Spread::of(values).context("no starts")?.to_string())
        };
        table.row([name, spread(|s| s.answers)?, spread(|s| s.applied)?]);
    }
    section.table(&table);

    let mut table = memory_table(&format!(
        "Memory of the agent, {FEW_SERVICES} Services of 3 endpoints, {FEW_PODS} pods, MiB"
    ));
    memories.sort_by_key(|memory| memory.all);
    let memory = memories[memories.len() / 2];
    table.row(memory_row("small cluster", memory, node)?);
    section.table(&table);

    cni::run(section, &cluster, rival, pods)?;
    drop(attached);
    Ok(())
}

fn large(section: &mut Section, changes: usize) -> Result<()> {
    let cluster = Cluster::builder("bench-large")
        .nodes(1)
        .families(Families::V4)
        .agent_arguments(&["--log", "info"])
        .wire()?;
    fill(&cluster, SERVICES, ENDPOINTS)?;
    let node = cluster.node("node1");
    let first = start(node)?;
    let memory = Memory::of(pid(node)?)?;
    let map_times = changes_seen_in_the_map(&cluster, node, changes)?;
    let wait_times = changes_waited_for(&cluster, node, changes)?;
    let after = Memory::of(pid(node)?)?;
    let first_row = memory_row("after the first sync", memory, node)?;
    node.agent().stop(Signal::SIGTERM)?;
    let again = start(node)?;

    let mut table = Table::new(
        &format!(
            "{SERVICES} Services of {ENDPOINTS} endpoints, IPv4, from a directory of {SERVICES} YAML files"
        ),
        &["", ""],
    );
    let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
    table.row(["start to everything applied".into(), seconds(first.applied)]);
    table.row([
        "started again: to everything applied".into(),
        seconds(again.applied),
    ]);
    for (what, mut times) in [
        (
            "one endpoint removed: file renamed to map changed",
            map_times,
        ),
        (
            "the same, `weir wait --applied` started and returned",
            wait_times,
        ),
    ] {
        times.sort_by(f64::total_cmp);
        for (name, at) in [("p50", 0.5), ("p99", 0.99)] {
            table.row([
                format!("{what}, {name} of {changes}"),
                format!("{:.1} ms", quantile(&times, at) * 1e3),
            ]);
        }
    }
    section.table(&table);
    section.paragraph(
        "The directory source waits 2 ms after a change for others before it reads; `weir wait` makes it read at once. \
         The next table but one has the way from object to map alone.",
    );
    let mut table = memory_table(&format!(
        "Memory of the agent, {SERVICES} Services of {ENDPOINTS} endpoints, MiB"
    ));
    table.row(first_row);
    table.row(memory_row("after the changes", after, node)?);
    let memory = Memory::of(pid(node)?)?;
    table.row(memory_row("started again", memory, node)?);
    section.table(&table);
    Ok(())
}

/// When an agent was ready.
struct Start {
    /// Its socket took a connection.
    answers: Duration,
    /// `weir wait --applied` returned.
    applied: Duration,
}

fn start(node: &Node) -> Result<Start> {
    let socket = node.agent().socket();
    // What a killed agent left would not answer, what one that ends left might.
    let begin = Instant::now();
    node.agent().start(&node.netns)?;
    while UnixStream::connect(&socket).is_err() {
        ensure!(
            begin.elapsed() < TIMEOUT,
            "the agent does not answer:\n{}",
            node.agent().log_tail(30)
        );
        std::thread::sleep(Duration::from_micros(200));
    }
    let answers = begin.elapsed();
    wait_applied(node)?;
    Ok(Start {
        answers,
        applied: begin.elapsed(),
    })
}

/// Removes all that an agent keeps on disk and in the kernel's BPF file system: the node is fresh
/// again, as long as it has no pods.
fn forget(node: &Node) -> Result<()> {
    for folder in [&node.run_dir, &node.bpf_root] {
        fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    Ok(())
}

/// Waits until everything is in the kernel, without the polling of the test bed, which would be
/// measured along.
///
/// # Errors
///
/// With what `weir wait --applied` says.
pub fn wait_applied(node: &Node) -> Result<()> {
    let socket = node.agent().socket();
    let output = Command::new(binary("weir")?)
        .arg("--socket")
        .arg(&socket)
        .args(["wait", "--applied", "--timeout"])
        .arg(format!("{}s", TIMEOUT.as_secs()))
        .stdin(Stdio::null())
        .output()?;
    ensure!(
        output.status.success(),
        "`weir wait --applied`: {}\n{}",
        String::from_utf8_lossy(&output.stderr),
        node.agent().log_tail(30)
    );
    Ok(())
}

fn pid(node: &Node) -> Result<u32> {
    node.agent().pid().context("the agent does not run")
}

/// Seconds from a change of a file to the switch of the Service in `SERVICE_STATE`.
fn changes_seen_in_the_map(cluster: &Cluster, node: &Node, count: usize) -> Result<Vec<f64>> {
    let map = |name: &str| -> Result<RawMap> {
        let path = node.bpf_root.join("maps").join(name);
        let map = MapData::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
        Ok(RawMap::new(&map)?)
    };
    let (frontends, states) = (map("FRONTENDS_V4")?, map("SERVICE_STATE")?);
    (0..count)
        .map(|turn| {
            let service = u32::try_from(turn)? * 7919 % SERVICES;
            let number = frontend(&frontends, service)?;
            let mut state = [0; 8];
            states.lookup(&number, &mut state)?;
            let mut now = state;
            let begin = Instant::now();
            write(cluster, service, ENDPOINTS - 1)?;
            while now == state {
                ensure!(
                    begin.elapsed() < TIMEOUT,
                    "Service {service} does not change"
                );
                states.lookup(&number, &mut now)?;
                std::thread::sleep(Duration::from_micros(20));
            }
            Ok(begin.elapsed().as_secs_f64())
        })
        .collect()
}

fn frontend(map: &RawMap, service: u32) -> Result<[u8; 4]> {
    let IpAddr::V4(address) = service_address(service) else {
        unreachable!("Services of the large cluster are IPv4")
    };
    let key = FrontendKey {
        address: Ipv4::from(address),
        port: Port::new(80),
        protocol: protocol::TCP,
        scope: scope::INSIDE,
    };
    let mut number = [0; 4];
    ensure!(
        map.lookup(bytes_of(&key), &mut number)?,
        "Service {service} has no frontend in the kernel"
    );
    Ok(number)
}

/// Seconds from a change of a file to the return of `weir wait --applied`.
fn changes_waited_for(cluster: &Cluster, node: &Node, count: usize) -> Result<Vec<f64>> {
    (0..count)
        .map(|turn| {
            let service = u32::try_from(turn)? * 7919 % SERVICES;
            let begin = Instant::now();
            write(cluster, service, ENDPOINTS)?;
            wait_applied(node)?;
            Ok(begin.elapsed().as_secs_f64())
        })
        .collect()
}

fn fill(cluster: &Cluster, services: u32, endpoints: u32) -> Result<()> {
    (0..services).try_for_each(|service| write(cluster, service, endpoints))
}

/// A Service with its EndpointSlice, in one file.
fn write(cluster: &Cluster, service: u32, endpoints: u32) -> Result<()> {
    let name = format!("service-{service}");
    let [tcp, _] = objects::Port::both(80, 8080);
    let port = [tcp];
    let endpoints: Vec<_> = (0..endpoints)
        .map(|number| Endpoint::ready(endpoint_address(service, number), "node9", ""))
        .collect();
    let text = format!(
        "{}---\n{}",
        to_yaml(&objects::service(&name, &[service_address(service)], &port)),
        to_yaml(&objects::endpoint_slice(&name, false, &endpoints, &port)),
    );
    cluster.objects().write(&format!("{name}.yaml"), &text)
}

fn service_address(service: u32) -> IpAddr {
    Ipv4Addr::from_bits(0x0a60_1000 + service).into()
}

fn endpoint_address(service: u32, number: u32) -> IpAddr {
    Ipv4Addr::from_bits(0x0b00_0000 + service * 16 + number).into()
}

fn memory_table(title: &str) -> Table {
    Table::new(
        title,
        &[
            "",
            "RSS",
            "own pages",
            "binary",
            "mapped BPF arrays",
            "kernel: pinned maps",
        ],
    )
}

fn memory_row(name: &str, memory: Memory, node: &Node) -> Result<Vec<String>> {
    let maps = process::pinned_maps(&node.bpf_root.join("maps"))?;
    let sizes = [
        memory.all,
        memory.anonymous,
        memory.file,
        memory.shared,
        maps,
    ];
    let mut row = vec![name.to_owned()];
    row.extend(sizes.map(|bytes| format!("{:.1}", bytes as f64 / MIB)));
    Ok(row)
}
