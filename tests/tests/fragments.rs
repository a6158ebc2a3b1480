//! Datagrams in pieces that come out of order: they are put together on the way, where Services
//! translate them, and arrive as they were.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use weir_tests::{
    Cluster, Node, Pod, TestResult,
    cluster::cluster_ips,
    netns::NetNs,
    packet::{self, mac_of},
    process, traffic, wait_for, wait_until,
};

const PORT: u16 = 8080;
const CLIENT_PORT: u16 = 45_000;
/// Bytes of a datagram, and of the payload of each of its fragments but the last.
const LENGTH: usize = 3000;
const PIECE: usize = 1200;
const FRAG_NOT_FOUND: &str = "FRAG_NOT_FOUND";
/// Datagrams of which one piece is sent.
const LOST: u32 = 4000;
const DEVICE: &str = "weir-defrag";

/// A cluster with a Service of a pod on the client's node, and one of a pod on another.
struct Setup {
    cluster: Cluster,
    client: Pod,
    servers: [Pod; 2],
}

impl Setup {
    fn start(name: &str, arguments: &[&str]) -> Result<Self> {
        let cluster = Cluster::builder(name).agent_arguments(arguments).start()?;
        let client = cluster.pod("node1", "client")?;
        let servers = [
            cluster.pod("node1", "local")?,
            cluster.pod("node2", "remote")?,
        ];
        for (number, server) in (10..).zip(&servers) {
            let name = format!("udp-{number}");
            cluster.service_of_pods(&name, &cluster_ips(number), PORT, &[server])?;
        }
        Ok(Self {
            cluster,
            client,
            servers,
        })
    }

    fn node(&self) -> &Node {
        self.cluster.node("node1")
    }

    /// A request and its answer, both in pieces, the last first, through each Service and by both
    /// families.
    fn works(&self, round: u8) -> Result<()> {
        for (number, server) in (10..).zip(&self.servers) {
            for vip in cluster_ips(number) {
                Exchange::new(&self.client, server, vip)?
                    .round_trip(round)
                    .with_context(|| format!("{vip}, an address of {}", server.name))?;
            }
        }
        Ok(())
    }
}

/// A client and a server behind a Service.
struct Exchange<'a> {
    client: &'a Pod,
    server: &'a Pod,
    /// Of the client, the Service and the server.
    addresses: [SocketAddr; 3],
    sockets: [UdpSocket; 2],
}

impl<'a> Exchange<'a> {
    fn new(client: &'a Pod, server: &'a Pod, vip: IpAddr) -> Result<Self> {
        let own = SocketAddr::new(client.address(vip.is_ipv6())?, CLIENT_PORT);
        let served = SocketAddr::new(server.address(vip.is_ipv6())?, PORT);
        let sockets = [bind(&client.netns, own)?, bind(&server.netns, served)?];
        Ok(Self {
            client,
            server,
            addresses: [own, SocketAddr::new(vip, 80), served],
            sockets,
        })
    }

    fn round_trip(&self, round: u8) -> Result<()> {
        let [own, vip, served] = self.addresses;
        let [client, server] = &self.sockets;
        let request = payload(round);
        send(self.client, pieces(self.client, own, vip, &request)?)?;
        receive(server, own, &request).context("the request")?;
        let answer = payload(round ^ 0x80);
        send(self.server, pieces(self.server, served, own, &answer)?)?;
        receive(client, vip, &answer).context("the answer")
    }
}

fn bind(netns: &NetNs, address: SocketAddr) -> Result<UdpSocket> {
    let socket = netns.run(|| UdpSocket::bind(address))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(socket)
}

fn payload(round: u8) -> Vec<u8> {
    (0..LENGTH).map(|i| (i / 7) as u8 ^ round).collect()
}

/// The fragments of a datagram that a pod sends, in their order.
fn pieces(from: &Pod, source: SocketAddr, to: SocketAddr, payload: &[u8]) -> Result<Vec<Vec<u8>>> {
    let frame = packet::udp_frame(
        packet::gateway_mac(&from.netns)?,
        mac_of(&from.netns, "eth0")?,
        (source.ip(), source.port()),
        (to.ip(), to.port()),
        payload,
    )?;
    packet::fragments(&frame, u32::from(payload[0]) << 8 | 7, PIECE)
}

