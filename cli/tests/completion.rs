//! The scripts of `weir completion`, loaded by the shell that they are for.

use std::{
    fs,
    process::{Command, Stdio},
};

#[expect(clippy::unwrap_used, reason = "a helper of tests")]
fn script(shell: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["completion", shell])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What bash offers for the last of the words, through the function that the script has
/// registered for `weir`.
#[expect(clippy::unwrap_used, reason = "a helper of tests")]
fn completed(words: &[&str]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("weir.bash");
    fs::write(&file, script("bash")).unwrap();
    // As readline calls it: the command, the word to complete, the word before it.
    let program = r#"
        set -e
        file=$1
        shift
        source "$file"
        registered=$(complete -p weir)
        [[ $registered =~ -F\ ([^ ]+) ]]
        COMP_WORDS=("$@")
        COMP_CWORD=$(($# - 1))
        set +e
        "${BASH_REMATCH[1]}" weir "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let output = Command::new("bash")
        .args(["--noprofile", "--norc", "-c", program, "bash"])
        .arg(&file)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .expect("bash is installed");
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_and_options() {
    assert_eq!(completed(&["weir", "stat"]), ["status"]);
    assert_eq!(completed(&["weir", "bpf", "ip"]), ["ipcache"]);
    assert_eq!(
        completed(&["weir", "bpf", "lb", "list", "--af"]),
        ["--affinity"]
    );
    assert_eq!(
        completed(&["weir", "completion", ""])
            .iter()
            .filter(|word| !word.starts_with('-'))
            .collect::<Vec<_>>(),
        ["bash", "zsh", "fish"]
    );
    let commands = completed(&["weir", ""]);
    for command in ["status", "service", "monitor", "wait"] {
        assert!(commands.iter().any(|word| word == command), "{commands:?}");
    }
}

#[test]
fn scripts_of_other_shells_name_the_commands() {
    let zsh = script("zsh");
    assert!(zsh.starts_with("#compdef weir") && zsh.contains("--affinity"));
    for shell in ["zsh", "fish"] {
        let script = script(shell);
        for word in ["ipcache", "completion", "drops-only", "timeout"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
}
