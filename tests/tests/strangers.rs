//! What others have left on a node: `weir status` names it with the command that removes it, and `weir cleanup`
//! takes away what kube-proxy and Cilium have left, and nothing else.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::net::if_::if_nametoindex;
use serde_json::Value;
use weir_tests::{
    Cluster, Node, TestResult,
    agent::binary,
    bpf::{self, Kind},
    cluster::cluster_ips,
    kube_proxy::{Mode, Rules, Service},
    netns::NetNs,
    process, reaper, wait_for, wait_until,
};

const TIMEOUT: Duration = Duration::from_secs(30);

/// The tools of iptables that show and change the rules of a mode.
fn iptables(mode: Mode) -> [&'static str; 2] {
    match mode {
        Mode::IptablesLegacy => ["iptables-legacy", "ip6tables-legacy"],
        Mode::IptablesNft | Mode::Nftables => ["iptables-nft", "ip6tables-nft"],
    }
}

/// kube-proxy's rules for a Service, in both families.
fn load_rules(node: &NetNs, mode: Mode) -> Result<()> {
    let pods = ["10.244.0.0/16", "fd00:244::/48"];
    let endpoints = ["10.244.1.2:80", "[fd00:244:0:1::2]:80"];
    for ((vip, pods), endpoint) in cluster_ips(10).into_iter().zip(pods).zip(endpoints) {
        let service = Service {
            frontend: SocketAddr::new(vip, 80),
            node_port: 30_080,
            endpoints: vec![endpoint.parse()?],
        };
        Rules::load(node, mode, service, pods)?;
    }
    Ok(())
}

fn load_nftables(node: &NetNs, text: &str) -> Result<()> {
    let mut nft = node.command("nft")?;
    process::run(nft.args(["-f", "-"]), text.as_bytes(), TIMEOUT)?;
    Ok(())
}

/// Rules of others: of somebody's own chain, of the kubelet, and of nftables.
fn load_rules_of_others(node: &NetNs, mode: Mode) -> Result<()> {
    for tool in iptables(mode) {
        let v6 = tool.starts_with("ip6");
        let address = if v6 { "2001:db8::1" } else { "192.0.2.1" };
        for rule in [
            "-t nat -N OTHERS".to_owned(),
            "-t nat -A PREROUTING -j OTHERS -m comment --comment KUBE-SERVICES".to_owned(),
            format!("-t nat -A OTHERS -d {address} -j ACCEPT"),
            "-t filter -N KUBE-FIREWALL".to_owned(),
            "-t filter -A OUTPUT -j KUBE-FIREWALL".to_owned(),
            format!("-t filter -A KUBE-FIREWALL -d {address} -j DROP"),
        ] {
            node.tool(tool, &rule.split(' ').collect::<Vec<_>>())?;
        }
    }
    let others = "table inet others {\nchain c {\ntype filter hook input priority 0;\ntcp dport 9 drop\n}\n}\n";
    load_nftables(node, others)
}

/// Chains that somebody made, and all rules. (The kernel's chains may appear, and are nobody's.)
fn rules(node: &NetNs, mode: Mode) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for tool in iptables(mode) {
        let saved = node.tool(&format!("{tool}-save"), &[])?;
        let lines = saved
            .lines()
            .filter(|line| line.starts_with("-A") || line.starts_with(':') && line.contains(" - "));
        all.extend(lines.map(str::to_owned));
    }
    let tables = node.tool("nft", &["list", "tables"])?;
    let own = |line: &&str| line.contains("kube-proxy") || line.contains("others");
    all.extend(tables.lines().filter(own).map(str::to_owned));
    all.push(node.tool("nft", &["list", "table", "inet", "others"])?);
    Ok(all)
}

fn cleanup(node: &NetNs, arguments: &[&str]) -> Result<Output> {
    let mut command = node.command(binary("weir")?)?;
    process::output(command.arg("cleanup").args(arguments), b"", TIMEOUT)
}

