//! Ends TCP sockets whose endpoint is gone, if the setting `end-sockets-of-gone-endpoints` says so: a
//! socket that was translated at `connect()` waits for a dead endpoint until TCP gives up.
//!
//! The model tells which endpoints its Service ports have lost. The tick gathers them for a while and
//! starts a [`walk`] on a thread of its own, which finds the sockets and asks here, just before it ends
//! them, which are to be ended: those that were translated for a Service port that is still served, and
//! that does not have the endpoint now. Once after the start the walk looks at all translated sockets:
//! endpoints may have gone while no agent ran.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::Agent;
use crate::{
    model::{BackendAddress, ServicePortKey},
    objects::Protocol,
};

mod walk;

pub(super) use walk::Report;
use walk::{Outcome, Plan, Translated};

/// How long endpoints that are gone are gathered. An endpoint that moves from one slice to another
/// may be in neither for a moment.
const GATHER: Duration = Duration::from_secs(1);

/// What is known of endpoints that are gone.
#[derive(Debug, Default)]
pub(super) struct GoneEndpoints {
    /// Whose sockets have not been looked for yet.
    lost: BTreeMap<ServicePortKey, HashSet<BackendAddress>>,
    /// When the first of them was noted.
    since: Option<Instant>,
    /// All translated sockets have been looked at since the start.
    has_looked_at_all: bool,
    walk: Option<Walk>,
    /// Sockets ended since the start.
    pub ended: u64,
    /// Sockets that could not be ended.
    pub failed: u64,
    /// What kept the last walk from its work.
    pub problems: Vec<String>,
}

/// A walk that is under way.
#[derive(Debug)]
struct Walk {
    reports: mpsc::Receiver<Report>,
    /// Service ports that have lost endpoints, by number.
    ports: HashMap<u32, ServicePortKey>,
}

impl GoneEndpoints {
    /// Notes what Service ports have lost. Other protocols than TCP are not translated at the socket
    /// (UDP to loopback apart, where nobody waits for an end).
    pub fn note(&mut self, gone: BTreeMap<ServicePortKey, Vec<BackendAddress>>) {
        for (key, endpoints) in gone {
            if key.protocol == Protocol::Tcp {
                self.since.get_or_insert_with(Instant::now);
                self.lost.entry(key).or_default().extend(endpoints);
            }
        }
    }

    /// Whether sockets are still to be looked for.
    pub fn is_looking(&self) -> bool {
        !self.lost.is_empty() || self.walk.is_some() || !self.has_looked_at_all
    }

    /// What the walk says next; pending while there is none.
    pub async fn next(&mut self) -> Report {
        let Some(walk) = &mut self.walk else {
            return std::future::pending().await;
        };
        // A thread that says nothing before it ends has met its end.
        let lost = || {
            Report::Done(Outcome {
                problems: vec!["the thread that ends sockets has died; see the log".to_owned()],
                ..Outcome::default()
            })
        };
        walk.reports.recv().await.unwrap_or_else(lost)
    }

    fn finish(&mut self, outcome: Outcome) {
        self.walk = None;
        self.ended += outcome.ended;
        self.failed += outcome.failed;
        for problem in &outcome.problems {
            tracing::warn!(problem, "while ending sockets whose endpoint is gone");
        }
        self.problems = outcome.problems;
        let milliseconds = outcome.took.as_millis();
        let Outcome {
            ended,
            failed,
            namespaces,
            ..
        } = outcome;
        let text = "looked for sockets whose endpoint is gone";
        if ended + failed > 0 {
            tracing::info!(ended, failed, namespaces, milliseconds, "{text}");
        } else {
            tracing::debug!(namespaces, milliseconds, "{text}");
        }
    }
}

