//! SCTP, from upstream's `test/e2e/network/{service,networking}.go` and
//! `test/e2e/common/network/networking.go`: the "Granular Checks" with `sctp` and those of "SCTP
//! [LinuxOnly]". Both families; clients and servers speak it over raw sockets ([`sctp`]) and check
//! every packet's CRC. A Service's port is that of its endpoints: SCTP's cannot be translated, and
//! one that would have to be is dropped with a reason (`agent/tests/program/services.rs`,
//! `ports_and_protocols_that_no_service_has`) and named as a problem (`agent/tests/model/cases/sctp.yaml`).

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use serde_json::{Value, json};
use weir_tests::{
    Cluster, Node, Pod, TestResult,
    cluster::cluster_ips,
    netns::NetNs,
    objects::{self, Endpoint, Port},
    outside::Outside,
    sctp,
    traffic::{Protocol, Server},
};

use super::support::{answers, is_refused, is_served_by, is_unreachable, name};

/// Where servers listen: port of the Service, NodePort and HostPort too.
const PORT: u16 = 30_080;
const SERVICE: &str = "sctp-service";

const SCTP: Port = Port {
    name: "sctp",
    protocol: Protocol::Sctp,
    port: PORT,
    target: PORT,
};
const TCP: Port = Port {
    name: "tcp",
    protocol: Protocol::Tcp,
    ..SCTP
};

/// Pods on node1 and node2 that serve SCTP for as long as this lives.
struct Bed {
    cluster: Cluster,
    pods: Vec<Pod>,
    vips: [IpAddr; 2],
    _servers: Vec<sctp::Server>,
}

impl Bed {
    fn start(name: &str) -> Result<Self> {
        Self::on(Cluster::builder(name).start()?)
    }

    fn on(cluster: Cluster) -> Result<Self> {
        let mut pods = Vec::new();
        let mut servers = Vec::new();
        for (number, node) in ["node1", "node2"].iter().enumerate() {
            let pod = cluster.pod(node, &format!("netserver-{number}"))?;
            servers.extend(pod.serve_sctp(PORT)?);
            pods.push(pod);
        }
        Ok(Self {
            cluster,
            pods,
            vips: cluster_ips(10),
            _servers: servers,
        })
    }

    fn names(&self) -> Vec<&str> {
        self.pods.iter().map(|pod| pod.name.as_str()).collect()
    }

    fn endpoints(&self) -> Vec<Endpoint> {
        self.pods.iter().flat_map(Pod::endpoints).collect()
    }

    /// All pods become the endpoints of a Service; `change` changes it before it is applied.
    fn serve(&self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let mut service = objects::service(SERVICE, &self.vips, &[SCTP]);
        change(&mut service);
        self.cluster.apply(&service)?;
        for slice in slices(&self.endpoints(), &[SCTP]) {
            self.cluster.apply(&slice)?;
        }
        self.cluster.wait_applied()
    }

    /// At the ClusterIPs, and there alone.
    fn is_served(&self, client: &NetNs, wanted: &[&str]) -> Result<()> {
        for vip in self.vips {
            is_served_by(client, Protocol::Sctp, SocketAddr::new(vip, PORT), wanted)?;
        }
        Ok(())
    }
}

/// Slices of both families.
fn slices(endpoints: &[Endpoint], ports: &[Port]) -> [Value; 2] {
    [false, true].map(|v6| {
        let family = endpoints.iter().filter(|e| e.address.is_ipv6() == v6);
        let family: Vec<Endpoint> = family.cloned().collect();
        objects::endpoint_slice(SERVICE, v6, &family, ports)
    })
}

/// "should function for intra-pod communication: sctp [LinuxOnly]", "should function for pod-pod:
/// sctp" and "should function for node-pod communication: sctp [LinuxOnly]".
#[test]
fn pods_and_nodes_reach_pods_over_sctp() -> TestResult {
    let bed = Bed::start("SCTP to pods")?;
    let client = bed.cluster.pod("node1", "test-container-pod")?;
    for from in [&client.netns, &*bed.cluster.node("node1").netns] {
        for pod in &bed.pods {
            for address in &pod.addresses {
                let to = SocketAddr::new(*address, PORT);
                is_served_by(from, Protocol::Sctp, to, &name(pod))?;
            }
        }
    }
    Ok(())
}

/// "should function for pod-Service: sctp", "should function for endpoint-Service: sctp" (each
/// endpoint reaches itself, too) and "should function for node-Service: sctp", their part with the
/// ClusterIP.
#[test]
fn pods_endpoints_and_nodes_reach_sctp_services() -> TestResult {
    let bed = Bed::start("SCTP Service")?;
    bed.serve(|_| {})?;
    let client = bed.cluster.pod("node1", "test-container-pod")?;
    let pods = bed.pods.iter().map(|pod| &pod.netns);
    let nodes = bed.cluster.nodes().iter().map(|node| &*node.netns);
    for from in pods.chain(nodes).chain([&client.netns]) {
        bed.is_served(from, &bed.names())?;
    }
    Ok(())
}

