//! From kube-proxy to Weir without a pause: the agent starts where kube-proxy's rules serve, serves the same
//! Services, and the rules go. Nothing fails meanwhile.
//!
//! A pod is on the network only once Weir has wired it, so that there is no pod on a node where no agent ever
//! ran: before the first start only processes of the nodes talk, and endpoints are in their own networks.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use weir_tests::{
    Cluster, Node, TestResult,
    cluster::cluster_ips,
    kube_proxy::{Mode, Rules, Service},
    load::Load,
    netns::NetNs,
    objects::{self, Endpoint, Port},
    process,
    traffic::{self, Protocol, TIMEOUT},
};

const PORT: u16 = 80;
const TARGET: u16 = 8080;
const NODE_PORT: u16 = 30_080;

/// Puts kube-proxy's rules on node1, for both families of a Service with these endpoints.
fn load_rules(cluster: &Cluster, mode: Mode, endpoints: &[Endpoint]) -> Result<Vec<Rules>> {
    let pods = ["10.244.0.0/16", "fd00:244::/48"];
    let families = cluster_ips(10).into_iter().zip(pods);
    families
        .map(|(vip, pods)| {
            let family = endpoints
                .iter()
                .filter(|endpoint| endpoint.address.is_ipv6() == vip.is_ipv6());
            let endpoints = family.map(|endpoint| SocketAddr::new(endpoint.address, TARGET));
            let service = Service {
                frontend: SocketAddr::new(vip, PORT),
                node_port: NODE_PORT,
                endpoints: endpoints.collect(),
            };
            Rules::load(&cluster.node("node1").netns, mode, service, pods)
        })
        .collect()
}

/// Someone else's rule that needs connection tracking and NAT, as nearly every node has one. Where
/// kube-proxy's rules are the only ones, the kernel ends both with them, and with them each connection that
/// they translated, whatever serves afterwards.
const RULES_OF_OTHERS: &str = "table inet others {
chain postrouting {
type nat hook postrouting priority 100;
ip daddr 198.51.100.0/24 masquerade
ip6 daddr 2001:db8::/32 masquerade
}
}
";

/// Writes the same Service as objects, for Weir.
fn write_objects(cluster: &Cluster, endpoints: &[Endpoint]) -> Result<()> {
    let mut service = objects::service("web", &cluster_ips(10), &Port::both(PORT, TARGET));
    service["spec"]["type"] = "NodePort".into();
    for port in 0..2 {
        service["spec"]["ports"][port]["nodePort"] = NODE_PORT.into();
    }
    // A Service that is known before its endpoints refuses.
    cluster.endpoints("web", TARGET, endpoints)?;
    cluster.apply(&service)
}

/// Successes of each phase of a load.
const SOME: u64 = 300;

/// All that the Service is reached at on node1.
fn frontends(cluster: &Cluster) -> Vec<SocketAddr> {
    let cluster_ips = cluster_ips(10).map(|vip| SocketAddr::new(vip, PORT));
    let node = cluster.node("node1").addresses.iter();
    let node = node.map(|address| SocketAddr::new(*address, NODE_PORT));
    cluster_ips.into_iter().chain(node).collect()
}

/// Traffic of every kind to every frontend.
fn load(cluster: &Cluster, from: &NetNs) -> Result<Load> {
    let mut load = Load::default();
    for to in frontends(cluster) {
        load = load
            .connections(from, to)?
            .long_connection(from, to)?
            .datagrams(from, to)?;
    }
    Ok(load)
}

/// The servers in the nodes' own networks.
fn endpoints_on_nodes(cluster: &Cluster) -> Vec<Endpoint> {
    let of_node = |node: &Node| {
        let addresses = node.addresses.iter();
        let endpoints = addresses.map(|address| Endpoint::ready(*address, &node.name, ""));
        endpoints.collect::<Vec<_>>()
    };
    cluster.nodes().iter().flat_map(of_node).collect()
}

/// Makes new connections and sends datagrams to every frontend; the connections must be Weir's. (Datagrams
/// are kube-proxy's until its rules are gone: they stand before the way to Weir's device.)
fn weir_serves(cluster: &Cluster, from: &NetNs) -> Result<()> {
    let before = cluster.translated_at_sockets()?;
    for to in frontends(cluster) {
        for protocol in Protocol::ALL {
            from.run(|| traffic::name(protocol, to))
                .with_context(|| format!("{protocol:?} to {to}"))?;
        }
    }
    // The load's own are counted, too.
    let count = frontends(cluster).len();
    let translated = cluster.translated_at_sockets()? - before;
    ensure!(
        translated >= u64::try_from(count)?,
        "{translated} of {count} connections were translated at the socket"
    );
    Ok(())
}

/// kube-proxy alone, both, Weir alone, for a process of the node and endpoints on both nodes.
///
/// With translation at the socket: packet by packet the node's new connections share the ports of their
/// sources with those that kube-proxy masqueraded, which linger in conntrack for two minutes.
fn first_start(mode: Mode) -> TestResult {
    let cluster = Cluster::builder("first start").wire()?;
    let nodes = cluster.nodes().iter();
    let _servers: Vec<_> = nodes
        .map(|node| node.serve(TARGET))
        .collect::<Result<_>>()?;
    let endpoints = endpoints_on_nodes(&cluster);
    write_objects(&cluster, &endpoints)?;
    let node = &cluster.node("node1").netns;
    let mut nft = node.command("nft")?;
    process::run(nft.args(["-f", "-"]), RULES_OF_OTHERS.as_bytes(), TIMEOUT)?;
    let rules = load_rules(&cluster, mode, &endpoints)?;
    let load = load(&cluster, node)?;
    load.wait_for(SOME, TIMEOUT).context("kube-proxy alone")?;
    for node in cluster.nodes() {
        node.start_agent()?;
    }
    cluster.wait_applied()?;
    load.wait_for(SOME, TIMEOUT).context("both")?;
    weir_serves(&cluster, node)?;
    for rules in rules {
        rules.remove(node)?;
    }
    load.wait_for(SOME, TIMEOUT).context("Weir alone")?;
    weir_serves(&cluster, node)?;
    Ok(load.stop().check(3 * SOME)?)
}

#[test]
fn the_first_start_breaks_nothing_of_iptables() -> TestResult {
    first_start(Mode::IptablesNft)
}

#[test]
fn the_first_start_breaks_nothing_of_legacy_iptables() -> TestResult {
    first_start(Mode::IptablesLegacy)
}

#[test]
fn the_first_start_breaks_nothing_of_nftables() -> TestResult {
    first_start(Mode::Nftables)
}
