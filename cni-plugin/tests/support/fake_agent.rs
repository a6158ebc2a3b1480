//! An agent that gives out fixed answers, notes the calls, and can be told to misbehave.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use tokio::{net::UnixListener, sync::Notify};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};
use weir_api::v1::{
    AllocateRequest, AllocateResponse, CommitRequest, CommitResponse, ReleaseRequest,
    ReleaseResponse,
    cni_server::{Cni, CniServer},
};

/// What the agent does wrong.
#[derive(Clone, Debug, Default)]
pub enum Behaviour {
    /// Nothing.
    #[default]
    Good,
    /// Allocate answers this.
    AllocateFails(Status),
    /// Allocate never answers.
    AllocateHangs,
    /// Commit answers this.
    CommitFails(Status),
    /// Commit never answers.
    CommitHangs,
    /// At the first Commit the agent is gone, without a word.
    DiesAtCommit,
    /// Release answers this.
    ReleaseFails(Status),
    /// Nothing is ever answered.
    AllHangs,
}

/// Calls it has seen.
#[derive(Clone, Debug, Default)]
pub struct Calls {
    pub allocated: Vec<AllocateRequest>,
    pub committed: Vec<CommitRequest>,
    pub released: Vec<ReleaseRequest>,
}

pub struct FakeAgent {
    pub socket: PathBuf,
    calls: Arc<Mutex<Calls>>,
    stop: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
}

impl FakeAgent {
    pub fn start(directory: &Path, answer: AllocateResponse, behaviour: Behaviour) -> Self {
        let socket = directory.join("agent.sock");
        let _ = std::fs::remove_file(&socket);
        let calls = Arc::new(Mutex::new(Calls::default()));
        let stop = Arc::new(Notify::new());
        let service = Service {
            answer,
            behaviour,
            calls: calls.clone(),
            stop: stop.clone(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let listener = {
            let _guard = runtime.enter();
            UnixListener::bind(&socket).unwrap()
        };
        let end = stop.clone();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let serve = Server::builder()
                    .add_service(CniServer::new(service))
                    .serve_with_incoming(UnixListenerStream::new(listener));
                tokio::select! {
                    result = serve => result.unwrap(),
                    () = end.notified() => {}
                }
            });
            // Dropping the runtime closes every connection: the agent is dead.
            runtime.shutdown_background();
        });
        Self {
            socket,
            calls,
            stop,
            thread: Some(thread),
        }
    }

    pub fn calls(&self) -> Calls {
        self.calls.lock().unwrap().clone()
    }
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        self.stop.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// A process by an agent's name that has the lock beside the socket and serves nobody.
pub struct StartingAgent(Child);

impl StartingAgent {
    pub fn start(directory: &Path) -> Self {
        // A process has the name that it was started by.
        let program = directory.join("weir-agent");
        std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
        let process = Command::new(&program).arg("600").spawn().unwrap();
        std::fs::write(directory.join("agent.lock"), format!("{}\n", process.id())).unwrap();
        Self(process)
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for StartingAgent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Service {
    answer: AllocateResponse,
    behaviour: Behaviour,
    calls: Arc<Mutex<Calls>>,
    stop: Arc<Notify>,
}

#[tonic::async_trait]
impl Cni for Service {
    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        self.calls
            .lock()
            .unwrap()
            .allocated
            .push(request.into_inner());
        match &self.behaviour {
            Behaviour::AllocateFails(status) => Err(status.clone()),
            Behaviour::AllocateHangs | Behaviour::AllHangs => std::future::pending().await,
            _ => Ok(Response::new(self.answer.clone())),
        }
    }

    async fn commit(
        &self,
        request: Request<CommitRequest>,
    ) -> Result<Response<CommitResponse>, Status> {
        self.calls
            .lock()
            .unwrap()
            .committed
            .push(request.into_inner());
        match &self.behaviour {
            Behaviour::CommitFails(status) => Err(status.clone()),
            Behaviour::CommitHangs => std::future::pending().await,
            Behaviour::DiesAtCommit => {
                self.stop.notify_one();
                std::future::pending().await
            }
            _ => Ok(Response::new(CommitResponse {})),
        }
    }

    async fn release(
        &self,
        request: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseResponse>, Status> {
        self.calls
            .lock()
            .unwrap()
            .released
            .push(request.into_inner());
        match &self.behaviour {
            Behaviour::ReleaseFails(status) => Err(status.clone()),
            Behaviour::AllHangs => std::future::pending().await,
            _ => Ok(Response::new(ReleaseResponse {})),
        }
    }
}
