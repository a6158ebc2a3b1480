//! The plugin as a runtime calls it, in namespaces of its own, with an agent that is ours.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{os::unix::net::UnixListener, time::Duration};

use serde_json::{Value, json};
use support::{
    fake_agent::{Behaviour, FakeAgent, StartingAgent},
    node::{Bed, Namespace, Outcome, answer},
};
use tonic::Status;
use weir_api::v1::PortMapping;

fn add(bed: &Bed) -> Outcome {
    bed.call("ADD", "1.1.0", &[])
}

fn del(bed: &Bed) -> Outcome {
    bed.call("DEL", "1.1.0", &[])
}

fn agent(bed: &Bed, behaviour: Behaviour) -> FakeAgent {
    FakeAgent::start(bed.directory.path(), answer(), behaviour)
}

#[track_caller]
fn assert_nothing_is_left(bed: &Bed) {
    assert_eq!(bed.node.links(), Vec::<String>::new());
    assert_eq!(bed.pod.links(), Vec::<String>::new());
}

/// Everything that the specification of the wiring says, read back from the kernel.
#[track_caller]
fn assert_wired(bed: &Bed) {
    let host = &bed.node.json("-d link show weir0123456789a")[0];
    assert_eq!(host["address"], "0a:57:00:00:00:07");
    assert_eq!(host["mtu"], 1430);
    assert_eq!(host["inet6_addr_gen_mode"], "none");
    assert_eq!(host["ifalias"], format!("weir:{}/eth0", bed.container_id));
    assert_eq!(host["linkinfo"]["info_kind"], "veth");
    assert!(has(&host["flags"], "UP"), "{host}");
    let host_addresses = &bed.node.json("addr show weir0123456789a")[0]["addr_info"];
    assert_eq!(host_addresses.as_array().unwrap().len(), 0);

    let pod = &bed.pod.json("-d link show eth0")[0];
    assert_eq!(pod["address"], "0e:57:00:00:00:07");
    assert_eq!(pod["mtu"], 1430);
    assert!(has(&pod["flags"], "UP"), "{pod}");
    assert!(has(&bed.pod.json("link show lo")[0]["flags"], "UP"));

    let addresses = &bed.pod.json("addr show eth0")[0]["addr_info"];
    for (local, length) in [("10.97.0.7", 32), ("fd97::7", 128)] {
        let address = find(addresses, "local", local);
        assert_eq!(address["prefixlen"], length);
        assert_eq!(address["noprefixroute"], true, "{address}");
        assert!(address.get("tentative").is_none(), "{address}");
    }
    assert_eq!(
        find(addresses, "local", "fd97::7")["nodad"],
        true,
        "{addresses}"
    );

    for (family, gateway) in [("-4", "169.254.1.1"), ("-6", "fe80::1")] {
        let routes = bed.pod.json(&format!("{family} route show table main"));
        let to_gateway = find(&routes, "dst", gateway);
        assert_eq!(to_gateway["dev"], "eth0");
        if family == "-4" {
            assert_eq!(to_gateway["scope"], "link");
        }
        let default = find(&routes, "dst", "default");
        assert_eq!(default["gateway"], gateway);
        assert_eq!(default["dev"], "eth0");
        let neighbours = bed.pod.json(&format!("{family} neigh show dev eth0"));
        let neighbour = find(&neighbours, "dst", gateway);
        assert_eq!(neighbour["lladdr"], "0a:57:00:00:00:07");
        assert!(has(&neighbour["state"], "PERMANENT"), "{neighbour}");
    }
    assert_eq!(bed.pod.sysctl("ipv6/conf/eth0/accept_ra"), "0");
}

fn has(array: &Value, word: &str) -> bool {
    array.as_array().unwrap().iter().any(|entry| entry == word)
}

#[track_caller]
fn find<'a>(array: &'a Value, key: &str, value: &str) -> &'a Value {
    array
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry[key] == value)
        .unwrap_or_else(|| panic!("no {key} {value} in {array}"))
}

