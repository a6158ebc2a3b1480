//! What load balancers ask a node: `/healthz` and `/livez` as kube-proxy has them, and the
//! `healthCheckNodePort` of Services. A thread of its own serves them from what the event loop last
//! said, so that they answer, and say so, when the event loop hangs. It decides nothing.

mod answer;
mod ports;
mod socket;

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, watch};

use self::ports::Ports;
use crate::{model::HealthCheck, objects::ObjectName};

/// How long something may be late before the data path counts as stale. kube-proxy allows twice its
/// `syncPeriod`, which is of that order.
pub const STALE_AFTER: Duration = Duration::from_mins(2);

/// Services whose health check has changed; `None`: it has none any more.
type Changes = BTreeMap<ObjectName, Option<HealthCheck>>;

/// The event loop's last word.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DataPath {
    /// When the agent started.
    pub started: Instant,
    /// Everything that the complete source asked for was tried once.
    pub synced: bool,
    /// When the event loop last said that it runs.
    pub alive: Instant,
    /// Since when the oldest change waits to be applied: whether the loop makes progress.
    pub waiting_since: Option<Instant>,
    /// Since when something fails that the whole data path needs: the configuration, or a program that cannot be
    /// attached.
    pub broken_since: Option<Instant>,
    /// Services with a health check of which something fails, and since when. They are nobody else's concern.
    pub failing_services: Arc<BTreeMap<ObjectName, Instant>>,
    /// This node is being deleted, or will be.
    pub leaving: bool,
}

impl DataPath {
    /// Of an agent that starts now.
    #[must_use]
    pub fn starting() -> Self {
        let started = Instant::now();
        Self {
            started,
            synced: false,
            alive: started,
            waiting_since: None,
            broken_since: None,
            failing_services: Arc::default(),
            leaving: false,
        }
    }

    /// Whether the event loop runs.
    #[must_use]
    pub fn is_alive(&self, now: Instant) -> bool {
        !is_late(self.alive, now)
    }

    /// Whether the data path as a whole does what it should, or did until a moment ago: it is complete and attached,
    /// and changes are applied. Single rows that fail do not count: one bad Service must not take the node out of
    /// every load balancer.
    #[must_use]
    pub fn is_healthy(&self, now: Instant) -> bool {
        self.synced && !is_late(self.updated(), now)
    }

    /// Whether what a Service asks for is in the kernel, or was until a moment ago.
    #[must_use]
    pub fn is_applied(&self, service: &ObjectName, now: Instant) -> bool {
        let failing = self.failing_services.get(service);
        failing.is_none_or(|since| !is_late(*since, now))
    }

    /// Until when the data path as a whole was as it should be, as far as is known.
    #[must_use]
    pub fn updated(&self) -> Instant {
        if !self.synced {
            return self.started;
        }
        let late = self.waiting_since.into_iter().chain(self.broken_since);
        late.fold(self.alive, Instant::min)
    }
}

fn is_late(since: Instant, now: Instant) -> bool {
    now.saturating_duration_since(since) > STALE_AFTER
}

/// The event loop's end. The thread ends when it is dropped, and its ports are closed.
#[derive(Debug)]
pub struct Health {
    changes: mpsc::UnboundedSender<Changes>,
    data_path: watch::Sender<DataPath>,
    problems: watch::Receiver<Vec<String>>,
}

impl Health {
    /// Starts the thread; `address` is where `/healthz` is served, `None` for nowhere. A port that
    /// cannot be had is no error but a problem, and is tried again.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started.
    pub fn start(address: Option<SocketAddr>) -> io::Result<Self> {
        let (changes, changed) = mpsc::unbounded_channel();
        let (data_path, receiver) = watch::channel(DataPath::starting());
        let (problems_sender, problems) = watch::channel(Vec::new());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name("weir-health".to_owned())
            .spawn(move || {
                runtime.block_on(run(address, changed, receiver, problems_sender));
            })?;
        Ok(Self {
            changes,
            data_path,
            problems,
        })
    }

    /// Tells of Services whose health check has changed.
    pub fn change(&self, changes: Changes) {
        if !changes.is_empty() && self.changes.send(changes).is_err() {
            tracing::error!("the thread that serves health checks has ended");
        }
    }

    /// Tells of the data path.
    pub fn tell(&self, change: impl FnOnce(&mut DataPath)) {
        self.data_path.send_if_modified(|data_path| {
            let before = data_path.clone();
            change(data_path);
            *data_path != before
        });
    }

    /// Ports that cannot be served, and what to do.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        self.problems.borrow().clone()
    }
}

async fn run(
    address: Option<SocketAddr>,
    mut changes: mpsc::UnboundedReceiver<Changes>,
    data_path: watch::Receiver<DataPath>,
    problems: watch::Sender<Vec<String>>,
) {
    let mut ports = Ports::open(address, data_path);
    loop {
        let found = ports.problems();
        problems.send_if_modified(|known| {
            let changed = *known != found;
            *known = found;
            changed
        });
        let due = ports.next_due();
        tokio::select! {
            changed = changes.recv() => {
                let Some(changed) = changed else { return };
                for (service, check) in changed {
                    ports.set(service, check);
                }
            }
            () = sleep_until(due) => ports.retry(Instant::now()),
        }
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_path_is_healthy_until_something_is_late_for_too_long() {
        let start = DataPath::starting();
        let second = Duration::from_secs(1);
        let long_after = start.started + 10 * STALE_AFTER;
        let ago = |time| Some(long_after - time);
        // What waits and what is broken, since when, how long the event loop has been silent, and what follows.
        for (synced, waiting_since, broken_since, silent, healthy, alive) in [
            (true, None, None, second, true, true),
            (false, None, None, second, false, true),
            (true, ago(STALE_AFTER), None, second, true, true),
            (true, ago(STALE_AFTER + second), None, second, false, true),
            (true, None, ago(STALE_AFTER), second, true, true),
            (true, None, ago(STALE_AFTER + second), second, false, true),
            (true, None, None, STALE_AFTER, true, true),
            (true, None, None, STALE_AFTER + second, false, false),
            (true, ago(second), None, STALE_AFTER + second, false, false),
        ] {
            let data_path = DataPath {
                synced,
                waiting_since,
                broken_since,
                alive: long_after - silent,
                ..start.clone()
            };
            assert_eq!(data_path.is_healthy(long_after), healthy, "{data_path:?}");
            assert_eq!(data_path.is_alive(long_after), alive, "{data_path:?}");
        }
        assert_eq!(start.updated(), start.started);
    }

    #[test]
    fn a_service_that_fails_is_its_own_concern_alone() {
        let start = DataPath::starting();
        let (bad, good) = (ObjectName::new("ns", "bad"), ObjectName::new("ns", "good"));
        let long_after = start.started + 10 * STALE_AFTER;
        for (late, applied) in [
            (STALE_AFTER, true),
            (STALE_AFTER + Duration::from_secs(1), false),
        ] {
            let data_path = DataPath {
                synced: true,
                alive: long_after,
                failing_services: BTreeMap::from([(bad.clone(), long_after - late)]).into(),
                ..start.clone()
            };
            assert_eq!(data_path.is_applied(&bad, long_after), applied, "{late:?}");
            assert!(data_path.is_applied(&good, long_after));
            assert!(data_path.is_healthy(long_after) && data_path.is_alive(long_after));
        }
    }
}
