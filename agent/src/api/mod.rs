//! Serves the agent's gRPC API on a unix socket. It holds no state and decides nothing: every
//! call becomes a [`Command`] to the event loop of [`crate::agent`], whose answer goes back to the
//! caller; events and progress come from there through [`events`] and a watch channel.

use std::{future::Future, io, path::Path, time::Duration};

use nix::sys::stat::{Mode, umask};
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout_at},
};
use tokio_stream::{StreamExt as _, wrappers::UnixListenerStream};
use tonic::{
    Request, Response, Status,
    transport::{Server, server::UdsConnectInfo},
};
use weir_api::v1::{
    AllocateRequest, AllocateResponse, CommitRequest, CommitResponse, ListEndpointsRequest,
    ListEndpointsResponse, ListNodesRequest, ListNodesResponse, ListServicesRequest,
    ListServicesResponse, MonitorRequest, ReleaseRequest, ReleaseResponse, StatusRequest,
    StatusResponse, WaitAppliedRequest, WaitAppliedResponse,
    cni_server::{Cni, CniServer},
    weir_server::{Weir, WeirServer},
};

use crate::source::Rescan;

pub mod events;

use events::{EventHub, EventStream};

/// Where an answer goes. The caller may be gone: then it is dropped.
pub type Reply<T> = oneshot::Sender<Result<T, Status>>;

/// A request to the event loop.
#[derive(Debug)]
pub enum Command {
    /// Reserve a pod's interface.
    Allocate(AllocateRequest, Reply<AllocateResponse>),
    /// The pod's interface is wired.
    Commit(CommitRequest, Reply<CommitResponse>),
    /// Forget a pod's interface.
    Release(ReleaseRequest, Reply<ReleaseResponse>),
    /// What is attached, how full the maps are, what is wrong.
    Status(Reply<StatusResponse>),
    /// Service ports.
    ListServices(ListServicesRequest, Reply<ListServicesResponse>),
    /// Endpoints of this node.
    ListEndpoints(Reply<ListEndpointsResponse>),
    /// Nodes.
    ListNodes(Reply<ListNodesResponse>),
}

/// How far the event loop is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Progress {
    /// Revision of the source that was last taken in.
    pub revision: u64,
    /// Last revision that is wholly in the kernel.
    pub applied: u64,
    /// What is missing, for people: the objects that are being retried, or the source that is
    /// not complete.
    pub missing: Vec<String>,
}

/// The ends of the event loop that the server talks to.
#[derive(Clone, Debug)]
pub struct Core {
    /// Requests.
    pub commands: mpsc::Sender<Command>,
    /// Progress.
    pub progress: watch::Receiver<Progress>,
    /// Asks the source to look again.
    pub rescan: mpsc::Sender<Rescan>,
    /// Events.
    pub events: EventHub,
}

/// Binds the socket with mode 0600; a socket that nobody serves any more is replaced.
///
/// # Errors
///
/// If somebody serves it, or it cannot be made.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    crate::lock::remove_stale_socket(path)?;
    // From the first moment on nobody else may connect: a chmod afterwards would come too late.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

/// Serves until `stop` is ready; calls under way are then answered first.
///
/// # Errors
///
/// If the listener fails.
pub async fn serve(
    listener: UnixListener,
    core: Core,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    // A failed accept (the peer is gone, no file descriptors left) must not end the server.
    let incoming = UnixListenerStream::new(listener).filter(|connection| {
        if let Err(error) = connection {
            tracing::warn!(%error, "cannot accept a connection on the agent's socket");
        }
        connection.is_ok()
    });
    Server::builder()
        .add_service(CniServer::with_interceptor(core.clone(), only_root))
        .add_service(WeirServer::with_interceptor(core, only_root))
        .serve_with_incoming_shutdown(incoming, stop)
        .await
}

/// The mode of the socket keeps others out already; this also holds where someone changed it.
fn only_root(request: Request<()>) -> Result<Request<()>, Status> {
    let uid = request
        .extensions()
        .get::<UdsConnectInfo>()
        .and_then(|info| info.peer_cred)
        .map(|credentials| credentials.uid());
    match uid {
        Some(uid) if uid == 0 || uid == nix::unistd::geteuid().as_raw() => Ok(request),
        Some(uid) => Err(Status::permission_denied(format!(
            "user {uid} may not use the Weir agent; run the command as root"
        ))),
        None => Err(Status::permission_denied(
            "the caller's user is unknown; connect over the agent's unix socket",
        )),
    }
}

