//! Upstream's `test/e2e/network/hostport.go`.

use std::{
    io::{BufRead as _, BufReader},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::{
    socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket,
        sockopt::SendTimeout,
    },
    time::{TimeVal, TimeValLike as _},
};
use serde_json::{Value, json};
use weir_tests::{
    Cluster, Pod, TestResult,
    netns::NetNs,
    traffic::{Protocol, Server},
};

use super::support::{is_refused, is_served_by};

const HOST_PORT: u16 = 54_323;
const CONTAINER_PORT: u16 = 8080;
/// Of each connection; upstream's.
const LIMIT_SECONDS: i64 = 5;
const LIMIT: Duration = Duration::from_secs(LIMIT_SECONDS.unsigned_abs());

/// A pod whose runtime asks for a HostPort, with a server on each of its addresses.
fn pod_with_host_port(
    cluster: &Cluster,
    name: &str,
    host_ip: IpAddr,
    protocol: Protocol,
) -> Result<(Pod, Vec<Server>)> {
    let pod = cluster.pod("node1", name)?;
    let node = &cluster.node("node1").netns;
    // The test bed adds pods without mappings: once more, with one.
    pod.call("DEL").result(node)?;
    let mut call = pod.call("ADD");
    let mut configuration: Value = serde_json::from_str(&call.configuration)?;
    configuration["capabilities"] = json!({"portMappings": true});
    configuration["runtimeConfig"] = json!({"portMappings": [{
        "hostPort": HOST_PORT,
        "containerPort": CONTAINER_PORT,
        "protocol": protocol.name().to_lowercase(),
        "hostIP": host_ip,
    }]});
    call.configuration = configuration.to_string();
    let result = call.result(node)?;
    let addresses = result["ips"].as_array().context("ips")?.iter();
    let servers = addresses
        .map(|ip| {
            let text = ip["address"].as_str().unwrap_or_default();
            let (address, _) = text.split_once('/').context("an address with its length")?;
            let address = SocketAddr::new(address.parse()?, CONTAINER_PORT);
            Server::start(&pod.netns, address, name)
        })
        .collect::<Result<_>>()?;
    Ok((pod, servers))
}

/// Tries of each client, as upstream's.
const TRIES: usize = 5;

/// A client whose socket is bound to an address of its own, as that of `curl --interface ADDRESS`: it
/// must be answered by `name`, every time.
fn is_served_from(
    client: &NetNs,
    from: IpAddr,
    protocol: Protocol,
    to: SocketAddr,
    name: &str,
) -> Result<()> {
    for _ in 0..TRIES {
        let answered = client
            .run(|| name_from(SocketAddr::new(from, 0), protocol, to))
            .with_context(|| format!("from {from} to {to} over {}", protocol.name()))?;
        ensure!(answered == name, "{answered} answered {from} at {to}");
    }
    Ok(())
}

fn name_from(from: SocketAddr, protocol: Protocol, to: SocketAddr) -> Result<String> {
    if protocol == Protocol::Udp {
        let socket = UdpSocket::bind(from)?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(LIMIT))?;
        socket.send(b"hostname")?;
        let mut answer = [0; 2048];
        let length = socket.recv(&mut answer)?;
        let name = answer[..length].split(|byte| *byte == 0).next();
        return Ok(String::from_utf8_lossy(name.unwrap_or_default()).into_owned());
    }
    let family = match from {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(family, SockType::Stream, flags, None)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(from))?;
    // Bounds the connection too.
    setsockopt(&socket, SendTimeout, &TimeVal::seconds(LIMIT_SECONDS))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(LIMIT))?;
    let mut name = String::new();
    BufReader::new(stream).read_line(&mut name)?;
    Ok(name.trim_end().to_owned())
}

/// "validates that there is no conflict between pods with same hostPort but different hostIP and
/// protocol [LinuxOnly]". Limit: 5 s for each connection.
#[test]
fn host_ports_are_told_apart_by_address_and_protocol() -> TestResult {
    let cluster = Cluster::builder("host port").start()?;
    let node = cluster.node("node1");
    for v6 in [false, true] {
        let localhost: IpAddr = if v6 {
            [0, 0, 0, 0, 0, 0, 0, 1].into()
        } else {
            [127, 0, 0, 1].into()
        };
        let own = node.address(v6)?;
        let asked = [
            ("pod1", localhost, Protocol::Tcp),
            ("pod2", own, Protocol::Tcp),
            ("pod3", own, Protocol::Udp),
        ];
        let mut pods = Vec::new();
        for (name, host_ip, protocol) in asked {
            let name = format!("{name}-v6-{v6}");
            pods.push(pod_with_host_port(&cluster, &name, host_ip, protocol)?);
        }
        for ((_, host_ip, protocol), (pod, _)) in asked.iter().zip(&pods) {
            let to = SocketAddr::new(*host_ip, HOST_PORT);
            is_served_by(&node.netns, *protocol, to, &[&pod.name])?;
            is_served_from(&node.netns, own, *protocol, to, &pod.name)?;
        }
        for (pod, servers) in pods {
            drop(servers);
            pod.delete()?;
        }
        for (_, host_ip, protocol) in asked {
            is_refused(&node.netns, protocol, SocketAddr::new(host_ip, HOST_PORT))?;
        }
    }
    Ok(())
}
