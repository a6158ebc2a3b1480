//! The nodes that are compared: a client beyond the first of two nodes, which is all it knows, and
//! two endpoints on the second. The first has Weir, one kind of kube-proxy's rules, or only routes.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use weir_tests::{
    Cluster, Families, Node,
    netns::NetNs,
    objects::{self, Endpoint, to_yaml},
    process, reaper,
};

use crate::{
    agent::wait_applied,
    pods::traffic::Path,
    services::{
        bed::{
            Kind, LOAD_TIMEOUT, NFTABLES_SHORT, PODS, SERVICES_PER_FILE, routed_pod, weir_arguments,
        },
        rules::{self, Service},
        traffic::Server,
    },
    threads::SERVER,
};

/// Where endpoints listen for those that use their own address, and for the Service. Not the same:
/// see the nodes of the part *services*.
const OWN_PORT: u16 = 8080;
const TARGET_PORT: u16 = 8081;
/// The measured Service.
const FRONTEND: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 10), 80);
/// Addresses of load balancers (RFC 2544), the measured Service's first: there are not as many
/// NodePorts as Services here.
const LOAD_BALANCERS: &str = "198.18.0.0/15";
const FIRST_LOAD_BALANCER: u32 = 0xc612_0001;
/// The network of the client (RFC 5737), the node and the client there.
const OUTSIDE: &str = "198.51.100.0/24";
const GATEWAY: &str = "198.51.100.1";
const CLIENT: &str = "198.51.100.10";
/// The node's device towards the client.
const DEVICE: &str = "outside";

/// See the module.
#[derive(Debug)]
pub struct Bed {
    kind: Kind,
    /// Accepts connections at both endpoints.
    pub server: Server,
    /// Beyond the first node.
    pub client: NetNs,
    /// The endpoints' own addresses.
    pub own: [SocketAddr; 2],
    pods: [Arc<NetNs>; 2],
    services: u32,
    // Dropped after the server: its namespaces are the cluster's.
    cluster: Cluster,
}

impl Bed {
    /// Makes the nodes, without any Service.
    ///
    /// # Errors
    ///
    /// They do not come up.
    pub fn start(kind: Kind) -> Result<Self> {
        let arguments = weir_arguments(kind);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let cluster = Cluster::builder("bench-outside")
            .families(Families::V4)
            .agent_arguments(&arguments)
            .wire()?;
        let client = join_client(&cluster)?;
        let names = ["a", "b"];
        let pods = if is_weir(kind) {
            cluster.start_agents()?;
            names.map(|name| {
                let pod = cluster.pod("node2", name)?;
                Ok((pod.address(false)?, Arc::new(pod.netns)))
            })
        } else {
            for node in cluster.nodes() {
                node.netns.sysctl("net/ipv4/ip_forward", "1")?;
            }
            let (asked, other) = (cluster.node("node1"), cluster.node("node2"));
            let range = other
                .pod_cidrs
                .first()
                .context("the node has no pod range")?;
            let via = other.address(false)?;
            asked.netns.ip(&format!("route add {range} via {via}\n"))?;
            [2u8, 3].map(|number| {
                let name = names[usize::from(number) - 2];
                let (address, netns) = routed_pod(&cluster, "node2", name, number)?;
                Ok((address, Arc::new(netns)))
            })
        };
        let pods: Vec<(IpAddr, Arc<NetNs>)> = pods.into_iter().collect::<Result<_>>()?;
        let [(first, a), (second, b)] = <[_; 2]>::try_from(pods)
            .map_err(|pods| anyhow::anyhow!("{} pods instead of two", pods.len()))?;
        let listen: Vec<(&NetNs, SocketAddr)> = [OWN_PORT, TARGET_PORT]
            .iter()
            .flat_map(|port| {
                [(&*a, first), (&*b, second)]
                    .map(|(pod, address)| (pod, SocketAddr::new(address, *port)))
            })
            .collect();
        Ok(Self {
            kind,
            server: Server::start(&listen)?,
            client,
            own: [first, second].map(|address| SocketAddr::new(address, OWN_PORT)),
            pods: [a, b],
            services: 0,
            cluster,
        })
    }

