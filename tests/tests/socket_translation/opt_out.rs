//! Who is translated at the socket: pods are known by their network namespace, and can opt out.

use std::{net::UdpSocket, os::fd::AsRawFd as _, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use weir_tests::{
    Cluster, Node, Pod, TestResult, cni::Call, netns::NetNs, node::number, objects, reaper,
    wait_until,
};

const KEY: &str = "weir.sh/socket-translation";

/// Row of a pod's endpoint in the kernel's table.
fn row(node: &Node, pod: &Pod) -> Result<Value> {
    let rows = node.weir_json(&["bpf", "endpoint", "list"])?;
    let address = pod.addresses[0].to_string();
    let is_pods = |row: &&Value| row["addresses"].to_string().contains(&address);
    let row = rows.as_array().into_iter().flatten().find(is_pods);
    Ok(row
        .with_context(|| format!("no row for {address}"))?
        .clone())
}

fn opted_out(node: &Node, pod: &Pod) -> Result<bool> {
    Ok(row(node, pod)?["flags"] == json!(["no-socket-translation"]))
}

/// `SO_NETNS_COOKIE` of a socket made inside.
fn cookie(pod: &Pod) -> Result<u64> {
    pod.run(|| {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let mut cookie = 0_u64;
        let mut length = libc::socklen_t::try_from(size_of::<u64>())?;
        // SAFETY: the kernel writes at most `length` bytes, the size of `cookie`.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        anyhow::ensure!(result == 0, "{}", std::io::Error::last_os_error());
        Ok(cookie)
    })
}

/// The Pod object with the annotation, or without.
fn say(cluster: &Cluster, pod: &Pod, annotation: Option<&str>) -> Result<()> {
    let mut object = objects::pod(&pod.name, "uid", &pod.node, &pod.addresses);
    if let Some(value) = annotation {
        object["metadata"]["annotations"] = json!({ KEY: value });
    }
    cluster.apply(&object)?;
    cluster.wait_applied()
}

fn say_of_all(cluster: &Cluster, label: Option<&str>) -> Result<()> {
    let mut object =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}});
    if let Some(value) = label {
        object["metadata"]["labels"] = json!({ KEY: value });
    }
    cluster.apply(&object)?;
    cluster.wait_applied()
}

#[test]
fn pods_opt_out_by_annotation_and_by_namespace() -> TestResult {
    let cluster = Cluster::builder("opt out").nodes(1).start()?;
    let node = cluster.node("node1");
    let one = cluster.pod("node1", "one")?;
    let other = cluster.pod("node1", "other")?;
    cluster.wait_applied()?;
    for pod in [&one, &other] {
        assert_eq!(number(&row(node, pod)?["netns_cookie"]), Some(cookie(pod)?));
        assert!(!opted_out(node, pod)?);
    }
    let generation = row(node, &one)?["generation"].clone();
    for (annotation, label, expected) in [
        (Some("disabled"), None, [true, false]),
        (Some("disabled"), Some("disabled"), [true, true]),
        (None, Some("disabled"), [true, true]),
        (Some("enabled"), Some("disabled"), [false, true]),
        (Some("enabled"), None, [false, false]),
        (Some("disabled"), Some("enabled"), [true, false]),
    ] {
        say(&cluster, &one, annotation)?;
        say_of_all(&cluster, label)?;
        let found = [opted_out(node, &one)?, opted_out(node, &other)?];
        assert_eq!(found, expected, "{annotation:?} {label:?}");
    }
    assert_eq!(row(node, &one)?["generation"], generation, "flows go on");

    // What stands in the kernel stays over a restart, also with a new pod of the same name later.
    node.kill9_agent()?;
    node.start_agent()?;
    assert!(opted_out(node, &one)?, "before the source was read");
    cluster.wait_applied()?;
    assert_eq!(
        [opted_out(node, &one)?, opted_out(node, &other)?],
        [true, false]
    );
    assert_eq!(
        number(&row(node, &one)?["netns_cookie"]),
        Some(cookie(&one)?)
    );
    node.kill9_agent()?;
    cluster.apply(&objects::pod(&one.name, "uid", &one.node, &one.addresses))?;
    node.start_agent()?;
    cluster.wait_applied()?;
    assert!(!opted_out(node, &one)?, "changed while no agent ran");
    Ok(())
}

/// The Pod object may be there before the runtime calls the plugin.
#[test]
fn a_pod_that_was_announced_opted_out_starts_opted_out() -> TestResult {
    let cluster = Cluster::builder("announced").nodes(1).start()?;
    let node = cluster.node("node1");
    let mut object = objects::pod("early", "uid", "node1", &[]);
    object["metadata"]["annotations"] = json!({ KEY: "disabled" });
    cluster.apply(&object)?;
    cluster.wait_applied()?;
    let netns = NetNs::create(&reaper::namespace_name(cluster.id(), "p-early"))?;
    let socket = node.run_dir.join("agent.sock");
    let path = netns.path();
    let mut call = Call::new(
        "ADD",
        &socket.to_string_lossy(),
        "early",
        &path.to_string_lossy(),
    );
    call.set_pod("default", "early", "uid");
    call.result(&node.netns)?;
    let rows = node.weir_json(&["bpf", "endpoint", "list"])?;
    assert_eq!(rows[0]["flags"], json!(["no-socket-translation"]));
    Ok(())
}

#[test]
fn values_that_cannot_be_are_told() -> TestResult {
    let cluster = Cluster::builder("bad opt out").nodes(1).start()?;
    let node = cluster.node("node1");
    let pod = cluster.pod("node1", "pod")?;
    say(&cluster, &pod, Some("off"))?;
    say_of_all(&cluster, Some("no"))?;
    let problems = || Ok::<_, anyhow::Error>(node.weir_json(&["status"])?["problems"].to_string());
    let text = problems()?;
    for part in [
        "Pod default/pod",
        "Namespace default",
        KEY,
        "off",
        "no",
        "remove it",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    assert!(!opted_out(node, &pod)?);
    say(&cluster, &pod, None)?;
    say_of_all(&cluster, None)?;
    wait_until("no problems", Duration::from_secs(10), || {
        Ok(!problems()?.contains(KEY))
    })?;
    Ok(())
}
