//! Hands events to everyone who watches (`weir monitor`). The event loop is the only sender; a
//! subscriber that is too slow loses events and is told how many, and holds nobody up.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::sync::{Notify, broadcast};
use tokio_stream::{Stream, StreamExt as _, wrappers::BroadcastStream};
use tonic::Status;
use weir_api::v1::MonitorEvent;

/// Events that are kept for a slow subscriber.
const BACKLOG: usize = 1024;

/// The events of one subscriber, until it goes away.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<MonitorEvent, Status>> + Send>>;

/// [`MonitorEvent::kind`]s.
pub mod kind {
    /// A packet was dropped.
    pub const DROP: &str = "drop";
    /// A connection was entered in the flow table.
    pub const NEW_FLOW: &str = "new-flow";
    /// Events found no room.
    pub const LOST: &str = "lost";
}

/// The one place where events come together.
#[derive(Clone, Debug)]
pub struct EventHub {
    sender: broadcast::Sender<Arc<MonitorEvent>>,
    flow_watchers: Arc<AtomicUsize>,
    watchers_changed: Arc<Notify>,
}

/// Counts a subscriber that wants new flows while it lives.
struct FlowWatcher {
    hub: EventHub,
}

impl Drop for FlowWatcher {
    fn drop(&mut self) {
        self.hub.flow_watchers.fetch_sub(1, Ordering::Relaxed);
        self.hub.watchers_changed.notify_one();
    }
}

impl Default for EventHub {
    fn default() -> Self {
        Self::new()
    }
}

impl EventHub {
    /// Without subscribers.
    #[must_use]
    pub fn new() -> Self {
        Self {
            sender: broadcast::Sender::new(BACKLOG),
            flow_watchers: Arc::default(),
            watchers_changed: Arc::default(),
        }
    }

    /// Whether anyone watches.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.sender.receiver_count() > 0
    }

    /// Whether anyone wants to see new flows.
    #[must_use]
    pub fn wants_flows(&self) -> bool {
        self.flow_watchers.load(Ordering::Relaxed) > 0
    }

    /// Ready when [`wants_flows`](Self::wants_flows) may have changed.
    pub async fn watchers_changed(&self) {
        self.watchers_changed.notified().await;
    }

    /// Sends an event to all subscribers.
    pub fn send(&self, event: MonitorEvent) {
        // An error means that nobody watches.
        let _ = self.sender.send(Arc::new(event));
    }

    /// A new subscriber.
    #[must_use]
    pub fn subscribe(&self, drops_only: bool) -> EventStream {
        let events = BroadcastStream::new(self.sender.subscribe());
        let watcher = (!drops_only).then(|| {
            self.flow_watchers.fetch_add(1, Ordering::Relaxed);
            self.watchers_changed.notify_one();
            FlowWatcher { hub: self.clone() }
        });
        Box::pin(events.filter_map(move |event| {
            // The closure owns the count: it goes when the stream goes.
            let _ = &watcher;
            match event {
                Ok(event) if drops_only && event.kind == kind::NEW_FLOW => None,
                Ok(event) => Some(Ok(Arc::unwrap_or_clone(event))),
                Err(lagged) => {
                    let tokio_stream::wrappers::errors::BroadcastStreamRecvError::Lagged(count) =
                        lagged;
                    Some(Ok(lost(count)))
                }
            }
        }))
    }
}

/// An event that tells of others that found no room.
#[must_use]
pub fn lost(count: u64) -> MonitorEvent {
    MonitorEvent {
        time: now(),
        kind: kind::LOST.to_owned(),
        lost: count,
        description: "events came faster than they could be shown".to_owned(),
        ..MonitorEvent::default()
    }
}

/// Nanoseconds since the epoch.
#[must_use]
pub fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|time| i64::try_from(time.as_nanos()).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: &str) -> MonitorEvent {
        MonitorEvent {
            kind: kind.to_owned(),
            ..MonitorEvent::default()
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn subscribers_see_what_they_asked_for_and_are_counted() {
        let hub = EventHub::new();
        assert!(!hub.is_watched() && !hub.wants_flows());
        let mut drops = hub.subscribe(true);
        assert!(hub.is_watched() && !hub.wants_flows());
        let mut all = hub.subscribe(false);
        assert!(hub.wants_flows());
        hub.send(event(kind::NEW_FLOW));
        hub.send(event(kind::DROP));
        assert_eq!(drops.next().await.unwrap().unwrap().kind, kind::DROP);
        assert_eq!(all.next().await.unwrap().unwrap().kind, kind::NEW_FLOW);
        drop(all);
        assert!(!hub.wants_flows());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_slow_subscriber_is_told_how_many_it_lost() {
        let hub = EventHub::new();
        let mut slow = hub.subscribe(true);
        for _ in 0..BACKLOG + 7 {
            hub.send(event(kind::DROP));
        }
        let first = slow.next().await.unwrap().unwrap();
        assert_eq!((first.kind.as_str(), first.lost), (kind::LOST, 7));
        assert_eq!(slow.next().await.unwrap().unwrap().kind, kind::DROP);
    }
}
