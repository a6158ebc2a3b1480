//! Pods that are wired before this node's devices are served. Until the programs are attached to them for
//! the first time in this agent's life, a pod would have no way to the outside, or one that nobody looks
//! after: its request waits here, and the event loop goes on meanwhile. Called by the event loop.

use std::time::{Duration, Instant};

use tonic::Status;
use weir_api::v1;

use super::{Agent, Row};
use crate::api::Reply;

/// The longest wait: a second less than the CNI plugin waits for an answer, so that it gets one.
const LONGEST: Duration = Duration::from_secs(9);

/// Requests that wait, the oldest first.
#[derive(Debug, Default)]
pub(super) struct WaitingCommits {
    requests: Vec<Waiting>,
    /// The devices have been attached once: nothing waits any more.
    open: bool,
}

#[derive(Debug)]
struct Waiting {
    request: v1::CommitRequest,
    reply: Reply<v1::CommitResponse>,
    due: Instant,
}

impl WaitingCommits {
    /// When the first of them has waited for long enough.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.requests.iter().map(|waiting| waiting.due).min()
    }

    /// The pod is given up before its turn has come. An empty `ifname` means all of the container.
    pub(super) fn release(&mut self, container_id: &str, ifname: &str) {
        let is_meant = |waiting: &mut Waiting| {
            waiting.request.container_id == container_id
                && (ifname.is_empty() || waiting.request.ifname == ifname)
        };
        for waiting in self.requests.extract_if(.., is_meant) {
            let _ = waiting.reply.send(Err(Status::aborted(
                "the pod was released before its network was ready",
            )));
        }
    }

    fn expired(&mut self, now: Instant) -> impl Iterator<Item = Waiting> + '_ {
        self.requests
            .extract_if(.., move |waiting| waiting.due <= now)
    }
}

impl Agent {
    /// Commits, or has the request wait.
    pub(super) async fn commit_or_wait(
        &mut self,
        request: v1::CommitRequest,
        reply: Reply<v1::CommitResponse>,
    ) {
        if self.are_devices_served() {
            drop(reply.send(self.commit(request).await));
            return;
        }
        tracing::info!(
            container = request.container_id,
            "the pod waits until the programs are attached to this node's devices"
        );
        self.waiting_commits.requests.push(Waiting {
            request,
            reply,
            due: Instant::now() + LONGEST,
        });
    }

    /// Commits what waits if it can be, and refuses what has waited for too long.
    pub(super) async fn settle_commits(&mut self) {
        if self.waiting_commits.requests.is_empty() {
            return;
        }
        if self.are_devices_served() {
            for waiting in std::mem::take(&mut self.waiting_commits.requests) {
                // Who is gone has been told of a failure, and will ask for another pod.
                if !waiting.reply.is_closed() {
                    drop(waiting.reply.send(self.commit(waiting.request).await));
                }
            }
            return;
        }
        let why = self.unserved_devices();
        for waiting in self.waiting_commits.expired(Instant::now()) {
            let text = format!(
                "the programs are not attached to the devices of this node yet, so that the pod would have \
                 no way to the outside: {why}; try again, and see `weir status`"
            );
            drop(waiting.reply.send(Err(Status::failed_precondition(text))));
        }
    }

    /// Whether the devices of this node have been attached, and what pods send by them been told to the programs, once
    /// since this agent has started. One that refuses its programs is no reason to run no pods, unless this node is
    /// reached, or reaches others, by it.
    fn are_devices_served(&mut self) -> bool {
        if !self.waiting_commits.open {
            self.waiting_commits.open =
                self.plan_is_made && !self.late.waiting && self.missing_devices().next().is_none();
        }
        self.waiting_commits.open
    }

    fn is_device_served(&self, ifindex: u32) -> bool {
        !self.rows.is_known(&Row::Device(ifindex)) && self.datapath.devices().is_attached(ifindex)
    }

    fn missing_devices(&self) -> impl Iterator<Item = (&u32, &String)> {
        self.plan.devices.iter().filter(|(ifindex, _)| {
            let is_given_up = !self.plan.leading.contains(ifindex)
                && self.rows.failure(&Row::Device(**ifindex)).is_some();
            !self.is_device_served(**ifindex) && !is_given_up
        })
    }

    /// What is missing, for people.
    fn unserved_devices(&self) -> String {
        if !self.plan_is_made {
            return "the source of objects has not told of this node yet".to_owned();
        }
        if self.late.waiting {
            return "the maps were made anew, and are not filled yet".to_owned();
        }
        let missing: Vec<String> = self
            .missing_devices()
            .map(
                |(ifindex, name)| match self.rows.failure(&Row::Device(*ifindex)) {
                    Some(failure) => format!("{name}: {}", failure.error),
                    None => name.clone(),
                },
            )
            .collect();
        missing.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use tonic::Code;

    use super::*;

    fn waiting(
        container: &str,
        ifname: &str,
        due: Instant,
    ) -> (
        Waiting,
        oneshot::Receiver<Result<v1::CommitResponse, Status>>,
    ) {
        let (reply, answer) = oneshot::channel();
        let request = v1::CommitRequest {
            container_id: container.to_owned(),
            ifname: ifname.to_owned(),
            ..v1::CommitRequest::default()
        };
        let waiting = Waiting {
            request,
            reply,
            due,
        };
        (waiting, answer)
    }

    #[test]
    fn a_released_pod_waits_no_longer_and_others_do() {
        let now = Instant::now();
        let (first, mut first_answer) = waiting("a", "eth0", now);
        let (second, mut second_answer) = waiting("a", "eth1", now);
        let (third, mut third_answer) = waiting("b", "eth0", now);
        let mut commits = WaitingCommits {
            requests: vec![first, second, third],
            open: false,
        };
        commits.release("a", "eth1");
        let refused = second_answer.try_recv().unwrap().unwrap_err();
        assert_eq!(refused.code(), Code::Aborted);
        assert!(first_answer.try_recv().is_err());
        commits.release("a", "");
        assert!(first_answer.try_recv().unwrap().is_err());
        assert!(third_answer.try_recv().is_err());
        assert_eq!(commits.requests.len(), 1);
    }

    #[test]
    fn each_waits_for_its_own_time() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let (first, _first) = waiting("a", "eth0", later);
        let (second, _second) = waiting("b", "eth0", now);
        let mut commits = WaitingCommits {
            requests: vec![first, second],
            open: false,
        };
        assert_eq!(commits.next_due(), Some(now));
        let expired: Vec<_> = commits
            .expired(now)
            .map(|waiting| waiting.request.container_id)
            .collect();
        assert_eq!(expired, ["b"]);
        assert_eq!(commits.next_due(), Some(later));
    }
}
