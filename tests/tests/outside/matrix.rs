//! Every kind of address of a Service × `externalTrafficPolicy` × place of its endpoint × family × protocol × client:
//! who answers, and which client the endpoint sees. What must come is computed by [`expected`], as
//! plainly as the documentation puts it. No combination is left out: they are counted.

use std::{collections::BTreeMap, net::SocketAddr, sync::Mutex, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use weir_tests::{
    Cluster, Pod, TestResult,
    netns::NetNs,
    objects::{self, Endpoint, Port},
    outside::{Outside, VIRTUAL_NETWORKS},
    sctp,
    traffic::{Protocol, Server},
    witness::{self, Seen},
};

use crate::support::{NAT_PORTS, PROTOCOLS, virtual_address};

/// The node that is asked, and the one that the routers have the way to virtual addresses by.
const ASKED: &str = "node1";
/// The node where endpoints elsewhere are.
const ELSEWHERE: &str = "node2";
/// The node whose pod and process are clients.
const CLIENTS: &str = "node3";
/// Where the first Service's TCP and UDP servers listen; the next one's at the next. Were it one port for all, a client
/// that happens to use a port of its own for two Services would be told apart by a changed port. SCTP servers listen
/// on the Service's port.
const FIRST_TARGET: u16 = 9376;
/// Port and NodePort of the first Service; the next has the next.
const FIRST_PORT: u16 = 30_100;
/// How long a client waits: servers are quick, and what is to be refused is refused at once.
const PATIENCE: Duration = Duration::from_secs(3);
/// Failures that are shown.
const SHOWN: usize = 40;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    NodePort,
    ExternalIp,
    LoadBalancer,
}

impl Kind {
    const ALL: [Self; 3] = [Self::NodePort, Self::ExternalIp, Self::LoadBalancer];
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Policy {
    Cluster,
    Local,
}

impl Policy {
    const ALL: [Self; 2] = [Self::Cluster, Self::Local];
}

/// Where the only endpoint of a Service is, as the asked node sees it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Place {
    PodHere,
    PodElsewhere,
    HostHere,
    HostElsewhere,
    Nowhere,
}

impl Place {
    const ALL: [Self; 5] = [
        Self::PodHere,
        Self::PodElsewhere,
        Self::HostHere,
        Self::HostElsewhere,
        Self::Nowhere,
    ];

    const fn is_here(self) -> bool {
        matches!(self, Self::PodHere | Self::HostHere)
    }

    /// Name of the endpoint's server.
    const fn server(self) -> &'static str {
        match self {
            Self::PodHere => "pod-here",
            Self::PodElsewhere => "pod-elsewhere",
            Self::HostHere => ASKED,
            Self::HostElsewhere => ELSEWHERE,
            Self::Nowhere => "nobody",
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Client {
    /// Behind the routers.
    Outside,
    /// A pod on a third node.
    Pod,
    /// A process of the third node.
    Process,
    /// A pod of the asked node that is no endpoint.
    PodThere,
    /// A process of the asked node.
    ProcessThere,
}

impl Client {
    const ALL: [Self; 5] = [
        Self::Outside,
        Self::Pod,
        Self::Process,
        Self::PodThere,
        Self::ProcessThere,
    ];
}

/// One question.
#[derive(Clone, Copy, Debug)]
struct Case {
    kind: Kind,
    policy: Policy,
    place: Place,
    v6: bool,
    protocol: Protocol,
    client: Client,
}

impl Case {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for client in Client::ALL {
            for protocol in PROTOCOLS {
                for (kind, policy, place) in services() {
                    for v6 in [false, true] {
                        all.push(Self {
                            kind,
                            policy,
                            place,
                            v6,
                            protocol,
                            client,
                        });
                    }
                }
            }
        }
        all
    }
}

/// Every Service, in the order of their ports.
fn services() -> Vec<(Kind, Policy, Place)> {
    let mut all = Vec::new();
    for kind in Kind::ALL {
        for policy in Policy::ALL {
            for place in Place::ALL {
                all.push((kind, policy, place));
            }
        }
    }
    all
}

/// What must come of a question.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Expected {
    /// A reset or ICMP port unreachable.
    Refused,
    /// The endpoint sees the client's own address and port.
    OwnAddress,
    /// The endpoint sees the client's own address and a port of the NAT range, with SCTP the client's port: a pod that
    /// reaches the endpoint directly, too, may have one port for both.
    OwnAddressNatPort,
    /// The endpoint sees the asked node's address and a port of the NAT range, with SCTP the client's port.
    AskedNode,
}

