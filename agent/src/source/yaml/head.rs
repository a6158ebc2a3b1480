//! What an object is, before it is decoded: the type to decode into follows from it.

use serde::Deserialize;

use crate::objects::{Kind, ObjectKey, ObjectName};

/// The fields that every Kubernetes object has.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Head {
    pub(super) api_version: Option<String>,
    pub(super) kind: Option<String>,
    metadata: Option<Metadata>,
}

/// A document: an object, or a list of them.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct DocumentHead {
    api_version: Option<String>,
    kind: Option<String>,
    metadata: Option<Metadata>,
    pub(super) items: Option<Vec<Head>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
}

impl DocumentHead {
    /// Splits the items off.
    pub(super) fn split(self) -> (Head, Option<Vec<Head>>) {
        let Self {
            api_version,
            kind,
            metadata,
            items,
        } = self;
        let head = Head {
            api_version,
            kind,
            metadata,
        };
        (head, items)
    }
}

/// What is to be done with an object.
#[derive(Debug)]
pub(super) enum Class {
    /// Decode it.
    Used(Kind),
    /// Weir has no use for it; how it calls itself.
    Ignored(String),
    /// It cannot be an object that Kubernetes would take.
    Bad(String),
}

impl Head {
    /// What it is. Its group and version decide, not the kind alone: a `Service` of
    /// `serving.knative.dev/v1` is another thing.
    pub(super) fn class(&self) -> Class {
        let Some(kind) = self.kind.as_deref().filter(|kind| !kind.is_empty()) else {
            return Class::Bad("the field `kind` is missing: not a Kubernetes object".to_owned());
        };
        let Some(api_version) = self.api_version.as_deref().filter(|v| !v.is_empty()) else {
            return Class::Bad(format!("{kind}: the field `apiVersion` is missing"));
        };
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        let used = match (group, kind) {
            ("", "Service") => Kind::Service,
            ("discovery.k8s.io", "EndpointSlice") => Kind::EndpointSlice,
            ("", "Node") => Kind::Node,
            ("", "Pod") => Kind::Pod,
            ("", "Namespace") => Kind::Namespace,
            _ => return Class::Ignored(format!("{api_version} {kind}")),
        };
        if version == "v1" {
            return Class::Used(used);
        }
        let wanted = if group.is_empty() {
            "v1".to_owned()
        } else {
            format!("{group}/v1")
        };
        Class::Bad(format!(
            "{kind}: apiVersion {api_version:?} is not known; write {wanted}"
        ))
    }

    /// Identity of the object if it is of `kind`.
    pub(super) fn key(&self, kind: Kind) -> Option<ObjectKey> {
        let metadata = self.metadata.as_ref()?;
        let name = metadata.name.clone().filter(|name| !name.is_empty())?;
        let namespace = match kind {
            Kind::Node | Kind::Namespace => String::new(),
            _ => metadata
                .namespace
                .clone()
                .filter(|namespace| !namespace.is_empty())
                .unwrap_or_else(|| ObjectName::DEFAULT_NAMESPACE.to_owned()),
        };
        Some(ObjectKey {
            kind,
            name: ObjectName::new(namespace, name),
        })
    }

    /// An item of a `ServiceList` need not say that it is a Service.
    pub(super) fn inherit(&mut self, list: &Head) {
        let Some(kind) = list.kind.as_deref().and_then(|k| k.strip_suffix("List")) else {
            return;
        };
        if !kind.is_empty() && self.kind.is_none() && self.api_version.is_none() {
            self.kind = Some(kind.to_owned());
            self.api_version.clone_from(&list.api_version);
        }
    }

    /// Whether it is a list, when it has `items`.
    pub(super) fn is_list(&self) -> bool {
        self.kind
            .as_deref()
            .is_some_and(|kind| kind.ends_with("List"))
    }
}
