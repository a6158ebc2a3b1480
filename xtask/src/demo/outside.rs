//! The part of the demo that concerns the outside: a client there asks a node, and a pod asks a server there.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::{Result, ensure};
use serde_json::json;
use weir_tests::{
    Cluster, Pod,
    cluster::cluster_ips,
    netns::NetNs,
    objects::{self, Port},
    outside::{Outside, VIRTUAL_NETWORKS},
    traffic::{Protocol, Server},
    witness::{self, Seen},
};

use super::{Demo, PORT, TIMEOUT, heading, join};
use crate::ui::{self, Colour};

/// NodePort of the Service for clients outside.
const NODE_PORT: u16 = 30080;
/// Its load balancer addresses, of the networks that the router leads to node1.
const LOAD_BALANCER: [&str; 2] = ["203.0.113.1", "2001:db8:203::1"];
/// Questions until an endpoint of each node has answered: that fails once in 2^100 times.
const ENOUGH: usize = 100;

/// A server outside, and a Service of type LoadBalancer with an endpoint on each node.
pub fn prepare(cluster: &Cluster, outside: &Outside, near: &Pod, far: &Pod) -> Result<Vec<Server>> {
    heading(
        "A client outside, behind two routers, and a Service for it with an endpoint on each node",
    );
    outside.route_via(cluster.node("node1"), &VIRTUAL_NETWORKS)?;
    let mut service = objects::service("shop", &cluster_ips(30), &Port::both(80, PORT));
    service["spec"]["type"] = "LoadBalancer".into();
    for port in 0..2 {
        service["spec"]["ports"][port]["nodePort"] = NODE_PORT.into();
    }
    let ingress = LOAD_BALANCER.map(|ip| json!({"ip": ip, "ipMode": "VIP"}));
    service["status"]["loadBalancer"]["ingress"] = json!(ingress);
    cluster.apply(&service)?;
    let endpoints: Vec<_> = [near, far].into_iter().flat_map(Pod::endpoints).collect();
    cluster.endpoints("shop", PORT, &endpoints)?;
    cluster.wait_applied()?;
    let text = format!(
        "NodePort {NODE_PORT}, load balancer {}, port 80",
        LOAD_BALANCER.join(" ")
    );
    ui::line(Colour::Green, "shop", &text);
    ui::line(Colour::Green, "outside", &join(&outside.addresses));
    let servers = outside.addresses.iter();
    servers
        .map(|address| Server::start(&outside.client, SocketAddr::new(*address, PORT), "outside"))
        .collect()
}

impl Demo {
    /// Both ways in, both families: an endpoint on the asked node sees the client, one elsewhere the node.
    pub(super) fn clients_outside_are_served(&self) -> Result<()> {
        heading("The client outside asks node1, by NodePort and load balancer address");
        let node = self.cluster.node("node1");
        for (family, load_balancer) in LOAD_BALANCER.into_iter().enumerate() {
            let v6 = family == 1;
            let client = self.outside.address(v6)?;
            let node_port = SocketAddr::new(node.address(v6)?, NODE_PORT);
            for to in [node_port, SocketAddr::new(load_balancer.parse()?, 80)] {
                let answers = ask_until(&self.outside.client, to, 2)?;
                for (server, seen) in answers {
                    let pod = self.pods.iter().find(|pod| pod.name == server);
                    let at = pod.map_or("", |pod| pod.node.as_str());
                    let (wanted, whose) = if at == node.name {
                        (client, "the client's own")
                    } else {
                        (node.address(v6)?, "node1's: the answer comes back that way")
                    };
                    let seen = seen.client;
                    ensure!(seen.ip() == wanted, "{server} sees {seen}, not {wanted}");
                    let text = format!("{to}: {server} on {at} sees {seen}, {whose}");
                    ui::line(Colour::Green, "outside", &text);
                }
            }
        }
        Ok(())
    }

    /// Masquerade, and the table of all that have an address of the node.
    pub(super) fn pods_talk_to_the_outside(&self) -> Result<()> {
        heading("A pod asks a server outside, which sees node1 and not the pod");
        let node = self.cluster.node("node1");
        for address in &self.outside.addresses {
            let to = SocketAddr::new(*address, PORT);
            for protocol in Protocol::ALL {
                let seen = self.client().run(|| witness::ask(protocol, to, TIMEOUT))?;
                let (own, seen) = (seen.own, seen.client);
                let wanted = node.address(address.is_ipv6())?;
                ensure!(seen.ip() == wanted, "{to} sees {seen}, not {wanted}");
                let text = format!("{} {own} to {to}, which sees {seen}", protocol.name());
                ui::line(Colour::Green, "client", &text);
            }
        }
        self.weir(&["bpf", "nat", "list"])?;
        Ok(())
    }
}

/// Asks over TCP until so many servers have answered. Gives one answer of each.
fn ask_until(client: &NetNs, to: SocketAddr, servers: usize) -> Result<BTreeMap<String, Seen>> {
    let mut answers = BTreeMap::new();
    for _ in 0..ENOUGH {
        let seen = client.run(|| witness::ask(Protocol::Tcp, to, TIMEOUT))?;
        answers.insert(seen.server.clone(), seen);
        if answers.len() == servers {
            break;
        }
    }
    ensure!(
        answers.len() == servers,
        "at {to} only {answers:?} answered"
    );
    Ok(answers)
}
