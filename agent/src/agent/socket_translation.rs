//! Which pods want no translation at the socket: their own annotation, else the label of their
//! namespace. Pure; the event loop tells every change of the source, and asks when an endpoint is
//! entered or something was said.

use std::collections::{BTreeMap, HashMap};

use weir_common::endpoint::flag;

use crate::{
    objects::{Kind, Object, ObjectName, SOCKET_TRANSLATION, SocketTranslation},
    source::Change,
};

/// What was said, by those that say anything.
#[derive(Debug, Default)]
pub(super) struct SocketTranslations {
    pods: HashMap<ObjectName, PodSays>,
    namespaces: BTreeMap<String, SocketTranslation>,
}

#[derive(Debug, Eq, PartialEq)]
struct PodSays {
    /// Node that the pod runs on.
    node: String,
    says: SocketTranslation,
}

impl SocketTranslations {
    /// Takes a change in. Gives whether anything said has changed.
    pub(super) fn take(&mut self, change: &Change) -> bool {
        match change {
            Change::Upsert(Object::Pod(pod)) => match &pod.socket_translation {
                SocketTranslation::Unsaid => self.pods.remove(&pod.name).is_some(),
                says => {
                    let new = PodSays {
                        node: pod.node.clone(),
                        says: says.clone(),
                    };
                    let same = self.pods.get(&pod.name) == Some(&new);
                    self.pods.insert(pod.name.clone(), new);
                    !same
                }
            },
            Change::Upsert(Object::Namespace(namespace)) => {
                let name = &namespace.name.name;
                match SocketTranslation::of(&namespace.labels) {
                    SocketTranslation::Unsaid => self.namespaces.remove(name).is_some(),
                    says => {
                        let old = self.namespaces.insert(name.clone(), says.clone());
                        old != Some(says)
                    }
                }
            }
            Change::Delete(key) => match key.kind {
                Kind::Pod => self.pods.remove(&key.name).is_some(),
                Kind::Namespace => self.namespaces.remove(&key.name.name).is_some(),
                _ => false,
            },
            Change::Upsert(_) => false,
        }
    }

    /// Flags of a pod's endpoint: bits of [`flag`].
    pub(super) fn flags(&self, namespace: &str, pod: &str) -> u16 {
        let name = ObjectName::new(namespace, pod);
        let of_pod = self.pods.get(&name).map(|pod| &pod.says);
        let of_namespace = self.namespaces.get(namespace);
        let decides = [of_pod, of_namespace].into_iter().flatten().find(|says| {
            matches!(
                says,
                SocketTranslation::Enabled | SocketTranslation::Disabled
            )
        });
        match decides {
            Some(SocketTranslation::Disabled) => flag::NO_SOCKET_TRANSLATION,
            _ => 0,
        }
    }

    /// Values that cannot be used, of namespaces and of the pods of a node, for people.
    pub(super) fn problems(&self, node: &str) -> Vec<String> {
        let mut problems: Vec<String> = self
            .namespaces
            .iter()
            .filter_map(|(name, says)| problem("Namespace", name, "label", says))
            .collect();
        let of_node = self.pods.iter().filter(|(_, pod)| pod.node == node);
        problems.extend(
            of_node.filter_map(|(name, pod)| problem("Pod", name, "annotation", &pod.says)),
        );
        problems.sort();
        problems
    }
}

fn problem(
    kind: &str,
    name: impl std::fmt::Display,
    place: &str,
    says: &SocketTranslation,
) -> Option<String> {
    match says {
        SocketTranslation::Unknown(value) => Some(format!(
            "{kind} {name}: {place} {SOCKET_TRANSLATION}: {value:?} is not enabled or disabled, and \
             counts as absent; correct or remove it"
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::{Namespace, ObjectKey, Pod};

    fn said(value: &str) -> BTreeMap<String, String> {
        match value {
            "" => BTreeMap::new(),
            value => BTreeMap::from([(SOCKET_TRANSLATION.to_owned(), value.to_owned())]),
        }
    }

    fn pod(value: &str) -> Change {
        Change::Upsert(Object::Pod(Pod {
            name: ObjectName::new("shop", "web-0"),
            node: "a".to_owned(),
            socket_translation: SocketTranslation::of(&said(value)),
            ..Pod::default()
        }))
    }

    fn namespace(value: &str) -> Change {
        Change::Upsert(Object::Namespace(Namespace {
            name: ObjectName::new("", "shop"),
            labels: said(value),
        }))
    }

    fn deleted(kind: Kind, namespace: &str, name: &str) -> Change {
        let name = ObjectName::new(namespace, name);
        Change::Delete(ObjectKey { kind, name })
    }

    #[test]
    fn the_pods_word_counts_before_the_namespaces() {
        for (of_pod, of_namespace, disabled) in [
            ("", "", false),
            ("disabled", "", true),
            ("", "disabled", true),
            ("enabled", "disabled", false),
            ("disabled", "enabled", true),
            ("Disabled", "disabled", true),
            ("Disabled", "", false),
            ("", "no", false),
        ] {
            for order in [
                [pod(of_pod), namespace(of_namespace)],
                [namespace(of_namespace), pod(of_pod)],
            ] {
                let mut translations = SocketTranslations::default();
                for change in &order {
                    translations.take(change);
                }
                let expected = if disabled {
                    flag::NO_SOCKET_TRANSLATION
                } else {
                    0
                };
                let what = format!("pod {of_pod:?}, namespace {of_namespace:?}");
                assert_eq!(translations.flags("shop", "web-0"), expected, "{what}");
                assert_eq!(translations.flags("other", "web-0"), 0, "{what}");
            }
        }
    }

    #[test]
    fn only_what_changes_what_was_said_is_a_change() {
        let mut translations = SocketTranslations::default();
        for (change, expected) in [
            (pod(""), false),
            (pod("disabled"), true),
            (pod("disabled"), false),
            (namespace("enabled"), true),
            (namespace("enabled"), false),
            (namespace("x"), true),
            (pod("enabled"), true),
            (pod(""), true),
            (deleted(Kind::Pod, "shop", "web-0"), false),
            (deleted(Kind::Namespace, "", "shop"), true),
            (deleted(Kind::Namespace, "", "shop"), false),
            (pod("disabled"), true),
            (deleted(Kind::Service, "shop", "web-0"), false),
            (deleted(Kind::Pod, "shop", "web-0"), true),
        ] {
            assert_eq!(translations.take(&change), expected, "{change:?}");
        }
        assert!(translations.pods.is_empty() && translations.namespaces.is_empty());
    }

    #[test]
    fn problems_name_object_key_value_and_remedy() {
        let mut translations = SocketTranslations::default();
        for change in [pod("off"), namespace("no")] {
            translations.take(&change);
        }
        let problems = translations.problems("a");
        for (problem, parts) in problems.iter().zip([
            [
                "Namespace shop: label",
                SOCKET_TRANSLATION,
                "\"no\"",
                "remove it",
            ],
            [
                "Pod shop/web-0: annotation",
                SOCKET_TRANSLATION,
                "\"off\"",
                "remove it",
            ],
        ]) {
            for part in parts {
                assert!(problem.contains(part), "{part:?} is not in {problem}");
            }
        }
        assert_eq!(problems.len(), 2);
        assert_eq!(translations.problems("b").len(), 1, "the pod is not there");
    }
}
