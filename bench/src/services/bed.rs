//! The nodes that are compared: one with Weir, one with each kind of kube-proxy's rules, and one
//! that only routes. Each has a client, two endpoints, and as many Services as are asked for; the
//! one that is measured leads to the two endpoints, the others to nobody.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use weir_tests::{
    Cluster, Families,
    netns::NetNs,
    objects::{self, Endpoint, to_yaml},
    process, reaper,
};

use super::{
    rules::{self, Service},
    traffic::Server,
};
use crate::agent::wait_applied;

/// Where endpoints listen for those that use their own address. Not [`TARGET_PORT`]: to an
/// endpoint a connection to itself and one through its Service look alike if their source ports
/// are equal, and clients here use every port many times.
const OWN_PORT: u16 = 8080;
/// Where they listen for the Service.
const TARGET_PORT: u16 = 8081;
/// What the measured Service is reached at.
const FRONTEND: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 10), 80);
/// Range of all pods of a rival's node, which are not masqueraded.
pub const PODS: &str = "10.244.0.0/16";
/// Services of one file of objects.
pub const SERVICES_PER_FILE: u32 = 1000;
/// How long it may take to load rules.
pub const LOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Services from which nftables is loaded without a map for each, see [`rules::nftables`].
pub const NFTABLES_SHORT: usize = 5000;

/// How a node knows its Services.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Weir, with `connect()` translated at the socket where the agent can do it.
    WeirSocket,
    /// Weir without that.
    WeirTc,
    /// Rules by this program, which is `iptables-restore` of one of its back ends.
    Iptables(&'static str),
    /// Rules by `nft`.
    Nftables,
    /// Not at all: routing alone.
    None,
}

/// Setting of the agent that turns translation at the socket off.
const SOCKET_SETTING: &str = "socket-translation";

/// Whether this agent can translate at the socket.
pub fn socket_translation_exists() -> bool {
    weir_agent::settings::definitions::find(SOCKET_SETTING).is_some()
}

/// A node with its pods.
#[derive(Debug)]
pub struct Bed {
    kind: Kind,
    /// Accepts connections at both endpoints.
    pub server: Server,
    /// Where connections come from: the node and a pod.
    pub clients: [Arc<NetNs>; 2],
    /// The endpoints' own addresses.
    pub own: [SocketAddr; 2],
    services: u32,
    // Dropped after the server: its namespaces are the cluster's.
    cluster: Cluster,
}

impl Bed {
    /// Makes the node, without any Service.
    ///
    /// # Errors
    ///
    /// It does not come up.
    pub fn start(kind: Kind) -> Result<Self> {
        let builder = Cluster::builder("bench-services")
            .nodes(1)
            .families(Families::V4);
        let (cluster, pods) = match kind {
            Kind::WeirSocket | Kind::WeirTc => {
                let arguments = weir_arguments(kind);
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                let cluster = builder.agent_arguments(&arguments).start()?;
                let pods = ["client", "a", "b"].map(|name| cluster.pod("node1", name));
                let pods = collect(pods)?.map(|pod| (pod.address(false), Arc::new(pod.netns)));
                (cluster, pods)
            }
            _ => {
                let cluster = builder.wire()?;
                let pods = ["client", "a", "b"];
                let pods = [2, 3, 4].map(|number| {
                    let name = pods[usize::from(number) - 2];
                    routed_pod(&cluster, "node1", name, number)
                });
                let pods = collect(pods)?.map(|(address, netns)| (Ok(address), Arc::new(netns)));
                cluster
                    .node("node1")
                    .netns
                    .sysctl("net/ipv4/ip_forward", "1")?;
                (cluster, pods)
            }
        };
        let [(_, client), (first, a), (second, b)] = pods;
        let addresses = [first?, second?];
        let node = cluster.node("node1").netns.clone();
        // A path that loses packets shall be an error, not a pause of two minutes.
        for client in [&node, &client] {
            client.sysctl("net/ipv4/tcp_syn_retries", "2")?;
        }
        let places = [(&*a, addresses[0]), (&*b, addresses[1])];
        let listen: Vec<(&NetNs, SocketAddr)> = [OWN_PORT, TARGET_PORT]
            .iter()
            .flat_map(|port| places.map(|(pod, address)| (pod, SocketAddr::new(address, *port))))
            .collect();
        Ok(Self {
            kind,
            server: Server::start(&listen)?,
            clients: [node, client],
            own: addresses.map(|address| SocketAddr::new(address, OWN_PORT)),
            services: 0,
            cluster,
        })
    }

