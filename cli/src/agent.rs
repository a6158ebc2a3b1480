//! The commands that ask the agent for a list or a single answer.

use std::{
    io,
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail};
use serde::Serialize;
use tonic::{Code, Status, transport::Channel};
use weir_api::{
    ConnectError,
    v1::{
        Endpoint, ListEndpointsRequest, ListNodesRequest, Node, PortMapping, StatusRequest,
        WaitAppliedRequest, weir_client::WeirClient,
    },
};

use crate::{
    Format, output,
    table::{Cell, Colour, Table},
};

/// How long an answer may take.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// Between two looks whether an agent has started.
const RETRY: Duration = Duration::from_millis(100);

/// Connects to the agent. `timeout` bounds each call; `None` is for streams.
pub async fn connect(
    socket: &Path,
    timeout: Option<Duration>,
) -> anyhow::Result<WeirClient<Channel>> {
    let channel = match weir_api::connect(socket, timeout).await {
        Ok(channel) => channel,
        Err(error) => return Err(unreachable(error, why_unreachable(socket), socket)),
    };
    // A node may have thousands of Services.
    Ok(WeirClient::new(channel).max_decoding_message_size(usize::MAX))
}

/// The kind of error that the socket gives.
fn why_unreachable(socket: &Path) -> Option<io::ErrorKind> {
    UnixStream::connect(socket).err().map(|error| error.kind())
}

/// Says to users who may not ask the agent whether it runs, that they may not.
fn unreachable(error: ConnectError, why: Option<io::ErrorKind>, socket: &Path) -> anyhow::Error {
    match why {
        Some(io::ErrorKind::PermissionDenied) => anyhow!(
            "the agent's socket {} is not open to this user (permission denied); run this as root",
            socket.display()
        ),
        _ => match error.starting() {
            Some(pid) => anyhow!(
                "the agent (pid {pid}) is still starting, or ending: nobody serves its socket {}, as it loads the data \
                 path first; ask again in some seconds, and see its log if that lasts",
                socket.display()
            ),
            None => error.into(),
        },
    }
}

/// The agent's error as text for people.
pub fn explain(status: &Status, socket: &Path) -> anyhow::Error {
    let place = socket.display();
    match status.code() {
        Code::Cancelled | Code::DeadlineExceeded if status.message() == "Timeout expired" => {
            anyhow!(
                "the agent at {place} did not answer in time; see its log, and whether it is busy"
            )
        }
        Code::Unimplemented => anyhow!(
            "the agent at {place} does not know this request; is it of another version (`weir version`)?"
        ),
        Code::Unknown | Code::Internal => anyhow!(
            "the connection to the agent at {place} broke: {}; has it been stopped?",
            status.message()
        ),
        _ => anyhow!("{}", status.message().to_owned()),
    }
}

/// `weir endpoint list`.
pub async fn endpoints(socket: &Path, format: Format) -> anyhow::Result<()> {
    let answer = connect(socket, Some(TIMEOUT))
        .await?
        .list_endpoints(ListEndpointsRequest {})
        .await
        .map_err(|status| explain(&status, socket))?;
    output::list(format, &answer.into_inner().endpoints, endpoint_table)
}

fn endpoint_table(endpoints: &[Endpoint]) -> Table {
    let mut table = Table::new([
        "NUMBER",
        "NAMESPACE",
        "POD",
        "INTERFACE",
        "ADDRESSES",
        "HOST PORTS",
        "DEVICE",
        "IFINDEX",
        "CONTAINER",
        "STATE",
    ]);
    for endpoint in endpoints {
        let colour = match endpoint.state.as_str() {
            "ready" => Colour::Green,
            "reserved" => Colour::Yellow,
            _ => Colour::Red,
        };
        table.row([
            Cell::number(endpoint.number),
            output::or_dash(&endpoint.pod_namespace).into(),
            output::or_dash(&endpoint.pod_name).into(),
            endpoint.ifname.as_str().into(),
            Cell::lines(endpoint.addresses.iter().cloned()),
            host_ports(&endpoint.host_ports),
            endpoint.host_ifname.as_str().into(),
            Cell::number(endpoint.host_ifindex),
            // As `crictl` and `docker` shorten them.
            endpoint
                .container_id
                .chars()
                .take(13)
                .collect::<String>()
                .into(),
            Cell::coloured(endpoint.state.as_str(), colour),
        ]);
    }
    table
}

/// Ports of the node, and where in the pod they lead: `192.0.2.1:8080->80/TCP`.
fn host_ports(mappings: &[PortMapping]) -> Cell {
    if mappings.is_empty() {
        return output::or_dash("").into();
    }
    Cell::lines(mappings.iter().map(|mapping| {
        let address = match mapping.host_ip.as_str() {
            "" => String::new(),
            v6 if v6.contains(':') => format!("[{v6}]:"),
            v4 => format!("{v4}:"),
        };
        format!(
            "{address}{}->{}/{}",
            mapping.host_port, mapping.container_port, mapping.protocol
        )
    }))
}

/// `weir node list`.
pub async fn nodes(socket: &Path, format: Format) -> anyhow::Result<()> {
    let answer = connect(socket, Some(TIMEOUT))
        .await?
        .list_nodes(ListNodesRequest {})
        .await
        .map_err(|status| explain(&status, socket))?;
    output::list(format, &answer.into_inner().nodes, node_table)
}

