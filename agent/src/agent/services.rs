//! The agent's account of Services, for `weir service`.

use std::{collections::BTreeSet, net::IpAddr};

use tonic::Status;
use weir_api::v1;

use super::{Agent, Row};
use crate::{
    model::{
        Backend, BackendAddress, BackendState, EndpointSet, Frontend, Owner, ServicePort,
        ServicePortKey,
    },
    objects::ObjectName,
};

impl Agent {
    /// All Services and host ports, or those of one name.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    pub(super) fn list_services(
        &self,
        request: &v1::ListServicesRequest,
    ) -> Result<v1::ListServicesResponse, Status> {
        if request.name.is_empty() {
            let services = self.service_ports(|_| true);
            return Ok(v1::ListServicesResponse { services });
        }
        let name = ObjectName::new(request.namespace.as_str(), request.name.as_str());
        let mut services = self.service_ports(|owner| *owner.name() == name);
        if services.is_empty() {
            services.push(self.not_served(&name)?);
        }
        Ok(v1::ListServicesResponse { services })
    }

    /// In the order of their names.
    fn service_ports(&self, is_wanted: impl Fn(&Owner) -> bool) -> Vec<v1::ServicePort> {
        let served: BTreeSet<&Owner> = self.model.services().map(|(key, _)| &key.owner).collect();
        let ports = self
            .model
            .services()
            .filter(|(key, _)| is_wanted(&key.owner));
        let mut all: Vec<v1::ServicePort> = ports
            .map(|(key, port)| self.service_port(key, port))
            .collect();
        let contested = self.model.owners_with_problems();
        let contested = contested.filter(|owner| is_wanted(owner) && !served.contains(owner));
        all.extend(contested.map(|owner| v1::ServicePort {
            status: "not served".to_owned(),
            ..self.about(owner)
        }));
        let order = |port: &v1::ServicePort| (port.namespace.clone(), port.name.clone());
        all.sort_by_cached_key(order);
        all
    }

    /// A Service without a port that is served, with the reason.
    fn not_served(&self, name: &ObjectName) -> Result<v1::ServicePort, Status> {
        let Some(reason) = self.model.why_not_served(name) else {
            return Err(Status::not_found(format!(
                "the source has no Service {name}, and no pod {name} of this node has a host port; \
                 see `weir service list`"
            )));
        };
        Ok(v1::ServicePort {
            status: format!("not served: {reason}"),
            ..self.about(&Owner::Service(name.clone()))
        })
    }

    /// What is known of an owner without its ports.
    fn about(&self, owner: &Owner) -> v1::ServicePort {
        let problems = self.model.problems_of(owner).iter();
        v1::ServicePort {
            namespace: owner.name().namespace.clone(),
            name: owner.name().name.clone(),
            owner: match owner {
                Owner::Service(_) => "Service".to_owned(),
                Owner::HostPort(_) => "HostPort".to_owned(),
            },
            problems: problems.map(|problem| problem.text.clone()).collect(),
            ..v1::ServicePort::default()
        }
    }

    fn service_port(&self, key: &ServicePortKey, port: &ServicePort) -> v1::ServicePort {
        let applied = self.applied.get(key);
        let status = match self.rows.failure(&Row::Service(Box::new(key.clone()))) {
            Some(failure) => failure.error.clone(),
            None if applied.is_some() => "applied".to_owned(),
            None => "waiting".to_owned(),
        };
        let used = port.backends.iter().map(|(address, used)| v1::Backend {
            state: match used.state {
                BackendState::Active => "active".to_owned(),
                BackendState::Terminating => "terminating".to_owned(),
            },
            number: applied
                .and_then(|applied| applied.backends.get(address).copied())
                .unwrap_or_default(),
            ..backend(address, used)
        });
        let unused = port.unused.iter().map(|(address, unused)| v1::Backend {
            state: "unused".to_owned(),
            reason: unused.reason.to_owned(),
            ..backend(address, &unused.backend)
        });
        v1::ServicePort {
            port_name: key.port_name.clone(),
            protocol: key.protocol.name().to_owned(),
            family: key.family.name().to_owned(),
            frontends: port.frontends.iter().map(frontend).collect(),
            backends: used.chain(unused).collect(),
            number: applied.map_or(0, |applied| applied.number),
            slots: applied.map_or(0, |applied| applied.slots),
            local_slots: applied.map_or(0, |applied| applied.local_slots),
            status,
            affinity_seconds: port.affinity.unwrap_or_default(),
            ..self.about(&key.owner)
        }
    }
}

fn frontend(frontend: &Frontend) -> v1::Frontend {
    v1::Frontend {
        kind: frontend.kind.name().to_owned(),
        address: frontend
            .address
            .as_ref()
            .map(IpAddr::to_string)
            .unwrap_or_default(),
        port: frontend.port.into(),
        scope: frontend.scope.name().to_owned(),
        set: frontend.set.name().to_owned(),
    }
}

/// Without state.
fn backend(address: &BackendAddress, backend: &Backend) -> v1::Backend {
    let sets = EndpointSet::ALL
        .into_iter()
        .filter(|set| backend.is_in(*set));
    v1::Backend {
        address: address.address.to_string(),
        port: address.port.into(),
        node: backend.node.clone(),
        zone: backend.zone.clone(),
        target: backend.target.clone(),
        sets: sets.map(|set| set.name().to_owned()).collect(),
        ..v1::Backend::default()
    }
}
