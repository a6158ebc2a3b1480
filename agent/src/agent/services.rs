//! The agent's account of Services, for `weir service`.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use tonic::Status;
use weir_api::v1;

use super::{Agent, Row, Rows};
use crate::{
    datapath::AppliedService,
    model::{
        Backend, BackendAddress, BackendState, EndpointSet, Frontend, Model, Owner, ServicePort,
        ServicePortKey,
    },
    objects::ObjectName,
};

impl Agent {
    pub(super) fn list_services(
        &self,
        request: &v1::ListServicesRequest,
    ) -> Result<v1::ListServicesResponse, Status> {
        let account = Account {
            model: &self.model,
            rows: &self.rows,
            applied: &self.applied,
            errors: &self.source_state.errors,
            of_node: self.problems_with_ports(),
        };
        let services = account.list(request)?;
        Ok(v1::ListServicesResponse { services })
    }
}

/// What is told of.
struct Account<'a> {
    model: &'a Model,
    rows: &'a Rows,
    applied: &'a HashMap<ServicePortKey, AppliedService>,
    /// What is wrong with the source's objects, whose names stand in the text.
    errors: &'a [String],
    /// What is wrong with ports of this node, with the Services named in the text.
    of_node: Vec<String>,
}

impl<'a> Account<'a> {
    /// All Services and host ports, or those of one name.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    fn list(&self, request: &v1::ListServicesRequest) -> Result<Vec<v1::ServicePort>, Status> {
        if request.name.is_empty() {
            return Ok(self.service_ports(|_| true));
        }
        let name = ObjectName::new(request.namespace.as_str(), request.name.as_str());
        let mut services = self.service_ports(|owner| *owner.name() == name);
        if services.is_empty() {
            services.push(self.not_served(&name)?);
        }
        Ok(services)
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
            if let Some(error) = self.errors_of(name).next() {
                return Err(Status::failed_precondition(format!(
                    "Service {name} is not served: it was refused, and there is no earlier version of it. {error}"
                )));
            }
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

    /// What the source says against an object of the name.
    fn errors_of(&self, name: &ObjectName) -> impl Iterator<Item = &'a String> {
        let about = format!("Service {name}: ");
        let errors = self.errors.iter();
        errors.filter(move |error| error.contains(&about))
    }

    /// What is known of an owner without its ports.
    fn about(&self, owner: &Owner) -> v1::ServicePort {
        let problems = self.model.problems_of(owner).iter();
        let problems = problems.map(|problem| problem.text.clone());
        let refused = match owner {
            Owner::Service(name) => Some(self.errors_of(name)),
            Owner::HostPort(_) => None,
        };
        let refused = refused.into_iter().flatten().map(|error| {
            format!("its newest version is refused, and an earlier one is served: {error}")
        });
        let of_node = self.of_node.iter().filter(|text| match owner {
            Owner::Service(name) => names_service(text, name),
            Owner::HostPort(_) => false,
        });
        let check = owner
            .service()
            .and_then(|name| self.model.health_checks().get(name));
        v1::ServicePort {
            namespace: owner.name().namespace.clone(),
            name: owner.name().name.clone(),
            health_check_node_port: check.map_or(0, |check| check.port.into()),
            owner: match owner {
                Owner::Service(_) => "Service".to_owned(),
                Owner::HostPort(_) => "HostPort".to_owned(),
            },
            problems: problems.chain(refused).chain(of_node.cloned()).collect(),
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
            restricted: port.source_ranges.is_some(),
            source_ranges: port
                .source_ranges
                .iter()
                .flatten()
                .map(ToString::to_string)
                .collect(),
            ..self.about(&key.owner)
        }
    }
}

