use std::collections::HashMap;

use super::*;

fn check(
    flags: &[(&str, &str)],
    variables: &[(&str, &str)],
    file: Option<&str>,
) -> (Result<Settings, String>, Option<Values>) {
    let directory = tempfile::tempdir().unwrap();
    let mut flags: HashMap<String, String> = flags
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    if let Some(text) = file {
        let path = directory.path().join("agent.yaml");
        fs::write(&path, text).unwrap();
        flags.insert("config".into(), path.display().to_string());
    }
    let variables: HashMap<_, _> = variables.iter().copied().collect();
    let values = match Values::gather(
        |name| flags.get(name).cloned(),
        |name| variables.get(name).map(|value| (*value).to_owned()),
    ) {
        Ok(values) => values,
        Err(error) => return (Err(error.to_string()), None),
    };
    (
        values.check().map_err(|error| error.to_string()),
        Some(values),
    )
}

const SOURCE: (&str, &str) = ("source", "dir:/objects");

#[test]
fn a_flag_beats_a_variable_beats_the_file_beats_the_default() {
    let file = Some("mtu: 1401\nconnections: 2_000\ndevices: [eth0, eth1]\n");
    let (settings, values) = check(
        &[SOURCE, ("mtu", "1403")],
        &[("WEIR_MTU", "1402"), ("WEIR_CONNECTIONS", "3000")],
        file,
    );
    let (settings, values) = (settings.unwrap(), values.unwrap());
    assert_eq!(settings.mtu, Some(1403));
    assert_eq!(settings.connections, 3000);
    assert_eq!(settings.devices, ["eth0", "eth1"]);
    assert_eq!(settings.backends_max, 131_072);
    assert_eq!(values.get("mtu").unwrap().origin, Origin::Flag);
    assert_eq!(
        values.get("connections").unwrap().origin,
        Origin::Environment
    );
    assert!(matches!(
        values.get("devices").unwrap().origin,
        Origin::File(_, 3)
    ));
    assert_eq!(values.get("run-dir").unwrap().origin, Origin::Default);

    let (settings, _) = check(&[SOURCE], &[], file);
    let settings = settings.unwrap();
    assert_eq!((settings.mtu, settings.connections), (Some(1401), 2000));
}

#[test]
fn sockets_are_ended_only_on_demand() {
    let name = "end-sockets-of-gone-endpoints";
    let is_on = |flags: &[(&str, &str)]| {
        let settings = check(flags, &[], None).0.unwrap();
        settings.end_sockets_of_gone_endpoints
    };
    assert!(!is_on(&[SOURCE]));
    assert!(is_on(&[SOURCE, (name, "true")]));
}

#[test]
fn healthz_is_served_at_an_address_or_nowhere() {
    let address = |flags: &[(&str, &str)]| {
        let settings = check(flags, &[], None).0.unwrap();
        settings.healthz_address.map(|address| address.to_string())
    };
    assert_eq!(address(&[SOURCE]).unwrap(), "0.0.0.0:10256");
    for (text, wanted) in [
        ("[::1]:99", Some("[::1]:99")),
        ("192.0.2.1:1", Some("192.0.2.1:1")),
        ("", None),
        ("off", None),
    ] {
        let found = address(&[SOURCE, ("healthz-address", text)]);
        assert_eq!(found.as_deref(), wanted, "{text:?}");
    }
    for text in ["10256", "0.0.0.0", "localhost:10256", "0.0.0.0:0", "::1:x"] {
        let error = check(&[SOURCE, ("healthz-address", text)], &[], None)
            .0
            .unwrap_err();
        for part in ["healthz-address", text, "0.0.0.0:10256"] {
            assert!(error.contains(part), "{error}");
        }
    }
}

#[test]
fn the_defaults_are_those_of_the_kernel_abi() {
    let settings = check(&[SOURCE], &[], None).0.unwrap();
    assert_eq!(settings.timeouts, Timeouts::DEFAULT);
    assert_eq!(
        settings.connections,
        weir_common::limits::CONNECTIONS_DEFAULT
    );
    assert_eq!(
        settings.services_max,
        weir_common::limits::SERVICE_PORTS_DEFAULT
    );
    assert_eq!(settings.backends_max, weir_common::limits::BACKENDS_DEFAULT);
    assert_eq!(settings.mark_mask, weir_common::mark::DEFAULT_MASK);
    assert_eq!(settings.source, SourceSetting::Directory("/objects".into()));
}