/// The same tests, their part with a node's address: at the client's own node, at another, and from beyond.
#[test]
fn sctp_node_ports_function_and_are_removed() -> TestResult {
    let (cluster, outside) = Outside::start(Cluster::builder("SCTP nodePort"))?;
    let bed = Bed::on(cluster)?;
    let node = bed.cluster.node("node1");
    let client = bed.cluster.pod("node1", "test-container-pod")?;
    let inside = [&client.netns, &*node.netns, &bed.pods[0].netns];
    let clients = || inside.into_iter().chain([&outside.client]);
    let addresses = || bed.cluster.nodes().iter().flat_map(|node| &node.addresses);
    bed.serve(|service| {
        service["spec"]["type"] = "NodePort".into();
        service["spec"]["ports"][0]["nodePort"] = PORT.into();
    })?;
    for from in clients() {
        for address in addresses() {
            let to = SocketAddr::new(*address, PORT);
            is_served_by(from, Protocol::Sctp, to, &bed.names())?;
            // The number is not taken for other protocols.
            is_refused(from, Protocol::Tcp, to)?;
        }
    }
    bed.serve(|_| {})?;
    for from in clients() {
        for address in addresses() {
            let to = SocketAddr::new(*address, PORT);
            is_unreachable(from, Protocol::Sctp, to)?;
        }
    }
    for from in inside {
        bed.is_served(from, &bed.names())?;
    }
    Ok(())
}

/// Session affinity counts associations as it does connections: 15 in a row to one endpoint.
#[test]
fn session_affinity_holds_for_sctp() -> TestResult {
    let bed = Bed::start("SCTP affinity")?;
    bed.serve(|service| service["spec"]["sessionAffinity"] = "ClientIP".into())?;
    let client = bed.cluster.pod("node1", "execpod-affinity")?;
    for from in [&client.netns, &*bed.cluster.node("node1").netns] {
        for vip in bed.vips {
            let counts = answers(from, Protocol::Sctp, SocketAddr::new(vip, PORT), 15)?;
            assert_eq!(counts.len(), 1, "{vip}: {counts:?}");
        }
    }
    Ok(())
}

/// One Service with TCP and SCTP on one port number, each with an endpoint of its own; then one of
/// them goes, and its port is refused as one that the ClusterIP never had.
#[test]
fn sctp_is_never_taken_for_tcp_or_udp() -> TestResult {
    let bed = Bed::start("SCTP is not TCP")?;
    // Both pods serve all three, so that a packet which is led astray is answered.
    let servers = bed.pods.iter().map(|pod| pod.serve(PORT));
    let _servers: Vec<Vec<Server>> = servers.collect::<Result<_>>()?;
    let client = bed.cluster.pod("node1", "test-container-pod")?;
    let clients = [&client.netns, &*bed.cluster.node("node1").netns];
    for (port, pod) in [(TCP, &bed.pods[0]), (SCTP, &bed.pods[1])] {
        for mut slice in slices(&pod.endpoints(), &[port]) {
            let family = slice["addressType"].as_str().unwrap_or_default();
            slice["metadata"]["name"] = format!("{SERVICE}-{}-{family}", port.name).into();
            bed.cluster.apply(&slice)?;
        }
    }
    for ports in [&[TCP, SCTP][..], &[TCP], &[SCTP], &[TCP, SCTP]] {
        let service = objects::service(SERVICE, &bed.vips, ports);
        bed.cluster.apply(&service)?;
        bed.cluster.wait_applied()?;
        for from in clients {
            for to in bed.vips.map(|vip| SocketAddr::new(vip, PORT)) {
                for (protocol, pod) in [
                    (Protocol::Tcp, &bed.pods[0]),
                    (Protocol::Sctp, &bed.pods[1]),
                ] {
                    if ports.iter().any(|port| port.protocol == protocol) {
                        is_served_by(from, protocol, to, &name(pod))?;
                    } else {
                        is_refused(from, protocol, to)?;
                    }
                }
                is_refused(from, Protocol::Udp, to)?;
            }
        }
    }
    Ok(())
}

/// Whether the node's kernel has SCTP of its own, as the module gives it, loaded or built in.
fn kernel_speaks_sctp(node: &Node) -> Result<bool> {
    node.run(sctp::kernel_speaks)
}

/// "should allow creating a basic SCTP service with pod and endpoints [LinuxOnly] [Serial]":
/// neither the Service nor its use loads the sctp module.
///
/// As upstream's, it shows nothing where the module is there before (upstream takes no other test
/// beside it); on a kernel that has none, an attempt to load it is not seen, only that all works
/// without.
#[test]
fn an_sctp_service_does_not_load_the_module() -> TestResult {
    let bed = Bed::start("SCTP module")?;
    let node = bed.cluster.node("node1");
    let before = kernel_speaks_sctp(node)?;
    bed.serve(|_| {})?;
    bed.is_served(&node.netns, &bed.names())?;
    assert_eq!(kernel_speaks_sctp(node)?, before);
    Ok(())
}

/// "should allow creating a Pod with an SCTP HostPort [LinuxOnly] [Serial]": the same, as far as
/// this can be seen, and the port leads to the pod.
#[test]
fn a_pod_with_an_sctp_host_port_does_not_load_the_module() -> TestResult {
    let bed = Bed::start("SCTP HostPort")?;
    let node = bed.cluster.node("node1");
    let before = kernel_speaks_sctp(node)?;
    let mapping = json!([{"hostPort": PORT, "containerPort": PORT, "protocol": "sctp"}]);
    let pod = bed
        .cluster
        .pod_with_host_ports("node1", "hostport", &mapping)?;
    let _servers = pod.serve_sctp(PORT)?;
    for from in [&node.netns, &bed.pods[0].netns] {
        for address in &node.addresses {
            let to = SocketAddr::new(*address, PORT);
            is_served_by(from, Protocol::Sctp, to, &name(&pod))?;
            is_refused(from, Protocol::Tcp, to)?;
        }
    }
    assert_eq!(kernel_speaks_sctp(node)?, before);
    Ok(())
}