impl Core {
    async fn ask<T>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<Response<T>, Status> {
        let stopping = || Status::unavailable("the Weir agent is stopping; try again");
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(command(reply))
            .await
            .map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?.map(Response::new)
    }

    async fn wait_applied(&self, timeout: Duration) -> Result<u64, Status> {
        let deadline = Instant::now() + timeout;
        // Even without waiting, the source needs a moment to say what it holds.
        let rescan_deadline = deadline.max(Instant::now() + Duration::from_secs(1));
        let gone = || Status::unavailable("the source of objects has stopped; see the agent's log");
        let (reply, answer) = oneshot::channel();
        let rescan = async {
            self.rescan.send(reply).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())
        };
        let revision = timeout_at(rescan_deadline, rescan).await.map_err(|_| {
            Status::deadline_exceeded(format!(
                "the source did not say within {} ms what it holds; see `weir status`",
                timeout.as_millis()
            ))
        })??;
        let mut progress = self.progress.clone();
        // Without waiting, the batch of that revision still gets its turn.
        let deadline = deadline.max(Instant::now() + Duration::from_millis(20));
        let applied = timeout_at(deadline, progress.wait_for(|p| p.applied >= revision)).await;
        match applied {
            Ok(Ok(progress)) => Ok(progress.applied),
            Ok(Err(_)) => Err(Status::unavailable("the Weir agent is stopping; try again")),
            Err(_) => Err(not_applied(&self.progress.borrow(), revision, timeout)),
        }
    }
}

fn not_applied(progress: &Progress, revision: u64, timeout: Duration) -> Status {
    const SHOWN: usize = 5;
    let mut text = format!(
        "not applied within {} ms: the source is at revision {revision}, the kernel at {}",
        timeout.as_millis(),
        progress.applied
    );
    if !progress.missing.is_empty() {
        text.push_str("; missing: ");
        let shown: Vec<_> = progress
            .missing
            .iter()
            .take(SHOWN)
            .map(String::as_str)
            .collect();
        text.push_str(&shown.join("; "));
        if progress.missing.len() > SHOWN {
            text.push_str(&format!("; and {} more", progress.missing.len() - SHOWN));
        }
    }
    text.push_str("; see `weir status`");
    Status::deadline_exceeded(text)
}

#[tonic::async_trait]
impl Cni for Core {
    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        self.ask(|reply| Command::Allocate(request.into_inner(), reply))
            .await
    }

    async fn commit(
        &self,
        request: Request<CommitRequest>,
    ) -> Result<Response<CommitResponse>, Status> {
        self.ask(|reply| Command::Commit(request.into_inner(), reply))
            .await
    }

    async fn release(
        &self,
        request: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseResponse>, Status> {
        self.ask(|reply| Command::Release(request.into_inner(), reply))
            .await
    }
}

#[tonic::async_trait]
impl Weir for Core {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        self.ask(Command::Status).await
    }

    async fn list_services(
        &self,
        request: Request<ListServicesRequest>,
    ) -> Result<Response<ListServicesResponse>, Status> {
        self.ask(|reply| Command::ListServices(request.into_inner(), reply))
            .await
    }

    async fn list_endpoints(
        &self,
        _: Request<ListEndpointsRequest>,
    ) -> Result<Response<ListEndpointsResponse>, Status> {
        self.ask(Command::ListEndpoints).await
    }

    async fn list_nodes(
        &self,
        _: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        self.ask(Command::ListNodes).await
    }

    type MonitorStream = EventStream;

    async fn monitor(
        &self,
        request: Request<MonitorRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let drops_only = request.into_inner().drops_only;
        Ok(Response::new(self.events.subscribe(drops_only)))
    }

    async fn wait_applied(
        &self,
        request: Request<WaitAppliedRequest>,
    ) -> Result<Response<WaitAppliedResponse>, Status> {
        let timeout = u64::from(request.into_inner().timeout_milliseconds);
        let revision = Self::wait_applied(self, Duration::from_millis(timeout)).await?;
        Ok(Response::new(WaitAppliedResponse { revision }))
    }
}

#[cfg(test)]
mod tests;
