//! Configurations of other CNI plugins: the runtime takes the first file of the folder by name.

use std::{fs, io, path::Path};

use serde_json::Value;

use crate::Findings;

/// Plugins that make no network.
const HARMLESS: [&str; 2] = ["weir-cni", "loopback"];

/// See [`crate::look`].
pub fn look(folder: &Path, findings: &mut Findings) {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        entries => entries.map(|entries| entries.flatten().collect::<Vec<_>>()),
    };
    for entry in findings.or_default(&format!("{}", folder.display()), entries) {
        let path = entry.path();
        let known = path.extension().is_some_and(|ending| {
            ["conf", "conflist", "json"]
                .iter()
                .any(|known| ending == *known)
        });
        if !known {
            continue;
        }
        let shown = path.display().to_string();
        let text = findings.or_default(&shown, fs::read_to_string(&path));
        let plugins = plugins(&text);
        if plugins
            .iter()
            .all(|plugin| HARMLESS.contains(&plugin.as_str()))
        {
            continue;
        }
        findings.add(
            format!("{shown} is the configuration of another CNI plugin ({})", plugins.join(", ")),
            "the container runtime takes the first file of the folder by name: pods may get another network",
            format!("rm {shown}"),
        );
    }
}

/// Types of the plugins that a configuration names; none if it is no JSON, which runtimes pass over.
fn plugins(text: &str) -> Vec<String> {
    let configuration: Value = serde_json::from_str(text).unwrap_or_default();
    let type_of = |plugin: &Value| plugin["type"].as_str().map(str::to_owned);
    let list = configuration["plugins"].as_array();
    let plugins = list.into_iter().flatten().filter_map(type_of);
    type_of(&configuration).into_iter().chain(plugins).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_of_others_are_named() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("10-weir.conf", r#"{"type": "weir-cni"}"#),
            ("99-loopback.conf", r#"{"type": "loopback"}"#),
            (
                "05-cilium.conflist",
                r#"{"plugins": [{"type": "cilium-cni"}, {"type": "portmap"}]}"#,
            ),
            ("87-podman.conf", r#"{"type": "bridge"}"#),
            ("broken.conf", "{"),
            ("README", r#"{"type": "bridge"}"#),
            ("10-old.conf.bak", r#"{"type": "bridge"}"#),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let mut findings = Findings::default();
        look(folder.path(), &mut findings);
        findings.strangers.sort();
        let found = findings.strangers;
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found[0].what.contains("05-cilium.conflist")
                && found[0].what.contains("cilium-cni, portmap")
        );
        assert!(
            found[1].what.contains("87-podman.conf") && found[1].remedy.ends_with("87-podman.conf")
        );
        look(&folder.path().join("absent"), &mut Findings::default());
    }
}
