//! Ends TCP sockets whose endpoint is gone, if the setting `end-sockets-of-gone-endpoints` says so: a
//! socket that was translated at `connect()` waits for a dead endpoint until TCP gives up.
//!
//! The model tells which endpoints its Service ports have lost. The tick gathers them for a while and
//! starts a [`walk`] on a thread of its own, which finds the sockets and asks here, just before it ends
//! them, which are to be ended: those that were translated for a Service port that is still served, and
//! that does not have the endpoint now. Once after the start the walk looks at all translated sockets:
//! endpoints may have gone while no agent ran. A walk that met a problem is done again with growing pauses, as
//! what it was to look for is still there.

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
/// Pause after a walk that met a problem; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

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
    /// Walks that met a problem since the last that met none.
    failures: u32,
    /// When what the last walk was to look for is looked for again.
    retry: Option<Instant>,
    /// Sockets ended since the start.
    pub ended: u64,
    /// Attempts to end a socket that failed.
    pub failed: u64,
    /// What kept the last walk from its work.
    problems: Vec<String>,
}

/// A walk that is under way.
#[derive(Debug)]
struct Walk {
    reports: mpsc::Receiver<Report>,
    /// Service ports that have lost endpoints, by number.
    ports: HashMap<u32, ServicePortKey>,
    /// What it looks for.
    target: Target,
}

/// What a walk looks for.
#[derive(Debug, Default)]
struct Target {
    /// All translated sockets, which those below are among.
    all: bool,
    lost: BTreeMap<ServicePortKey, HashSet<BackendAddress>>,
}

