//! Nodes with clients beyond them, as the tests of load balancers and external traffic policies use them. The router
//! outside stands for the cloud: it leads the load balancer's addresses to the node that the test names.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use weir_tests::{
    Cluster, Node,
    netns::NetNs,
    outside::{Outside, VIRTUAL_NETWORKS},
    traffic::{self, Protocol},
    witness::{self, Seen},
};

use super::support::{is_refused, is_served_by};

pub const NODE_PORT: u16 = 30_080;
/// Requests in a row that must go to one endpoint: upstream's `AffinityConfirmCount`.
pub const CONFIRMATIONS: usize = 15;
pub const SERVICE: &str = "external-local";

/// Addresses that the router leads to a node.
pub fn ingress() -> Result<[IpAddr; 2]> {
    Ok(["203.0.113.250".parse()?, "2001:db8:203::250".parse()?])
}

/// Nodes, the outside beside them, and the load balancer's addresses led to the first node.
pub struct Bed {
    pub cluster: Cluster,
    pub outside: Outside,
}

impl Bed {
    pub fn start(name: &str, nodes: usize) -> Result<Self> {
        Self::start_with(name, nodes, &[])
    }

    pub fn start_with(name: &str, nodes: usize, arguments: &[&str]) -> Result<Self> {
        let cluster = Cluster::builder(name)
            .nodes(nodes)
            .agent_arguments(arguments)
            .wire()?;
        let outside = Outside::join(&cluster)?;
        cluster.start_agents()?;
        let this = Self { cluster, outside };
        this.lead_to("node1")?;
        Ok(this)
    }

    /// As the cloud's load balancer does when a node's health check says so.
    pub fn lead_to(&self, node: &str) -> Result<()> {
        self.outside
            .route_via(self.cluster.node(node), &VIRTUAL_NETWORKS)
    }

    pub fn client(&self) -> &NetNs {
        &self.outside.client
    }

    /// Who answers the client outside, and which client it sees.
    pub fn ask(&self, protocol: Protocol, to: SocketAddr) -> Result<Seen> {
        self.client()
            .run(|| witness::ask(protocol, to, traffic::TIMEOUT))
    }

    /// Served by all of the named pods and no others, over TCP and UDP.
    pub fn is_served(&self, to: &[SocketAddr], wanted: &[&str]) -> Result<()> {
        for to in to {
            for protocol in Protocol::ALL {
                is_served_by(self.client(), protocol, *to, wanted)?;
            }
        }
        Ok(())
    }

    /// Served by the named pods alone, with the client's own address seen.
    pub fn is_local(&self, to: &[SocketAddr], wanted: &[&str]) -> Result<()> {
        for to in to {
            for protocol in Protocol::ALL {
                is_served_by(self.client(), protocol, *to, wanted)?;
                let seen = self.ask(protocol, *to)?;
                ensure!(seen.client == seen.own, "{to}: {seen:?}");
            }
        }
        Ok(())
    }

    pub fn is_refused(&self, to: &[SocketAddr]) -> Result<()> {
        for to in to {
            for protocol in Protocol::ALL {
                is_refused(self.client(), protocol, *to)?;
            }
        }
        Ok(())
    }
}

pub fn node_ports(node: &Node) -> Vec<SocketAddr> {
    at(&node.addresses, NODE_PORT)
}

pub fn at(addresses: &[IpAddr], port: u16) -> Vec<SocketAddr> {
    let addresses = addresses.iter();
    addresses.map(|ip| SocketAddr::new(*ip, port)).collect()
}

pub fn node_port(service: &mut Value) {
    service["spec"]["type"] = "NodePort".into();
    if let Some(ports) = service["spec"]["ports"].as_array_mut() {
        for port in ports {
            port["nodePort"] = NODE_PORT.into();
        }
    }
}

/// A load balancer with NodePorts and a policy, its addresses those of [`ingress`].
pub fn load_balancer(policy: &str) -> Result<impl Fn(&mut Value)> {
    let ingress = ingress()?;
    let policy = policy.to_owned();
    Ok(move |service: &mut Value| {
        node_port(service);
        service["spec"]["type"] = "LoadBalancer".into();
        service["spec"]["externalTrafficPolicy"] = policy.clone().into();
        let ingress = ingress.map(|ip| json!({"ip": ip, "ipMode": "VIP"}));
        service["status"]["loadBalancer"]["ingress"] = json!(ingress);
    })
}
