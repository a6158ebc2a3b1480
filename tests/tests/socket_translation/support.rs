//! A cluster with endpoints on two nodes, and sockets by the system's own calls.

use std::{
    io::{BufRead as _, BufReader},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};
use serde_json::Value;
use weir_tests::{
    Cluster, Node, Pod,
    cluster::cluster_ips,
    netns::NetNs,
    objects::{self, Port},
    traffic::{self, Server},
};

/// Port of Services and of their endpoints.
pub const PORT: u16 = 80;
pub const TARGET: u16 = 8080;
/// Port of the node that leads to the Service.
pub const NODE_PORT: u16 = 30_080;
/// Longer than any refusal takes, shorter than the first SYN is sent again.
const AT_ONCE: Duration = Duration::from_millis(900);

/// Two nodes; the Service `web` at ClusterIPs 10 and NodePort 30080 has an endpoint on each.
#[derive(Debug)]
pub struct Setup {
    pub cluster: Cluster,
    /// A pod on node1.
    pub client: Pod,
    /// The endpoints: `here` on node1 and `far` on node2.
    pub endpoints: Vec<Pod>,
    servers: Vec<Server>,
}

impl Setup {
    /// `change` changes the Service before it is applied.
    pub fn start(name: &str, change: impl FnOnce(&mut Value)) -> Result<Self> {
        Self::start_with(name, &[], change)
    }

    /// As [`Self::start`], with more arguments for the agents.
    pub fn start_with(
        name: &str,
        arguments: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> Result<Self> {
        let cluster = Cluster::builder(name).agent_arguments(arguments).start()?;
        let mut servers = Vec::new();
        let mut pods = Vec::new();
        for (node, name) in [("node1", "here"), ("node2", "far")] {
            let pod = cluster.pod(node, name)?;
            servers.extend(pod.serve(TARGET)?);
            pods.push(pod);
        }
        let mut service = objects::service("web", &cluster_ips(10), &Port::both(PORT, TARGET));
        service["spec"]["type"] = "NodePort".into();
        for port in service["spec"]["ports"]
            .as_array_mut()
            .into_iter()
            .flatten()
        {
            port["nodePort"] = NODE_PORT.into();
        }
        change(&mut service);
        cluster.apply(&service)?;
        let endpoints: Vec<_> = pods.iter().flat_map(Pod::endpoints).collect();
        cluster.endpoints("web", TARGET, &endpoints)?;
        let client = cluster.pod("node1", "client")?;
        cluster.wait_applied()?;
        Ok(Self {
            cluster,
            client,
            endpoints: pods,
            servers,
        })
    }

    /// The endpoints stay, and nobody listens there any more.
    pub fn stop_servers(&mut self) {
        self.servers.clear();
    }

    pub fn node(&self) -> &Node {
        self.cluster.node("node1")
    }

    /// The namespaces that clients are in.
    pub fn clients(&self) -> [(&'static str, &NetNs); 2] {
        [("pod", &self.client.netns), ("node", &self.node().netns)]
    }

    /// Requires that one of the endpoints has answered.
    #[track_caller]
    pub fn is_endpoint(&self, name: &str) {
        let mut known = self.endpoints.iter().map(|pod| &pod.name);
        assert!(known.any(|known| known == name), "{name:?} is no endpoint");
    }
}

/// ClusterIPs of a number: IPv4, IPv6, and the first in IPv6 form.
pub fn addresses(number: u8) -> [IpAddr; 3] {
    let [v4, v6] = cluster_ips(number);
    [v4, v6, mapped(v4)]
}

/// An IPv4 address in IPv6 form (RFC 4291 section 2.5.5.2).
pub fn mapped(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        v6 => v6,
    }
}

/// Connections in the flow table of a node.
pub fn flows(node: &Node) -> Result<usize> {
    let list = node.weir_json(&["bpf", "flow", "list"])?;
    Ok(list.as_array().map_or(0, Vec::len))
}

/// A count of `weir status` over all hooks: of an outcome, or of a drop reason.
pub fn counted(node: &Node, name: &str) -> Result<u64> {
    let status = node.weir_json(&["status"])?;
    let counters = status["counters"].as_array().cloned().unwrap_or_default();
    Ok(counters
        .iter()
        .filter(|counter| counter["name"] == name)
        .filter_map(|counter| weir_tests::node::number(&counter["packets"]))
        .sum())
}

/// A TCP connection as the process sees it: its peer, and who greets.
pub fn greeted(stream: TcpStream) -> Result<(SocketAddr, String, TcpStream)> {
    stream.set_read_timeout(Some(traffic::TIMEOUT))?;
    let peer = stream.peer_addr().context("getpeername")?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    Ok((peer, line.trim_end().to_owned(), stream))
}

/// A TCP socket, bound to a port of the kernel's choice before it is connected.
pub fn connect_bound(to: SocketAddr) -> Result<TcpStream> {
    let any = match to.ip() {
        IpAddr::V4(_) => "0.0.0.0:0".parse()?,
        IpAddr::V6(_) => SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0),
    };
    let socket = tcp_socket(to, SockFlag::empty())?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(any))?;
    connect_socket(&socket, to)?;
    Ok(TcpStream::from(socket))
}

/// An unbound TCP socket of the family of `to`.
pub fn tcp_socket(to: SocketAddr, flags: SockFlag) -> Result<OwnedFd> {
    let family = if to.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    Ok(socket(family, SockType::Stream, flags, None)?)
}

/// `connect()`.
pub fn connect_socket(socket: &OwnedFd, to: SocketAddr) -> nix::Result<()> {
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))
}

/// Requires that `connect()` says ECONNREFUSED, before anything could have been sent twice.
pub fn is_refused_at_once(from: &NetNs, to: SocketAddr) -> Result<()> {
    let begin = Instant::now();
    let result = from.run(|| TcpStream::connect_timeout(&to, traffic::TIMEOUT).map(drop));
    let took = begin.elapsed();
    let Err(error) = result else {
        anyhow::bail!("{to} accepts");
    };
    ensure!(
        error.kind() == std::io::ErrorKind::ConnectionRefused && took < AT_ONCE,
        "{to}: {error} after {took:?}"
    );
    Ok(())
}