    /// Whether it is Weir that serves here.
    pub const fn is_weir(&self) -> bool {
        is_weir(self.kind)
    }

    /// What the measured Service is reached at, from outside.
    pub fn frontend(&self) -> SocketAddr {
        SocketAddr::new(load_balancer(0).into(), FRONTEND.port())
    }

    /// Has the node that is asked handle what comes from the client on the processor of the server from
    /// now on (receive packet steering), or again on that of the client, which sends at the same time.
    ///
    /// # Errors
    ///
    /// The kernel has no receive packet steering.
    pub fn steer(&self, apart: bool) -> Result<()> {
        let mask = if apart { 1 << SERVER } else { 0 };
        let setting = format!("/sys/class/net/{DEVICE}/queues/rx-0/rps_cpus");
        // (`ip netns exec` mounts the namespace's own /sys.)
        let mut command = Command::new("ip");
        let script = format!("echo {mask:x} > {setting}");
        command.args([
            "netns",
            "exec",
            self.asked().netns.name(),
            "sh",
            "-c",
            &script,
        ]);
        process::run(&mut command, b"", LOAD_TIMEOUT).map(drop)
    }

    /// The way of datagrams: through the Service or not. They reach the first endpoint, since the
    /// Service for UDP has only that.
    pub fn datagrams(&self, through_service: bool) -> Path<'_> {
        let (port, to) = if through_service {
            (TARGET_PORT, self.frontend())
        } else {
            (OWN_PORT, self.own[0])
        };
        Path {
            name: "from outside",
            client: &self.client,
            server: &self.pods[0],
            listen: SocketAddr::new(self.own[0].ip(), port),
            to,
        }
    }

    /// Makes the asked node know `count` Services, the measured one among them in the middle; returns
    /// how long that took.
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
                self.cluster.nodes().iter().try_for_each(wait_applied)?;
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

    /// Packets that the asked node's programs have sent on to the other node, and back to the outside.
    /// `None` where there are no programs.
    ///
    /// # Errors
    ///
    /// `weir` fails.
    pub fn forwarded(&self) -> Result<Option<[u64; 2]>> {
        if !self.is_weir() {
            return Ok(None);
        }
        let count = |outcome| self.asked().outcomes("from_netdev", outcome);
        Ok(Some([count("REMOTE")?, count("ROUTED")?]))
    }

    /// Requires that what a client sees as one connection came to the endpoint from the node: with
    /// source NAT, as it is meant.
    ///
    /// # Errors
    ///
    /// The endpoint saw somebody else, or there was no connection.
    pub fn check_source(&self) -> Result<()> {
        let listen = SocketAddr::new(self.own[0].ip(), TARGET_PORT);
        let socket = self.pods[0].run(|| UdpSocket::bind(listen))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        let to = self.frontend();
        self.client.run(|| -> Result<()> {
            let client = UdpSocket::bind("0.0.0.0:0")?;
            client.send_to(b"?", to)?;
            Ok(())
        })?;
        let (_, from) = socket
            .recv_from(&mut [0; 1])
            .with_context(|| format!("a datagram to {to} did not arrive"))?;
        let node = self.asked().address(false)?;
        ensure!(
            from.ip() == node,
            "the endpoint saw {} instead of the node's {node}",
            from.ip()
        );
        Ok(())
    }

    fn asked(&self) -> &Node {
        self.cluster.node("node1")
    }

    /// All Services, those measured in the middle: they shall stand where one stands on average.
    fn rules(&self, count: u32) -> Result<Vec<Service>> {
        let mut services: Vec<Service> = (1..count).map(other).collect();
        let [a, b] = self.own.map(|own| match own.ip() {
            IpAddr::V4(address) => Ok(SocketAddrV4::new(address, TARGET_PORT)),
            IpAddr::V6(address) => Err(anyhow::anyhow!("{address} is not IPv4")),
        });
        let (a, b) = (a?, b?);
        let measured = |protocol, endpoints| Service {
            protocol,
            frontend: FRONTEND,
            load_balancer: Some(load_balancer(0)),
            endpoints,
        };
        let middle = services.len() / 2;
        services.insert(middle, measured("tcp", [a, b]));
        services.insert(middle, measured("udp", [a, a]));
        Ok(services)
    }

    fn filter(&self, program: &str, arguments: &[&str], text: &str) -> Result<()> {
        let mut command = self.asked().netns.command(program)?;
        process::run(command.args(arguments), text.as_bytes(), LOAD_TIMEOUT)?;
        Ok(())
    }

    fn write_objects(&self, count: u32) -> Result<()> {
        let [tcp, udp] = objects::Port::both(FRONTEND.port(), TARGET_PORT);
        let endpoint = |own: SocketAddr| Endpoint::ready(own.ip(), "node2", "");
        let [a, b] = self.own.map(endpoint);
        let ip = FRONTEND.ip();
        let text = [
            service_text("measured-tcp", *ip, 0, tcp, &[a.clone(), b]),
            service_text(
                "measured-udp",
                Ipv4Addr::from_bits(ip.to_bits() + 1),
                0,
                udp,
                &[a],
            ),
        ];
        let objects = self.cluster.objects();
        objects.write("measured.yaml", &text.concat())?;
        let mut from = self.services.max(1);
        while from < count {
            let to = (from + SERVICES_PER_FILE).min(count);
            let text: String = (from..to)
                .map(|number| {
                    let service = other(number);
                    let endpoints = service
                        .endpoints
                        .map(|to| Endpoint::ready((*to.ip()).into(), "node9", ""));
                    let name = format!("service-{number}");
                    service_text(&name, *service.frontend.ip(), number, tcp, &endpoints)
                })
                .collect();
            objects.write(&format!("services-{from}.yaml"), &text)?;
            from = to;
        }
        Ok(())
    }
}