/// The last piece first.
fn send(from: &Pod, mut pieces: Vec<Vec<u8>>) -> Result<()> {
    pieces.reverse();
    send_in_order(&from.netns, &pieces)
}

fn send_in_order(from: &NetNs, pieces: &[Vec<u8>]) -> Result<()> {
    from.run(|| packet::send_all("eth0", pieces))
}

fn receive(socket: &UdpSocket, from: SocketAddr, wanted: &[u8]) -> Result<()> {
    let mut bytes = vec![0; 2 * LENGTH];
    let (length, sender) = socket.recv_from(&mut bytes).context("nothing came")?;
    ensure!(sender == from, "it came from {sender}, not {from}");
    ensure!(bytes[..length] == *wanted, "it is not what was sent");
    Ok(())
}

/// Fragments sent to be put together, or come back from there, by hook.
fn put_together(node: &Node, hook: &str) -> Result<u64> {
    let status = node.weir_json(&["status"])?;
    Ok(status["counters"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|counter| counter["name"] == "DEFRAG" && counter["hook"] == hook)
        .filter_map(|counter| weir_tests::node::number(&counter["packets"]))
        .sum())
}

fn device(node: &Node) -> Result<Option<u64>> {
    if !node.netns.devices()?.iter().any(|device| device == DEVICE) {
        return Ok(None);
    }
    let links = node.netns.tool("ip", &["-j", "link", "show", DEVICE])?;
    let links: serde_json::Value = serde_json::from_str(&links)?;
    Ok(links[0]["ifindex"].as_u64())
}

fn wait_for_device(node: &Node) -> Result<u64> {
    wait_for("the device", traffic::TIMEOUT, || {
        let device = device(node)?;
        let status = node.weir_json(&["status"])?;
        let has_program = status["attachments"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|a| a["program"] == "from_defrag" && a["ifindex"].as_u64() == device);
        ensure!(has_program, "the program is not attached");
        Ok(device)
    })
}

#[test]
fn pieces_that_come_out_of_order_arrive_as_they_were_sent() -> TestResult {
    let setup = Setup::start("fragments", &[])?;
    let node = setup.node();
    let before = wait_for_device(node)?;
    setup.works(1)?;
    // Two Services, two families: each request and each answer has three pieces.
    assert_eq!(put_together(node, "from_pod")?, 6 * 3);
    assert_eq!(put_together(node, "from_netdev")?, 2 * 3);
    assert_eq!(put_together(node, "from_defrag")?, 8 * 3);
    assert_eq!(node.drops(FRAG_NOT_FOUND)?, 0);
    // What the endpoint on the other node answers has no connection there.
    assert_eq!(put_together(setup.cluster.node("node2"), "from_pod")?, 0);

    node.kill9_agent()?;
    setup.works(2).context("without an agent")?;
    node.start_agent()?;
    setup.works(3).context("with the next agent")?;
    assert_eq!(wait_for_device(node)?, before);

    // Nothing of it is kept: the second is not the end of the first.
    setup.works(4)?;
    Ok(())
}

#[test]
fn the_node_gets_answers_whose_pieces_come_out_of_order() -> TestResult {
    let setup = Setup::start("fragments node", &[])?;
    let node = setup.node();
    wait_for_device(node)?;
    let server = &setup.servers[1];
    for vip in cluster_ips(11) {
        let served = SocketAddr::new(server.address(vip.is_ipv6())?, PORT);
        let own = SocketAddr::new(node.address(vip.is_ipv6())?, CLIENT_PORT);
        let client = bind(&node.netns, own)?;
        let socket = bind(&server.netns, served)?;
        let vip = SocketAddr::new(vip, 80);
        client.send_to(b"?", vip).context("to the Service")?;
        receive(&socket, own, b"?")?;
        let answer = payload(5);
        send(server, pieces(server, served, own, &answer)?)?;
        receive(&client, vip, &answer).with_context(|| format!("the answer of {vip}"))?;
    }
    assert_eq!(put_together(node, "from_netdev")?, 2 * 3);
    Ok(())
}

