//! Ports of the node that lead to a pod: who has them, and for how long.

use super::*;

fn host_port(host_ip: &str, port: u16) -> HostPort {
    HostPort {
        host_ip: host_ip.parse().ok(),
        host_port: port,
        container_port: 80,
        protocol: crate::objects::Protocol::Tcp,
    }
}

fn with_host_port(container: &str, host_ip: &str, port: u16) -> AllocateRequest {
    AllocateRequest {
        host_ports: vec![host_port(host_ip, port)],
        ..request(container)
    }
}

fn served(bed: &Bed) -> Vec<&str> {
    let specs = bed.manager.with_host_ports();
    specs.map(|spec| spec.key.container_id.as_str()).collect()
}

#[test]
fn host_ports_live_as_long_as_their_pod() {
    let mut bed = Bed::new();
    bed.add("plain", 0);
    let spec = bed
        .allocate_as(&with_host_port("web", "", 8080), 0)
        .unwrap();
    assert_eq!(served(&bed), [""; 0], "not before the pod is wired");
    let ifindex = bed.kernel.wire(&spec);
    bed.commit("web", ifindex, 0).unwrap();
    assert_eq!(served(&bed), ["web"]);
    assert_eq!(bed.restart(1).problems, [""; 0]);
    assert_eq!(served(&bed), ["web"]);
    let kept = bed.manager.get(&spec.key).unwrap();
    assert_eq!(kept.spec.host_ports, [host_port("", 8080)]);

    bed.kernel.refuse_remove = true;
    bed.release("web", 1).unwrap_err();
    assert_eq!(served(&bed), [""; 0], "not while it is half gone");
    bed.allocate_as(&with_host_port("next", "", 8080), 1)
        .unwrap();
    bed.kernel.refuse_remove = false;
    assert_eq!(bed.tick(2), []);
    for container in ["plain", "next"] {
        bed.release(container, 2).unwrap();
    }
    bed.assert_empty();
}

#[test]
fn host_ports_of_a_vanished_pod_are_free() {
    let mut bed = Bed::new();
    let request = with_host_port("web", "192.0.2.1", 8080);
    let spec = bed.allocate_as(&request, 0).unwrap();
    let ifindex = bed.kernel.wire(&spec);
    bed.commit("web", ifindex, 0).unwrap();
    bed.kernel.unwire(ifindex);
    block_on(bed.manager.link_removed(ifindex, &mut bed.kernel, 1)).unwrap();
    assert_eq!(served(&bed), [""; 0]);
    let next = with_host_port("next", "192.0.2.1", 8080);
    bed.allocate_as(&next, 1).unwrap();
    bed.release("next", 1).unwrap();
    bed.assert_empty();
}

#[test]
fn two_pods_never_share_a_host_port() {
    let mut bed = Bed::new();
    bed.allocate_as(&with_host_port("first", "192.0.2.1", 8080), 0)
        .unwrap();
    for (host_ip, conflict) in [
        ("", true),
        ("0.0.0.0", true),
        ("192.0.2.1", true),
        ("::", false),
    ] {
        let request = with_host_port("second", host_ip, 8080);
        let before = bed.manager.usage();
        match bed.allocate_as(&request, 0) {
            Ok(_) => assert!(!conflict, "{host_ip:?}"),
            Err(error) => {
                assert!(conflict, "{host_ip:?}: {error}");
                assert_eq!(error.kind, ErrorKind::Conflict);
                for part in [
                    "shop/web-0 (eth0 of container first)",
                    "192.0.2.1:8080/TCP",
                    "hostPort",
                ] {
                    assert!(error.message.contains(part), "{part:?}: {error}");
                }
                assert_eq!(bed.manager.usage(), before);
            }
        }
    }
    // The same pod again is no conflict, and may say something else.
    let again = with_host_port("first", "", 9090);
    let spec = bed.allocate_as(&again, 0).unwrap();
    assert_eq!(spec.host_ports, [host_port("", 9090)]);
    bed.allocate_as(&with_host_port("third", "", 8080), 0)
        .unwrap_err();
    bed.release("second", 0).unwrap();
    bed.allocate_as(&with_host_port("third", "", 8080), 0)
        .unwrap();
}

#[test]
fn files_without_host_ports_are_read_and_wrong_ones_set_aside() {
    let mut bed = Bed::new();
    let spec = bed.add("old", 0);
    let file = bed.directory.path().join("endpoints/old-eth0.json");
    let text = fs::read_to_string(&file).unwrap();
    assert!(
        !text.contains("host_ports"),
        "as an older version writes it"
    );
    assert_eq!(bed.restart(1).problems, [""; 0]);
    assert_eq!(bed.manager.get(&spec.key).unwrap().spec.host_ports, []);
    for (wrong, expected) in [
        (
            r#"{"host_ip":null,"host_port":0,"container_port":1,"protocol":"TCP"}"#,
            "is 0",
        ),
        (
            r#"{"host_ip":"x","host_port":1,"container_port":1,"protocol":"TCP"}"#,
            "invalid",
        ),
        (
            r#"{"host_ip":null,"host_port":1,"container_port":1,"protocol":"X"}"#,
            "TCP, UDP or",
        ),
    ] {
        let start = text.strip_suffix('}').unwrap();
        fs::write(&file, format!("{start},\"host_ports\":[{wrong}]}}")).unwrap();
        let report = bed.restart(1);
        assert!(
            report.problems[0].contains(expected),
            "{:?}",
            report.problems
        );
        fs::remove_file(file.with_extension("json.quarantine")).unwrap();
    }
}