#[test]
fn empty_variables_and_keys_and_files_count_as_absent() {
    for file in ["", "# nothing\n", "mtu:\n"] {
        let settings = check(&[SOURCE], &[("WEIR_MTU", "")], Some(file)).0.unwrap();
        assert_eq!(settings.mtu, None, "{file:?}");
    }
}

#[test]
fn every_setting_is_shown_with_its_origin() {
    let (settings, values) = check(&[SOURCE], &[("WEIR_LOG", "debug")], None);
    let table = values.unwrap().table(&settings.unwrap());
    for definition in ALL {
        assert!(
            table.lines().any(|l| l.starts_with(definition.name)),
            "{table}"
        );
    }
    let row = |name| {
        let line = table
            .lines()
            .find(|l| l.split_whitespace().next() == Some(name));
        line.unwrap().split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(row("log"), ["log", "debug", "WEIR_LOG"]);
    assert_eq!(row("source"), ["source", "dir:/objects", "--source"]);
    assert_eq!(row("run-dir"), ["run-dir", "/run/weir", "default"]);
    let [_, root, origin] = row("cgroup-root")[..] else {
        panic!("{table}");
    };
    assert!(Path::new(root).join("cgroup.procs").exists(), "{root}");
    assert_eq!(origin, "mounts");
}

/// Bad input and what the message must contain: the setting, its origin, the value, the remedy.
#[test]
fn bad_values_name_setting_origin_value_and_remedy() {
    type Case = (
        &'static [(&'static str, &'static str)],
        &'static [(&'static str, &'static str)],
        Option<&'static str>,
        &'static [&'static str],
    );
    let cases: &[Case] = &[
        (
            &[],
            &[],
            None,
            &["source is required", "--source", "WEIR_SOURCE", "dir:PATH"],
        ),
        (
            &[("source", "kube")],
            &[],
            None,
            &[
                "setting source",
                "\"kube\"",
                "--source",
                "not in this version",
                "dir:PATH",
            ],
        ),
        (
            &[("source", "dir:objects")],
            &[],
            None,
            &["\"dir:objects\"", "absolute"],
        ),
        (
            &[("source", "/objects")],
            &[],
            None,
            &["\"/objects\"", "use dir:PATH"],
        ),
        (
            &[SOURCE, ("mtu", "abc")],
            &[],
            None,
            &[
                "setting mtu",
                "\"abc\"",
                "--mtu",
                "not a whole number",
                "1280 to 65535",
            ],
        ),
        (
            &[SOURCE],
            &[("WEIR_MTU", "1279")],
            None,
            &[
                "setting mtu",
                "\"1279\"",
                "WEIR_MTU",
                "out of range",
                "1280 to 65535",
            ],
        ),
        (
            &[SOURCE],
            &[],
            Some("log: info\nmtu: 99999999999999\n"),
            &["setting mtu", "agent.yaml:2", "out of range"],
        ),
        (
            &[SOURCE],
            &[],
            Some("mtu: {a: 1}\n"),
            &[
                "setting mtu",
                "agent.yaml:1",
                "a mapping where a value belongs",
            ],
        ),
        (
            &[SOURCE],
            &[],
            Some("devices: [[eth0]]\n"),
            &["setting devices", "agent.yaml:1", "a list of lists"],
        ),
        (
            &[SOURCE],
            &[],
            Some("log: info\nrun_dir: /x\n"),
            &[
                "unknown setting \"run_dir\"",
                "agent.yaml:2",
                "did you mean \"run-dir\"?",
            ],
        ),
        (
            &[SOURCE],
            &[],
            Some("colour: red\n"),
            &[
                "unknown setting \"colour\"",
                "agent.yaml:1",
                "known are source, node-name",
            ],
        ),
        (
            &[SOURCE],
            &[],
            Some("- a\n- b\n"),
            &["agent.yaml", "one YAML mapping"],
        ),
        (
            &[SOURCE],
            &[],
            Some("mtu: [1\n"),
            &["agent.yaml", "line", "one YAML mapping"],
        ),
        (
            &[SOURCE, ("config", "/does/not/exist.yaml")],
            &[],
            None,
            &["/does/not/exist.yaml", "No such file", "--config"],
        ),
        (
            &[SOURCE, ("mark-mask", "0xff")],
            &[],
            None,
            &["setting mark-mask", "\"0xff\"", "four adjacent bits"],
        ),
        (
            &[SOURCE, ("mark-mask", "0xg")],
            &[],
            None,
            &["\"0xg\"", "not a 32-bit mask"],
        ),
        (
            &[SOURCE, ("connections", "1")],
            &[],
            None,
            &["connections", "1024 to 8388608"],
        ),
        (
            &[SOURCE, ("connections", "-5")],
            &[],
            None,
            &["connections", "not a whole number"],
        ),
        (
            &[SOURCE, ("services-max", "0")],
            &[],
            None,
            &["services-max", "16 to 1048576"],
        ),
        (
            &[SOURCE, ("backends-max", "5000000")],
            &[],
            None,
            &["backends-max", "16 to 4194304"],
        ),
        (
            &[SOURCE, ("exclude-services", "app=legacy,")],
            &[],
            None,
            &[
                "exclude-services",
                "\"app=legacy,\"",
                "key of a label",
                "notin (a,b)",
            ],
        ),
        (
            &[SOURCE, ("exclude-cidrs", "10.0.0.0/8,x")],
            &[],
            None,
            &["exclude-cidrs", "\"x\" is not a CIDR", "169.254.20.10/32"],
        ),
        (
            &[SOURCE, ("exclude-cidrs", "10.0.0.1/8")],
            &[],
            None,
            &["exclude-cidrs", "bits beyond", "give 10.0.0.0/8"],
        ),
        (
            &[SOURCE, ("expedite-rcu", "yes")],
            &[],
            None,
            &["expedite-rcu", "\"yes\"", "true or false"],
        ),
        (
            &[SOURCE, ("end-sockets-of-gone-endpoints", "on")],
            &[],
            None,
            &["end-sockets-of-gone-endpoints", "\"on\"", "true or false"],
        ),
        (
            &[SOURCE, ("address-rest", "1h")],
            &[],
            None,
            &["address-rest", "\"1h\""],
        ),
        (
            &[SOURCE, ("timeout-udp", "0")],
            &[],
            None,
            &["timeout-udp", "1 to 2000000"],
        ),
        (
            &[SOURCE, ("run-dir", "run")],
            &[],
            None,
            &["run-dir", "\"run\"", "absolute path"],
        ),
        (
            &[SOURCE, ("run-dir", "/run/../etc")],
            &[],
            None,
            &["run-dir", "no .."],
        ),
        (
            &[SOURCE, ("bpf-root", "/")],
            &[],
            None,
            &["bpf-root", "below /"],
        ),
        (
            &[SOURCE, ("cgroup-root", "/proc")],
            &[],
            None,
            &[
                "cgroup-root",
                "\"/proc\"",
                "not a folder of a cgroup2",
                "findmnt",
            ],
        ),
        (
            &[SOURCE, ("cgroup-root", "/does/not/exist")],
            &[],
            None,
            &["cgroup-root", "No such file"],
        ),
        (
            &[SOURCE, ("cgroup-root", "sys/fs/cgroup")],
            &[],
            None,
            &["cgroup-root", "\"sys/fs/cgroup\"", "begins with /"],
        ),
        (
            &[SOURCE, ("devices", "eth0,a-name-that-is-too-long")],
            &[],
            None,
            &["devices", "a-name-that-is-too-long", "ip link"],
        ),
        (
            &[SOURCE, ("devices", "lo")],
            &[],
            None,
            &["devices", "\"lo\""],
        ),
        (
            &[SOURCE, ("node-name", "Node_1")],
            &[],
            None,
            &["node-name", "\"Node_1\"", "metadata.name"],
        ),
        (
            &[SOURCE, ("log", "weir=loud")],
            &[],
            None,
            &["setting log", "weir=loud", "debug or trace"],
        ),
        (
            &[SOURCE, ("log", "info,inof")],
            &[],
            None,
            &["setting log", "inof", "no level", "debug or trace"],
        ),
        (
            &[SOURCE, ("log-format", "xml")],
            &[],
            None,
            &["log-format", "\"xml\"", "text or json"],
        ),
    ];
    for (flags, variables, file, wanted) in cases {
        let error = check(flags, variables, *file)
            .0
            .expect_err(&format!("{flags:?} {variables:?} {file:?}"));
        for part in *wanted {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }
}

#[test]
fn exclusions_are_conditions_and_ranges() {
    let settings = check(&[SOURCE], &[], None).0.unwrap();
    assert_eq!(settings.exclude_services, None);
    assert!(settings.exclude_cidrs.is_empty());
    let file =
        "exclude-services: [app=legacy, '!weir']\nexclude-cidrs: [10.0.0.0/8, 'fd00::/64']\n";
    for text in [
        file,
        "exclude-services: app=legacy,!weir\nexclude-cidrs: 10.0.0.0/8, fd00::/64\n",
    ] {
        let settings = check(&[SOURCE], &[], Some(text)).0.unwrap();
        let selector = LabelSelector::parse("app=legacy,!weir").unwrap();
        assert_eq!(settings.exclude_services, Some(selector));
        let cidrs = ["10.0.0.0/8", "fd00::/64"].map(|cidr| cidr.parse().unwrap());
        assert_eq!(settings.exclude_cidrs, cidrs);
    }
    let none = check(&[SOURCE, ("exclude-services", " ")], &[], None).0;
    assert_eq!(none.unwrap().exclude_services, None);
}

#[test]
fn masquerade_is_on_and_knows_its_exceptions() {
    let settings = check(&[SOURCE], &[], None).0.unwrap();
    assert!(settings.masquerade_v4 && settings.masquerade_v6);
    assert!(settings.non_masquerade_cidrs.is_empty());
    assert_eq!(
        settings.nat_ports.first,
        weir_common::config::NAT_PORT_FIRST
    );
    assert_eq!(
        settings.nat_ports.count(),
        weir_common::config::NAT_PORT_COUNT
    );
    let file = "masquerade-ipv4: false\nnon-masquerade-cidrs: [10.0.0.0/8, fd00::/8]\n\
                nat-ports: 40000-49999\n";
    let settings = check(&[SOURCE], &[], Some(file)).0.unwrap();
    assert!(!settings.masquerade_v4 && settings.masquerade_v6);
    let cidrs: Vec<String> = settings
        .non_masquerade_cidrs
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(cidrs, ["10.0.0.0/8", "fd00::/8"]);
    assert_eq!(settings.nat_ports.to_string(), "40000-49999");
    for (name, value, part) in [
        ("masquerade-ipv6", "on", "neither true nor false"),
        ("non-masquerade-cidrs", "10.0.0.1/8", "10.0.0.0/8"),
        ("nat-ports", "1-2", "below 1024"),
    ] {
        let error = check(&[SOURCE, (name, value)], &[], None).0.unwrap_err();
        for part in [name, value, part, "give"] {
            assert!(error.contains(part), "{part:?}: {error}");
        }
    }
}

#[test]
fn node_ports_are_served_where_the_setting_says() {
    let given = |value: &str| {
        let settings = check(&[SOURCE, ("nodeport-addresses", value)], &[], None).0;
        settings.map(|settings| settings.node_port_addresses)
    };
    let settings = check(&[SOURCE], &[], None).0.unwrap();
    assert_eq!(settings.node_port_addresses, NodePortAddresses::Found);
    assert!(!settings.cluster_ips_outside);
    assert_eq!(given(" primary"), Ok(NodePortAddresses::Primary));
    assert_eq!(given(""), Ok(NodePortAddresses::Found));
    let ranges = ["192.0.2.0/24", "fd00::/8"].map(|range| range.parse().unwrap());
    assert_eq!(
        given("192.0.2.0/24, fd00::/8"),
        Ok(NodePortAddresses::Ranges(ranges.to_vec()))
    );
    for (value, part) in [
        ("192.0.2.1/24", "192.0.2.0/24"),
        ("primary,10.0.0.0/8", "\"primary\" is not a CIDR"),
        ("secondary", "or primary alone"),
    ] {
        let error = given(value).unwrap_err();
        for part in ["nodeport-addresses", value, part, "give"] {
            assert!(error.contains(part), "{part:?}: {error}");
        }
    }
}

#[test]
fn ranges_that_no_packet_has_are_refused_with_the_remedy() {
    for (text, problem, remedy) in [
        ("10.0.0.1", "has no length", "give 10.0.0.1/32"),
        ("fd00::1", "has no length", "give fd00::1/128"),
        (
            "::ffff:10.0.0.0/104",
            "IPv4 range in the form of IPv6",
            "as IPv4",
        ),
        ("10.0.0.1/8", "bits beyond", "10.0.0.0/8"),
        ("fd00::/129", "is not a CIDR", "give CIDRs"),
    ] {
        let refusal = cidrs(text).err().unwrap();
        assert!(
            refusal.problem.contains(problem),
            "{text}: {}",
            refusal.problem
        );
        assert!(
            refusal.remedy.contains(remedy),
            "{text}: {}",
            refusal.remedy
        );
    }
    // One within another, or twice, means what it says.
    assert_eq!(cidrs("10.0.0.0/8,10.1.0.0/16").ok().unwrap().len(), 2);
}