    /// Whether it is Weir that serves here.
    pub const fn is_weir(&self) -> bool {
        matches!(self.kind, Kind::WeirSocket | Kind::WeirTc)
    }

    /// What the measured Service is reached at.
    pub const fn frontend(&self) -> SocketAddr {
        SocketAddr::V4(FRONTEND)
    }

    /// Makes it `count` Services, the measured one among them in the middle; returns how long
    /// that took.
    ///
    /// # Errors
    ///
    /// The rules or objects are refused, or it takes longer than a minute.
    pub fn load(&mut self, count: u32) -> Result<Duration> {
        let begin = Instant::now();
        match self.kind {
            Kind::None => {}
            Kind::WeirSocket | Kind::WeirTc => {
                self.write_objects(count)?;
                wait_applied(self.cluster.node("node1"))?;
            }
            Kind::Iptables(program) => {
                self.filter(program, &[], &rules::iptables(&self.rules(count)?, PODS))?;
            }
            Kind::Nftables => {
                let services = self.rules(count)?;
                let measured = services.len() / 2;
                let short = services.len() >= NFTABLES_SHORT;
                let text = rules::nftables(&services, PODS, measured, short);
                self.filter("nft", &["-f", "-"], &text)?;
            }
        }
        self.services = count;
        Ok(begin.elapsed())
    }

    /// Requires that connections were translated where this kind of bed is to do it: the flow
    /// table knows the frontend exactly if packets carried it. To be called once some were made.
    ///
    /// # Errors
    ///
    /// They took another way, or the flow table cannot be read.
    pub fn check_way(&self) -> Result<()> {
        if !self.is_weir() {
            return Ok(());
        }
        let flows = self
            .cluster
            .node("node1")
            .weir_json(&["bpf", "flow", "list"])?;
        let flows = flows.as_array().context("a list of flows")?;
        let on_the_wire = flows.iter().any(|flow| {
            flow["destination"] == FRONTEND.ip().to_string()
                && flow["destination_port"] == FRONTEND.port()
        });
        ensure!(
            on_the_wire == (self.kind == Kind::WeirTc),
            "connections to {FRONTEND} were {} in the packets, not where they should be",
            if on_the_wire {
                "translated"
            } else {
                "not translated"
            }
        );
        Ok(())
    }

    /// All Services, the measured one in the middle: it shall stand where one stands on average.
    fn rules(&self, count: u32) -> Result<Vec<Service>> {
        let mut services: Vec<Service> = (1..count).map(rules::other).collect();
        let [a, b] = self.own.map(|own| match own.ip() {
            IpAddr::V4(address) => Ok(SocketAddrV4::new(address, TARGET_PORT)),
            IpAddr::V6(address) => Err(anyhow::anyhow!("{address} is not IPv4")),
        });
        let measured = Service {
            protocol: "tcp",
            frontend: FRONTEND,
            load_balancer: None,
            endpoints: [a?, b?],
        };
        services.insert(services.len() / 2, measured);
        Ok(services)
    }

    fn filter(&self, program: &str, arguments: &[&str], text: &str) -> Result<()> {
        let mut command: Command = self.clients[0].command(program)?;
        process::run(command.args(arguments), text.as_bytes(), LOAD_TIMEOUT)?;
        Ok(())
    }