/// Whether a text is about the Service, and not about one whose name begins like its name.
fn names_service(text: &str, name: &ObjectName) -> bool {
    let name = format!("Service {name}");
    let goes_on = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    let mut found = text.match_indices(&name);
    found.any(|(start, _)| !text[start + name.len()..].starts_with(goes_on))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        objects::Object,
        source::{
            Change,
            yaml::{self, Format},
        },
    };

    fn list(text: &str, name: &str) -> Result<Vec<v1::ServicePort>, Status> {
        let mut model = Model::default();
        let manifest = yaml::parse(text, Format::Yaml);
        let errors: Vec<String> = manifest
            .errors
            .iter()
            .map(|error| error.cause.clone())
            .collect();
        let objects = manifest.objects.into_iter().map(|o| o.object);
        for object in objects.collect::<Vec<Object>>() {
            model.apply(Change::Upsert(object));
        }
        model.take_delta();
        let account = Account {
            model: &model,
            rows: &Rows::default(),
            applied: &HashMap::new(),
            errors: &errors,
            of_node: vec![
                "Service default/a: healthCheckNodePort 30000 is not served".to_owned(),
                "NodePort 30000 of Service default/ab lies within nat-ports".to_owned(),
            ],
        };
        account.list(&v1::ListServicesRequest {
            namespace: "default".to_owned(),
            name: name.to_owned(),
        })
    }

    const SERVICES: &str = "
{apiVersion: v1, kind: Service, metadata: {name: b}, spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: a, creationTimestamp: 2026-01-01T00:00:00Z},
 spec: {type: NodePort, clusterIP: 10.96.0.1, externalTrafficPolicy: Local, sessionAffinity: ClientIP,
 ports: [{port: 80, nodePort: 30080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: c}, spec: {clusterIP: None, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: d}, spec: {type: ExternalName, externalName: x.example}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-1, labels: {kubernetes.io/service-name: a}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.0.0.1]}, {addresses: [10.0.0.2], conditions: {ready: false}}]
";

    #[test]
    fn a_service_that_lost_everything_is_listed_with_the_reason() {
        let all = list(SERVICES, "").unwrap();
        let names: Vec<_> = all
            .iter()
            .map(|s| (s.name.as_str(), s.status.as_str()))
            .collect();
        assert_eq!(names, [("a", "waiting"), ("b", "not served")]);
        assert!(all[1].frontends.is_empty());
        let problem = "10.96.0.1:80 TCP belongs to Service default/a";
        assert!(all[1].problems[0].contains(problem), "{:?}", all[1]);
        assert_eq!(all[0].problems.len(), 1, "that of the node: {:?}", all[0]);
        assert!(all[0].problems[0].contains("is not served"));
        assert_eq!(list(SERVICES, "b").unwrap()[..], all[1..]);
    }

    #[test]
    fn frontends_tell_for_whom_they_are_and_where_they_lead() {
        let found = list(SERVICES, "a").unwrap();
        let [service] = &found[..] else {
            panic!("{found:?}")
        };
        let frontends: Vec<String> = service
            .frontends
            .iter()
            .map(|f| format!("{} {}:{} {} {}", f.kind, f.address, f.port, f.scope, f.set))
            .collect();
        assert_eq!(
            frontends,
            [
                "NodePort :30080 inside Cluster",
                "NodePort :30080 outside Local",
                "ClusterIP 10.96.0.1:80 inside Cluster",
            ]
        );
        assert_eq!(service.affinity_seconds, 10_800);
        let backends: Vec<_> = service
            .backends
            .iter()
            .map(|b| (b.state.as_str(), b.reason.as_str(), b.sets.clone()))
            .collect();
        let cluster = vec!["Cluster".to_owned()];
        assert_eq!(
            backends,
            [("active", "", cluster), ("unused", "not ready", Vec::new())]
        );
    }

    #[test]
    fn one_that_is_not_served_says_why_and_one_that_is_not_there_is_an_error() {
        for (name, reason) in [
            ("c", "not served: it is headless, or has no clusterIP yet"),
            ("d", "not served: it is of type ExternalName"),
        ] {
            let found = list(SERVICES, name).unwrap();
            assert_eq!((found.len(), found[0].status.as_str()), (1, reason));
        }
        let error = list(SERVICES, "e").unwrap_err();
        assert_eq!(error.code(), tonic::Code::NotFound);
        assert!(error.message().contains("default/e"), "{error}");
    }

    #[test]
    fn one_that_was_refused_shows_the_mistake() {
        const MISTAKE: &str = "{apiVersion: v1, kind: Service, metadata: {name: b}, spec: {clusterIP: 10.96.0, ports: [{port: 80}]}}";
        let error = list(MISTAKE, "b").unwrap_err();
        assert_eq!(error.code(), tonic::Code::FailedPrecondition);
        assert!(error.message().contains("10.96.0"), "{error}");
        let error = list(MISTAKE, "bb").unwrap_err();
        assert_eq!(error.code(), tonic::Code::NotFound, "of another name");
        // An earlier version is served.
        let both = format!("{SERVICES}---\n{MISTAKE}\n");
        let found = list(&both, "b").unwrap();
        assert!(
            found[0]
                .problems
                .iter()
                .any(|p| p.contains("newest version is refused") && p.contains("10.96.0")),
            "{found:?}"
        );
        let other = &list(&both, "a").unwrap()[0];
        assert!(other.problems.iter().all(|p| !p.contains("refused")));
    }
}
