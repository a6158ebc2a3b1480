//! Kubernetes objects as YAML files in the directory that the agents watch. Files are replaced atomically, one
//! object per file.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use crate::traffic::Protocol;

/// The directory of objects.
#[derive(Clone, Debug)]
pub struct Objects {
    directory: PathBuf,
}

impl Objects {
    /// Uses `directory`, made if need be.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn new(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
        Ok(Self {
            directory: directory.to_owned(),
        })
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Creates or replaces an object.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn apply(&self, object: &Value) -> Result<()> {
        self.write(&file_name(object), &to_yaml(object))
    }

    /// Deletes an object.
    ///
    /// # Errors
    ///
    /// When there is no such object.
    pub fn delete(&self, object: &Value) -> Result<()> {
        let path = self.directory.join(file_name(object));
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    /// Creates or replaces a file with any text.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.directory.join(file);
        // Two writers of one file must not share a temporary one.
        let temporary = self
            .directory
            .join(format!(".{file}.{:?}.tmp", std::thread::current().id()));
        fs::write(&temporary, text).with_context(|| format!("write {}", temporary.display()))?;
        fs::rename(&temporary, &path).with_context(|| format!("replace {}", path.display()))
    }
}

fn file_name(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_lowercase();
    let kind = text(&object["kind"]);
    let name = text(&object["metadata"]["name"]);
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{kind}-{namespace}-{name}.yaml"),
        None => format!("{kind}-{name}.yaml"),
    }
}

/// A Node.
#[must_use]
pub fn node(name: &str, addresses: &[IpAddr], pod_cidrs: &[String]) -> Value {
    let addresses: Vec<Value> = addresses
        .iter()
        .map(|address| json!({"type": "InternalIP", "address": address.to_string()}))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {"podCIDR": pod_cidrs.first(), "podCIDRs": pod_cidrs},
        "status": {"addresses": addresses},
    })
}

/// A Pod in the namespace `default`, running on `node`.
#[must_use]
pub fn pod(name: &str, uid: &str, node: &str, addresses: &[IpAddr]) -> Value {
    let addresses: Vec<Value> = addresses
        .iter()
        .map(|address| json!({"ip": address.to_string()}))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": uid, "labels": {"app": name}},
        "spec": {"nodeName": node},
        "status": {"phase": "Running", "podIPs": addresses},
    })
}

/// A port of a Service: name, protocol, port of the Service, port of the endpoints.
#[derive(Clone, Copy, Debug)]
pub struct Port {
    /// Name, unique in the Service.
    pub name: &'static str,
    /// Protocol.
    pub protocol: Protocol,
    /// Where clients connect to.
    pub port: u16,
    /// Where endpoints listen.
    pub target: u16,
}

impl Port {
    /// TCP and UDP on one port number.
    #[must_use]
    pub const fn both(port: u16, target: u16) -> [Self; 2] {
        [
            Self {
                name: "tcp",
                protocol: Protocol::Tcp,
                port,
                target,
            },
            Self {
                name: "udp",
                protocol: Protocol::Udp,
                port,
                target,
            },
        ]
    }
}

/// A Service of type ClusterIP in the namespace `default`.
#[must_use]
pub fn service(name: &str, cluster_ips: &[IpAddr], ports: &[Port]) -> Value {
    let ports: Vec<Value> = ports
        .iter()
        .map(|port| {
            json!({
                "name": port.name,
                "protocol": port.protocol.name(),
                "port": port.port,
                "targetPort": port.target,
            })
        })
        .collect();
    let families: Vec<&str> = cluster_ips.iter().map(|ip| family_name(*ip)).collect();
    let ips: Vec<String> = cluster_ips.iter().map(ToString::to_string).collect();
    let policy = if ips.len() > 1 {
        "RequireDualStack"
    } else {
        "SingleStack"
    };
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": ips.first(),
            "clusterIPs": ips,
            "ipFamilies": families,
            "ipFamilyPolicy": policy,
            "ports": ports,
        },
    })
}

