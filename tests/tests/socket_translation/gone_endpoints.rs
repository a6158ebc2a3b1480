//! Connections whose endpoint is removed from the Service end, where the setting says so, and no others.

use std::{
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::Signal,
        socket::{SockFlag, getsockopt, sockopt::SocketError},
        stat::Mode,
    },
    unistd::mkfifo,
};
use weir_tests::{
    Node, Pod, TestResult,
    cluster::cluster_ips,
    netns::{self, NetNs},
    node::number,
    objects::{self, Endpoint, Port},
    traffic, wait_for,
};

use crate::support::{
    NODE_PORT, PORT, Setup, TARGET, addresses, connect_socket, greeted, mapped, tcp_socket,
};

const ON: [&str; 2] = ["--end-sockets-of-gone-endpoints", "true"];
/// Longer than an agent takes to notice on a busy machine, much shorter than TCP takes to give up.
const DEADLINE: Duration = Duration::from_secs(20);
/// Connections that are tried until one goes to a given endpoint, of two.
const ATTEMPTS: usize = 64;

/// An open connection, and what it is for people.
struct Connection {
    what: String,
    stream: TcpStream,
}

/// A connection that the endpoint `name` has greeted.
fn connect(from: (&str, &NetNs), to: SocketAddr, name: &str) -> Result<Connection> {
    let (who, netns) = from;
    let what = format!("{who} to {to}, {name}");
    for _ in 0..ATTEMPTS {
        let open = || greeted(TcpStream::connect_timeout(&to, traffic::TIMEOUT)?);
        let (_, found, stream) = netns.run(open).with_context(|| what.clone())?;
        if found == name {
            return Ok(Connection { what, stream });
        }
    }
    bail!("{what}: it never answered in {ATTEMPTS} connections")
}

/// Connections of all clients to the ClusterIPs of a number.
fn connect_all(setup: &Setup, service: u8, name: &str) -> Result<Vec<Connection>> {
    let mut open = Vec::new();
    for from in setup.clients() {
        for address in addresses(service) {
            open.push(connect(from, SocketAddr::new(address, PORT), name)?);
        }
    }
    Ok(open)
}

/// Connections of all clients to a pod's own addresses.
fn connect_directly(setup: &Setup, pod: &Pod) -> Result<Vec<Connection>> {
    let mut open = Vec::new();
    let own = pod.addresses.iter().copied();
    let own: Vec<IpAddr> = own.chain([mapped(pod.addresses[0])]).collect();
    for from in setup.clients() {
        for address in &own {
            open.push(connect(from, SocketAddr::new(*address, TARGET), &pod.name)?);
        }
    }
    Ok(open)
}

/// Clients that wait for something to read; gives how each wait ends.
fn waiting(
    connections: Vec<Connection>,
) -> Vec<(String, thread::JoinHandle<std::io::Result<usize>>)> {
    connections
        .into_iter()
        .map(|Connection { what, mut stream }| {
            let wait = move || {
                stream.set_read_timeout(Some(DEADLINE))?;
                stream.read(&mut [0])
            };
            (what, thread::spawn(wait))
        })
        .collect()
}

/// Requires that all waits end with ECONNABORTED, which no peer can cause.
fn are_aborted(waits: Vec<(String, thread::JoinHandle<std::io::Result<usize>>)>) -> Result<()> {
    for (what, wait) in waits {
        let ended = wait
            .join()
            .map_err(|_| anyhow::anyhow!("a client panicked"))?;
        let is_aborted =
            matches!(&ended, Err(error) if error.kind() == ErrorKind::ConnectionAborted);
        ensure!(is_aborted, "{what}: {ended:?}");
    }
    Ok(())
}

/// Sends a byte and waits for its echo.
fn work(connections: &mut [Connection], is_first: bool) -> Result<()> {
    for Connection { what, stream } in connections {
        let mut echo = || -> std::io::Result<u8> {
            if is_first {
                stream.write_all(b"E")?;
            }
            stream.write_all(b"x")?;
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            Ok(byte[0])
        };
        let byte = echo().with_context(|| what.clone())?;
        ensure!(byte == b'x', "{what}: {byte}");
    }
    Ok(())
}

/// Waits until the agent has counted this many ended sockets and looks for no more.
fn wait_ended(node: &Node, expected: usize) -> Result<()> {
    let what = format!("{expected} sockets to be ended");
    wait_for(&what, DEADLINE, || {
        let sockets = node.weir_json(&["status"])?["ended_sockets"].clone();
        let found = number(&sockets["ended"]).unwrap_or_default();
        let is_over = sockets["looking"] != true;
        ensure!(found == expected as u64 && is_over, "{sockets}");
        Ok(Some(()))
    })?;
    let status = node.weir_json(&["status"])?;
    ensure!(status["problems"] == serde_json::json!([]), "{status}");
    Ok(())
}

