//! Calls of the CNI plugin as a container runtime makes them: variables in the environment, configuration on
//! standard input.

use std::{process::Output, time::Duration};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::{agent::binary, netns::NetNs, process};

/// How long a call may take on a busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// One call.
#[derive(Clone, Debug)]
pub struct Call {
    /// Variables of the environment, `CNI_COMMAND` and so on.
    pub environment: Vec<(String, String)>,
    /// The network configuration.
    pub configuration: String,
}

impl Call {
    /// As containerd calls for a pod's `eth0`.
    #[must_use]
    pub fn new(command: &str, socket: &str, container: &str, netns: &str) -> Self {
        let mut call = Self {
            environment: Vec::new(),
            configuration: configuration(socket).to_string(),
        };
        call.set("CNI_COMMAND", command);
        call.set("CNI_CONTAINERID", container);
        call.set("CNI_NETNS", netns);
        call.set("CNI_IFNAME", "eth0");
        call.set("CNI_PATH", "/opt/cni/bin");
        call
    }

    /// Sets a variable.
    pub fn set(&mut self, name: &str, value: &str) {
        self.unset(name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Takes a variable away.
    pub fn unset(&mut self, name: &str) {
        self.environment.retain(|(known, _)| known != name);
    }

    /// Names the pod, as containerd does.
    pub fn set_pod(&mut self, namespace: &str, name: &str, uid: &str) {
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};\
             K8S_POD_INFRA_CONTAINER_ID=x;K8S_POD_UID={uid}"
        );
        self.set("CNI_ARGS", &arguments);
    }

    /// Hands `hostPort`s of the pod on, as containerd does for a plugin with the capability: an array of
    /// `{"hostPort", "containerPort", "protocol", "hostIP"}`.
    ///
    /// # Panics
    ///
    /// When the configuration was replaced by something that is no JSON object.
    pub fn set_port_mappings(&mut self, mappings: &Value) {
        match serde_json::from_str(&self.configuration) {
            Ok(Value::Object(mut fields)) => {
                fields.insert("runtimeConfig".into(), json!({"portMappings": mappings}));
                self.configuration = Value::Object(fields).to_string();
            }
            other => panic!("no network configuration: {other:?}"),
        }
    }

    /// Makes the call in the network namespace of a node.
    ///
    /// # Errors
    ///
    /// When the plugin cannot be run or hangs; that it fails is for the caller to see.
    pub fn run(&self, node: &NetNs) -> Result<Output> {
        let mut command = node.command(binary("weir-cni")?)?;
        command
            .env_clear()
            .envs(self.environment.iter().map(|(k, v)| (k, v)));
        process::output(&mut command, self.configuration.as_bytes(), TIMEOUT)
    }

    /// Makes the call and returns its result, `null` when it prints none.
    ///
    /// # Errors
    ///
    /// When it fails, with code and message of the plugin.
    pub fn result(&self, node: &NetNs) -> Result<Value> {
        let output = self.run(node)?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!(
                "weir-cni ended with {}: {}{}",
                output.status,
                text.trim(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        if text.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).with_context(|| format!("result of weir-cni: {text}"))
    }
}

/// The network configuration that names an agent's socket.
#[must_use]
pub fn configuration(socket: &str) -> Value {
    json!({
        "cniVersion": "1.1.0",
        "name": "weir",
        "type": "weir-cni",
        "agentSocket": socket,
        "capabilities": {"portMappings": true},
    })
}
