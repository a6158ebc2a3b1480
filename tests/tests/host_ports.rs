//! Host ports as the runtime hands them on: who gets one, who is refused, and how long it is kept.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::json;
use weir_tests::{
    Cluster, Node, TestResult, objects,
    traffic::{self, Protocol, Server},
    wait_until,
};

/// `POD HOST-PORT/PROTOCOL` of every host port on a node.
fn host_ports(node: &Node) -> anyhow::Result<Vec<String>> {
    let list = node.weir_json(&["endpoint", "list"])?;
    let ports_of = |endpoint: &serde_json::Value| {
        let ports = endpoint["host_ports"].as_array().cloned();
        ports.unwrap_or_default()
    };
    let mut shown = Vec::new();
    for endpoint in list.as_array().into_iter().flatten() {
        let pod = endpoint["pod_name"].as_str().unwrap_or_default();
        for port in ports_of(endpoint) {
            let protocol = port["protocol"].as_str().unwrap_or_default();
            shown.push(format!("{pod} {}/{protocol}", port["host_port"]));
        }
    }
    Ok(shown)
}

/// Beside what upstream's "[sig-network] HostPort validates that there is no conflict between pods with
/// same hostPort but different hostIP and protocol" asks for: pods that do conflict.
#[test]
fn a_host_port_has_one_pod_until_that_is_gone() -> TestResult {
    let cluster = Cluster::builder("host ports").nodes(2).start()?;
    let node = cluster.node("node1");
    let [v4, v6] = [node.address(false)?, node.address(true)?];
    let mapping = |protocol: &str, host_ip: &str| json!([{"hostPort": 54323, "containerPort": 8080, "protocol": protocol, "hostIP": host_ip}]);
    let add = |name: &str, protocol: &str, host_ip: &str| {
        cluster.pod_with_host_ports("node1", name, &mapping(protocol, host_ip))
    };
    let first = add("first", "tcp", "127.0.0.1")?;
    let second = add("second", "tcp", &v4.to_string())?;
    let third = add("third", "udp", &v4.to_string())?;
    let fourth = add("fourth", "tcp", &v6.to_string())?;
    let expected = ["first TCP", "second TCP", "third UDP", "fourth TCP"];
    let expected = expected.map(|pod| pod.replace(' ', " 54323/"));
    let mut shown = host_ports(node)?;
    shown.sort_by_key(|port| expected.iter().position(|known| known == port));
    assert_eq!(shown, expected);
    // The loopback address stays on the loopback device.
    let routes = node
        .netns
        .tool("ip", &["route", "show", "table", "all", "proto", "157"])?;
    assert!(!routes.contains("127.0.0.1"), "{routes}");

    for (name, protocol, host_ip, other) in [
        ("same", "tcp", v4.to_string(), "default/second"),
        ("all", "tcp", String::new(), "default/"),
        ("all-v6", "tcp", "::".to_owned(), "default/fourth"),
        ("all-udp", "udp", "0.0.0.0".to_owned(), "default/third"),
    ] {
        let Err(error) = add(name, protocol, &host_ip) else {
            panic!("{name} got a host port that another pod has");
        };
        let text = format!("{error:#}");
        for part in [other, "54323", "hostPort"] {
            assert!(text.contains(part), "{part:?} is not in: {text}");
        }
    }
    // On another node it is free.
    cluster.pod_with_host_ports("node2", "elsewhere", &mapping("tcp", ""))?;

    let servers = [&first, &second, &third, &fourth].map(|pod| pod.serve(8080));
    let servers: Vec<_> = servers.into_iter().collect::<Result<_, _>>()?;
    let client = cluster.pod("node1", "client")?;
    let each_is_reached = |when: &str| -> anyhow::Result<()> {
        let localhost = IpAddr::from([127, 0, 0, 1]);
        for (from, name, protocol, host_ip) in [
            (&*node.netns, "first", Protocol::Tcp, localhost),
            (&client.netns, "second", Protocol::Tcp, v4),
            (&*node.netns, "second", Protocol::Tcp, v4),
            (&client.netns, "third", Protocol::Udp, v4),
            (&*node.netns, "third", Protocol::Udp, v4),
            (&client.netns, "fourth", Protocol::Tcp, v6),
            (&*node.netns, "fourth", Protocol::Tcp, v6),
        ] {
            let to = SocketAddr::new(host_ip, 54323);
            let answered = from.run(|| traffic::name(protocol, to));
            let answered = answered.with_context(|| format!("{name} {when}"))?;
            ensure!(answered == name, "{answered} answered at {to} {when}");
        }
        Ok(())
    };
    each_is_reached("at first")?;
    node.kill9_agent()?;
    each_is_reached("without an agent")?;
    node.start_agent()?;
    let mut after = host_ports(node)?;
    after.sort_by_key(|port| expected.iter().position(|known| known == port));
    assert_eq!(after, expected, "kept over a restart");
    each_is_reached("after the restart")?;
    // Sockets hold their namespace.
    drop(servers);
    add("late", "tcp", &v4.to_string())
        .map_or_else(|_| Ok(()), |_| anyhow::bail!("{v4} is taken"))?;

    second.delete()?;
    let second = add("second-again", "tcp", &v4.to_string())?;
    first.vanish()?;
    wait_until("the vanished pod's port", Duration::from_secs(20), || {
        Ok(!host_ports(node)?
            .iter()
            .any(|port| port.starts_with("first")))
    })?;
    second.delete()?;
    Ok(())
}