const fn is_weir(kind: Kind) -> bool {
    matches!(kind, Kind::WeirSocket | Kind::WeirTc)
}

/// Address of a Service for clients outside.
const fn load_balancer(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(FIRST_LOAD_BALANCER + number)
}

/// One of the Services beside the measured one.
fn other(number: u32) -> Service {
    Service {
        load_balancer: Some(load_balancer(number)),
        ..rules::other(number)
    }
}

/// Links a client to the first node, which it takes for its router to everything. The second node
/// answers by way of the first.
fn join_client(cluster: &Cluster) -> Result<NetNs> {
    let (asked, other) = (cluster.node("node1"), cluster.node("node2"));
    let client = NetNs::create(&reaper::namespace_name(cluster.id(), "client"))?;
    asked.netns.ip(&format!(
        "link add {DEVICE} type veth peer name eth0 netns {}\n\
         link set {DEVICE} up\naddress add {GATEWAY}/24 dev {DEVICE}\n",
        client.name()
    ))?;
    client.ip(&format!(
        "link set eth0 up\naddress add {CLIENT}/24 dev eth0\n\
         route add {PODS} via {GATEWAY}\nroute add {LOAD_BALANCERS} via {GATEWAY}\n"
    ))?;
    let via = asked.address(false)?;
    other
        .netns
        .ip(&format!("route add {OUTSIDE} via {via}\n"))?;
    // A path that loses packets shall be an error, not a pause of two minutes.
    client.sysctl("net/ipv4/tcp_syn_retries", "2")?;
    Ok(client)
}

/// A Service of type LoadBalancer without NodePorts, with its EndpointSlice; more may follow.
fn service_text(
    name: &str,
    cluster_ip: Ipv4Addr,
    number: u32,
    port: objects::Port,
    endpoints: &[Endpoint],
) -> String {
    let port = [port];
    let mut service = objects::service(name, &[cluster_ip.into()], &port);
    service["spec"]["type"] = "LoadBalancer".into();
    service["spec"]["allocateLoadBalancerNodePorts"] = false.into();
    service["status"] = serde_json::json!({
        "loadBalancer": {"ingress": [{"ip": load_balancer(number).to_string()}]}
    });
    format!(
        "{}---\n{}---\n",
        to_yaml(&service),
        to_yaml(&objects::endpoint_slice(name, false, endpoints, &port)),
    )
}