/// The Service `name` at the ClusterIPs of a number, with pods as endpoints.
fn service(setup: &Setup, name: &str, number: u8, pods: &[&Pod]) -> Result<()> {
    let ports = Port::both(PORT, TARGET);
    setup
        .cluster
        .apply(&objects::service(name, &cluster_ips(number), &ports))?;
    set_endpoints(setup, name, pods.iter().flat_map(|pod| pod.endpoints()))
}

fn set_endpoints(
    setup: &Setup,
    name: &str,
    endpoints: impl Iterator<Item = Endpoint>,
) -> Result<()> {
    let endpoints: Vec<Endpoint> = endpoints.collect();
    setup.cluster.endpoints(name, TARGET, &endpoints)?;
    setup.cluster.wait_applied()
}

#[test]
fn connections_to_a_removed_endpoint_end_and_no_others() -> TestResult {
    let setup = Setup::start_with("gone", &ON, |_| {})?;
    let (here, far) = (&setup.endpoints[0], &setup.endpoints[1]);
    service(&setup, "keeps", 11, &[far])?;

    let mut doomed = connect_all(&setup, 10, "far")?;
    let node = setup.node();
    let own = node.addresses.iter().copied();
    let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    for address in own.chain(loopback) {
        let to = SocketAddr::new(address, NODE_PORT);
        doomed.push(connect(("node", &node.netns), to, "far")?);
    }
    let mut lasting = connect_all(&setup, 10, "here")?;
    lasting.extend(connect_all(&setup, 11, "far")?);
    lasting.extend(connect_directly(&setup, far)?);
    work(&mut lasting, true)?;
    let count = doomed.len();
    let waits = waiting(doomed);

    set_endpoints(&setup, "web", here.endpoints().into_iter())?;
    are_aborted(waits)?;
    wait_ended(node, count)?;
    work(&mut lasting, false)?;
    Ok(())
}

/// Nobody is there who could answer, and so nobody but the agent ends the wait.
#[test]
fn clients_of_a_dead_endpoint_need_not_wait() -> TestResult {
    let setup = Setup::start_with("gone dead", &ON, |_| {})?;
    let (here, far) = (&setup.endpoints[0], &setup.endpoints[1]);
    service(&setup, "single", 11, &[far])?;
    let open = connect_all(&setup, 10, "far")?;
    // What is closed but not acknowledged, too: it is counted with the rest.
    let closed = connect_all(&setup, 10, "far")?;
    far.netns.ip("link set eth0 down")?;
    let half_closed = closed.len();
    for Connection { what, stream } in &closed {
        let shut = stream.shutdown(std::net::Shutdown::Write);
        shut.with_context(|| what.clone())?;
    }
    let connecting = begin_all(&setup, 11)?;
    let count = open.len() + half_closed + connecting.len();
    let waits = waiting(open.into_iter().chain(closed).collect());

    set_endpoints(&setup, "web", here.endpoints().into_iter())?;
    set_endpoints(&setup, "single", std::iter::empty())?;
    are_aborted(waits)?;
    for (what, socket) in connecting {
        let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        let timeout = PollTimeout::try_from(DEADLINE).context("a time-out")?;
        assert_eq!(
            poll(&mut ready, timeout).context("poll")?,
            1,
            "{what} waits"
        );
        let error = getsockopt(&socket, SocketError).context("SO_ERROR")?;
        assert_eq!(Errno::from_raw(error), Errno::ECONNABORTED, "{what}");
    }
    wait_ended(setup.node(), count)?;
    Ok(())
}

/// Connections that nobody answers.
fn begin_all(setup: &Setup, service: u8) -> Result<Vec<(String, OwnedFd)>> {
    let mut begun = Vec::new();
    for (who, netns) in setup.clients() {
        for address in addresses(service) {
            let to = SocketAddr::new(address, PORT);
            let socket = netns.run(|| -> Result<OwnedFd> {
                let socket = tcp_socket(to, SockFlag::SOCK_NONBLOCK)?;
                let begun = connect_socket(&socket, to);
                ensure!(begun == Err(Errno::EINPROGRESS), "{begun:?}");
                Ok(socket)
            })?;
            begun.push((format!("{who} to {to}"), socket));
        }
    }
    Ok(begun)
}