#[test]
fn add_wires_both_families_and_del_leaves_nothing() {
    let bed = Bed::new();
    let agent = agent(&bed, Behaviour::Good);

    let outcome = add(&bed);
    assert!(outcome.success, "{outcome:?}");
    assert_wired(&bed);
    let result = outcome.json();
    assert_eq!(result["cniVersion"], "1.1.0");
    assert_eq!(result["interfaces"][0]["name"], "weir0123456789a");
    assert_eq!(result["interfaces"][1]["sandbox"], bed.pod.path());
    assert_eq!(result["interfaces"][1]["mtu"], 1430);
    assert_eq!(result["ips"][0]["address"], "10.97.0.7/32");
    assert_eq!(result["ips"][1]["address"], "fd97::7/128");

    let calls = agent.calls();
    assert_eq!(calls.allocated[0].pod_namespace, "shop");
    assert_eq!(calls.allocated[0].pod_name, "web-0");
    assert_eq!(calls.allocated[0].pod_uid, "u1");
    assert_eq!(calls.allocated[0].netns, bed.pod.path());
    let index = &bed.node.json("link show weir0123456789a")[0]["ifindex"];
    assert_eq!(calls.committed[0].host_ifindex, *index);
    assert_ne!(calls.committed[0].netns_cookie, 0);
    assert!(bed.log().contains("ADD"), "{}", bed.log());

    let outcome = del(&bed);
    assert!(outcome.success, "{outcome:?}");
    assert_eq!(outcome.stdout, "");
    assert_nothing_is_left(&bed);
    assert_eq!(agent.calls().released[0].container_id, bed.container_id);
    assert!(del(&bed).success, "DEL again");
    let outcome = bed.call("DEL", "1.1.0", &[("CNI_NETNS", "")]);
    assert!(outcome.success, "DEL without a namespace: {outcome:?}");
}

#[test]
fn add_with_one_family_needs_only_that() {
    let bed = Bed::new();
    for (index, other) in [(0, "fd97::7"), (1, "10.97.0.7")] {
        let mut answer = answer();
        answer.addresses = vec![answer.addresses[index].clone()];
        answer.gateways = vec![answer.gateways[index].clone()];
        let _agent = FakeAgent::start(bed.directory.path(), answer, Behaviour::Good);
        let outcome = add(&bed);
        assert!(outcome.success, "{outcome:?}");
        assert_eq!(outcome.json()["ips"].as_array().unwrap().len(), 1);
        assert!(!bed.pod.ip("addr show eth0").contains(other));
        assert!(del(&bed).success);
    }
}

#[test]
fn add_gives_ipv6_to_a_pod_whose_namespace_has_it_off_by_default() {
    let bed = Bed::new();
    let off = std::process::Command::new("nsenter")
        .arg(format!("--net={}", bed.pod.path()))
        .args([
            "sh",
            "-c",
            "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6",
        ])
        .status()
        .unwrap();
    assert!(off.success());
    let _agent = agent(&bed, Behaviour::Good);
    let outcome = add(&bed);
    assert!(outcome.success, "{outcome:?}");
    assert_wired(&bed);
}

#[test]
fn add_again_is_the_same_and_repairs() {
    let bed = Bed::new();
    let agent = agent(&bed, Behaviour::Good);
    let first = add(&bed);
    assert!(first.success, "{first:?}");
    let index = bed.node.json("link show weir0123456789a")[0]["ifindex"].clone();
    bed.pod.ip("addr del 10.97.0.7/32 dev eth0");
    bed.pod.ip("-6 route del default");

    let second = add(&bed);
    assert!(second.success, "{second:?}");
    assert_eq!(first.json(), second.json());
    assert_wired(&bed);
    let calls = agent.calls();
    assert_eq!(calls.committed.len(), 2);
    assert_eq!(calls.committed[1].host_ifindex, index);
    assert!(calls.released.is_empty());
}

