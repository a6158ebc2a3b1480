//! A node and a pod: two network namespaces, and the plugin called in the node's.

use std::{
    io::Write as _,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;
use weir_api::v1::AllocateResponse;

/// A network namespace that ends with the value.
pub struct Namespace {
    pub name: String,
}

impl Namespace {
    pub fn new(what: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("weir-cni-{}-{number}-{what}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]));
        Self { name }
    }

    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// `ip -n NAME …`, which must succeed.
    pub fn ip(&self, arguments: &str) -> String {
        let mut command = Command::new("ip");
        command.args(["-n", &self.name]);
        command.args(arguments.split_whitespace());
        run(&mut command)
    }

    /// `ip -n NAME -j …` decoded.
    pub fn json(&self, arguments: &str) -> Value {
        let text = self.ip(&format!("-j {arguments}"));
        if text.trim().is_empty() {
            return json!([]);
        }
        serde_json::from_str(&text).unwrap()
    }

    /// Names of its links but `lo`.
    pub fn links(&self) -> Vec<String> {
        self.json("link")
            .as_array()
            .unwrap()
            .iter()
            .map(|link| link["ifname"].as_str().unwrap().to_owned())
            .filter(|name| name != "lo")
            .collect()
    }

    pub fn sysctl(&self, path: &str) -> String {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path()));
        command.args(["cat", &format!("/proc/sys/net/{path}")]);
        run(&mut command).trim().to_owned()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .stderr(Stdio::null())
            .status();
    }
}

/// What a call of the plugin gave.
#[derive(Debug)]
pub struct Outcome {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Outcome {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {:?} {:?}", self.stdout, self.stderr))
    }

    /// The error's code and its message with the details.
    pub fn error(&self) -> (u64, String) {
        assert!(!self.success, "{self:?}");
        let json = self.json();
        let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
        let message = format!("{}: {}", text("msg"), text("details"));
        (json["code"].as_u64().unwrap(), message)
    }
}

/// Node, pod, and a directory for the agent's socket.
pub struct Bed {
    pub node: Namespace,
    pub pod: Namespace,
    pub directory: TempDir,
    pub container_id: String,
    /// `runtimeConfig` of every call.
    pub runtime_config: Value,
}

impl Bed {
    pub fn new() -> Self {
        let node = Namespace::new("node");
        let pod = Namespace::new("pod");
        let container_id = format!("c{}", pod.name);
        Self {
            node,
            pod,
            directory: TempDir::new().unwrap(),
            container_id,
            runtime_config: json!({"portMappings": []}),
        }
    }

    /// Calls the plugin in the node's namespace as a runtime does. `changes` overrides variables.
    pub fn call(&self, command: &str, version: &str, changes: &[(&str, &str)]) -> Outcome {
        let configuration = json!({
            "cniVersion": version,
            "name": "weir",
            "type": "weir-cni",
            "agentSocket": self.directory.path().join("agent.sock"),
            "agentTimeoutSeconds": 2,
            "logFile": self.directory.path().join("cni.log"),
            "capabilities": {"portMappings": true},
            "runtimeConfig": self.runtime_config,
        });
        let netns = self.pod.path();
        let mut process = Command::new("nsenter");
        process
            .arg(format!("--net={}", self.node.path()))
            .arg(env!("CARGO_BIN_EXE_weir-cni"))
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.container_id)
            .env("CNI_NETNS", &netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env(
                "CNI_ARGS",
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u1",
            )
            .envs(changes.iter().copied());
        let start = Instant::now();
        let mut child = process
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // The plugin may refuse before it reads.
        let _ = stdin.write_all(configuration.to_string().as_bytes());
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        Outcome {
            success: output.status.success(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
            took: start.elapsed(),
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("cni.log")).unwrap()
    }
}

/// The answer of an agent with both families.
pub fn answer() -> AllocateResponse {
    AllocateResponse {
        endpoint: 7,
        host_ifname: "weir0123456789a".into(),
        host_mac: "0a:57:00:00:00:07".into(),
        pod_mac: "0e:57:00:00:00:07".into(),
        addresses: vec!["10.97.0.7".into(), "fd97::7".into()],
        gateways: vec!["169.254.1.1".into(), "fe80::1".into()],
        mtu: 1430,
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}