#[test]
fn pieces_that_never_become_whole_hold_nothing_up() -> TestResult {
    let setup = Setup::start("fragments flood", &[])?;
    let node = setup.node();
    wait_for_device(node)?;
    let client = &setup.client;
    for vip in cluster_ips(10) {
        let exchange = Exchange::new(client, &setup.servers[0], vip)?;
        let [own, vip, _] = exchange.addresses;
        let frame = packet::udp_frame(
            packet::gateway_mac(&client.netns)?,
            mac_of(&client.netns, "eth0")?,
            (own.ip(), own.port()),
            (vip.ip(), vip.port()),
            &payload(0),
        )?;
        // More than may wait at once.
        let lost: Vec<Vec<u8>> = (0x8000..0x8000 + LOST)
            .map(|id| Ok(packet::fragments(&frame, id, PIECE)?.remove(1)))
            .collect::<Result<_>>()?;
        send_in_order(&client.netns, &lost)?;
        wait_for("room", traffic::TIMEOUT, || {
            exchange.round_trip(10)?;
            Ok(Some(()))
        })?;
    }
    // What was given up is told apart from what came back.
    assert!(put_together(node, "from_pod")? >= 2 * u64::from(LOST));
    assert!(put_together(node, "from_defrag")? < u64::from(LOST));
    Ok(())
}

#[test]
fn what_puts_them_together_comes_back() -> TestResult {
    let setup = Setup::start("fragments drift", &[])?;
    let node = setup.node();
    wait_for_device(node)?;
    let links = node.bpf_root.join("links");
    let remove = |file: &str| std::fs::remove_file(links.join(file)).context(file.to_owned());
    let steps: [(&str, &dyn Fn() -> Result<()>); 3] = [
        ("the device is deleted", &|| {
            node.netns.ip(&format!("link del {DEVICE}"))
        }),
        ("one family is let go", &|| remove("defrag-v6")),
        ("the program is detached", &|| {
            let ifindex = wait_for_device(node)?;
            remove(&format!("from_defrag-{ifindex}"))
        }),
    ];
    for (step, (what, take_away)) in (20..).zip(steps) {
        take_away().context(what)?;
        wait_for(what, 3 * traffic::TIMEOUT, || {
            setup.works(step)?;
            let problems = node.weir_json(&["status"])?["problems"].to_string();
            ensure!(problems == "[]", "{problems}");
            Ok(Some(()))
        })?;
    }

    node.agent().stop(Signal::SIGTERM)?;
    let mut command = node.agent().command(&node.netns)?;
    command.arg("cleanup");
    process::run(&mut command, b"", traffic::TIMEOUT)?;
    assert_eq!(device(node)?, None);
    assert!(!links.exists());
    Ok(())
}

#[test]
fn without_it_they_are_dropped_with_a_reason() -> TestResult {
    let setup = Setup::start("fragments off", &["--defragmentation", "false"])?;
    let node = setup.node();
    assert_eq!(device(node)?, None);
    for vip in cluster_ips(10) {
        let exchange = Exchange::new(&setup.client, &setup.servers[0], vip)?;
        let [own, vip, _] = exchange.addresses;
        let before = node.drops(FRAG_NOT_FOUND)?;
        let pieces = pieces(&setup.client, own, vip, &payload(1))?;
        send(&setup.client, pieces.clone())?;
        wait_until("drops", traffic::TIMEOUT, || {
            Ok(node.drops(FRAG_NOT_FOUND)? == before + 2)
        })?;
        // In their order they need nobody.
        send_in_order(&setup.client.netns, &pieces)?;
        receive(&exchange.sockets[1], own, &payload(1))?;
    }
    let problems = node.weir_json(&["status"])?["problems"].to_string();
    assert_eq!(problems, "[]");
    Ok(())
}
