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