/// What is asked for an endpoint that is removed counts at the moment when its sockets are ended: the
/// agent is held between the node's sockets and those of the pod by a pipe in place of a namespace.
#[test]
fn connections_to_an_endpoint_that_came_back_go_on() -> TestResult {
    let setup = Setup::start_with("gone back", &ON, |_| {})?;
    let (here, far) = (&setup.endpoints[0], &setup.endpoints[1]);
    // The look at all sockets that begins with the agent is over.
    wait_ended(setup.node(), 0)?;
    // The agent takes namespaces in the order of their paths.
    let gate = setup.cluster.pod("node1", "a-gate")?;
    let path = gate.netns.path();
    assert!(path < setup.client.netns.path());
    netns::remove(gate.netns.name());
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).context("a pipe")?;

    let [pod, node] = setup.clients().map(|(_, netns)| netns);
    let (mut doomed, mut lasting) = (Vec::new(), Vec::new());
    for address in addresses(10) {
        let to = SocketAddr::new(address, PORT);
        doomed.push(connect(("node", node), to, "far")?);
        lasting.push(connect(("pod", pod), to, "far")?);
    }
    work(&mut lasting, true)?;
    let count = doomed.len();
    let waits = waiting(doomed);
    set_endpoints(&setup, "web", here.endpoints().into_iter())?;
    are_aborted(waits)?;
    let both = here.endpoints().into_iter().chain(far.endpoints());
    set_endpoints(&setup, "web", both)?;
    let gate = wait_for("the agent at the pipe", DEADLINE, || {
        // Refused as long as nobody wants to read.
        let mut options = File::options();
        let options = options.write(true).custom_flags(libc::O_NONBLOCK);
        Ok(Some(options.open(&path)?))
    })?;
    drop(gate);
    wait_ended(setup.node(), count)?;
    work(&mut lasting, false)?;
    Ok(())
}

/// An endpoint that takes no new connections serves those that it has.
#[test]
fn connections_to_an_unused_endpoint_go_on_until_it_is_removed() -> TestResult {
    let setup = Setup::start_with("gone unused", &ON, |_| {})?;
    let (here, far) = (&setup.endpoints[0], &setup.endpoints[1]);
    let node = setup.node();
    let mut lasting = connect_all(&setup, 10, "far")?;
    work(&mut lasting, true)?;
    let mut ended = 0;
    // Each round removes another endpoint, so that the agent looks while `far` is not used.
    for (ready, terminating, number) in [(false, false, 11), (true, true, 12), (false, true, 13)] {
        service(&setup, "other", number, &[here])?;
        let marks = connect_all(&setup, number, "here")?;
        ended += marks.len();
        let waits = waiting(marks);
        let unused = far.endpoints().into_iter().map(|endpoint| Endpoint {
            ready,
            terminating,
            ..endpoint
        });
        set_endpoints(&setup, "web", here.endpoints().into_iter().chain(unused))?;
        set_endpoints(&setup, "other", std::iter::empty())?;
        are_aborted(waits)?;
        wait_ended(node, ended)?;
        work(&mut lasting, false)
            .with_context(|| format!("ready: {ready}, terminating: {terminating}"))?;
    }
    ended += lasting.len();
    let waits = waiting(lasting);
    set_endpoints(&setup, "web", here.endpoints().into_iter())?;
    are_aborted(waits)?;
    wait_ended(node, ended)?;
    Ok(())
}

/// The default; and what was missed meanwhile is found by an agent that starts with the setting.
#[test]
fn nothing_ends_by_default_and_the_rest_at_a_start_with_the_setting() -> TestResult {
    let setup = Setup::start("gone off", |_| {})?;
    let (here, far) = (&setup.endpoints[0], &setup.endpoints[1]);
    service(&setup, "keeps", 11, &[far])?;
    let node = setup.node();
    let mut doomed = connect_all(&setup, 10, "far")?;
    let mut lasting = connect_all(&setup, 10, "here")?;
    lasting.extend(connect_all(&setup, 11, "far")?);
    lasting.extend(connect_directly(&setup, far)?);
    work(&mut doomed, true)?;
    work(&mut lasting, true)?;
    set_endpoints(&setup, "web", here.endpoints().into_iter())?;
    // An agent with the setting looks after two seconds at most.
    for Connection { what, stream } in &mut doomed[..1] {
        let timeout = Some(Duration::from_secs(4));
        stream.set_read_timeout(timeout).context("a time-out")?;
        let read = stream.read(&mut [0]);
        let is_open = matches!(&read, Err(error) if error.kind() == ErrorKind::WouldBlock);
        assert!(is_open, "{what}: {read:?}");
    }
    work(&mut doomed, false)?;
    let status = node.weir_json(&["status"])?;
    assert!(status["ended_sockets"].is_null(), "{status}");

    let count = doomed.len();
    let waits = waiting(doomed);
    node.agent().stop(Signal::SIGTERM)?;
    node.agent().use_arguments(&ON);
    node.start_agent()?;
    are_aborted(waits)?;
    wait_ended(node, count)?;
    work(&mut lasting, false)?;
    Ok(())
}
