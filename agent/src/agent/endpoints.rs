//! Requests of the API: pods come and go, and people ask.

use std::collections::BTreeMap;

use tonic::{Code, Status};
use weir_api::v1;

use super::{Agent, Row};
use crate::{
    api::Command,
    endpoint::{self, EndpointError, EndpointKey, EndpointSpec, ErrorKind, boot_seconds},
    model::{HostPort, PodInterface},
    objects::ObjectName,
};

impl Agent {
    /// Carries a request out and answers it.
    pub(super) async fn command(&mut self, command: Command) {
        // A caller that is gone needs no answer.
        match command {
            Command::Allocate(request, reply) => drop(reply.send(self.allocate(request).await)),
            Command::Commit(request, reply) => self.commit_or_wait(request, reply).await,
            Command::Release(request, reply) => drop(reply.send(self.release(request).await)),
            Command::Status(reply) => drop(reply.send(self.status())),
            Command::ListServices(request, reply) => {
                drop(reply.send(self.list_services(&request)));
            }
            Command::ListEndpoints(reply) => drop(reply.send(Ok(self.list_endpoints()))),
            Command::ListNodes(reply) => drop(reply.send(Ok(self.list_nodes()))),
        }
    }

    async fn allocate(
        &mut self,
        request: v1::AllocateRequest,
    ) -> Result<v1::AllocateResponse, Status> {
        // The first pods of a node may come before its Node object was worked off.
        while self.endpoints.pod_ranges().next().is_none() && self.rows.is_waiting() {
            self.work().await;
        }
        let request = request.try_into().map_err(status)?;
        let (endpoints, mut wiring) = self.endpoints_and_wiring();
        let spec = endpoints
            .allocate(&request, &mut wiring, boot_seconds())
            .await
            .map_err(status)?;
        self.endpoints_changed();
        tracing::info!(pod = spec.display_name(), endpoint = spec.number,
            addresses = ?spec.addresses, "reserved");
        Ok((&spec).into())
    }

    pub(super) async fn commit(
        &mut self,
        request: v1::CommitRequest,
    ) -> Result<v1::CommitResponse, Status> {
        let key = EndpointKey::new(request.container_id, request.ifname);
        let (endpoints, mut wiring) = self.endpoints_and_wiring();
        endpoints
            .commit(
                &key,
                request.host_ifindex,
                request.netns_cookie,
                &mut wiring,
                boot_seconds(),
            )
            .await
            .map_err(status)?;
        self.endpoints_changed();
        tracing::info!(endpoint = %key, ifindex = request.host_ifindex, "ready");
        Ok(v1::CommitResponse {})
    }

    async fn release(
        &mut self,
        request: v1::ReleaseRequest,
    ) -> Result<v1::ReleaseResponse, Status> {
        self.waiting_commits
            .release(&request.container_id, &request.ifname);
        let (endpoints, mut wiring) = self.endpoints_and_wiring();
        let released = endpoints
            .release(
                &request.container_id,
                &request.ifname,
                &mut wiring,
                boot_seconds(),
            )
            .await;
        self.endpoints_changed();
        released.map_err(status)?;
        tracing::info!(
            container = request.container_id,
            interface = request.ifname,
            "released"
        );
        Ok(v1::ReleaseResponse {})
    }

    /// Marks the endpoints whose flags in the kernel are not what the objects say.
    pub(super) fn mark_changed_flags(&mut self) {
        let changed: Vec<EndpointKey> = self
            .endpoints
            .list()
            .map(|endpoint| &endpoint.spec)
            .filter(|spec| {
                let flags = self.translations.flags(&spec.pod_namespace, &spec.pod_name);
                let row = self.datapath.endpoints().get(spec.number);
                row.is_some_and(|row| row.flags != flags)
            })
            .map(|spec| spec.key.clone())
            .collect();
        for key in changed {
            self.mark(Row::Endpoint(key));
        }
    }

    /// One that is not in the kernel gets its flags when it is entered.
    pub(super) fn apply_flags(&mut self, key: &EndpointKey) -> anyhow::Result<()> {
        if let Some(endpoint) = self.endpoints.get(key) {
            let spec = &endpoint.spec;
            let flags = self.translations.flags(&spec.pod_namespace, &spec.pod_name);
            self.datapath.set_endpoint_flags(spec.number, flags)?;
        }
        Ok(())
    }

    /// Endpoints have come or gone.
    pub(super) fn endpoints_changed(&mut self) {
        self.pod_names = None;
        // An old range may have lost its last pod.
        let ranges = self.endpoints.pod_ranges();
        if !ranges.eq(self.config.pod_ranges.iter().copied()) {
            self.mark(Row::Config);
        }
        self.take_host_ports();
    }

    /// Tells the model of the ports of the node that lead to pods.
    fn take_host_ports(&mut self) {
        let now: BTreeMap<PodInterface, Vec<HostPort>> = self
            .endpoints
            .with_host_ports()
            .map(|spec| (interface(spec), host_ports(spec)))
            .collect();
        if now == self.host_ports {
            return;
        }
        let before = std::mem::replace(&mut self.host_ports, now);
        for gone in before
            .keys()
            .filter(|key| !self.host_ports.contains_key(key))
        {
            self.model.set_host_ports(gone.clone(), None);
        }
        for (interface, ports) in &self.host_ports {
            if before.get(interface) != Some(ports) {
                self.model
                    .set_host_ports(interface.clone(), Some(ports.clone()));
            }
        }
        self.model_has_changed(self.source_state.synced);
    }
}

fn interface(spec: &EndpointSpec) -> PodInterface {
    PodInterface {
        pod: ObjectName::new(spec.pod_namespace.as_str(), spec.pod_name.as_str()),
        container_id: spec.key.container_id.clone(),
        ifname: spec.key.ifname.clone(),
    }
}

fn host_ports(spec: &EndpointSpec) -> Vec<HostPort> {
    let port = |port: &endpoint::HostPort| HostPort {
        host_ip: port.host_ip,
        host_port: port.host_port,
        protocol: port.protocol,
        addresses: spec.addresses.clone(),
        container_port: port.container_port,
    };
    spec.host_ports.iter().map(port).collect()
}

fn status(error: EndpointError) -> Status {
    let code = match error.kind {
        ErrorKind::NotReady => Code::FailedPrecondition,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::Conflict => Code::AlreadyExists,
        ErrorKind::Internal => Code::Internal,
    };
    Status::new(code, error.message)
}
