//! Bad settings as the operator meets them: the binary, its standard error, exit code 1.

use std::process::{Command, Output, Stdio};

#[expect(clippy::unwrap_used, reason = "a helper of tests")]
fn agent(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weir-agent"))
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn bad_settings_are_told_with_exit_code_1() {
    type Case = (
        &'static [&'static str],
        &'static [(&'static str, &'static str)],
        &'static [&'static str],
    );
    const SOURCE: (&str, &str) = ("WEIR_SOURCE", "dir:/objects");
    let cases: &[Case] = &[
        (&[], &[], &["source is required", "--source", "WEIR_SOURCE"]),
        (&["--sauce", "x"], &[], &["--sauce"]),
        (
            &["--source", "kube"],
            &[],
            &["\"kube\"", "--source", "not in this version"],
        ),
        (
            &["--mtu", "9"],
            &[SOURCE],
            &["setting mtu", "\"9\"", "--mtu", "1280 to 65535"],
        ),
        (
            &[],
            &[SOURCE, ("WEIR_LOG_FORMAT", "xml")],
            &["WEIR_LOG_FORMAT", "text or json"],
        ),
        (
            &["--config", "/does/not/exist"],
            &[SOURCE],
            &["/does/not/exist", "--config"],
        ),
        (
            &["settings", "--connections", "ten"],
            &[SOURCE],
            &["connections", "\"ten\""],
        ),
        (
            &["--bpf-root", "/proc/weir"],
            &[SOURCE],
            &["/proc/weir", "bpffs", "mount -t bpf"],
        ),
        (
            &["--bpf-root", "/proc/weir", "cleanup"],
            &[],
            &["/proc/weir", "bpffs", "mount -t bpf"],
        ),
    ];
    for (arguments, variables, wanted) in cases {
        let output = agent(arguments, variables);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            output.status.code(),
            Some(1),
            "{arguments:?} {variables:?}: {text}"
        );
        for part in *wanted {
            assert!(
                text.contains(part),
                "{arguments:?}: {part:?} is not in: {text}"
            );
        }
    }
}

#[test]
fn the_settings_in_force_are_shown_with_their_origin() {
    let output = agent(
        &["--source", "dir:/objects", "settings"],
        &[("WEIR_MTU", "1400"), ("WEIR_NODE_NAME", "worker-1")],
    );
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let row = |name: &str| {
        let line = text
            .lines()
            .find(|line| line.split_whitespace().next() == Some(name));
        line.unwrap_or_default()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(row("mtu"), "mtu 1400 WEIR_MTU");
    assert_eq!(row("source"), "source dir:/objects --source");
    assert_eq!(row("node-name"), "node-name worker-1 WEIR_NODE_NAME");
    assert_eq!(row("connections"), "connections 131072 default");
}

#[test]
fn the_help_names_every_setting_and_variable() {
    let output = agent(&["--help"], &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    for definition in weir_agent::settings::definitions::ALL {
        assert!(
            text.contains(&format!("--{}", definition.name)),
            "{}",
            definition.name
        );
        assert!(
            text.contains(&definition.environment_variable()),
            "{}",
            definition.name
        );
    }
}
