use std::os::unix::fs::PermissionsExt as _;

use weir_api::v1::{
    Endpoint, MonitorEvent, Node, ServicePort, Source, cni_client::CniClient,
    weir_client::WeirClient,
};

use super::*;

/// An event loop that answers every command with something recognisable.
async fn fake_core(mut commands: mpsc::Receiver<Command>) {
    while let Some(command) = commands.recv().await {
        match command {
            Command::Allocate(request, reply) => {
                let answer = if request.pod_name == "full" {
                    Err(Status::resource_exhausted("10.0.0.0/30 is used up"))
                } else {
                    Ok(AllocateResponse {
                        endpoint: 7,
                        addresses: vec!["10.0.0.7".into(), "fd00::7".into()],
                        ..Default::default()
                    })
                };
                let _ = reply.send(answer);
            }
            Command::Commit(_, reply) => drop(reply),
            Command::Release(_, reply) => drop(reply.send(Ok(ReleaseResponse {}))),
            Command::Status(reply) => {
                let _ = reply.send(Ok(StatusResponse {
                    node_name: "a".into(),
                    source: Some(Source::default()),
                    ..Default::default()
                }));
            }
            Command::ListServices(_, reply) => {
                let services = vec![ServicePort::default()];
                let _ = reply.send(Ok(ListServicesResponse { services }));
            }
            Command::ListEndpoints(reply) => {
                let endpoints = vec![Endpoint::default()];
                let _ = reply.send(Ok(ListEndpointsResponse { endpoints }));
            }
            Command::ListNodes(reply) => {
                let nodes = vec![Node::default()];
                let _ = reply.send(Ok(ListNodesResponse { nodes }));
            }
        }
    }
}

struct Bed {
    _directory: tempfile::TempDir,
    path: std::path::PathBuf,
    progress: watch::Sender<Progress>,
    events: EventHub,
    stop: Option<oneshot::Sender<()>>,
    server: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
}

/// A server whose source is at revision 5.
fn bed() -> Bed {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    let (commands, receiver) = mpsc::channel(8);
    tokio::spawn(fake_core(receiver));
    let (rescan, mut rescans) = mpsc::channel::<Rescan>(8);
    tokio::spawn(async move {
        while let Some(reply) = rescans.recv().await {
            let _ = reply.send(5);
        }
    });
    let (progress, progress_receiver) = watch::channel(Progress::default());
    let events = EventHub::new();
    let core = Core {
        commands,
        progress: progress_receiver,
        rescan,
        events: events.clone(),
    };
    let (stop, stopped) = oneshot::channel::<()>();
    let listener = bind(&path).unwrap();
    let server = tokio::spawn(async move {
        serve(listener, core, async {
            let _ = stopped.await;
        })
        .await
    });
    Bed {
        _directory: directory,
        path,
        progress,
        events,
        stop: Some(stop),
        server,
    }
}

#[tokio::test(flavor = "current_thread")]
async fn every_call_reaches_the_event_loop_and_comes_back() {
    let mut bed = bed();
    let mode = std::fs::metadata(&bed.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let channel = weir_api::connect(&bed.path, None).await.unwrap();
    let mut cni = CniClient::new(channel.clone());
    let answer = cni.allocate(AllocateRequest::default()).await.unwrap();
    assert_eq!(answer.into_inner().addresses, ["10.0.0.7", "fd00::7"]);
    let full = AllocateRequest {
        pod_name: "full".into(),
        ..Default::default()
    };
    let status = cni.allocate(full).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    assert_eq!(status.message(), "10.0.0.0/30 is used up");
    // A command that nobody answers is an error, not a call that hangs.
    let status = cni.commit(CommitRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    cni.release(ReleaseRequest::default()).await.unwrap();

    let mut weir = WeirClient::new(channel);
    assert_eq!(
        weir.status(StatusRequest {})
            .await
            .unwrap()
            .into_inner()
            .node_name,
        "a"
    );
    let services = weir
        .list_services(ListServicesRequest::default())
        .await
        .unwrap();
    assert_eq!(services.into_inner().services.len(), 1);
    let endpoints = weir.list_endpoints(ListEndpointsRequest {}).await.unwrap();
    assert_eq!(endpoints.into_inner().endpoints.len(), 1);
    let nodes = weir.list_nodes(ListNodesRequest {}).await.unwrap();
    assert_eq!(nodes.into_inner().nodes.len(), 1);

    drop((cni, weir));
    bed.stop.take().unwrap().send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(10), bed.server)
        .await
        .expect("the server stops")
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn wait_applied_waits_for_the_revision_that_the_source_named() {
    let bed = bed();
    let mut weir = WeirClient::new(weir_api::connect(&bed.path, None).await.unwrap());
    let waiting = |timeout_milliseconds| WaitAppliedRequest {
        timeout_milliseconds,
    };
    bed.progress.send_modify(|p| {
        p.applied = 4;
        p.missing = (0..7).map(|i| format!("default/web{i}: no room")).collect();
    });
    for timeout in [0, 30] {
        let status = weir.wait_applied(waiting(timeout)).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
        for part in [
            "revision 5",
            "kernel at 4",
            "default/web0: no room",
            "and 2 more",
        ] {
            assert!(
                status.message().contains(part),
                "{part:?}: {}",
                status.message()
            );
        }
    }
    let mut other = weir.clone();
    let call = tokio::spawn(async move { other.wait_applied(waiting(20_000)).await });
    tokio::task::yield_now().await;
    bed.progress.send_modify(|p| p.applied = 6);
    assert_eq!(call.await.unwrap().unwrap().into_inner().revision, 6);
    assert_eq!(
        weir.wait_applied(waiting(0))
            .await
            .unwrap()
            .into_inner()
            .revision,
        6
    );
}

#[tokio::test(flavor = "current_thread")]
async fn monitor_streams_events_and_stops_counting_a_caller_that_leaves() {
    let bed = bed();
    let mut weir = WeirClient::new(weir_api::connect(&bed.path, None).await.unwrap());
    let request = MonitorRequest { drops_only: false };
    let mut stream = weir.monitor(request).await.unwrap().into_inner();
    assert!(bed.events.wants_flows());
    bed.events.send(MonitorEvent {
        kind: events::kind::NEW_FLOW.into(),
        source: "10.0.0.7:4000".into(),
        ..Default::default()
    });
    let event = stream.message().await.unwrap().unwrap();
    assert_eq!(event.source, "10.0.0.7:4000");
    drop(stream);
    drop(weir);
    let gone = async {
        while bed.events.wants_flows() {
            bed.events.watchers_changed().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone)
        .await
        .expect("the caller is forgotten");
}