/// What a cleanup that succeeds says.
fn cleaned(node: &NetNs, arguments: &[&str]) -> Result<String> {
    let output = cleanup(node, arguments)?;
    ensure!(output.status.success(), "{arguments:?}: {output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What one that fails says.
fn refused(node: &NetNs, arguments: &[&str]) -> Result<String> {
    let output = cleanup(node, arguments)?;
    ensure!(output.status.code() == Some(1), "{arguments:?}: {output:?}");
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A process of that name in the node's network; it ends with this.
struct Running(Child);

impl Running {
    fn start(node: &Node, directory: &Path, name: &str) -> Result<Self> {
        let path = directory.join(name);
        fs::copy("/bin/sleep", &path).context("copy a program")?;
        let child = node.netns.command(&path)?.arg("1000").spawn();
        let running = Self(child.with_context(|| format!("start {}", path.display()))?);
        // Before `exec` it has the name of this process.
        let comm = format!("/proc/{}/comm", running.0.id());
        wait_for("the process", TIMEOUT, || {
            Ok((fs::read_to_string(&comm)?.trim_end() == name).then_some(()))
        })?;
        Ok(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn kube_proxy_is_cleaned_up_after(mode: Mode) -> TestResult {
    let cluster = Cluster::builder("cleanup of kube-proxy").nodes(1).wire()?;
    let node = cluster.node("node1");
    let netns = &node.netns;
    load_rules_of_others(netns, mode)?;
    let of_others = rules(netns, mode)?;
    load_rules(netns, mode)?;
    netns.ip("link add kube-ipvs0 type veth peer name peer0\nlink add kube-ipvs1 type veth peer name peer1\n")?;
    let all = rules(netns, mode)?;
    assert_ne!(all, of_others);

    // Nothing happens to it while kube-proxy runs, nor in a dry run.
    let running = Running::start(node, &reaper::state_directory(cluster.id()), "kube-proxy")?;
    let said = refused(netns, &["--kube-proxy"])?;
    for part in ["kube-proxy runs", &running.0.id().to_string(), "--force"] {
        assert!(said.contains(part), "{said}");
    }
    // Another one's does not matter.
    assert_eq!(cleaned(netns, &["--cilium"])?, "nothing is left\n");
    let said = cleaned(netns, &["--kube-proxy", "--dry-run"])?;
    let count = said.lines().count();
    assert!(
        said.lines().all(|line| line.starts_with("would remove ")),
        "{said}"
    );
    assert!(said.contains("device kube-ipvs0"), "{said}");
    assert_eq!(rules(netns, mode)?, all);

    let said = cleaned(netns, &["--kube-proxy", "--force"])?;
    drop(running);
    assert!(
        said.lines().all(|line| line.starts_with("removed ")),
        "{said}"
    );
    assert_eq!(said.lines().count(), count, "{said}");
    assert_eq!(rules(netns, mode)?, of_others);
    let devices = netns.devices()?;
    assert!(
        devices.iter().any(|name| name == "kube-ipvs1"),
        "{devices:?}"
    );
    assert!(
        !devices.iter().any(|name| name == "kube-ipvs0"),
        "{devices:?}"
    );
    assert_eq!(cleaned(netns, &["--kube-proxy"])?, "nothing is left\n");
    Ok(())
}

#[test]
fn rules_of_kube_proxy_in_iptables_go_and_others_stay() -> TestResult {
    kube_proxy_is_cleaned_up_after(Mode::IptablesNft)
}

#[test]
fn rules_of_kube_proxy_in_legacy_iptables_go_and_others_stay() -> TestResult {
    kube_proxy_is_cleaned_up_after(Mode::IptablesLegacy)
}

#[test]
fn rules_of_kube_proxy_in_nftables_go_and_others_stay() -> TestResult {
    kube_proxy_is_cleaned_up_after(Mode::Nftables)
}

/// A tool that is not installed is no reason to say that all is gone.
#[test]
fn a_missing_tool_is_named_when_it_is_needed() -> TestResult {
    for (mode, tool, named, others_go) in [
        (Mode::Nftables, "nft", "nft is not installed", "--cilium"),
        (
            Mode::IptablesNft,
            "xtables-nft-multi",
            "iptables-nft-save is not installed",
            "--cilium",
        ),
        (
            Mode::IptablesLegacy,
            "xtables-legacy-multi",
            "iptables-legacy-save is not installed",
            "",
        ),
    ] {
        let cluster = Cluster::builder("missing tool").nodes(1).wire()?;
        let netns = &cluster.node("node1").netns;
        load_rules_of_others(netns, mode)?;
        load_rules(netns, mode)?;
        let all = rules(netns, mode)?;
        let weir = binary("weir")?.display().to_string();
        let clean = |owner: &str| {
            let script =
                format!("mount --bind /dev/null /usr/sbin/{tool} && {weir} cleanup {owner}");
            let mut command = netns.command("unshare")?;
            process::output(command.args(["-m", "sh", "-c", &script]), b"", TIMEOUT)
        };
        let output = clean("--kube-proxy")?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(1) && said.contains(named),
            "{mode:?}: {output:?}"
        );
        assert_eq!(rules(netns, mode)?, all, "{mode:?}");
        if !others_go.is_empty() {
            let output = clean(others_go)?;
            assert!(output.status.success(), "{mode:?}: {output:?}");
        }
    }
    Ok(())
}

/// The folder that stands for `/sys/fs/bpf`.
fn bpffs(node: &Node) -> Result<PathBuf> {
    let folder = node.bpf_root.parent().context("no parent")?;
    Ok(folder.to_owned())
}

/// What Cilium leaves, and beside it what is somebody else's.
fn leave_cilium(node: &Node) -> Result<()> {
    let (netns, bpffs) = (&node.netns, bpffs(node)?);
    netns.ip(
        "link add cilium_host type veth peer name cilium_net\nlink add cili0 type veth peer name cili1\n",
    )?;
    for tool in iptables(Mode::IptablesNft) {
        for rule in [
            "-N CILIUM_FORWARD",
            "-A FORWARD -j CILIUM_FORWARD",
            "-N OTHERS",
        ] {
            netns.tool(tool, &rule.split(' ').collect::<Vec<_>>())?;
        }
    }
    let globals = bpffs.join("tc/globals");
    fs::create_dir_all(&globals)?;
    for name in ["cilium_lxc", "others"] {
        let pin = globals.join(name).display().to_string();
        let map = [
            "map", "create", &pin, "type", "array", "key", "4", "value", "4", "entries", "1",
            "name", "m",
        ];
        netns.tool("bpftool", &map)?;
    }
    let links = bpffs.join("cilium/devices/eth0/links");
    let ifindex = netns.run(|| if_nametoindex("eth0"))?;
    let program = bpf::program(Kind::Tc, "cil_from_netdev")?;
    let link = netns.run(|| bpf::tcx_link(&program, ifindex))?;
    bpf::pin(&link, &links.join("cil_from_netdev"))?;
    netns.tool("tc", &["qdisc", "add", "dev", "eth0", "clsact"])?;
    for (name, direction) in [("cil_to_netdev", "egress"), ("foreign", "ingress")] {
        let pin = bpffs.join(name);
        bpf::pin(&bpf::program(Kind::Tc, name)?, &pin)?;
        let pin_name = pin.display().to_string();
        let filter = [
            "filter",
            "add",
            "dev",
            "eth0",
            direction,
            "bpf",
            "da",
            "object-pinned",
            &pin_name,
        ];
        netns.tool("tc", &filter)?;
        fs::remove_file(pin)?;
    }
    let pin = bpffs.join("xdp");
    bpf::pin(&bpf::program(Kind::Xdp, "cil_xdp_entry")?, &pin)?;
    let pin_name = pin.display().to_string();
    netns.tool(
        "ip",
        &[
            "link",
            "set",
            "dev",
            "eth0",
            "xdpgeneric",
            "pinned",
            &pin_name,
        ],
    )?;
    fs::remove_file(pin)?;
    Ok(())
}

#[test]
fn what_cilium_has_left_goes_and_others_stay() -> TestResult {
    let cluster = Cluster::builder("cleanup of Cilium").nodes(1).wire()?;
    let node = cluster.node("node1");
    let (netns, bpffs) = (&node.netns, bpffs(node)?);
    leave_cilium(node)?;
    let folder = bpffs.display().to_string();
    let arguments = ["--cilium", "--bpffs", &folder];
    let running = Running::start(node, &reaper::state_directory(cluster.id()), "cilium-agent")?;
    let said = refused(netns, &arguments)?;
    assert!(said.contains("cilium-agent runs"), "{said}");
    drop(running);
    let dry = cleaned(netns, &[&arguments[..], &["--dry-run"]].concat())?;
    for part in [
        "/cilium\n",
        "/tc/globals/cilium_lxc\n",
        "cil_from_netdev on eth0 (tcx ingress)",
        "cil_to_netdev on eth0 (clsact egress)",
        "cil_xdp_entry on eth0 (xdpgeneric)",
        "1 chain of Cilium in iptables-nft",
        "1 chain of Cilium in ip6tables-nft",
        "device cilium_host",
        "device cilium_net",
    ] {
        assert!(dry.contains(part), "{part:?} is not in:\n{dry}");
    }
    cleaned(netns, &arguments)?;
    assert!(!bpffs.join("cilium").exists());
    let globals = fs::read_dir(bpffs.join("tc/globals")).context("globals")?;
    let globals: Vec<_> = globals.flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(globals, ["others"]);
    let devices = netns.devices()?;
    assert!(
        !devices.iter().any(|name| name.starts_with("cilium_")),
        "{devices:?}"
    );
    assert!(devices.iter().any(|name| name == "cili0"), "{devices:?}");
    let programs = netns.tool("bpftool", &["net"])?;
    assert!(
        !programs.contains("cil_") && programs.contains("foreign"),
        "{programs}"
    );
    for tool in iptables(Mode::IptablesNft) {
        let saved = netns.tool(&format!("{tool}-save"), &[])?;
        assert!(
            !saved.contains("CILIUM") && saved.contains(":OTHERS"),
            "{saved}"
        );
    }
    assert_eq!(cleaned(netns, &arguments)?, "nothing is left\n");
    Ok(())
}

#[test]
fn what_cannot_be_removed_is_named_with_the_reason() -> TestResult {
    let cluster = Cluster::builder("cleanup that fails").nodes(1).wire()?;
    let node = cluster.node("node1");
    let (netns, bpffs) = (&node.netns, bpffs(node)?);
    let program = bpf::program(Kind::Tc, "cil_from_netdev")?;
    let ifindex = netns.run(|| if_nametoindex("eth0")).context("eth0")?;
    let link = netns.run(|| bpf::tcx_link(&program, ifindex))?;
    netns.ip("link add cilium_host type veth peer name cilium_net\n")?;
    let folder = bpffs.display().to_string();
    let said = refused(netns, &["--cilium", "--bpffs", &folder])?;
    assert!(said.contains("is no bpffs"), "a slip: {said}");
    fs::create_dir_all(&bpffs).context("make a folder")?;
    let arguments = ["--cilium", "--bpffs", &folder];
    let said = refused(netns, &arguments)?;
    for part in [
        "cil_from_netdev on eth0 (tcx ingress)",
        "a link holds it",
        "bpftool link",
    ] {
        assert!(said.contains(part), "{said}");
    }
    // The others have gone all the same.
    assert_eq!(netns.devices()?, ["eth0"]);
    drop(link);
    assert_eq!(cleaned(netns, &arguments)?, "nothing is left\n");
    // And neither is everything meant, nor nothing.
    assert!(refused(netns, &[])?.contains("--kube-proxy"));
    Ok(())
}

/// What the agent has found; waits until it has looked.
fn strangers(node: &Node) -> Result<Vec<Value>> {
    wait_for("strangers to be looked for", TIMEOUT, || {
        let status = node.weir_json(&["status"])?;
        let strangers = &status["strangers"];
        let Some(found) = strangers["found"].as_array() else {
            return Ok(None);
        };
        ensure!(
            strangers["errors"] == Value::Array(Vec::new()),
            "{strangers}"
        );
        Ok(Some(found.clone()))
    })
}

#[test]
fn strangers_are_named_and_the_commands_remove_them() -> TestResult {
    let cluster = Cluster::builder("strangers").nodes(1).wire()?;
    let node = cluster.node("node1");
    let netns = &node.netns;
    let cni = reaper::state_directory(cluster.id()).join("cni");
    fs::create_dir_all(&cni).context("make a folder")?;
    fs::write(
        cni.join("05-other.conflist"),
        r#"{"plugins": [{"type": "other"}]}"#,
    )
    .context("write")?;
    fs::write(cni.join("10-weir.conf"), r#"{"type": "weir-cni"}"#).context("write")?;
    load_rules(netns, Mode::Nftables)?;
    load_rules(netns, Mode::IptablesNft)?;
    leave_cilium(node)?;
    for tool in ["iptables-legacy", "ip6tables-legacy", "iptables-nft"] {
        for rule in [
            "-P FORWARD DROP",
            "-A FORWARD -i eth9 -j DROP",
            "-A FORWARD -i eth9 -j ACCEPT",
        ] {
            netns.tool(tool, &rule.split(' ').collect::<Vec<_>>())?;
        }
    }
    netns.tool("iptables-legacy", &["-t", "nat", "-N", "KUBE-SERVICES"])?;
    let native = "table inet others {\nchain c {\ntype filter hook forward priority 0;\ntcp dport 9 reject\n}\n}\n";
    load_nftables(netns, native)?;
    netns.sysctl("net/ipv4/conf/eth0/rp_filter", "1")?;
    let directory = cni.display().to_string();
    node.agent().use_arguments(&["--cni-conf-dir", &directory]);
    node.start_agent()?;
    let found = strangers(node)?;
    let text =
        |stranger: &Value, field: &str| stranger[field].as_str().unwrap_or_default().to_owned();
    for (what, remedy) in [
        (
            "the table ip kube-proxy of nftables is kube-proxy's",
            "weir cleanup --kube-proxy",
        ),
        (
            "the table ip6 kube-proxy of nftables is kube-proxy's",
            "weir cleanup --kube-proxy",
        ),
        (
            "chains of kube-proxy in table ip nat of nftables",
            "weir cleanup --kube-proxy",
        ),
        (
            "chains of kube-proxy in table ip6 nat of nftables",
            "weir cleanup --kube-proxy",
        ),
        (
            "1 chain of kube-proxy in table nat of iptables-legacy",
            "weir cleanup --kube-proxy",
        ),
        (
            "1 chain of Cilium in table ip filter of nftables",
            "weir cleanup --cilium",
        ),
        (
            "the device cilium_host is Cilium's",
            "weir cleanup --cilium",
        ),
        ("pins of Cilium: ", "weir cleanup --cilium --bpffs "),
        (
            "the program cil_from_netdev on eth0 (tcx ingress) is Cilium's",
            "weir cleanup --cilium",
        ),
        (
            "the program foreign on eth0 (clsact ingress) is somebody else's",
            "tc filter del dev eth0 ingress pref ",
        ),
        (
            "05-other.conflist is the configuration of another CNI plugin (other)",
            "rm ",
        ),
        (
            "the policy of FORWARD in table filter of iptables-legacy is DROP",
            "iptables-legacy -t filter -P FORWARD ACCEPT",
        ),
        (
            "the policy of FORWARD in table filter of ip6tables-legacy is DROP",
            "ip6tables-legacy -t filter -P FORWARD ACCEPT",
        ),
        (
            "a rule of FORWARD in table filter of iptables-legacy drops: -A FORWARD -i eth9 -j DROP",
            "iptables-legacy -t filter -D FORWARD -i eth9 -j DROP",
        ),
        (
            "the policy of the chain ip filter FORWARD of nftables",
            "nft chain ip filter FORWARD '{ policy accept; }'",
        ),
        (
            "a rule of the chain ip filter FORWARD of nftables",
            "nft delete rule ip filter FORWARD handle ",
        ),
        (
            "a rule of the chain inet others c of nftables",
            "nft delete rule inet others c handle ",
        ),
        (
            "the device eth0 has strict reverse-path filtering",
            "sysctl -w net.ipv4.conf.eth0.rp_filter=2",
        ),
    ] {
        let known = found.iter().any(|stranger| {
            text(stranger, "what").contains(what) && text(stranger, "remedy").starts_with(remedy)
        });
        assert!(known, "{what:?} ({remedy:?}) is not in {found:#?}");
    }
    assert!(!found.iter().any(|s| text(s, "what").contains("10-weir")
        || text(s, "what").contains("from_netdev on eth0 (tcx ingress) is somebody")));
    let shown = node.agent().weir(&["status"])?;
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(
        shown.contains("Strangers on this node:")
            && shown.contains("to remove it: weir cleanup --cilium"),
        "{shown}"
    );

    // Each command works, and nothing is left.
    let folder = binary("weir")?
        .parent()
        .context("no folder")?
        .display()
        .to_string();
    for stranger in &found {
        let script = format!("PATH={folder}:$PATH; {}", text(stranger, "remedy"));
        netns.tool("sh", &["-c", &script])?;
    }
    // Whoever asks while there is something has the agent look again.
    let mut left = Vec::new();
    wait_until("no strangers", TIMEOUT, || {
        left = strangers(node)?;
        Ok(left.is_empty())
    })
    .with_context(|| format!("{left:#?}"))?;
    Ok(())
}
