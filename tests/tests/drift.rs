//! What somebody else takes out of the kernel comes back, and what cannot be had is said.

use std::{fs, net::SocketAddr};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use weir_tests::{
    Cluster, Node, Pod, TestResult,
    cluster::{Way, cluster_ips},
    objects, process, traffic, wait_for,
};

const PORT: u16 = 8080;

/// Everything that a pod is used for: the node reaches it, and it reaches a Service.
fn works(node: &Node, server: &Pod, client: &Pod) -> Result<()> {
    for address in &server.addresses {
        let to = SocketAddr::new(*address, PORT);
        node.run(|| traffic::tcp_name(to))
            .with_context(|| format!("from the node to {to}"))?;
    }
    for vip in cluster_ips(10) {
        let to = SocketAddr::new(vip, 80);
        client
            .run(|| traffic::tcp_name(to))
            .with_context(|| format!("from a pod to {to}"))?;
    }
    Ok(())
}

fn problems(node: &Node) -> Result<String> {
    Ok(node.weir_json(&["status"])?["problems"].to_string())
}

#[test]
fn what_is_taken_away_comes_back() -> TestResult {
    let cluster = Cluster::builder("drift").start()?;
    let node = cluster.node("node1");
    let server = cluster.pod("node1", "server")?;
    let client = cluster.pod("node1", "client")?;
    let remote = cluster.pod("node2", "remote")?;
    let _servers = (server.serve(PORT)?, remote.serve(PORT)?);
    cluster.service_of_pods("web", &cluster_ips(10), PORT, &[&server, &remote])?;
    works(node, &server, &client)?;
    let endpoints = node.weir_json(&["endpoint", "list"])?;
    let device = endpoints[0]["host_ifname"]
        .as_str()
        .context("a pod has a device")?
        .to_owned();
    let links = node.bpf_root.join("links");
    let attached = || anyhow::Ok(fs::read_dir(&links)?.count());
    let before: usize = attached()?;

    let take_away: [(&str, &dyn Fn() -> Result<()>); 3] = [
        ("all programs are detached", &|| {
            for entry in fs::read_dir(&links)? {
                fs::remove_file(entry?.path())?;
            }
            Ok(())
        }),
        ("all routes of Weir are removed", &|| {
            for family in ["-4", "-6"] {
                let arguments = [family, "route", "flush", "proto", "157"];
                node.netns.tool("ip", &arguments)?;
            }
            Ok(())
        }),
        ("a pod's device goes down and up", &|| {
            for state in ["down", "up"] {
                node.netns
                    .tool("ip", &["link", "set", device.as_str(), state])?;
            }
            Ok(())
        }),
    ];
    for (what, take_away) in take_away {
        take_away().context(what)?;
        wait_for(what, 2 * traffic::TIMEOUT, || {
            works(node, &server, &client)?;
            anyhow::ensure!(attached()? == before, "programs are missing");
            let problems = problems(node)?;
            anyhow::ensure!(problems == "[]", "{problems}");
            Ok(Some(()))
        })?;
    }
    Ok(())
}

#[test]
fn a_node_that_cannot_be_reached_is_a_problem() -> TestResult {
    let cluster = Cluster::builder("unreachable").start()?;
    let node = cluster.node("node1");
    assert_eq!(problems(node)?, "[]");
    node.netns.tool("ip", &["link", "set", "eth0", "down"])?;
    wait_for("the node to be out of reach", traffic::TIMEOUT, || {
        let said = problems(node)?;
        for family in ["IPv4", "IPv6"] {
            let expected = format!("pods of node node2 cannot be reached by {family}");
            anyhow::ensure!(said.contains(&expected), "{said}");
        }
        Ok(Some(()))
    })?;
    Ok(())
}

#[test]
fn pins_that_are_gone_are_a_problem() -> TestResult {
    let cluster = Cluster::builder("pins").nodes(1).start()?;
    let node = cluster.node("node1");
    assert_eq!(problems(node)?, "[]");
    fs::remove_file(node.bpf_root.join("maps/FLOWS_V4")).context("remove a pin")?;
    let said = problems(node)?;
    assert!(
        said.contains("pins of maps are gone") && said.contains("FLOWS_V4"),
        "{said}"
    );
    fs::remove_dir_all(&node.bpf_root).context("remove every pin")?;
    let said = problems(node)?;
    assert!(said.contains("cannot read what is attached"), "{said}");
    Ok(())
}