#[test]
fn add_does_not_touch_a_stranger_of_the_same_name() {
    let bed = Bed::new();
    let agent = agent(&bed, Behaviour::Good);
    bed.pod
        .ip("link add eth0 type veth peer name other address 02:00:00:00:00:01");
    let (code, message) = add(&bed).error();
    assert_eq!(code, 101);
    assert!(
        message.contains("interface eth0 exists in /run/netns/"),
        "{message}"
    );
    assert_eq!(bed.node.links(), Vec::<String>::new());
    assert_eq!(bed.pod.links().len(), 2);
    assert_eq!(agent.calls().released.len(), 1);
    // The runtime answers a failed ADD with a DEL.
    assert!(del(&bed).success);
    assert_eq!(bed.pod.links().len(), 2);
}

#[test]
fn add_does_not_take_over_a_stranger_on_the_host() {
    let bed = Bed::new();
    let _agent = agent(&bed, Behaviour::Good);
    bed.node
        .ip("link add weir0123456789a type veth peer name other");
    let (code, message) = add(&bed).error();
    assert_eq!(code, 101);
    assert!(
        message.contains("weir0123456789a exists in the host's"),
        "{message}"
    );
    assert_eq!(bed.node.links().len(), 2);
    assert_eq!(
        bed.node.json("link show weir0123456789a")[0].get("ifalias"),
        None
    );
}

#[test]
fn add_replaces_a_pair_whose_other_side_went_astray() {
    let bed = Bed::new();
    let _agent = agent(&bed, Behaviour::Good);
    bed.node
        .ip("link add weir0123456789a address 0a:57:00:00:00:07 type veth peer name other");
    let outcome = add(&bed);
    assert!(outcome.success, "{outcome:?}");
    assert_wired(&bed);
    assert_eq!(bed.node.links(), ["weir0123456789a"]);
}

#[test]
fn a_failed_add_is_undone() {
    let second = Duration::from_secs(1);
    for (behaviour, code, expected) in [
        (
            Behaviour::AllocateFails(Status::failed_precondition("no pod range yet")),
            11,
            "no pod range yet",
        ),
        (
            Behaviour::AllocateFails(Status::resource_exhausted("10.0.0.0/29 is full")),
            100,
            "10.0.0.0/29 is full",
        ),
        (
            Behaviour::AllocateHangs,
            11,
            "did not answer Allocate within 2 s",
        ),
        (
            Behaviour::CommitFails(Status::internal("tcx refused")),
            100,
            "tcx refused",
        ),
        (
            Behaviour::CommitHangs,
            11,
            "did not answer Commit within 2 s",
        ),
        (Behaviour::DiesAtCommit, 11, "during Commit"),
    ] {
        let bed = Bed::new();
        let agent = agent(&bed, behaviour.clone());
        let outcome = add(&bed);
        let (found, message) = outcome.error();
        assert_eq!(found, code, "{behaviour:?}: {message}");
        assert!(message.contains(expected), "{behaviour:?}: {message}");
        assert!(message.contains("agent.sock"), "{message}");
        assert!(outcome.stderr.contains(expected), "{}", outcome.stderr);
        assert!(outcome.took < 8 * second, "{:?}", outcome.took);
        assert_nothing_is_left(&bed);
        if matches!(
            behaviour,
            Behaviour::CommitFails(_) | Behaviour::CommitHangs
        ) {
            assert_eq!(agent.calls().released.len(), 1);
        }
    }
}

#[test]
fn a_failure_in_the_kernel_is_undone_and_named() {
    let bed = Bed::new();
    let mut answer = answer();
    // No address for an interface: the kernel refuses it after the pair was made.
    answer.addresses[1] = "ff02::7".into();
    let agent = FakeAgent::start(bed.directory.path(), answer, Behaviour::Good);
    let (code, message) = add(&bed).error();
    assert_eq!(code, 5, "{message}");
    assert!(
        message.contains("add address ff02::7/128 to eth0"),
        "{message}"
    );
    assert_nothing_is_left(&bed);
    let calls = agent.calls();
    assert_eq!((calls.committed.len(), calls.released.len()), (0, 1));
}

#[test]
fn add_without_an_agent_says_where_it_looked() {
    let bed = Bed::new();
    let (code, message) = add(&bed).error();
    assert_eq!(code, 11);
    assert!(message.contains("agent.sock"), "{message}");
    assert_nothing_is_left(&bed);
}