fn expected(case: Case) -> Expected {
    // Addresses that lead to every node are served by the client's own, where it is inside. The address of another
    // node leads there, and there the client is outside, whoever it is.
    let is_inside = match case.client {
        Client::Outside => false,
        Client::Pod | Client::Process => case.kind != Kind::NodePort,
        Client::PodThere | Client::ProcessThere => true,
    };
    match (case.place, case.policy) {
        (Place::Nowhere, _) => Expected::Refused,
        // Native routing: nobody between needs to take the place of the client.
        _ if is_inside => Expected::OwnAddress,
        (place, _) if place.is_here() && case.client == Client::Pod => Expected::OwnAddressNatPort,
        (place, _) if place.is_here() => Expected::OwnAddress,
        (_, Policy::Local) => Expected::Refused,
        (_, Policy::Cluster) => Expected::AskedNode,
    }
}

/// All Services and servers, made once.
struct Bed {
    cluster: Cluster,
    outside: Outside,
    client: Pod,
    client_there: Pod,
    _servers: Vec<Server>,
    _sctp_servers: Vec<sctp::Server>,
}

impl Bed {
    fn start(name: &str, has_offloads: bool) -> Result<Self> {
        let cluster = Cluster::builder(name).nodes(3).wire()?;
        let outside = Outside::join(&cluster)?;
        cluster.start_agents()?;
        outside.route_via(cluster.node(ASKED), &VIRTUAL_NETWORKS)?;
        let client = cluster.pod(CLIENTS, "client")?;
        let client_there = cluster.pod(ASKED, "client-there")?;
        let here = cluster.pod(ASKED, Place::PodHere.server())?;
        let elsewhere = cluster.pod(ELSEWHERE, Place::PodElsewhere.server())?;
        let (host_here, host_elsewhere) = (cluster.node(ASKED), cluster.node(ELSEWHERE));
        let endpoints = BTreeMap::from([
            (Place::PodHere, here.endpoints()),
            (Place::PodElsewhere, elsewhere.endpoints()),
            (Place::HostHere, host_endpoints(host_here)),
            (Place::HostElsewhere, host_endpoints(host_elsewhere)),
            (Place::Nowhere, Vec::new()),
        ]);
        let mut servers = Vec::new();
        let mut sctp_servers = Vec::new();
        for ((number, (kind, policy, place)), port) in
            services().iter().enumerate().zip(FIRST_PORT..)
        {
            let target = FIRST_TARGET + u16::try_from(number)?;
            let ports = ports(port, target);
            let name = format!("service-{number}");
            cluster.apply(&service(&name, number, *kind, *policy, &ports)?)?;
            let endpoints = endpoints.get(place).context("every place has endpoints")?;
            for v6 in [false, true] {
                let family: Vec<_> = endpoints
                    .iter()
                    .filter(|endpoint| endpoint.address.is_ipv6() == v6)
                    .cloned()
                    .collect();
                cluster.apply(&objects::endpoint_slice(&name, v6, &family, &ports))?;
            }
            let netns: &NetNs = match place {
                Place::PodHere => &here.netns,
                Place::PodElsewhere => &elsewhere.netns,
                Place::HostHere => &host_here.netns,
                Place::HostElsewhere => &host_elsewhere.netns,
                Place::Nowhere => continue,
            };
            for endpoint in endpoints {
                let address = SocketAddr::new(endpoint.address, target);
                servers.push(Server::start(netns, address, place.server())?);
                let address = SocketAddr::new(endpoint.address, port);
                sctp_servers.push(sctp::Server::start(netns, address, place.server())?);
            }
        }
        cluster.wait_applied()?;
        if !has_offloads {
            cluster.set_offloads(false)?;
            outside.set_offloads(false)?;
        }
        Ok(Self {
            cluster,
            outside,
            client,
            client_there,
            _servers: servers,
            _sctp_servers: sctp_servers,
        })
    }

    fn to(&self, case: Case) -> Result<SocketAddr> {
        let number = services()
            .iter()
            .position(|service| *service == (case.kind, case.policy, case.place))
            .context("every case has a Service")?;
        let address = match case.kind {
            Kind::NodePort => self.cluster.node(ASKED).address(case.v6)?,
            Kind::ExternalIp | Kind::LoadBalancer => virtual_address(number, case.v6)?,
        };
        Ok(SocketAddr::new(
            address,
            FIRST_PORT + u16::try_from(number)?,
        ))
    }