/// The Node object says where what the node's processes send to Services comes from, and may be wrong.
#[test]
fn a_node_object_with_wrong_addresses_is_a_problem_and_services_are_reached() -> TestResult {
    let cluster = Cluster::builder("wrong addresses")
        .nodes(1)
        .translation(Way::ByPacket)
        .start()?;
    let node = &cluster.nodes()[0];
    let server = cluster.pod("node1", "server")?;
    let _servers = server.serve(PORT)?;
    cluster.service_of_pods("web", &cluster_ips(10), PORT, &[&server])?;
    cluster.wait_applied()?;
    assert_eq!(problems(node)?, "[]");
    let ranges = ["10.244.1.0/24", "fd00:244:0:1::/64"].map(str::to_owned);
    let with_addresses = |addresses: &[&str]| -> Result<()> {
        let addresses: Vec<_> = addresses
            .iter()
            .map(|address| address.parse())
            .collect::<Result<_, _>>()?;
        cluster.apply(&objects::node("node1", &addresses, &ranges))?;
        cluster.wait_applied()
    };
    let reaches = |vips: &[std::net::IpAddr]| -> Result<()> {
        for vip in vips {
            let to = SocketAddr::new(*vip, 80);
            for protocol in traffic::Protocol::ALL {
                node.run(|| traffic::name(protocol, to))
                    .with_context(|| format!("{protocol:?} to {to}"))?;
            }
        }
        Ok(())
    };

    let foreign = ["192.0.2.77", "2001:db8::77"];
    with_addresses(&foreign)?;
    wait_for("routes without a source", traffic::TIMEOUT, || {
        let said = problems(node)?;
        for address in foreign {
            let expected = format!("{address}, which no device of this node has");
            anyhow::ensure!(said.contains(&expected), "{said}");
        }
        Ok(Some(()))
    })?;
    reaches(&cluster_ips(10)).context("with a foreign address")?;

    // A device gets them: now they are the source.
    for address in foreign {
        let arguments = ["address", "add", address, "dev", "lo"];
        let arguments: Vec<&str> = arguments.into_iter().collect();
        node.netns.tool("ip", &arguments)?;
    }
    wait_for("the problems to go", traffic::TIMEOUT, || {
        let said = problems(node)?;
        anyhow::ensure!(said == "[]", "{said}");
        Ok(Some(()))
    })?;
    reaches(&cluster_ips(10)).context("with an address of the loopback device")?;
    let own = |family: &str| {
        let arguments = [family, "route", "show", "table", "all", "proto", "157"];
        node.netns.tool("ip", &arguments)
    };
    for (family, source) in ["-4", "-6"].into_iter().zip(foreign) {
        let routes = own(family)?;
        assert!(routes.contains(&format!("src {source}")), "{routes}");
    }

    for (kept, lacks) in [(0, "IPv6"), (1, "IPv4")] {
        with_addresses(&foreign[kept..=kept])?;
        wait_for("the lack to be said", traffic::TIMEOUT, || {
            let said = problems(node)?;
            let expected = format!("status.addresses has no {lacks} address");
            anyhow::ensure!(said.contains(&expected), "{said}");
            Ok(Some(()))
        })?;
        reaches(&cluster_ips(10)[kept..=kept]).context("with one family")?;
    }
    Ok(())
}

/// Somebody has cleaned the node up under a pod that runs.
#[test]
fn a_device_of_nobody_is_a_problem_until_it_is_gone() -> TestResult {
    let cluster = Cluster::builder("orphan").nodes(1).start()?;
    let node = cluster.node("node1");
    let pod = cluster.pod("node1", "pod")?;
    node.agent().stop(Signal::SIGTERM)?;
    let mut command = node.agent().command(&node.netns)?;
    command.arg("cleanup");
    process::run(&mut command, b"", traffic::TIMEOUT)?;
    node.start_agent()?;
    let found = problems(node)?;
    assert!(found.contains("looks like a pod's"), "{found}");
    pod.delete()?;
    wait_for("the device to be forgotten", traffic::TIMEOUT, || {
        let left = problems(node)?;
        ensure!(!left.contains("looks like a pod's"), "{left}");
        Ok(Some(()))
    })?;
    Ok(())
}
