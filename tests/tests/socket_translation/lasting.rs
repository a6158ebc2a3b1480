//! What serves the node's sockets lasts as long as it should: over restarts and moves, until it is
//! switched off or cleaned up; and comes back when somebody takes it away.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs,
    net::{SocketAddr, TcpStream},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use weir_tests::{Node, TestResult, cluster::cluster_ips, process, traffic, wait_for};

use crate::support::{NODE_PORT, PORT, Setup, addresses, counted, flows, greeted};

/// `BPF_OBJ_GET` of <linux/bpf.h>.
const OBJ_GET: libc::c_long = 7;

#[repr(C)]
struct ObjGet {
    pathname: u64,
    descriptor: u32,
    flags: u32,
}

/// What `/proc/self/fdinfo` says of a pinned link.
fn link(pin: &Path) -> Result<BTreeMap<String, String>> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut arguments = ObjGet {
        pathname: path.as_ptr() as u64,
        descriptor: 0,
        flags: 0,
    };
    // SAFETY: the arguments are whole and of the size given; the path outlives the call.
    let descriptor = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            OBJ_GET,
            &raw mut arguments,
            size_of::<ObjGet>(),
        )
    };
    ensure!(
        descriptor >= 0,
        "{}: {}",
        pin.display(),
        std::io::Error::last_os_error()
    );
    // SAFETY: the kernel has just returned it.
    let file = unsafe { OwnedFd::from_raw_fd(i32::try_from(descriptor)?) };
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect())
}

/// A field of the links of programs at sockets, by the program's name.
fn socket_links(node: &Node, field: &str) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(node.bpf_root.join("links"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("sock_") {
            let about = link(&entry.path())?;
            let value = about
                .get(field)
                .with_context(|| format!("{name} has no {field}"))?;
            found.insert(name, value.clone());
        }
    }
    Ok(found)
}

/// How many programs there are at sockets.
const PROGRAMS: usize = 10;

/// TCP to each address of the Service, from the pod and the node; gives the open connections.
fn connect_all(setup: &Setup) -> Result<Vec<(SocketAddr, TcpStream)>> {
    let mut open = Vec::new();
    for (who, from) in setup.clients() {
        for address in addresses(10) {
            let to = SocketAddr::new(address, PORT);
            let (peer, name, stream) = from
                .run(|| greeted(TcpStream::connect_timeout(&to, traffic::TIMEOUT)?))
                .with_context(|| format!("{who} to {to}"))?;
            ensure!(peer == to, "{who}: {peer} instead of {to}");
            setup.is_endpoint(&name);
            open.push((to, stream));
        }
    }
    Ok(open)
}

fn check_peers(open: &[(SocketAddr, TcpStream)]) -> Result<()> {
    for (to, stream) in open {
        let peer = stream.peer_addr()?;
        ensure!(peer == *to, "{peer} instead of {to}");
    }
    Ok(())
}

/// UDP of the node to ClusterIPs: it goes by the node's own device.
fn udp_works(setup: &Setup) -> Result<()> {
    for address in cluster_ips(10) {
        let to = SocketAddr::new(address, PORT);
        setup.is_endpoint(&setup.node().run(|| traffic::udp_name(to, 32))?);
    }
    Ok(())
}

#[test]
fn programs_stay_over_kills_and_are_replaced_in_place() -> TestResult {
    let setup = Setup::start("sockets restart", |_| {})?;
    let node = setup.node();
    let open = connect_all(&setup)?;
    let (links, programs) = (
        socket_links(node, "link_id")?,
        socket_links(node, "prog_id")?,
    );
    assert_eq!(links.len(), PROGRAMS);
    node.kill9_agent()?;
    assert_eq!(socket_links(node, "link_id")?, links);
    check_peers(&open)?;
    let mut more = connect_all(&setup)?;
    udp_works(&setup)?;
    node.start_agent()?;
    node.wait_applied()?;
    assert_eq!(socket_links(node, "link_id")?, links, "the same links");
    let replaced = socket_links(node, "prog_id")?;
    for (name, program) in &replaced {
        assert_ne!(
            programs.get(name),
            Some(program),
            "{name} is the new agent's"
        );
    }
    more.extend(open);
    check_peers(&more)?;
    connect_all(&setup)?;
    udp_works(&setup)?;
    Ok(())
}

#[test]
fn another_cgroup_takes_them_over() -> TestResult {
    let setup = Setup::start("sockets move", |_| {})?;
    let node = setup.node();
    let above = setup
        .cluster
        .fabric()
        .cgroup()
        .context("the fabric has a cgroup")?;
    let open = connect_all(&setup)?;
    for cgroup in [above.path(), node.cgroup.path()] {
        node.agent().stop(Signal::SIGTERM)?;
        node.agent().use_cgroup(cgroup);
        node.start_agent()?;
        node.wait_applied()?;
        let id = fs::metadata(cgroup)
            .context("the cgroup")?
            .ino()
            .to_string();
        let now = socket_links(node, "cgroup_id")?;
        assert_eq!(now.len(), PROGRAMS);
        for (name, attached_to) in now {
            assert_eq!(attached_to, id, "{name}");
        }
        check_peers(&open)?;
        connect_all(&setup)?;
    }
    Ok(())
}

