//! Golden cases. A file in `cases/` is Kubernetes YAML followed by comments: after `# expect:` the
//! state that follows from it, as `render` writes it. More YAML after that is applied on top, a
//! line `# delete: KIND NAMESPACE/NAME` deletes, and another `# expect:` follows. Lines `# this node:
//! NAME`, `# exclude-services: SELECTOR`, `# exclude-cidrs: CIDR` and `# cluster-ips-outside` say what the model is told.
//!
//! `WEIR_BLESS=1 cargo test --test model` writes what the model says into the files.

use std::{env, fs, path::Path};

use weir_agent::{
    model::{Model, ModelOptions},
    objects::{Kind, LabelSelector, ObjectKey, ObjectName},
    source::{
        Change,
        yaml::{self, Format},
    },
};

use crate::{Mirror, render::render};

#[test]
fn cases() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model/cases");
    let mut failures = Vec::new();
    let mut count = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let stages = stages(&text);
        assert!(!stages.is_empty(), "{}: no `# expect:`", path.display());
        count += 1;
        if env::var_os("WEIR_BLESS").is_some() {
            fs::write(&path, bless(&stages)).unwrap();
            continue;
        }
        for backwards in [false, true] {
            for together in [false, true] {
                failures.extend(run(&stages, backwards, together).err().map(|error| {
                    let path = path.display();
                    format!("{path} (backwards {backwards}, together {together}): {error}")
                }));
            }
        }
    }
    assert!(count >= 10, "only {count} cases were found");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn options(stages: &[Stage]) -> ModelOptions {
    let mut options = ModelOptions::default();
    for line in stages[0].yaml.lines() {
        if let Some(node) = line.strip_prefix("# this node: ") {
            options.node_name = node.to_owned();
        } else if let Some(text) = line.strip_prefix("# exclude-services: ") {
            options.exclude_services = Some(LabelSelector::parse(text).unwrap());
        } else if let Some(text) = line.strip_prefix("# exclude-cidrs: ") {
            options.exclude_cidrs.push(text.parse().unwrap());
        } else if line == "# cluster-ips-outside" {
            options.cluster_ips_outside = true;
        }
    }
    options
}

struct Stage {
    yaml: String,
    changes: Vec<Change>,
    expected: String,
}

/// Applies the stages, then deletes everything.
fn run(stages: &[Stage], backwards: bool, together: bool) -> Result<(), String> {
    let mut model = Model::new(options(stages));
    let mut mirror = Mirror::default();
    let mut keys = Vec::new();
    let mut apply = |model: &mut Model, mut changes: Vec<Change>| {
        if backwards {
            changes.reverse();
        }
        for change in changes {
            model.apply(change);
            if !together {
                mirror.follow(model.take_delta());
            }
        }
        mirror.follow(model.take_delta());
        assert_eq!(mirror, Mirror::of(model));
    };
    for (index, stage) in stages.iter().enumerate() {
        apply(&mut model, stage.changes.clone());
        let found = render(&model);
        if found != stage.expected {
            let expected = &stage.expected;
            let stage = index + 1;
            return Err(format!(
                "stage {stage}\n--- expected\n{expected}--- found\n{found}"
            ));
        }
        keys.extend(stage.changes.iter().filter_map(|change| match change {
            Change::Upsert(object) => Some(object.key()),
            Change::Delete(_) => None,
        }));
    }
    apply(&mut model, keys.into_iter().map(Change::Delete).collect());
    match render(&model) {
        rest if rest.is_empty() => Ok(()),
        rest => Err(format!("left after all is deleted:\n{rest}")),
    }
}

fn stages(text: &str) -> Vec<Stage> {
    let mut stages = Vec::new();
    let (mut yaml, mut expected) = (String::new(), None::<String>);
    for line in text.lines().chain([""]) {
        match &mut expected {
            None if line == "# expect:" => expected = Some(String::new()),
            None => yaml += &format!("{line}\n"),
            Some(lines) => match line.strip_prefix('#') {
                Some(line) => *lines += &format!("{}\n", line.strip_prefix(' ').unwrap_or(line)),
                None => {
                    stages.push(stage(&yaml, expected.take().unwrap()));
                    yaml = format!("{line}\n");
                }
            },
        }
    }
    assert!(yaml.trim().is_empty(), "no `# expect:` after {yaml}");
    stages
}

fn stage(yaml: &str, expected: String) -> Stage {
    let manifest = yaml::parse(yaml, Format::Yaml);
    assert_eq!(manifest.errors, []);
    let upserts = manifest
        .objects
        .into_iter()
        .map(|o| Change::Upsert(o.object));
    let deletes = yaml.lines().filter_map(|l| l.strip_prefix("# delete: "));
    Stage {
        yaml: yaml.to_owned(),
        changes: upserts.chain(deletes.map(delete)).collect(),
        expected,
    }
}

fn delete(what: &str) -> Change {
    let (kind, name) = what.split_once(' ').unwrap();
    let kind = [
        Kind::Service,
        Kind::EndpointSlice,
        Kind::Node,
        Kind::Pod,
        Kind::Namespace,
    ]
    .into_iter()
    .find(|k| k.name() == kind)
    .unwrap();
    let (namespace, name) = name.split_once('/').unwrap_or(("", name));
    Change::Delete(ObjectKey {
        kind,
        name: ObjectName::new(namespace, name),
    })
}

fn bless(stages: &[Stage]) -> String {
    let mut model = Model::new(options(stages));
    let mut text = String::new();
    for stage in stages {
        stage.changes.iter().for_each(|c| model.apply(c.clone()));
        model.take_delta();
        text += &stage.yaml;
        text += "# expect:\n";
        for line in render(&model).lines() {
            text += &format!("# {line}\n");
        }
    }
    text
}