impl Agent {
    /// Starts a walk if there is something to look for, and what is lost has reached the kernel: no
    /// socket comes to it any more.
    pub(super) fn look_for_gone_endpoints(&mut self) {
        if !self.settings.end_sockets_of_gone_endpoints
            || !self.swept
            || self.gone.walk.is_some()
            || self.rows.is_waiting()
        {
            return;
        }
        // An object that cannot be read at the start is no object that is gone.
        let all = !self.gone.has_looked_at_all && self.source_state.errors.is_empty();
        let is_due = match self.gone.since {
            Some(since) => since.elapsed() >= GATHER,
            None => all,
        };
        if !is_due {
            return;
        }
        let map = match self.datapath.socket_frontends() {
            Ok(map) => map,
            Err(error) => {
                self.gone.problems = vec![format!("cannot end sockets of gone endpoints: {error}")];
                return;
            }
        };
        let lost = std::mem::take(&mut self.gone.lost);
        self.gone.since = None;
        self.gone.has_looked_at_all |= all;
        let ports = if all {
            let tcp = self
                .applied
                .keys()
                .filter(|key| key.protocol == Protocol::Tcp);
            self.numbered(tcp)
        } else {
            self.numbered(lost.keys())
        };
        let namespaces = self.endpoints.list().map(|e| PathBuf::from(&e.spec.netns));
        let (sender, reports) = mpsc::channel(1);
        let plan = Plan {
            map,
            only: (!all).then(|| lost.into_values().flatten().collect()),
            namespaces: namespaces.collect(),
        };
        match walk::start(plan, sender) {
            Ok(()) => self.gone.walk = Some(Walk { reports, ports }),
            Err(error) => {
                self.gone.problems = vec![format!(
                    "cannot start the thread that ends sockets: {error}"
                )];
            }
        }
    }

    /// Service ports that are in the kernel, by number.
    fn numbered<'a>(
        &self,
        keys: impl Iterator<Item = &'a ServicePortKey>,
    ) -> HashMap<u32, ServicePortKey> {
        keys.filter_map(|key| Some((self.applied.get(key)?.number, key.clone())))
            .collect()
    }

    /// Answers the walk, or takes its outcome.
    pub(super) fn take_report(&mut self, report: Report) {
        match report {
            Report::Found(sockets, answer) => {
                let gone = sockets.iter().map(|socket| self.is_gone(socket)).collect();
                // If the thread has died, so has the walk.
                let _ = answer.send(gone);
            }
            Report::Done(outcome) => self.gone.finish(outcome),
        }
    }

    /// Whether the Service port that the socket asked for is served, and has the endpoint that it got
    /// no more, ready or not.
    fn is_gone(&self, socket: &Translated) -> bool {
        let number = self.datapath.services().tcp_port_at(socket.frontend);
        let walk = self.gone.walk.as_ref();
        number
            .zip(walk)
            .and_then(|(number, walk)| walk.ports.get(&number).zip(Some(number)))
            .filter(|(key, number)| {
                let applied = self.applied.get(*key);
                applied.is_some_and(|applied| applied.number == *number)
            })
            .and_then(|(key, _)| self.model.service(key))
            .is_some_and(|port| !port.has_endpoint(&socket.backend))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::{Family, ObjectName};

    fn lost(protocol: Protocol, port: u16) -> BTreeMap<ServicePortKey, Vec<BackendAddress>> {
        let key = ServicePortKey {
            owner: ObjectName::new("shop", "web").into(),
            port_name: String::new(),
            protocol,
            family: Family::V4,
            port: 80,
        };
        let address = "10.0.0.1".parse().unwrap();
        BTreeMap::from([(key, vec![BackendAddress { address, port }])])
    }

    #[test]
    fn only_lost_endpoints_of_tcp_are_looked_for() {
        let mut gone = GoneEndpoints {
            has_looked_at_all: true,
            ..GoneEndpoints::default()
        };
        gone.note(lost(Protocol::Udp, 8080));
        gone.note(lost(Protocol::Sctp, 8080));
        gone.note(BTreeMap::new());
        assert!(gone.since.is_none() && !gone.is_looking());
        gone.note(lost(Protocol::Tcp, 8080));
        let first = gone.since;
        assert!(first.is_some() && gone.is_looking());
        for port in [8080, 8081] {
            gone.note(lost(Protocol::Tcp, port));
        }
        // Those that come later do not put off the first ones.
        assert_eq!(gone.since, first);
        let ports: Vec<usize> = gone.lost.values().map(HashSet::len).collect();
        assert_eq!(ports, [2]);
    }

    #[tokio::test]
    async fn a_thread_that_dies_is_a_problem_and_ends_the_walk() {
        let (sender, reports) = mpsc::channel(1);
        let mut gone = GoneEndpoints {
            has_looked_at_all: true,
            walk: Some(Walk {
                reports,
                ports: HashMap::new(),
            }),
            ..GoneEndpoints::default()
        };
        drop(sender);
        let Report::Done(outcome) = gone.next().await else {
            panic!("a question of nobody");
        };
        gone.finish(outcome);
        assert!(!gone.is_looking());
        assert!(gone.problems[0].contains("has died"), "{:?}", gone.problems);
    }
}