#[test]
fn without_translation_at_the_socket_the_devices_serve() -> TestResult {
    let setup = Setup::start("sockets off", |_| {})?;
    let node = setup.node();
    let restart = |value: &str| -> Result<()> {
        node.agent().stop(Signal::SIGTERM)?;
        node.agent()
            .use_arguments(&["--log", "debug", "--socket-translation", value]);
        node.start_agent()?;
        node.wait_applied()
    };
    restart("false")?;
    assert!(socket_links(node, "link_id")?.is_empty());
    let before = flows(node)?;
    let open = connect_all(&setup)?;
    assert_eq!(flows(node)?, before + 2 * open.len());
    udp_works(&setup)?;
    for address in &node.addresses {
        let to = SocketAddr::new(*address, NODE_PORT);
        setup.is_endpoint(&node.run(|| traffic::tcp_name(to))?);
        // Nobody keeps processes from the port.
        node.run(|| std::net::TcpListener::bind(to).map(drop))
            .context("bind")?;
    }
    assert_eq!(counted(node, "TRANSLATED")?, 0);
    restart("true")?;
    assert_eq!(socket_links(node, "link_id")?.len(), PROGRAMS);
    check_peers(&open)?;
    connect_all(&setup)?;
    assert_eq!(counted(node, "TRANSLATED")?, open.len() as u64);
    Ok(())
}

/// Devices, cgroup programs and routes of Services of a node.
fn host_devices(node: &Node) -> Result<Vec<String>> {
    let mut devices = node.netns.devices()?;
    devices.retain(|device| ["weir-host", "weir-net"].contains(&device.as_str()));
    devices.sort();
    Ok(devices)
}

fn routes(node: &Node) -> Result<String> {
    let mut all = String::new();
    for family in ["-4", "-6"] {
        let arguments = [family, "route", "show", "table", "all", "proto", "157"];
        all.push_str(&node.netns.tool("ip", &arguments)?);
    }
    Ok(all)
}

/// Where `from_host` is attached, as `weir status` says.
fn attached_to(node: &Node) -> Result<Vec<String>> {
    let status = node.weir_json(&["status"])?;
    let mut devices: Vec<String> = status["attachments"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|attachment| attachment["program"] == "from_host")
        .map(|attachment| attachment["device"].as_str().unwrap_or("gone").to_owned())
        .collect();
    devices.sort();
    Ok(devices)
}

#[test]
fn the_nodes_own_device_comes_back() -> TestResult {
    let setup = Setup::start("own device", |_| {})?;
    let node = setup.node();
    udp_works(&setup)?;
    for device in ["weir-host", "weir-net"] {
        node.netns.ip(&format!("link del {device}"))?;
        wait_for("the node's own device", 2 * traffic::TIMEOUT, || {
            ensure!(
                host_devices(node)? == ["weir-host", "weir-net"],
                "no device"
            );
            let attached = attached_to(node)?;
            ensure!(attached == ["lo", "weir-net"], "{attached:?} have programs");
            udp_works(&setup)?;
            let problems = node.weir_json(&["status"])?["problems"].to_string();
            ensure!(problems == "[]", "{problems}");
            Ok(Some(()))
        })
        .with_context(|| format!("after {device} was deleted"))?;
        let routes = routes(node)?;
        for address in cluster_ips(10) {
            let route = format!("{address} dev weir-host");
            assert!(routes.contains(&route), "{route} is not in {routes}");
        }
    }
    connect_all(&setup)?;
    Ok(())
}

#[test]
fn programs_that_were_detached_come_back() -> TestResult {
    let setup = Setup::start("sockets detached", |_| {})?;
    let node = setup.node();
    for entry in fs::read_dir(node.bpf_root.join("links")).context("links")? {
        let entry = entry.context("a link")?;
        if entry.file_name().to_string_lossy().starts_with("sock_") {
            fs::remove_file(entry.path()).context("remove a link")?;
        }
    }
    wait_for("programs of sockets", 2 * traffic::TIMEOUT, || {
        let there = socket_links(node, "link_id")?.len();
        ensure!(there == PROGRAMS, "{there} programs");
        Ok(Some(()))
    })?;
    connect_all(&setup)?;
    assert_eq!(flows(node)?, 0);
    Ok(())
}

#[test]
fn a_clean_up_takes_all_of_it() -> TestResult {
    let setup = Setup::start("sockets cleanup", |_| {})?;
    let node = setup.node();
    assert_eq!(host_devices(node)?, ["weir-host", "weir-net"]);
    let open = connect_all(&setup)?;
    node.agent().stop(Signal::SIGTERM)?;
    let mut command = node.agent().command(&node.netns)?;
    command.arg("cleanup");
    process::run(&mut command, b"", traffic::TIMEOUT)?;
    assert!(host_devices(node)?.is_empty());
    assert_eq!(routes(node)?, "");
    assert!(!node.bpf_root.join("links").exists());
    // What was connected at its socket goes on where the network carries it, and is what it is.
    for (to, stream) in &open {
        assert_ne!(stream.peer_addr().context("getpeername")?, *to);
    }
    let bound = node.run(|| std::net::TcpListener::bind(("0.0.0.0", NODE_PORT)));
    bound.context("the port is free")?;
    Ok(())
}
