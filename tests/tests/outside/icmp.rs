//! ICMP through translation: an endpoint's "port unreachable" comes to the client that has asked a NodePort, wherever
//! both are; and echoes of pods to the outside find back to the pod that sent them.

use std::{
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use weir_tests::{
    Cluster, Pod, TestResult,
    netns::NetNs,
    objects::{self, Endpoint, Port},
    outside::Outside,
    traffic::Protocol,
};

use crate::support::{Bed, WIDE};

/// NodePort of the first Service, and the port of its endpoint, where nobody listens; the next Service has the next.
const FIRST_PORT: u16 = 30_100;
const FIRST_TARGET: u16 = 9376;
/// The node that is asked, and the other.
const ASKED: &str = "node1";
const ELSEWHERE: &str = "node2";
/// How long an error may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// Where the endpoint of a Service is, as the asked node sees it.
#[derive(Clone, Copy, Debug)]
enum Place {
    PodHere,
    PodElsewhere,
    HostHere,
    HostElsewhere,
}

const PLACES: [Place; 4] = [
    Place::PodHere,
    Place::PodElsewhere,
    Place::HostHere,
    Place::HostElsewhere,
];

#[derive(Clone, Copy, Debug)]
enum Client {
    Outside,
    PodThere,
    ProcessThere,
    PodElsewhere,
    ProcessElsewhere,
}

const CLIENTS: [Client; 5] = [
    Client::Outside,
    Client::PodThere,
    Client::ProcessThere,
    Client::PodElsewhere,
    Client::ProcessElsewhere,
];

/// Four Services whose endpoints refuse.
struct Refusing {
    cluster: Cluster,
    outside: Outside,
    clients: [Pod; 2],
    _endpoints: [Pod; 2],
}

impl Refusing {
    fn start(name: &str, has_offloads: bool) -> Result<Self> {
        let cluster = Cluster::builder(name).wire()?;
        let outside = Outside::join(&cluster)?;
        cluster.start_agents()?;
        let clients = [
            cluster.pod(ASKED, "client-there")?,
            cluster.pod(ELSEWHERE, "client-elsewhere")?,
        ];
        let pods = [
            cluster.pod(ASKED, "endpoint-here")?,
            cluster.pod(ELSEWHERE, "endpoint-elsewhere")?,
        ];
        let host = |name: &str| -> Vec<Endpoint> {
            let addresses = cluster.node(name).addresses.iter();
            addresses
                .map(|address| Endpoint::ready(*address, name, ""))
                .collect()
        };
        for (number, place) in (0..).zip(PLACES) {
            let endpoints = match place {
                Place::PodHere => pods[0].endpoints(),
                Place::PodElsewhere => pods[1].endpoints(),
                Place::HostHere => host(ASKED),
                Place::HostElsewhere => host(ELSEWHERE),
            };
            let ports = [Port {
                name: "udp",
                protocol: Protocol::Udp,
                port: FIRST_PORT + number,
                target: FIRST_TARGET + number,
            }];
            let name = format!("refusing-{number}");
            let vips = weir_tests::cluster::cluster_ips(10 + u8::try_from(number)?);
            let mut service = objects::service(&name, &vips, &ports);
            service["spec"]["type"] = "NodePort".into();
            service["spec"]["ports"][0]["nodePort"] = (FIRST_PORT + number).into();
            cluster.apply(&service)?;
            for v6 in [false, true] {
                let family: Vec<_> = endpoints
                    .iter()
                    .filter(|endpoint| endpoint.address.is_ipv6() == v6)
                    .cloned()
                    .collect();
                cluster.apply(&objects::endpoint_slice(&name, v6, &family, &ports))?;
            }
        }
        // The kernel's own limits of errors are not what is tested.
        let nodes = cluster.nodes().iter().map(|node| &*node.netns);
        for netns in nodes.chain(pods.iter().map(|pod| &pod.netns)) {
            netns.sysctl("net/ipv4/icmp_ratelimit", "0")?;
            netns.sysctl("net/ipv6/icmp/ratelimit", "0")?;
        }
        cluster.wait_applied()?;
        if !has_offloads {
            cluster.set_offloads(false)?;
            outside.set_offloads(false)?;
        }
        Ok(Self {
            cluster,
            outside,
            clients,
            _endpoints: pods,
        })
    }

    fn netns(&self, client: Client) -> &NetNs {
        match client {
            Client::Outside => &self.outside.client,
            Client::PodThere => &self.clients[0].netns,
            Client::PodElsewhere => &self.clients[1].netns,
            Client::ProcessThere => &self.cluster.node(ASKED).netns,
            Client::ProcessElsewhere => &self.cluster.node(ELSEWHERE).netns,
        }
    }

    /// Asks, and requires the error: the kernel hands it to the socket only if the packet within, ports and all, is
    /// the one that was sent.
    fn check(&self, client: Client, to: SocketAddr) -> Result<()> {
        let any = if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
        let socket = self.netns(client).run(|| UdpSocket::bind(any))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        self.netns(client).run(|| socket.connect(to))?;
        for what in ["a new connection", "a known one"] {
            socket.send(b"question").with_context(|| what.to_owned())?;
            match socket.recv(&mut [0; 16]) {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                other => anyhow::bail!("{what}: {other:?} instead of a refusal"),
            }
        }
        Ok(())
    }

    /// Every endpoint × family × client. Weir refuses none of them: it is the endpoints that do.
    fn check_all(&self) -> Result<()> {
        let failures = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for client in CLIENTS {
                let failures = &failures;
                scope.spawn(move || {
                    for (place, port) in PLACES.into_iter().zip(FIRST_PORT..) {
                        for address in &self.cluster.node(ASKED).addresses {
                            let to = SocketAddr::new(*address, port);
                            if let Err(error) = self.check(client, to) {
                                let text = format!("{client:?} {place:?} {to}: {error:#}");
                                failures.lock().expect("no thread panics").push(text);
                            }
                        }
                    }
                });
            }
        });
        let failures = failures.into_inner().context("no thread panics")?;
        ensure!(failures.is_empty(), "{}", failures.join("\n"));
        for node in self.cluster.nodes() {
            for reason in ["SERVICE_BACKEND_NOT_FOUND", "SERVICE_PORT_NOT_FOUND"] {
                let count = node.drops(reason)?;
                ensure!(count == 0, "{} has counted {count} {reason}", node.name);
            }
        }
        Ok(())
    }
}

