//! Objects that several of these tests use.

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
};

use anyhow::Result;
use serde_json::Value;
use weir_tests::{
    Cluster, Node, Pod,
    cluster::ClusterBuilder,
    objects::{self, Port},
    outside::{Outside, VIRTUAL_NETWORKS},
    traffic::{Protocol, Server},
};

/// Every protocol.
pub const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
/// Ports that nodes take for clients whose address they replace, unless set.
pub const NAT_PORTS: RangeInclusive<u16> = 61_000..=65_534;
/// Port of Services.
pub const PORT: u16 = 80;
/// Where servers listen.
pub const TARGET: u16 = 8080;
/// NodePort that leads to the pod on the asked node.
pub const NEAR: u16 = 30_080;
/// NodePort that leads to the pod on the other node.
pub const FAR: u16 = 30_081;
/// MTU of links that are as wide as all others, bytes.
pub const WIDE: u32 = 1500;

/// An address of the networks that the routers lead to a node, by number.
pub fn virtual_address(number: usize, v6: bool) -> Result<IpAddr> {
    let number = number + 1;
    let text = if v6 {
        format!("2001:db8:203::{number:x}")
    } else {
        format!("203.0.113.{number}")
    };
    Ok(text.parse()?)
}

/// A Service with TCP and UDP on [`PORT`] and a NodePort: ClusterIPs by number.
pub fn node_port_service(name: &str, number: u8, node_port: u16) -> Value {
    let ports = Port::both(PORT, TARGET);
    let mut service = objects::service(name, &weir_tests::cluster::cluster_ips(number), &ports);
    service["spec"]["type"] = "NodePort".into();
    for port in 0..2 {
        service["spec"]["ports"][port]["nodePort"] = node_port.into();
    }
    service
}

/// Applies a Service with pods as endpoints on [`TARGET`].
pub fn apply(cluster: &Cluster, name: &str, service: &Value, pods: &[&Pod]) -> Result<()> {
    cluster.apply(service)?;
    let endpoints: Vec<_> = pods.iter().flat_map(|pod| pod.endpoints()).collect();
    cluster.endpoints(name, TARGET, &endpoints)?;
    cluster.wait_applied()
}

/// Two nodes with a pod on each that serves [`TARGET`], a Service of each, and a server outside. The first node is asked.
pub struct Bed {
    pub cluster: Cluster,
    pub outside: Outside,
    /// On the node that is asked.
    pub near: Pod,
    /// On the other.
    pub far: Pod,
    _servers: Vec<Server>,
}

impl Bed {
    /// With an MTU of the link in the middle, in bytes.
    pub fn start(name: &str, middle: u32, arguments: &[&str]) -> Result<Self> {
        Self::build(
            Cluster::builder(name).agent_arguments(arguments),
            middle,
            |_, _| Ok(()),
        )
    }

    /// As [`Bed::start`], of a cluster of one's own; `prepare` gets the node that is asked, and what lies beyond, before
    /// any agent runs.
    pub fn build(
        builder: ClusterBuilder,
        middle: u32,
        prepare: impl FnOnce(&Node, &Outside) -> Result<()>,
    ) -> Result<Self> {
        let cluster = builder.wire()?;
        let outside = Outside::join_with_middle(&cluster, middle)?;
        prepare(cluster.node("node1"), &outside)?;
        cluster.start_agents()?;
        outside.route_via(cluster.node("node1"), &VIRTUAL_NETWORKS)?;
        let near = cluster.pod("node1", "near")?;
        let far = cluster.pod("node2", "far")?;
        let mut servers = near.serve(TARGET)?;
        servers.extend(far.serve(TARGET)?);
        for address in &outside.addresses {
            let address = SocketAddr::new(*address, TARGET);
            servers.push(Server::start(&outside.client, address, "outside")?);
        }
        apply(
            &cluster,
            "near",
            &node_port_service("near", 10, NEAR),
            &[&near],
        )?;
        apply(&cluster, "far", &node_port_service("far", 11, FAR), &[&far])?;
        Ok(Self {
            cluster,
            outside,
            near,
            far,
            _servers: servers,
        })
    }

    /// The node that is asked.
    pub fn node(&self) -> &Node {
        self.cluster.node("node1")
    }

    /// A NodePort of the node that is asked, in both families.
    pub fn at_node(&self, node_port: u16) -> Vec<SocketAddr> {
        let addresses = self.node().addresses.iter();
        addresses
            .map(|address| SocketAddr::new(*address, node_port))
            .collect()
    }

    /// The server outside, in both families.
    pub fn at_outside(&self) -> Vec<SocketAddr> {
        let addresses = self.outside.addresses.iter();
        addresses
            .map(|address| SocketAddr::new(*address, TARGET))
            .collect()
    }
}