fn node_table(nodes: &[Node]) -> Table {
    let mut table = Table::new(["NAME", "ADDRESSES", "POD-CIDRS", "ROUTES", "ZONE"]);
    for node in nodes {
        let name = if node.this_node {
            format!("{} (this node)", node.name)
        } else {
            node.name.clone()
        };
        table.row([
            name.into(),
            Cell::lines(node.addresses.iter().cloned()),
            Cell::lines(node.pod_cidrs.iter().cloned()),
            Cell::lines(node.routes.iter().cloned()),
            output::or_dash(&node.zone).into(),
        ]);
    }
    table
}

/// `weir wait --applied`.
pub async fn wait(socket: &Path, timeout: Duration, format: Format) -> anyhow::Result<()> {
    let deadline = Instant::now() + timeout;
    // One that is still starting is waited for, too.
    while let Err(error) = weir_api::connect(socket, Some(TIMEOUT)).await
        && error.starting().is_some()
        && Instant::now() < deadline
    {
        tokio::time::sleep(RETRY).await;
    }
    let timeout = deadline.saturating_duration_since(Instant::now());
    // The agent answers at the deadline; the call itself gets some more.
    let mut client = connect(socket, Some(timeout + Duration::from_secs(5))).await?;
    let request = WaitAppliedRequest {
        timeout_milliseconds: u32::try_from(timeout.as_millis())?,
    };
    let revision = match client.wait_applied(request).await {
        Ok(answer) => answer.into_inner().revision,
        Err(status) => return Err(explain(&status, socket)),
    };
    match format {
        Format::Json => output::json(&serde_json::json!({ "revision": revision })),
        Format::Yaml => output::yaml(&serde_json::json!({ "revision": revision })),
        Format::Table => output::text(&format!("applied: revision {revision}\n")),
    }
}

#[derive(Serialize)]
struct Versions {
    weir: &'static str,
    abi_version: u32,
    agent: Option<String>,
    agent_abi_version: Option<u32>,
    kernel: Option<String>,
}

/// `weir version`: also without an agent, which is then shown as absent.
pub async fn version(socket: &Path, format: Format) -> anyhow::Result<()> {
    let answer = match connect(socket, Some(TIMEOUT)).await {
        Ok(mut client) => client.status(StatusRequest {}).await.ok(),
        Err(_) => None,
    }
    .map(tonic::Response::into_inner);
    let versions = Versions {
        weir: env!("CARGO_PKG_VERSION"),
        abi_version: weir_common::ABI_VERSION,
        agent_abi_version: answer.as_ref().map(|a| a.abi_version),
        kernel: answer.as_ref().map(|a| a.kernel_version.clone()),
        agent: answer.map(|a| a.agent_version),
    };
    match format {
        Format::Json => output::json(&versions),
        Format::Yaml => output::yaml(&versions),
        Format::Table => {
            let agent = match (
                &versions.agent,
                versions.agent_abi_version,
                &versions.kernel,
            ) {
                (Some(agent), Some(abi), Some(kernel)) => {
                    format!("{agent} (ABI {abi}, kernel {kernel})")
                }
                _ => format!("not reachable at {}", socket.display()),
            };
            output::text(&format!(
                "weir   {} (ABI {})\nagent  {agent}\n",
                versions.weir, versions.abi_version
            ))
        }
    }
}

/// Where the agent has its pins, if it answers within a second.
pub async fn bpf_root(socket: &Path) -> anyhow::Result<String> {
    let mut client = connect(socket, Some(Duration::from_secs(1))).await?;
    let status = client.status(StatusRequest {}).await?.into_inner();
    if status.bpf_root.is_empty() {
        bail!("the agent does not say where its pins are");
    }
    Ok(status.bpf_root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_and_endpoints_fill_every_column() {
        let node = Node {
            name: "a".into(),
            this_node: true,
            ..Node::default()
        };
        let text = node_table(&[node]).render(false);
        assert!(text.contains("a (this node)  -"), "{text}");
        let endpoint = Endpoint {
            number: 3,
            container_id: "0123456789abcdef".into(),
            addresses: vec!["10.0.0.3".into(), "fd00::3".into()],
            state: "ready".into(),
            ..Endpoint::default()
        };
        let text = endpoint_table(std::slice::from_ref(&endpoint)).render(false);
        assert!(text.contains("0123456789abc "), "{text}");
        assert_eq!(text.lines().count(), 3, "{text}");
        let mapping = |host_ip: &str| PortMapping {
            host_port: 8080,
            container_port: 80,
            protocol: "TCP".into(),
            host_ip: host_ip.into(),
        };
        let endpoint = Endpoint {
            host_ports: ["", "192.0.2.1", "fd00::1"].map(mapping).into(),
            ..endpoint
        };
        let text = endpoint_table(&[endpoint]).render(false);
        for port in [
            " 8080->80/TCP ",
            "192.0.2.1:8080->80/TCP",
            "[fd00::1]:8080->80/TCP",
        ] {
            assert!(text.contains(port), "{port}: {text}");
        }
    }

    #[tokio::test]
    async fn who_may_not_open_the_socket_is_told_to_be_root() {
        let socket = Path::new("/does/not/exist.sock");
        for (why, wanted) in [
            (io::ErrorKind::PermissionDenied, "run this as root"),
            (io::ErrorKind::NotFound, "is weir-agent running"),
        ] {
            let error = weir_api::connect(socket, None).await.unwrap_err();
            let text = unreachable(error, Some(why), socket).to_string();
            assert!(text.contains(wanted), "{text}");
            assert!(text.contains("/does/not/exist.sock"), "{text}");
        }
    }
}
