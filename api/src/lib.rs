//! The gRPC API of the Weir agent: messages and services generated from `proto/weir.proto`, and
//! the one way to connect to the agent's socket. It knows nothing of the agent or the kernel.

use std::{
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