#[test]
fn an_endpoint_s_refusal_reaches_the_client() -> TestResult {
    let bed = Refusing::start("ICMP errors", true)?;
    Ok(bed.check_all()?)
}

#[test]
fn an_endpoint_s_refusal_reaches_the_client_without_offloads() -> TestResult {
    let bed = Refusing::start("ICMP errors plain", false)?;
    Ok(bed.check_all()?)
}

/// Two pods of a node send echoes with one identifier to one place outside: each gets the answers to its own.
#[test]
fn echoes_with_the_same_identifier_are_told_apart() -> TestResult {
    const COUNT: &str = "20";
    let bed = Bed::start("echoes", WIDE, &[])?;
    let second = bed.cluster.pod("node1", "second")?;
    let pods = [&bed.near, &second];
    for to in bed.at_outside() {
        let address = to.ip().to_string();
        std::thread::scope(|scope| -> Result<()> {
            let pings = pods.map(|pod| {
                let arguments = ["-e", "777", "-c", COUNT, "-i", "0.05", "-W", "3", &address]
                    .map(str::to_owned);
                scope.spawn(move || {
                    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                    pod.netns.tool("ping", &arguments)
                })
            });
            for (pod, ping) in pods.into_iter().zip(pings) {
                let said = ping
                    .join()
                    .expect("no panic")
                    .with_context(|| format!("{} {to}", pod.name))?;
                let is_complete = said.contains(&format!("{COUNT} received, 0% packet loss"));
                ensure!(
                    is_complete && !said.contains("DUP!"),
                    "{}: {said}",
                    pod.name
                );
            }
            Ok(())
        })?;
        let rows = bed.node().weir_json(&["bpf", "nat", "list"])?;
        let node = bed.node().address(to.is_ipv6())?.to_string();
        let echoes: Vec<_> = rows
            .as_array()
            .context("`weir bpf nat list -o json` is no list")?
            .iter()
            .filter(|row| row["translated_source"] == node.as_str())
            .collect();
        assert_eq!(echoes.len(), pods.len(), "{echoes:#?}");
        let [first, other] = [0, 1].map(|row| &echoes[row]["translated_source_port"]);
        assert_ne!(first, other);
    }
    Ok(())
}