impl GoneEndpoints {
    /// Notes what Service ports have lost. Other protocols than TCP are not translated at the socket
    /// (UDP to loopback apart, where nobody waits for an end).
    pub fn note(&mut self, gone: BTreeMap<ServicePortKey, Vec<BackendAddress>>) {
        for (key, endpoints) in gone {
            if key.protocol == Protocol::Tcp {
                self.since.get_or_insert_with(Instant::now);
                // What is new does not wait for what fails.
                self.retry = None;
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

    /// For people. `source_has_errors`: an object that could not be read may be an endpoint's.
    pub fn problems(&self, source_has_errors: bool) -> impl Iterator<Item = String> + '_ {
        let waits = (source_has_errors && !self.has_looked_at_all && self.walk.is_none()).then(|| {
            "sockets whose endpoints went while no agent ran are not ended while objects of the source cannot \
             be read: mend those named here"
                .to_owned()
        });
        self.problems.iter().cloned().chain(waits)
    }

    /// Whether there is something to look for now; if so, whether among all translated sockets.
    fn due(&self, source_has_errors: bool, now: Instant) -> Option<bool> {
        if self.walk.is_some() || self.retry.is_some_and(|retry| now < retry) {
            return None;
        }
        // An object that cannot be read at the start is no object that is gone.
        let all = !self.has_looked_at_all && !source_has_errors;
        let is_due = match self.since {
            Some(since) => now.saturating_duration_since(since) >= GATHER,
            None => all,
        };
        is_due.then_some(all)
    }

    /// What the next walk looks for.
    fn take_target(&mut self, all: bool) -> Target {
        self.since = None;
        self.has_looked_at_all |= all;
        Target {
            all,
            lost: std::mem::take(&mut self.lost),
        }
    }

    /// The walk has met problems: what it was to look for is looked for again.
    fn put_back(&mut self, target: Target, problems: Vec<String>) {
        let now = Instant::now();
        self.failures = self.failures.saturating_add(1);
        let doubled = FIRST_PAUSE.saturating_mul(1 << (self.failures - 1).min(16));
        if self.since.is_none() {
            // Something new since the walk began goes first.
            self.retry = Some(now + doubled.min(LONGEST_PAUSE));
        }
        if target.all {
            self.has_looked_at_all = false;
        }
        if !target.lost.is_empty() {
            self.since.get_or_insert(now);
        }
        for (key, endpoints) in target.lost {
            self.lost.entry(key).or_default().extend(endpoints);
        }
        self.tell(problems);
    }

    /// Shows problems, and logs those that are new.
    fn tell(&mut self, problems: Vec<String>) {
        for problem in &problems {
            if !self.problems.contains(problem) {
                tracing::warn!(problem, "while ending sockets whose endpoint is gone");
            }
        }
        self.problems = problems;
    }

    fn finish(&mut self, outcome: Outcome) {
        let target = self.walk.take().map(|walk| walk.target);
        self.ended += outcome.ended;
        self.failed += outcome.failed;
        if outcome.problems.is_empty() {
            self.failures = 0;
            self.problems.clear();
        } else {
            self.put_back(target.unwrap_or_default(), outcome.problems);
        }
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
        if !self.settings.end_sockets_of_gone_endpoints || !self.swept || self.rows.is_waiting() {
            return;
        }
        let source_has_errors = !self.source_state.errors.is_empty();
        let Some(all) = self.gone.due(source_has_errors, Instant::now()) else {
            return;
        };
        let target = self.gone.take_target(all);
        if let Err((target, problem)) = self.start_walk(target) {
            self.gone.put_back(target, vec![problem]);
        }
    }

    /// Gives back what was to be looked for, with the problem, if it cannot start.
    fn start_walk(&mut self, target: Target) -> Result<(), (Target, String)> {
        let map = match self.datapath.socket_frontends() {
            Ok(map) => map,
            Err(error) => {
                let problem = format!("cannot end sockets of gone endpoints: {error}");
                return Err((target, problem));
            }
        };
        let ports = if target.all {
            let tcp = self
                .applied
                .keys()
                .filter(|key| key.protocol == Protocol::Tcp);
            self.numbered(tcp)
        } else {
            self.numbered(target.lost.keys())
        };
        let namespaces = self.endpoints.list().map(|e| PathBuf::from(&e.spec.netns));
        let (sender, reports) = mpsc::channel(1);
        let plan = Plan {
            map,
            only: (!target.all).then(|| target.lost.values().flatten().copied().collect()),
            namespaces: namespaces.collect(),
        };
        if let Err(error) = walk::start(plan, sender) {
            let problem = format!("cannot start the thread that ends sockets: {error}");
            return Err((target, problem));
        }
        self.gone.walk = Some(Walk {
            reports,
            ports,
            target,
        });
        Ok(())
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

    fn failed() -> Outcome {
        Outcome {
            problems: vec!["cannot".to_owned()],
            ..Outcome::default()
        }
    }

    fn begin(gone: &mut GoneEndpoints, all: bool) -> mpsc::Sender<Report> {
        let (sender, reports) = mpsc::channel(1);
        let target = gone.take_target(all);
        gone.walk = Some(Walk {
            reports,
            ports: HashMap::new(),
            target,
        });
        sender
    }

    #[test]
    fn what_a_failed_walk_was_to_look_for_is_looked_for_again_with_growing_pauses() {
        let far = Instant::now() + 2 * LONGEST_PAUSE;
        for all in [true, false] {
            let mut gone = GoneEndpoints {
                has_looked_at_all: !all,
                ..GoneEndpoints::default()
            };
            gone.note(lost(Protocol::Tcp, 8080));
            let mut pauses = Vec::new();
            for _ in 0..9 {
                assert_eq!(gone.due(false, far), Some(all));
                let _sender = begin(&mut gone, all);
                assert_eq!(gone.due(false, far), None, "one at a time");
                let before = Instant::now();
                gone.finish(failed());
                pauses.push(gone.retry.unwrap() - before);
                assert!(gone.is_looking());
                assert_eq!(gone.due(false, before), None);
                assert_eq!(gone.lost.len(), 1);
                assert_eq!(gone.problems(false).collect::<Vec<_>>(), ["cannot"]);
            }
            assert!(pauses[0] >= FIRST_PAUSE && pauses[0] < 2 * FIRST_PAUSE);
            assert!(pauses[1] >= 2 * FIRST_PAUSE && pauses[1] < 3 * FIRST_PAUSE);
            assert!(pauses[8] >= LONGEST_PAUSE && pauses[8] < LONGEST_PAUSE + FIRST_PAUSE);
            // What is lost meanwhile does not wait that long.
            gone.note(lost(Protocol::Tcp, 8081));
            assert_eq!(gone.due(false, Instant::now() + 2 * GATHER), Some(all));
            let _sender = begin(&mut gone, all);
            gone.finish(Outcome::default());
            assert!(!gone.is_looking() && gone.due(false, far).is_none());
            assert_eq!(gone.problems(false).count(), 0);
        }
    }

    #[test]
    fn what_is_lost_during_a_walk_that_fails_does_not_wait_for_its_pause() {
        let mut gone = GoneEndpoints {
            has_looked_at_all: true,
            failures: 20,
            ..GoneEndpoints::default()
        };
        gone.note(lost(Protocol::Tcp, 8080));
        let _sender = begin(&mut gone, false);
        gone.note(lost(Protocol::Tcp, 8081));
        gone.finish(failed());
        assert_eq!(gone.due(false, Instant::now() + 2 * GATHER), Some(false));
        let ports: Vec<usize> = gone.lost.values().map(HashSet::len).collect();
        assert_eq!(ports, [2]);
    }

    #[test]
    fn it_says_that_it_waits_for_the_source() {
        let mut gone = GoneEndpoints::default();
        let now = Instant::now();
        assert_eq!(gone.due(true, now), None);
        let said: Vec<String> = gone.problems(true).collect();
        assert!(
            gone.is_looking() && said.len() == 1 && said[0].contains("mend"),
            "{said:?}"
        );
        assert_eq!(gone.problems(false).count(), 0);
        assert_eq!(gone.due(false, now), Some(true));
        let _sender = begin(&mut gone, true);
        gone.finish(Outcome::default());
        // An error that comes later is no reason to wait for.
        assert_eq!(gone.problems(true).count(), 0);
    }

    #[tokio::test]
    async fn a_thread_that_dies_is_a_problem_and_ends_the_walk() {
        let (sender, reports) = mpsc::channel(1);
        let mut gone = GoneEndpoints {
            has_looked_at_all: true,
            walk: Some(Walk {
                reports,
                ports: HashMap::new(),
                target: Target::default(),
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