#[test]
fn an_agent_that_does_not_serve_yet_is_told_from_none() {
    let bed = Bed::new();
    let starting = StartingAgent::start(bed.directory.path());
    let words = format!("agent (pid {}) is still starting", starting.pid());
    let again = "the runtime will try again";
    // Without a socket, and with that of an agent that is gone.
    for left in [false, true] {
        if left {
            drop(UnixListener::bind(bed.directory.path().join("agent.sock")).unwrap());
        }
        let (code, message) = add(&bed).error();
        assert_eq!(code, 11, "{message}");
        for part in [&words, again, "agent.sock"] {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert_nothing_is_left(&bed);
        // A DEL is done without it: nobody tries that again.
        let outcome = del(&bed);
        assert!(outcome.success, "{outcome:?}");
        assert!(outcome.stderr.contains(&words), "{}", outcome.stderr);
        assert!(!outcome.stderr.contains(again), "{}", outcome.stderr);
    }
    // The lock file outlives its agent.
    drop(starting);
    let (code, message) = add(&bed).error();
    assert_eq!(code, 11, "{message}");
    assert!(message.contains("is weir-agent running"), "{message}");
    assert!(!message.contains("starting"), "{message}");
}

#[test]
fn del_does_without_the_agent() {
    for behaviour in [
        None,
        Some(Behaviour::AllHangs),
        Some(Behaviour::ReleaseFails(Status::internal("broken"))),
    ] {
        for netns in [None, Some(""), Some("/run/netns/no-such-namespace")] {
            let bed = Bed::new();
            drop_after_add(&bed);
            let _agent = behaviour.clone().map(|behaviour| agent(&bed, behaviour));
            let path = bed.pod.path();
            let outcome = bed.call("DEL", "1.0.0", &[("CNI_NETNS", netns.unwrap_or(&path))]);
            assert!(outcome.success, "{behaviour:?} {netns:?}: {outcome:?}");
            assert!(outcome.took < Duration::from_secs(5), "{:?}", outcome.took);
            assert_nothing_is_left(&bed);
            assert!(del(&bed).success, "again");
        }
    }
}

/// ADD with an agent that dies after it.
fn drop_after_add(bed: &Bed) {
    let agent = agent(bed, Behaviour::Good);
    let outcome = add(bed);
    assert!(outcome.success, "{outcome:?}");
    drop(agent);
}

#[test]
fn del_leaves_other_pods_alone() {
    let bed = Bed::new();
    drop_after_add(&bed);
    let outcome = bed.call(
        "DEL",
        "1.1.0",
        &[("CNI_CONTAINERID", "another"), ("CNI_NETNS", "")],
    );
    assert!(outcome.success, "{outcome:?}");
    // Not even when a stale path leads to another pod's namespace.
    let outcome = bed.call("DEL", "1.1.0", &[("CNI_CONTAINERID", "another")]);
    assert!(outcome.success, "{outcome:?}");
    assert_wired(&bed);
}

#[test]
fn add_refuses_namespaces_that_cannot_be() {
    let bed = Bed::new();
    let _agent = agent(&bed, Behaviour::Good);
    let plain = bed.directory.path().join("file");
    std::fs::write(&plain, "").unwrap();
    for (path, code, expected) in [
        ("/run/netns/no-such-namespace", 3, "does not exist"),
        (plain.to_str().unwrap(), 4, "is no network namespace"),
        ("/proc/self/ns/mnt", 4, "is no network namespace"),
        (&bed.node.path(), 4, "of weir-cni itself"),
    ] {
        let (found, message) = bed.call("ADD", "1.1.0", &[("CNI_NETNS", path)]).error();
        assert_eq!(found, code, "{message}");
        assert!(message.contains(expected), "{message}");
        assert!(message.contains("CNI_NETNS"), "{message}");
    }
    assert_nothing_is_left(&bed);
}

#[test]
fn errors_speak_the_version_of_the_caller() {
    let bed = Bed::new();
    for (asked, answered, code) in [("0.3.1", "0.3.1", 11), ("0.2.0", "1.1.0", 1)] {
        let outcome = bed.call("ADD", asked, &[]);
        assert_eq!(outcome.json()["cniVersion"], answered);
        assert_eq!(outcome.error().0, code);
    }
    for command in ["CHECK", "GC", "STATUS", "", "Add"] {
        let outcome = bed.call(command, "0.4.0", &[]);
        assert_eq!(outcome.json()["cniVersion"], "0.4.0");
        let (code, message) = outcome.error();
        assert_eq!(code, 4);
        assert!(message.contains("CNI_COMMAND"), "{message}");
    }
}

#[test]
fn version_tells_what_is_supported() {
    let bed = Bed::new();
    let outcome = bed.call("VERSION", "0.4.0", &[("CNI_NETNS", ""), ("CNI_IFNAME", "")]);
    assert!(outcome.success, "{outcome:?}");
    let result = outcome.json();
    assert_eq!(result["cniVersion"], "0.4.0");
    let versions = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
    assert_eq!(result["supportedVersions"], serde_json::json!(versions));
}

#[test]
fn port_mappings_reach_the_agent() {
    let mut bed = Bed::new();
    bed.runtime_config = json!({"portMappings": [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "2001:DB8::1"},
        {"hostPort": 0, "containerPort": 443, "protocol": "tcp"},
        {"hostPort": 53, "containerPort": 5353, "protocol": "UDP", "hostIP": ""},
    ]});
    let agent = agent(&bed, Behaviour::Good);
    let outcome = add(&bed);
    assert!(outcome.success, "{outcome:?}");
    let mapping = |host_port, container_port, protocol: &str, host_ip: &str| PortMapping {
        host_port,
        container_port,
        protocol: protocol.into(),
        host_ip: host_ip.into(),
    };
    assert_eq!(
        agent.calls().allocated[0].port_mappings,
        [
            mapping(8080, 80, "TCP", "2001:db8::1"),
            mapping(53, 5353, "UDP", "")
        ]
    );

    bed.runtime_config = json!({"portMappings": [{"hostPort": "http", "containerPort": 80}]});
    let (code, message) = add(&bed).error();
    assert_eq!(code, 7);
    let expected = "runtimeConfig.portMappings[0].hostPort \"http\"";
    assert!(message.contains(expected), "{message}");
    assert_eq!(agent.calls().allocated.len(), 1, "nothing was asked for");
    // Whatever the configuration says, a pod goes.
    assert!(del(&bed).success);
    assert_nothing_is_left(&bed);
}