    fn write_objects(&self, count: u32) -> Result<()> {
        let measured = self.own.map(|own| Endpoint::ready(own.ip(), "node1", ""));
        self.write_file("measured", &service_text("measured", FRONTEND, &measured))?;
        let mut from = self.services.max(1);
        while from < count {
            let to = (from + SERVICES_PER_FILE).min(count);
            let text: String = (from..to)
                .map(|number| {
                    let service = rules::other(number);
                    let endpoints = service
                        .endpoints
                        .map(|to| Endpoint::ready((*to.ip()).into(), "node9", ""));
                    service_text(&format!("service-{number}"), service.frontend, &endpoints)
                })
                .collect();
            self.write_file(&format!("services-{from}"), &text)?;
            from = to;
        }
        Ok(())
    }

    fn write_file(&self, name: &str, text: &str) -> Result<()> {
        let objects = self.cluster.objects();
        objects.write(&format!("{name}.yaml"), text)
    }
}

/// Settings of an agent. (Threads in the namespaces of a node and its pods are in its cgroup.)
pub fn weir_arguments(kind: Kind) -> Vec<String> {
    let mut arguments = ["--log", "info", "--services-max", "65536"]
        .map(str::to_owned)
        .to_vec();
    arguments.extend(["--backends-max", "131072"].map(str::to_owned));
    if socket_translation_exists() {
        let socket = kind == Kind::WeirSocket;
        arguments.extend([format!("--{SOCKET_SETTING}"), socket.to_string()]);
    }
    arguments
}

fn collect<T>(items: [Result<T>; 3]) -> Result<[T; 3]> {
    let [a, b, c] = items;
    Ok([a?, b?, c?])
}

/// A pod of a node that only routes: a veth pair, wired as Weir wires its own. Its address is that with
/// the number in the node's range.
///
/// # Errors
///
/// The devices cannot be made.
pub fn routed_pod(
    cluster: &Cluster,
    node: &str,
    name: &str,
    number: u8,
) -> Result<(IpAddr, NetNs)> {
    let node = cluster.node(node);
    let range: ipnet::Ipv4Net = node
        .pod_cidrs
        .first()
        .context("the node has no pod range")?
        .parse()?;
    let node = &node.netns;
    let pod = NetNs::create(&reaper::namespace_name(cluster.id(), &format!("p-{name}")))?;
    let (host_mac, pod_mac) = (
        format!("02:00:00:00:01:{number:02x}"),
        format!("02:00:00:00:02:{number:02x}"),
    );
    let address = Ipv4Addr::from_bits(range.network().to_bits() + u32::from(number));
    let device = format!("veth-{name}");
    node.ip(&format!(
        "link add name {device} address {host_mac} type veth \
         peer name eth0 address {pod_mac} netns {}\n\
         link set {device} up\n\
         neighbour add {address} lladdr {pod_mac} dev {device} nud permanent\n\
         route add {address}/32 dev {device}\n",
        pod.name()
    ))?;
    pod.ip(&format!(
        "link set eth0 up\naddress add {address}/32 dev eth0\n\
         route add 169.254.1.1/32 dev eth0\n\
         neighbour add 169.254.1.1 lladdr {host_mac} dev eth0 nud permanent\n\
         route add default via 169.254.1.1 dev eth0\n"
    ))?;
    Ok((address.into(), pod))
}

/// A Service with its EndpointSlice; more may follow.
fn service_text(name: &str, frontend: SocketAddrV4, endpoints: &[Endpoint]) -> String {
    let [tcp, _] = objects::Port::both(frontend.port(), TARGET_PORT);
    let port = [tcp];
    format!(
        "{}---\n{}---\n",
        to_yaml(&objects::service(name, &[(*frontend.ip()).into()], &port)),
        to_yaml(&objects::endpoint_slice(name, false, endpoints, &port)),
    )
}

/// Whether a program is there; the rivals' tools need not be installed.
pub fn is_installed(program: &str) -> Result<bool> {
    let path = std::env::var_os("PATH").context("there is no PATH")?;
    ensure!(!path.is_empty(), "PATH is empty");
    Ok(std::env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}
