//! The test bed itself, without an agent: when this fails, look here first.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    process::Command,
    sync::mpsc,
};

use anyhow::Context as _;
use weir_tests::{
    Cluster, TestResult, cgroup, netns,
    netns::NetNs,
    process, reaper,
    traffic::{self, Connection, Protocol},
};

const PORT: u16 = 8080;

#[test]
fn nodes_reach_each_other_over_the_underlay() -> TestResult {
    let cluster = Cluster::builder("underlay").nodes(3).mtu(1400).wire()?;
    for node in cluster.nodes() {
        let _servers = node.serve(PORT)?;
        for client in cluster.nodes() {
            for address in &node.addresses {
                let to = SocketAddr::new(*address, PORT);
                for protocol in Protocol::ALL {
                    let name = client.run(|| traffic::name(protocol, to))?;
                    assert_eq!(name, node.name);
                }
                client.run(|| traffic::udp_name(to, 60_000))?;
                client.run(|| Connection::open(to)?.transfer(3_000_001, 999_999))?;
            }
        }
    }
    Ok(())
}

#[test]
fn transfers_work_without_offloads() -> TestResult {
    let cluster = Cluster::builder("offloads").wire()?;
    cluster.set_offloads(false)?;
    let _servers = cluster.node("node2").serve(PORT)?;
    for address in &cluster.node("node2").addresses {
        let to = SocketAddr::new(*address, PORT);
        let client = cluster.node("node1");
        client.run(|| Connection::open(to)?.transfer(1 << 20, 1 << 20))?;
    }
    Ok(())
}

/// The kernel keeps with each socket the cgroup of the thread that made it; `ss` asks for its name.
fn cgroup_of_listener(netns: &NetNs, to: SocketAddr) -> anyhow::Result<String> {
    let filter = format!("sport = {}", to.port());
    let text = netns.tool("ss", &["-Hltn", "--cgroup", &filter])?;
    let field = text
        .split_whitespace()
        .find_map(|f| f.strip_prefix("cgroup:"));
    Ok(field
        .with_context(|| format!("`ss` shows {text:?}"))?
        .to_owned())
}

#[test]
fn threads_processes_and_sockets_of_a_node_are_in_its_cgroup() -> TestResult {
    let before = cgroup::of_this_thread()?;
    let cluster = Cluster::builder("cgroups").wire()?;
    let domain = cgroup::of_this_thread()?;
    assert_ne!(domain, before);
    let [node1, node2] = cluster.nodes() else {
        panic!("not two nodes");
    };
    assert_ne!(node1.cgroup.name()?, node2.cgroup.name()?);
    let pod = NetNs::create(&reaper::namespace_name(cluster.id(), "p-pod"))?
        .in_cgroup(node1.cgroup.clone());
    let at_node1 = node1.cgroup.name()?;
    for (netns, wanted) in [
        (&*node1.netns, &at_node1),
        (&pod, &at_node1),
        (&*node2.netns, &node2.cgroup.name()?),
        (cluster.fabric(), &domain),
    ] {
        assert_eq!(&netns.run(cgroup::of_this_thread)?, wanted);
        // Also when the one who asks is in another.
        let nested = node2.run(|| netns.run(cgroup::of_this_thread))?;
        assert_eq!(&nested, wanted);
        let shown = node2.run(|| netns.tool("cat", &["/proc/self/cgroup"]))?;
        assert!(
            shown.lines().any(|l| l == format!("0::{wanted}")),
            "{shown}"
        );
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = netns.run(|| TcpListener::bind(address)).context("listen")?;
            let to = listener.local_addr().context("a listener's address")?;
            assert_eq!(&cgroup_of_listener(netns, to)?, wanted, "{address}");
        }
    }
    assert_eq!(cgroup::of_this_thread()?, domain);
    drop(cluster);
    assert_eq!(cgroup::of_this_thread()?, before);
    Ok(())
}

#[test]
fn a_dropped_cluster_leaves_nothing() -> TestResult {
    let cluster = Cluster::builder("dropped").wire()?;
    let id = cluster.id().to_owned();
    let prefix = reaper::namespace_name(&id, "");
    let mut sleeper = cluster
        .node("node1")
        .netns
        .command("sleep")?
        .arg("60")
        .spawn()
        .context("start a process in the node")?;
    let left = || {
        fs::read_dir(netns::DIRECTORY)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .count()
    };
    assert_eq!(left(), 3);
    assert!(reaper::state_directory(&id).exists());
    let node_cgroup = cluster.node("node1").cgroup.path().to_owned();
    assert!(node_cgroup.exists());
    // A thread that outlives the cluster keeps nothing of it.
    let (end, ended) = mpsc::channel::<()>();
    let thread = cluster.node("node1").netns.spawn(move || ended.recv())?;
    drop(cluster);
    let domain = node_cgroup.parent().context("a cgroup without parent")?;
    assert!(!domain.exists(), "{}", domain.display());
    drop(end);
    assert!(thread.join().is_ok_and(|received| received.is_err()));
    assert_eq!(left(), 0);
    assert!(!reaper::state_directory(&id).exists());
    let status = sleeper.wait().context("wait for the process")?;
    assert!(!status.success(), "it was killed");
    Ok(())
}

/// What a test that was killed leaves, with somebody inside: cgroups of a cluster that is known, and
/// of one of which nothing else is left.
#[test]
fn cgroups_of_the_dead_go() -> TestResult {
    let sleep = || Command::new("sleep").arg("60").spawn();
    let mut owner = sleep().context("run `sleep`")?;
    let pid = owner.id();
    let started = i32::try_from(pid).ok().and_then(process::start_time);
    let started = started.context("start time of `sleep`")?;
    // Tests that start just now must not take it for dead before it is.
    let state = reaper::state_directory(&format!("{pid}-0"));
    fs::create_dir_all(&state).context("make the state directory")?;
    fs::write(state.join("owner"), started.to_string()).context("write the owner")?;
    let domain = cgroup::mount_point()?.join(format!("weir-test-{pid}"));
    let mut sleepers = Vec::new();
    for node in [format!("{pid}-0-node1"), format!("{pid}-1-node1")] {
        let folder = domain.join(node);
        fs::create_dir_all(&folder).context("make cgroups")?;
        fs::write(folder.join("cgroup.type"), "threaded").context("make it threaded")?;
        let sleeper = sleep().context("run `sleep`")?;
        fs::write(folder.join("cgroup.procs"), sleeper.id().to_string()).context("move `sleep`")?;
        sleepers.push(sleeper);
    }
    let _one = Cluster::builder("beside the living").nodes(1).wire()?;
    assert!(domain.exists(), "its owner lives");
    owner.kill().context("kill the owner")?;
    owner.wait().context("wait for the owner")?;

    let cluster = Cluster::builder("after the dead").nodes(1).wire()?;
    assert!(!domain.exists(), "{}", domain.display());
    assert!(!state.exists(), "{}", state.display());
    for mut sleeper in sleepers {
        let status = sleeper.wait().context("wait for `sleep`")?;
        assert!(!status.success(), "it was killed");
    }
    assert!(cluster.node("node1").cgroup.path().exists());
    Ok(())
}