#[test]
fn a_refused_host_port_leaves_nothing_and_releases_nobody() {
    let bed = Bed::new();
    let status = Status::already_exists("8080/TCP leads to pod shop/web-1 already");
    let agent = agent(&bed, Behaviour::AllocateFails(status));
    let (code, message) = add(&bed).error();
    assert_eq!(code, 100);
    assert!(message.contains("shop/web-1"), "{message}");
    assert_nothing_is_left(&bed);
    // What is known by this name may be a pod that works.
    assert!(agent.calls().released.is_empty());
}

#[test]
fn a_pod_reaches_the_host_through_its_gateway() {
    // The host's half (routes, neighbours) is the agent's; here by hand.
    let bed = Bed::new();
    let _agent = agent(&bed, Behaviour::Good);
    assert!(add(&bed).success);
    let node: &Namespace = &bed.node;
    node.ip("link set lo up");
    for (family, address, pod) in [
        ("-4", "192.0.2.1/32", "10.97.0.7"),
        ("-6", "2001:db8::1/128", "fd97::7"),
    ] {
        node.ip(&format!("{family} addr add {address} dev lo nodad"));
        node.ip(&format!("{family} route add {pod} dev weir0123456789a"));
        node.ip(&format!(
            "neigh add {pod} lladdr 0e:57:00:00:00:07 dev weir0123456789a"
        ));
        let (target, _) = address.split_once('/').unwrap();
        let ping = std::process::Command::new("nsenter")
            .arg(format!("--net={}", bed.pod.path()))
            .args(["ping", "-c1", "-W2", target])
            .output()
            .unwrap();
        assert!(ping.status.success(), "{target}: {ping:?}");
    }
}
