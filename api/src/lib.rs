//! The gRPC API of the Weir agent: messages and services generated from `proto/weir.proto`, and
//! the one way to connect to the agent's socket. It knows nothing of the agent or the kernel.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// Version 1 of the API.
#[allow(
    missing_docs,
    clippy::all,
    unused_qualifications,
    reason = "generated code"
)]
pub mod v1 {
    tonic::include_proto!("weir.v1");
}

/// Where the agent listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/weir/agent.sock";

/// Why the agent cannot be reached.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot reach the Weir agent at {socket}: {cause}; is weir-agent running on this node, and is \
     this its socket?"
)]
pub struct ConnectError {
    socket: PathBuf,
    cause: std::io::Error,
}

impl ConnectError {
    /// The process id of an agent that lives and does not serve the socket: it is still starting, or ending.
    /// `None` if there is no such agent, or if the socket could not be asked (it is not open to this user).
    #[must_use]
    pub fn starting(&self) -> Option<u32> {
        match self.cause.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => holder_of_lock(&self.socket),
            _ => None,
        }
    }
}

/// The process that has the lock beside the socket, if it lives and is an agent: the file outlives its agent, and the
/// number may by then be another process's.
fn holder_of_lock(socket: &Path) -> Option<u32> {
    let lock = std::fs::read_to_string(socket.with_file_name("agent.lock")).ok()?;
    let pid: u32 = lock.trim().parse().ok()?;
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    (name.trim() == "weir-agent").then_some(pid)
}

/// Connects to the agent at `socket`. Fails at once if nobody listens there.
///
/// `timeout` bounds every later call on the channel; `None` lets them run (streams).
///
/// # Errors
///
/// [`ConnectError`] if the socket does not exist, may not be opened, or nobody listens.
pub async fn connect(socket: &Path, timeout: Option<Duration>) -> Result<Channel, ConnectError> {
    let error = |cause| ConnectError {
        socket: socket.to_owned(),
        cause,
    };
    let first = UnixStream::connect(socket).await.map_err(error)?;
    let path = socket.to_owned();
    let mut first = Some(first);
    let connector = tower::service_fn(move |_: Uri| {
        let (ready, path) = (first.take(), path.clone());
        async move {
            let stream = match ready {
                Some(stream) => stream,
                None => UnixStream::connect(path).await?,
            };
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    // The authority is never resolved: the connector knows the path.
    let mut endpoint = Endpoint::from_static("http://weir.invalid");
    if let Some(timeout) = timeout {
        endpoint = endpoint.timeout(timeout);
    }
    Ok(endpoint.connect_with_connector_lazy(connector))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(socket: &Path, kind: ErrorKind) -> ConnectError {
        ConnectError {
            socket: socket.to_owned(),
            cause: kind.into(),
        }
    }

    #[test]
    fn only_a_living_agent_starts() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let lock = directory.path().join("agent.lock");
        let starting = |kind| error(&socket, kind).starting();
        assert_eq!(starting(ErrorKind::NotFound), None, "no lock");
        // A process of another name, one that is gone, and no number.
        for holder in [std::process::id().to_string(), "4194305".into(), "x".into()] {
            std::fs::write(&lock, holder).unwrap();
            assert_eq!(starting(ErrorKind::NotFound), None);
        }
        // A process has the name that it was started by.
        let agent = directory.path().join("weir-agent");
        std::os::unix::fs::symlink("/bin/sleep", &agent).unwrap();
        let mut process = std::process::Command::new(&agent)
            .arg("60")
            .spawn()
            .unwrap();
        let pid = process.id();
        std::fs::write(&lock, format!("{pid}\n")).unwrap();
        let found = [
            ErrorKind::NotFound,
            ErrorKind::ConnectionRefused,
            ErrorKind::PermissionDenied,
        ]
        .map(starting);
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(found, [Some(pid), Some(pid), None]);
        assert_eq!(starting(ErrorKind::NotFound), None, "gone");
    }
}