/// Otherwise whoever may make pods could take an address of others for all clients of a node, a DNS
/// server's or another node's.
#[test]
fn an_address_of_others_stays_theirs() -> TestResult {
    Ok(addresses_of_others()?)
}

fn addresses_of_others() -> anyhow::Result<()> {
    const PORT: u16 = 54_324;
    let cluster = Cluster::builder("host ports of others").nodes(2).start()?;
    let (node, other, outside) = (
        cluster.node("node1"),
        cluster.node("node2"),
        cluster.fabric(),
    );
    let client = cluster.pod("node1", "client")?;
    let mut servers = other.serve(PORT)?;
    let mut asked = Vec::new();
    for v6 in [false, true] {
        let beyond: IpAddr = if v6 { "fd00:77::1" } else { "192.168.77.1" }.parse()?;
        servers.push(Server::start(
            outside,
            SocketAddr::new(beyond, PORT),
            "outside",
        )?);
        // The way back to the pod.
        let pod = client.address(v6)?.to_string();
        let via = node.address(v6)?.to_string();
        outside.tool("ip", &["route", "add", &pod, "via", &via])?;
        asked.push((other.address(v6)?, "node2"));
        asked.push((beyond, "outside"));
    }
    let each_is_itself = |when: &str| -> anyhow::Result<()> {
        for (address, name) in &asked {
            for from in [&client.netns, &*node.netns] {
                for protocol in Protocol::ALL {
                    let to = SocketAddr::new(*address, PORT);
                    let answered = from.run(|| traffic::name(protocol, to));
                    let answered = answered.with_context(|| format!("{to} {when}"))?;
                    ensure!(answered == *name, "{answered} answered at {to} {when}");
                }
            }
        }
        Ok(())
    };
    each_is_itself("before")?;
    for (number, (address, _)) in asked.iter().enumerate() {
        let mapping = |protocol: &str| json!({"hostPort": PORT, "containerPort": 8080, "protocol": protocol, "hostIP": address});
        let mappings = json!([mapping("tcp"), mapping("udp")]);
        let pod = cluster.pod_with_host_ports("node1", &format!("greedy-{number}"), &mappings)?;
        servers.extend(pod.serve(8080)?);
    }
    node.wait_applied()?;
    each_is_itself("beside pods that ask for it")?;
    let problems = node.weir_json(&["status"])?["problems"].to_string();
    for (number, (address, _)) in asked.iter().enumerate() {
        let said = [
            format!("HostPort of pod default/greedy-{number}: "),
            format!("hostIP {address} is no loopback address and none that the Node node1 has"),
        ];
        for part in said {
            ensure!(problems.contains(&part), "{part:?} is not in {problems}");
        }
    }
    // An address that the Node gets is its own.
    let (address, _) = asked[0];
    let addresses = [&node.addresses[..], &[address]].concat();
    cluster.apply(&objects::node("node1", &addresses, &node.pod_cidrs))?;
    node.wait_applied()?;
    let problems = node.weir_json(&["status"])?["problems"].to_string();
    ensure!(!problems.contains("greedy-0"), "{problems}");
    ensure!(problems.contains("greedy-1"), "{problems}");
    Ok(())
}