/// One endpoint of a slice.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Address, of the slice's family.
    pub address: IpAddr,
    /// Node that it runs on.
    pub node: String,
    /// Name of the Pod, or empty.
    pub pod: String,
    /// Condition `ready`.
    pub ready: bool,
    /// Condition `terminating`.
    pub terminating: bool,
}

impl Endpoint {
    /// A ready endpoint.
    #[must_use]
    pub fn ready(address: IpAddr, node: &str, pod: &str) -> Self {
        Self {
            address,
            node: node.to_owned(),
            pod: pod.to_owned(),
            ready: true,
            terminating: false,
        }
    }
}

/// The EndpointSlice of one family of a Service in the namespace `default`, named SERVICE-FAMILY.
#[must_use]
pub fn endpoint_slice(service: &str, v6: bool, endpoints: &[Endpoint], ports: &[Port]) -> Value {
    let family = if v6 { "IPv6" } else { "IPv4" };
    let ports: Vec<Value> = ports
        .iter()
        .map(|port| {
            json!({"name": port.name, "protocol": port.protocol.name(), "port": port.target})
        })
        .collect();
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|endpoint| {
            let mut value = json!({
                "addresses": [endpoint.address.to_string()],
                "conditions": {
                    "ready": endpoint.ready,
                    "serving": true,
                    "terminating": endpoint.terminating,
                },
                "nodeName": endpoint.node,
            });
            if !endpoint.pod.is_empty() {
                value["targetRef"] =
                    json!({"kind": "Pod", "namespace": "default", "name": endpoint.pod});
            }
            value
        })
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-{}", family.to_lowercase()),
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family,
        "endpoints": endpoints,
        "ports": ports,
    })
}

const fn family_name(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "IPv4",
        IpAddr::V6(_) => "IPv6",
    }
}

/// Block-style YAML, as `kubectl get -o yaml` prints it; strings are always quoted.
#[must_use]
pub fn to_yaml(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) => write_map(&mut out, map, 0),
        Value::Array(items) => write_list(&mut out, items, 0),
        scalar => out.push_str(&format!("{scalar}\n")),
    }
    out
}

fn write_map(out: &mut String, map: &Map<String, Value>, indent: usize) {
    for (number, (key, value)) in map.iter().enumerate() {
        // The first key of a list item stands behind the dash.
        if number > 0 || !out.ends_with("- ") {
            out.push_str(&" ".repeat(indent));
        }
        // Keys may hold characters that mean something in YAML, quoted they never do.
        let plain = key.bytes().all(|b| b.is_ascii_alphanumeric());
        let key = if plain {
            key.clone()
        } else {
            Value::from(key.as_str()).to_string()
        };
        out.push_str(&key);
        out.push(':');
        write_value(out, value, indent);
    }
}

fn write_list(out: &mut String, items: &[Value], indent: usize) {
    for item in items {
        out.push_str(&" ".repeat(indent));
        match item {
            Value::Object(map) if !map.is_empty() => {
                out.push_str("- ");
                write_map(out, map, indent + 2);
            }
            other => {
                out.push('-');
                write_value(out, other, indent);
            }
        }
    }
}

fn write_value(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            out.push('\n');
            write_map(out, map, indent + 2);
        }
        Value::Array(items) if !items.is_empty() => {
            out.push('\n');
            write_list(out, items, indent);
        }
        scalar => out.push_str(&format!(" {scalar}\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_is_block_style_and_quoted() {
        let value = json!({
            "kind": "X",
            "metadata": {"labels": {"a.b/c": "1"}, "none": {}},
            "list": [{"a": 1, "b": [true, "y"]}, {"c": null}],
        });
        let text = to_yaml(&value);
        assert_eq!(
            text,
            "kind: \"X\"\nlist:\n- a: 1\n  b:\n  - true\n  - \"y\"\n- c: null\nmetadata:\n  labels:\n    \"a.b/c\": \"1\"\n  none: {}\n"
        );
    }

    #[test]
    fn files_are_named_after_the_object() {
        let name = file_name(&service("Web", &[], &[]));
        assert_eq!(name, "service-default-web.yaml");
    }
}
