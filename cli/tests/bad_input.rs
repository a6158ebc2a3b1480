//! Bad input of every kind and what `weir` says to it: standard error, exit code 1, the object,
//! the value, the remedy.

use std::process::{Command, Output, Stdio};

#[expect(clippy::unwrap_used, reason = "a helper of tests")]
fn weir(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(arguments)
        .env_remove("WEIR_SOCKET")
        .env_remove("WEIR_BPF_ROOT")
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn bad_input_is_told_with_exit_code_1() {
    const NO_SOCKET: [&str; 2] = ["--socket", "/does/not/exist.sock"];
    type Case = (&'static [&'static str], &'static [&'static str]);
    let cases: &[Case] = &[
        (&[], &["Usage: weir"]),
        (&["frobnicate"], &["unrecognized subcommand 'frobnicate'"]),
        (&["service"], &["Usage: weir service", "list"]),
        (&["status", "-o", "xml"], &["'xml'", "table", "json"]),
        (&["wait"], &["--applied"]),
        (
            &["wait", "--applied", "--timeout", "soon"],
            &["'soon'", "500ms, 30s, 2m"],
        ),
        (&["monitor", "--count", "0"], &["'0'", "--count"]),
        (
            &["status"],
            &[
                "/does/not/exist.sock",
                "No such file",
                "is weir-agent running",
            ],
        ),
        (
            &["service", "list"],
            &["/does/not/exist.sock", "is weir-agent running"],
        ),
        (
            &["endpoint", "list", "-o", "json"],
            &["/does/not/exist.sock"],
        ),
        (&["node", "list"], &["/does/not/exist.sock"]),
        (&["monitor"], &["/does/not/exist.sock"]),
        (&["wait", "--applied"], &["/does/not/exist.sock"]),
        (
            &["bpf", "lb", "list", "--frontends", "--maglev"],
            &["'--frontends'", "cannot be used with", "--maglev"],
        ),
        (
            &["bpf", "lb", "list", "--affinity", "--backends"],
            &["'--affinity'", "cannot be used with", "--backends"],
        ),
        (
            &["bpf", "lb", "list", "--sources"],
            &["unexpected argument '--sources'", "Usage: weir bpf lb list"],
        ),
        (
            &["bpf", "lb", "list", "--maglev=yes"],
            &["'yes'", "'--maglev'"],
        ),
        (
            &[
                "bpf",
                "lb",
                "list",
                "--affinity",
                "--bpf-root",
                "/does/not/exist",
            ],
            &["/does/not/exist/maps/CONFIG", "--bpf-root"],
        ),
        (&["completion"], &["<SHELL>"]),
        (&["completion", "tcsh"], &["'tcsh'", "bash, zsh, fish"]),
        (
            &["bpf", "flow", "list", "--bpf-root", "/does/not/exist"],
            &["/does/not/exist/maps/CONFIG", "--bpf-root"],
        ),
    ];
    for (arguments, wanted) in cases {
        let all: Vec<&str> = if arguments.is_empty() {
            Vec::new()
        } else {
            NO_SOCKET.iter().chain(*arguments).copied().collect()
        };
        let output = weir(&all, &[]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        for part in *wanted {
            assert!(
                text.contains(part),
                "{arguments:?}: {part:?} is not in: {text}"
            );
        }
    }
}

#[test]
fn the_socket_can_come_from_the_environment() {
    let output = weir(&["status"], &[("WEIR_SOCKET", "/from/environment.sock")]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("/from/environment.sock"), "{text}");
}

#[test]
fn version_and_help_need_no_agent() {
    let output = weir(&["--socket", "/does/not/exist.sock", "version"], &[]);
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains(env!("CARGO_PKG_VERSION")) && text.contains("not reachable"),
        "{text}"
    );
    for arguments in [["--help"].as_slice(), &["--version"], &["bpf", "--help"]] {
        let output = weir(arguments, &[]);
        assert!(
            output.status.success() && !output.stdout.is_empty(),
            "{arguments:?}"
        );
    }
}
