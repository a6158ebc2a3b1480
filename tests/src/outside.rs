//! What lies beyond the nodes: a router on their underlay, another behind it, and behind that a client, each a network
//! namespace. The nodes' default routes lead to the router; the client knows nothing of the cluster.
//!
//! ```text
//! node1 ─┐
//! node2 ─┼─ underlay ─ router ─ (the link in the middle) ─ edge ─ client
//! node3 ─┘
//! ```

use std::{net::IpAddr, sync::Arc};

use anyhow::{Context as _, Result, ensure};

use crate::{
    Cluster, Node,
    cgroup::Cgroup,
    cluster::{ClusterBuilder, nodad},
    netns::NetNs,
    reaper,
};

/// MTU of every link but the one in the middle, bytes.
const MTU: u32 = 1500;

/// Addresses of a place, IPv4 first.
type Addresses = [&'static str; 2];

/// Of the router, on the underlay of the nodes.
const ROUTER: Addresses = ["192.168.77.254", "fd00:77::fe"];
/// Of the router, on the second underlay.
const ROUTER_SECOND: Addresses = ["192.168.78.254", "fd00:78::fe"];
/// Of the router, on the link in the middle.
const ROUTER_MIDDLE: Addresses = ["192.0.2.1", "2001:db8:2::1"];
/// Of the edge, on the link in the middle.
const EDGE_MIDDLE: Addresses = ["192.0.2.2", "2001:db8:2::2"];
/// Of the edge, towards the client.
const EDGE: Addresses = ["198.51.100.1", "2001:db8:100::1"];
/// Of the client.
const CLIENT: Addresses = ["198.51.100.10", "2001:db8:100::10"];
/// Networks of the client.
pub const CLIENT_NETWORKS: Addresses = ["198.51.100.0/24", "2001:db8:100::/64"];
/// Networks of external and load-balancer addresses: of documentation, RFC 5737 and RFC 3849.
pub const VIRTUAL_NETWORKS: Addresses = ["203.0.113.0/24", "2001:db8:203::/64"];
/// Prefix lengths of all of them.
const LENGTHS: [u8; 2] = [24, 64];

/// The second device of a node.
pub const SECOND_DEVICE: &str = "eth1";

/// The namespaces beyond the nodes. They go with the cluster.
#[derive(Debug)]
pub struct Outside {
    /// Joined to the underlay by `eth0`.
    pub router: NetNs,
    /// Joined to the router by `eth0` and to the client by `eth1`.
    pub edge: NetNs,
    /// Clients and servers outside; its device is `eth0`.
    pub client: NetNs,
    /// The client's addresses of the families that the cluster has, IPv4 first.
    pub addresses: Vec<IpAddr>,
}

impl Outside {
    /// Makes a cluster with them beside it, and starts its agents.
    ///
    /// # Errors
    ///
    /// As [`ClusterBuilder::start`] and [`Outside::join`].
    pub fn start(builder: ClusterBuilder) -> Result<(Cluster, Self)> {
        let cluster = builder.wire()?;
        let outside = Self::join(&cluster)?;
        cluster.start_agents()?;
        Ok((cluster, outside))
    }

    /// Puts them beside a cluster, with an MTU of 1500 everywhere.
    ///
    /// # Errors
    ///
    /// When a device or route cannot be made.
    pub fn join(cluster: &Cluster) -> Result<Self> {
        Self::join_with_middle(cluster, MTU)
    }

    /// As [`Outside::join`], with the MTU of the link in the middle in bytes, at least 1280.
    ///
    /// # Errors
    ///
    /// As [`Outside::join`].
    pub fn join_with_middle(cluster: &Cluster, middle: u32) -> Result<Self> {
        let cgroup = cluster.fabric().cgroup();
        let router = namespace(cluster, "router", cgroup)?;
        let edge = namespace(cluster, "edge", cgroup)?;
        let client = namespace(cluster, "client", cgroup)?;
        for namespace in [&router, &edge] {
            namespace.sysctl("net/ipv4/ip_forward", "1")?;
            namespace.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        }
        plug_in(cluster.fabric(), "br0", "router", &router, "eth0")?;
        connect(&router, "eth1", &edge, "eth0", middle)?;
        connect(&edge, "eth1", &client, "eth0", MTU)?;
        let mut addresses = Vec::new();
        for family in 0..2 {
            let own: IpAddr = CLIENT[family].parse()?;
            let has = |address: &IpAddr| address.is_ipv6() == own.is_ipv6();
            if !cluster
                .nodes()
                .iter()
                .any(|node| node.addresses.iter().any(has))
            {
                continue;
            }
            addresses.push(own);
            add_address(&router, "eth0", ROUTER[family])?;
            add_address(&router, "eth1", ROUTER_MIDDLE[family])?;
            add_address(&edge, "eth0", EDGE_MIDDLE[family])?;
            add_address(&edge, "eth1", EDGE[family])?;
            add_address(&client, "eth0", CLIENT[family])?;
            let network = CLIENT_NETWORKS[family];
            let [to_edge, to_router, gateway] =
                [EDGE_MIDDLE[family], ROUTER_MIDDLE[family], EDGE[family]];
            router.ip(&format!("route add {network} via {to_edge}\n"))?;
            edge.ip(&format!("route add default via {to_router}\n"))?;
            client.ip(&format!("route add default via {gateway}\n"))?;
            for node in cluster.nodes() {
                node.netns
                    .ip(&format!("route replace default via {}\n", ROUTER[family]))?;
            }
        }
        Ok(Self {
            router,
            edge,
            client,
            addresses,
        })
    }

    /// The client's address of a family.
    ///
    /// # Errors
    ///
    /// When the cluster has no such family.
    pub fn address(&self, v6: bool) -> Result<IpAddr> {
        self.addresses
            .iter()
            .copied()
            .find(|address| address.is_ipv6() == v6)
            .context("the cluster has no such family")
    }

    /// Sends the router's traffic to networks by way of a node from now on; those of a family that the node has not
    /// are left out.
    ///
    /// # Errors
    ///
    /// When a route is not taken.
    pub fn route_via(&self, node: &Node, networks: &[&str]) -> Result<()> {
        for network in networks {
            let v6 = network.contains(':');
            if let Ok(address) = node.address(v6) {
                self.router
                    .ip(&format!("route replace {network} via {address}\n"))?;
            }
        }
        Ok(())
    }

    /// Gives a node a second device, [`SECOND_DEVICE`], on a second underlay with a router of its own there, and with
    /// a default route that is worse than the first. Returns its addresses.
    ///
    /// # Errors
    ///
    /// When the node has one.
    pub fn add_second_device(&self, cluster: &Cluster, node: &Node) -> Result<Vec<IpAddr>> {
        let fabric = cluster.fabric();
        if !fabric.devices()?.iter().any(|device| device == "br1") {
            fabric
                .ip("link add br1 type bridge stp_state 0 mcast_snooping 0\nlink set br1 up\n")?;
            plug_in(fabric, "br1", "router-second", &self.router, "second")?;
            for address in ROUTER_SECOND {
                add_address(&self.router, "second", address)?;
            }
        }
        node.netns.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        let port = format!("{}-second", node.name);
        plug_in(fabric, "br1", &port, &node.netns, SECOND_DEVICE)?;
        let mut addresses = Vec::new();
        for (family, gateway) in ROUTER_SECOND.into_iter().enumerate() {
            let text = node.address(family == 1)?.to_string();
            let address = [("192.168.77.", "192.168.78."), ("fd00:77:", "fd00:78:")]
                .iter()
                .find_map(|(first, second)| Some(format!("{second}{}", text.strip_prefix(first)?)));
            let address = address.with_context(|| format!("{text} is not on the underlay"))?;
            add_address(&node.netns, SECOND_DEVICE, &address)?;
            node.netns.ip(&format!(
                "route add default via {gateway} dev {SECOND_DEVICE} metric 4096\n"
            ))?;
            addresses.push(address.parse()?);
        }
        // The device that was there before had another Ethernet address.
        self.router
            .tool("ip", &["neigh", "flush", "dev", "second"])?;
        Ok(addresses)
    }

    /// Turns checksum and segmentation offloads on or off on every device here.
    ///
    /// # Errors
    ///
    /// When `ethtool` fails.
    pub fn set_offloads(&self, on: bool) -> Result<()> {
        [&self.router, &self.edge, &self.client]
            .iter()
            .try_for_each(|namespace| namespace.set_offloads(on))
    }
}

fn namespace(cluster: &Cluster, name: &str, cgroup: Option<&Arc<Cgroup>>) -> Result<NetNs> {
    let namespace = NetNs::create(&reaper::namespace_name(cluster.id(), name))?;
    // A link-local address that is being checked cannot ask for neighbours.
    namespace.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
    Ok(match cgroup {
        Some(cgroup) => namespace.in_cgroup(cgroup.clone()),
        None => namespace,
    })
}

/// A device of `namespace` on a bridge of the fabric, where its other half has the name `port`.
fn plug_in(
    fabric: &NetNs,
    bridge: &str,
    port: &str,
    namespace: &NetNs,
    device: &str,
) -> Result<()> {
    ensure!(
        port.len() < libc::IFNAMSIZ,
        "{port} is too long for a device"
    );
    fabric.ip(&format!(
        "link add {port} type veth peer name {device} netns {}\nlink set {port} master {bridge} up\n",
        namespace.name()
    ))?;
    namespace.ip(&format!("link set {device} up\n"))
}

/// A link between two namespaces.
fn connect(one: &NetNs, device: &str, other: &NetNs, other_device: &str, mtu: u32) -> Result<()> {
    one.ip(&format!(
        "link add {device} mtu {mtu} type veth peer name {other_device} mtu {mtu} netns {}\n\
         link set {device} up\n",
        other.name()
    ))?;
    other.ip(&format!("link set {other_device} up\n"))
}

/// An address with the prefix length that all have here.
fn add_address(namespace: &NetNs, device: &str, address: &str) -> Result<()> {
    let address: IpAddr = address.parse()?;
    let length = LENGTHS[usize::from(address.is_ipv6())];
    let nodad = nodad(address);
    namespace.ip(&format!(
        "address add {address}/{length} dev {device}{nodad}\n"
    ))
}
