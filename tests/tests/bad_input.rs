//! Bad input to plugin, agent and command line: a table of input and the text that must come back.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};
use weir_tests::{
    Cluster, TestResult, agent::binary, cni::Call, netns::NetNs, process, reaper, wait_until,
};

const TIMEOUT: Duration = Duration::from_secs(20);

/// What is wrong with a call of the plugin, how it is made wrong, the code, and words of the message.
type BadCall = (&'static str, fn(&mut Call), u64, &'static [&'static str]);

const BAD_CALLS: &[BadCall] = &[
    (
        "no command",
        |c| c.unset("CNI_COMMAND"),
        4,
        &["CNI_COMMAND"],
    ),
    (
        "unknown command",
        |c| c.set("CNI_COMMAND", "JUMP"),
        4,
        &["CNI_COMMAND", "JUMP"],
    ),
    (
        "no container",
        |c| c.unset("CNI_CONTAINERID"),
        4,
        &["CNI_CONTAINERID"],
    ),
    (
        "bad container",
        |c| c.set("CNI_CONTAINERID", "a/../b"),
        4,
        &["CNI_CONTAINERID", "a/../b"],
    ),
    ("no namespace", |c| c.unset("CNI_NETNS"), 4, &["CNI_NETNS"]),
    (
        "absent namespace",
        |c| c.set("CNI_NETNS", "/run/netns/weir-none"),
        3,
        &["CNI_NETNS", "/run/netns/weir-none"],
    ),
    ("no device", |c| c.unset("CNI_IFNAME"), 4, &["CNI_IFNAME"]),
    (
        "long device",
        |c| c.set("CNI_IFNAME", "much-too-long-a-name"),
        4,
        &["CNI_IFNAME", "much-too-long-a-name"],
    ),
    (
        "device with slash",
        |c| c.set("CNI_IFNAME", "a/b"),
        4,
        &["CNI_IFNAME", "a/b"],
    ),
    (
        "no configuration",
        |c| c.configuration.clear(),
        6,
        &["standard input"],
    ),
    (
        "half a configuration",
        |c| c.configuration.truncate(20),
        6,
        &["line"],
    ),
    ("a list", |c| c.configuration = "[]".into(), 6, &[]),
    (
        "unsupported version",
        |c| edit(c, "cniVersion", json!("9.0.0")),
        1,
        &["9.0.0", "1.1.0"],
    ),
    (
        "version of the wrong type",
        |c| edit(c, "cniVersion", json!(1)),
        7,
        &["cniVersion"],
    ),
    ("no name", |c| edit(c, "name", Value::Null), 7, &["name"]),
    (
        "relative socket",
        |c| edit(c, "agentSocket", json!("agent.sock")),
        7,
        &["agentSocket"],
    ),
    (
        "absent socket",
        |c| edit(c, "agentSocket", json!("/run/weir-none/agent.sock")),
        11,
        &["/run/weir-none/agent.sock"],
    ),
];

fn edit(call: &mut Call, key: &str, value: Value) {
    let mut configuration: Value =
        serde_json::from_str(&call.configuration).expect("a configuration of ours");
    if value.is_null() {
        configuration
            .as_object_mut()
            .expect("a configuration of ours")
            .remove(key);
    } else {
        configuration[key] = value;
    }
    call.configuration = configuration.to_string();
}

#[test]
fn the_plugin_says_what_is_wrong() -> TestResult {
    // Each is found before the agent is asked, or by its absence.
    let cluster = Cluster::builder("bad calls").nodes(1).wire()?;
    let node = &cluster.nodes()[0];
    let pod = NetNs::create(&reaper::namespace_name(cluster.id(), "p-pod"))?;
    let socket = node.agent().socket();
    let mut wrong = Vec::new();
    for (what, spoil, code, words) in BAD_CALLS {
        let netns = pod.path();
        let mut call = Call::new(
            "ADD",
            &socket.to_string_lossy(),
            "pod",
            &netns.to_string_lossy(),
        );
        spoil(&mut call);
        let output = call.run(&node.netns)?;
        let error: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("{what}: {output:?}"))?;
        let message = format!("{} {}", error["msg"], error["details"]);
        if output.status.success()
            || error["code"] != *code
            || !error["cniVersion"].is_string()
            || !words.iter().all(|word| message.contains(word))
        {
            wrong.push(format!(
                "{what}: expected code {code} and {words:?}: {error}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

#[test]
fn the_plugin_tells_its_versions() -> TestResult {
    let cluster = Cluster::builder("versions").nodes(1).wire()?;
    let mut call = Call::new("VERSION", "/run/weir/agent.sock", "x", "");
    call.unset("CNI_CONTAINERID");
    call.unset("CNI_NETNS");
    call.unset("CNI_IFNAME");
    let result = call.result(&cluster.nodes()[0].netns)?;
    let versions = result["supportedVersions"].as_array().context("versions")?;
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        assert!(versions.iter().any(|v| v == version), "{version}: {result}");
    }
    Ok(())
}

#[test]
fn results_have_the_shape_of_the_version_asked_for() -> TestResult {
    let cluster = Cluster::builder("result versions").nodes(1).start()?;
    let node = &cluster.nodes()[0];
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let pod = cluster.pod("node1", "pod")?;
        pod.call("DEL").result(&node.netns)?;
        let mut call = pod.call("ADD");
        edit(&mut call, "cniVersion", json!(version));
        let result = call.result(&node.netns)?;
        assert_eq!(result["cniVersion"], version);
        let ips = result["ips"].as_array().context("ips")?;
        assert_eq!(ips.len(), 2);
        // Before 1.0.0 each address carried its family.
        let old = version.starts_with('0');
        assert_eq!(ips[0]["version"] == "4", old, "{result}");
        let sandbox = &result["interfaces"][1]["sandbox"];
        assert_eq!(
            sandbox,
            &json!(pod.netns.path().to_string_lossy()),
            "{result}"
        );
        pod.delete()?;
    }
    Ok(())
}

/// Arguments of the agent, and words of the error.
const BAD_ARGUMENTS: &[(&[&str], &[&str])] = &[
    (&["--source", "dir:relative"], &["source", "dir:relative"]),
    (&["--source", "ftp://x"], &["source", "ftp://x"]),
    (&["--connections", "many"], &["connections", "many"]),
    (&["--mtu", "12"], &["mtu", "12"]),
    (&["--log-format", "poetry"], &["log-format", "poetry"]),
    (&["--devices", "a-name-that-is-too-long"], &["devices"]),
    (&["--run-dir", "relative"], &["run-dir", "relative"]),
    (
        &["--config", "/nonexistent/weir.yaml"],
        &["/nonexistent/weir.yaml"],
    ),
    (&["--no-such-flag"], &["--no-such-flag"]),
];

#[test]
fn the_agent_says_which_setting_is_wrong() -> TestResult {
    let cluster = Cluster::builder("bad settings").nodes(1).wire()?;
    let node = &cluster.nodes()[0];
    let mut wrong = Vec::new();
    for (arguments, words) in BAD_ARGUMENTS {
        let mut command = node.netns.command(binary("weir-agent")?)?;
        command.args(["--node-name", "node1"]).args(*arguments);
        let has = |flag| arguments.contains(&flag);
        if !has("--source") {
            command
                .arg("--source")
                .arg(format!("dir:{}", cluster.objects().directory().display()));
        }
        if !has("--run-dir") {
            command.arg("--run-dir").arg(&node.run_dir);
        }
        command.arg("--bpf-root").arg(&node.bpf_root);
        let output = process::output(&mut command, b"", TIMEOUT)
            .with_context(|| format!("{arguments:?}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !matches!(output.status.code(), Some(1 | 2))
            || !words.iter().all(|word| said.contains(word))
        {
            wrong.push(format!("{arguments:?}: expected {words:?}: {output:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

/// Documents that cannot be read, and words of what `weir status` says of them.
const BAD_DOCUMENTS: &[(&str, &str, &[&str])] = &[
    (
        "syntax.yaml",
        "kind: Service\nmetadata: {\n",
        &["syntax.yaml"],
    ),
    (
        "port.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: d}\nspec:\n  ports:\n  - port: eighty\n",
        &["port.yaml", "6"],
    ),
    (
        "second.yaml",
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: fine}\n---\nkind: [\n",
        &["second.yaml"],
    ),
    (
        "nameless.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {}\n",
        &["nameless.yaml", "name"],
    ),
];

#[test]
fn a_bad_document_is_reported_and_the_others_stay() -> TestResult {
    let cluster = Cluster::builder("bad documents").nodes(1).start()?;
    let node = &cluster.nodes()[0];
    let vips = weir_tests::cluster::cluster_ips(10);
    cluster.service("web", &vips, 8080, &[])?;
    for (file, text, words) in BAD_DOCUMENTS {
        cluster.objects().write(file, text)?;
        wait_until(&format!("{file} to be reported"), TIMEOUT, || {
            let status = node.weir_json(&["status"])?;
            let errors = status["source"]["errors"].to_string();
            Ok(words.iter().all(|word| errors.contains(word)))
        })?;
        let services = node.weir_json(&["service", "list"])?.to_string();
        assert!(services.contains("web"), "{file}: {services}");
        std::fs::remove_file(cluster.objects().directory().join(file))
            .with_context(|| format!("remove {file}"))?;
        wait_until(&format!("{file} to be forgotten"), TIMEOUT, || {
            let status = node.weir_json(&["status"])?;
            Ok(!status["source"]["errors"].to_string().contains(file))
        })?;
    }
    Ok(())
}

/// Arguments of `weir`, and words of the error.
const BAD_COMMANDS: &[(&[&str], &[&str])] = &[
    (
        &["--socket", "/nonexistent.sock", "status"],
        &["/nonexistent.sock"],
    ),
    (
        &["--socket", "/nonexistent.sock", "service", "list"],
        &["/nonexistent.sock"],
    ),
    (
        &["--socket", "/nonexistent.sock", "wait", "--applied"],
        &["/nonexistent.sock"],
    ),
    (
        &["--socket", "/nonexistent.sock", "monitor"],
        &["/nonexistent.sock"],
    ),
    (
        &["bpf", "lb", "list", "--bpf-root", "/nonexistent"],
        &["/nonexistent"],
    ),
    (&["status", "-o", "sculpture"], &["sculpture"]),
    (&["juggle"], &["juggle"]),
];

#[test]
fn the_command_line_says_what_is_wrong() -> TestResult {
    for (arguments, words) in BAD_COMMANDS {
        let mut command = std::process::Command::new(binary("weir")?);
        let output = process::output(command.args(*arguments), b"", TIMEOUT)?;
        let code = output.status.code();
        assert!(matches!(code, Some(1 | 2)), "{arguments:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{arguments:?}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        for word in *words {
            assert!(said.contains(word), "{arguments:?}: no {word:?} in {said}");
        }
    }
    Ok(())
}