    /// Asks, and requires what is expected.
    fn check(&self, case: Case) -> Result<()> {
        let to = self.to(case)?;
        let netns = match case.client {
            Client::Outside => &self.outside.client,
            Client::Pod => &self.client.netns,
            Client::Process => &self.cluster.node(CLIENTS).netns,
            Client::PodThere => &self.client_there.netns,
            Client::ProcessThere => &self.cluster.node(ASKED).netns,
        };
        let client = match case.client {
            Client::Outside => self.outside.address(case.v6)?,
            Client::Pod => self.client.address(case.v6)?,
            Client::Process => self.cluster.node(CLIENTS).address(case.v6)?,
            Client::PodThere => self.client_there.address(case.v6)?,
            Client::ProcessThere => self.cluster.node(ASKED).address(case.v6)?,
        };
        let answer = netns.run(|| witness::ask(case.protocol, to, PATIENCE));
        let expected = expected(case);
        let found = match (answer, expected) {
            (Err(error), Expected::Refused) if witness::is_refusal(&error) => return Ok(()),
            (Err(error), _) => return Err(error),
            (Ok(seen), _) => seen,
        };
        ensure!(expected != Expected::Refused, "served: {found:?}");
        let Seen {
            server,
            client: seen,
            own,
        } = &found;
        ensure!(server == case.place.server(), "another server: {found:?}");
        let is_right = if expected == Expected::OwnAddress {
            seen == &SocketAddr::new(client, own.port())
        } else {
            let has_port = match case.protocol {
                Protocol::Sctp => seen.port() == own.port(),
                Protocol::Tcp | Protocol::Udp => NAT_PORTS.contains(&seen.port()),
            };
            let address = match expected {
                Expected::OwnAddressNatPort => client,
                _ => self.cluster.node(ASKED).address(case.v6)?,
            };
            has_port && seen.ip() == address
        };
        ensure!(is_right, "{found:?}");
        Ok(())
    }
}

fn host_endpoints(node: &weir_tests::Node) -> Vec<Endpoint> {
    let addresses = node.addresses.iter();
    addresses
        .map(|address| Endpoint::ready(*address, &node.name, ""))
        .collect()
}

/// All protocols on one port number.
fn ports(port: u16, target: u16) -> [Port; 3] {
    let [tcp, udp] = Port::both(port, target);
    let sctp = Port {
        name: "sctp",
        protocol: Protocol::Sctp,
        port,
        target: port,
    };
    [tcp, udp, sctp]
}

fn service(name: &str, number: usize, kind: Kind, policy: Policy, ports: &[Port]) -> Result<Value> {
    let vips = weir_tests::cluster::cluster_ips(u8::try_from(number + 1)?);
    let mut service = objects::service(name, &vips, ports);
    let virtual_addresses = [
        virtual_address(number, false)?,
        virtual_address(number, true)?,
    ];
    service["spec"]["externalTrafficPolicy"] = json!(format!("{policy:?}"));
    match kind {
        Kind::NodePort => {
            service["spec"]["type"] = "NodePort".into();
            for (number, port) in ports.iter().enumerate() {
                service["spec"]["ports"][number]["nodePort"] = port.port.into();
            }
        }
        Kind::ExternalIp => service["spec"]["externalIPs"] = json!(virtual_addresses),
        Kind::LoadBalancer => {
            service["spec"]["type"] = "LoadBalancer".into();
            service["spec"]["allocateLoadBalancerNodePorts"] = false.into();
            let ingress = virtual_addresses.map(|ip| json!({"ip": ip, "ipMode": "VIP"}));
            service["status"]["loadBalancer"]["ingress"] = json!(ingress);
        }
    }
    Ok(service)
}

/// Goes over all cases, those of different clients and protocols beside each other.
fn go_over(bed: &Bed) -> Result<()> {
    let cases = Case::all();
    let count = Kind::ALL.len()
        * Policy::ALL.len()
        * Place::ALL.len()
        * 2
        * PROTOCOLS.len()
        * Client::ALL.len();
    ensure!(cases.len() == count, "{} cases of {count}", cases.len());
    let failures = Mutex::new(Vec::new());
    let per_thread = cases.len() / (PROTOCOLS.len() * Client::ALL.len());
    std::thread::scope(|scope| {
        for part in cases.chunks(per_thread) {
            let failures = &failures;
            scope.spawn(move || {
                for case in part {
                    if let Err(error) = bed.check(*case) {
                        let text = format!("{case:?}: {:?} expected: {error:#}", expected(*case));
                        failures.lock().expect("no thread panics").push(text);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().context("no thread panics")?;
    let shown = &failures[..failures.len().min(SHOWN)];
    ensure!(
        failures.is_empty(),
        "{} of {count} cases fail:\n{}",
        failures.len(),
        shown.join("\n")
    );
    Ok(())
}

#[test]
fn every_combination() -> TestResult {
    let bed = Bed::start("outside matrix", true)?;
    Ok(go_over(&bed)?)
}

/// With offloads on, wrong checksums pass unseen.
#[test]
fn every_combination_without_offloads() -> TestResult {
    let bed = Bed::start("outside plain", false)?;
    Ok(go_over(&bed)?)
}
