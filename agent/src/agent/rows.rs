//! What has still to be brought into the kernel: rows that wait for their turn, and rows that
//! failed and wait for their next attempt. Pure: the caller tells the time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::{Duration, Instant},
};

use ipnet::IpNet;

use crate::{endpoint::EndpointKey, model::ServicePortKey, objects::Family};

/// Wait after the first failure of a row; it doubles with each further one.
pub const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// One thing that the kernel should have or should not have. What exactly, is looked up when its
/// turn comes: the model and the node plan know.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Row {
    /// The ways to the nodes: compare the Node objects with the kernel's routes.
    Network,
    /// The row of `CONFIG`.
    Config,
    /// The node's own device, and the programs on it and on the loopback device.
    Host,
    /// The device behind which datagrams are put together, and the program on it.
    Defrag,
    /// The programs of sockets.
    Sockets,
    /// Routes of addresses of Services to the node's own device.
    ServiceRoutes,
    /// Refusals at addresses that Services have come to have.
    Refusals,
    /// A device of the node and the programs on it.
    Device(u32),
    /// The next hop to a node.
    Hop(String, Family),
    /// What the objects say about a pod of this node: the flags of its endpoint.
    Endpoint(EndpointKey),
    /// A prefix of nodes or pods in the ipcache.
    Prefix(IpNet),
    /// A Service port.
    Service(Box<ServicePortKey>),
    /// Removal of what nobody asks for any more; once, after everything else.
    Sweep,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network => f.write_str("routes to other nodes"),
            Self::Config => f.write_str("configuration of this node"),
            Self::Host => f.write_str("devices weir-host and weir-net"),
            Self::Defrag => f.write_str("device weir-defrag"),
            Self::Sockets => f.write_str("programs of sockets"),
            Self::ServiceRoutes => f.write_str("routes to addresses of Services"),
            Self::Refusals => f.write_str("refusals at addresses of Services"),
            Self::Device(ifindex) => write!(f, "programs of device #{ifindex}"),
            Self::Hop(node, family) => write!(f, "next hop to node {node} ({})", family.name()),
            Self::Endpoint(key) => write!(f, "flags of endpoint {key}"),
            Self::Prefix(prefix) => write!(f, "ipcache entry {prefix}"),
            Self::Service(key) => {
                let ServicePortKey {
                    owner,
                    port,
                    protocol,
                    family,
                    ..
                } = &**key;
                let (protocol, family) = (protocol.name(), family.name());
                write!(f, "{owner} port {port}/{protocol} ({family})")
            }
            Self::Sweep => f.write_str("removal of leftovers"),
        }
    }
}

/// Why a row is not in the kernel, and when it is tried again.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Failure {
    /// For people.
    pub error: String,
    /// Attempts so far.
    pub attempts: u32,
    /// Next attempt.
    pub due: Instant,
}

/// The order in which rows are worked off: what others refer to comes first when it appears and
/// last when it goes.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Phase {
    /// The network is looked at.
    Look,
    /// Rows that others refer to.
    Found,
    /// Next hops.
    Hops,
    /// What refers to them.
    Add,
    /// What is gone.
    Remove,
    /// What it referred to.
    Clear,
    /// The rest.
    Sweep,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Rows {
    waiting: BTreeSet<(Phase, Row)>,
    phases: BTreeMap<Row, Phase>,
    failed: BTreeMap<Row, Failure>,
}

impl Rows {
    /// The row has changed: its turn comes, also if it failed before.
    pub fn mark(&mut self, row: Row, phase: Phase) {
        if let Some(before) = self.phases.insert(row.clone(), phase) {
            self.waiting.remove(&(before, row.clone()));
        }
        self.waiting.insert((phase, row));
    }

    /// The next row, in the order of phases.
    pub fn take(&mut self) -> Option<Row> {
        let (_, row) = self.waiting.pop_first()?;
        self.phases.remove(&row);
        Some(row)
    }

    /// Whether rows wait for their turn.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether everything is as it should be.
    pub fn is_clean(&self) -> bool {
        self.waiting.is_empty() && self.failed.is_empty()
    }

    /// The row is as it should be.
    pub fn succeeded(&mut self, row: &Row) {
        self.failed.remove(row);
    }

    /// The row failed; gives the number of attempts so far.
    pub fn fail(&mut self, row: Row, error: String, now: Instant) -> u32 {
        let attempts = self.failed.get(&row).map_or(0, |f| f.attempts) + 1;
        let doubled = FIRST_WAIT.saturating_mul(1 << (attempts - 1).min(16));
        let failure = Failure {
            error,
            attempts,
            due: now + doubled.min(LONGEST_WAIT),
        };
        self.failed.insert(row, failure);
        attempts
    }

    /// When the next row that failed is due.
    pub fn next_due(&self) -> Option<Instant> {
        let waits = |row: &&Row| !self.phases.contains_key(*row);
        let rows = self.failed.keys().filter(waits);
        rows.filter_map(|row| self.failed.get(row))
            .map(|f| f.due)
            .min()
    }

    /// Rows that failed and whose time has come.
    pub fn due(&self, now: Instant) -> Vec<Row> {
        let due = self.failed.iter().filter(|(_, failure)| failure.due <= now);
        due.map(|(row, _)| row.clone()).collect()
    }

    /// Whether the row waits for its turn, or for another attempt.
    pub fn is_known(&self, row: &Row) -> bool {
        self.phases.contains_key(row) || self.failed.contains_key(row)
    }

    /// Rows that failed.
    pub fn failed(&self) -> impl ExactSizeIterator<Item = (&Row, &Failure)> {
        self.failed.iter()
    }

    /// Why this row is not in the kernel.
    pub fn failure(&self, row: &Row) -> Option<&Failure> {
        self.failed.get(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(node: &str) -> Row {
        Row::Hop(node.to_owned(), Family::V6)
    }

    #[test]
    fn rows_come_in_the_order_of_their_phases_and_once() {
        let mut rows = Rows::default();
        rows.mark(Row::Sweep, Phase::Sweep);
        rows.mark(hop("a"), Phase::Clear);
        rows.mark(hop("a"), Phase::Hops);
        rows.mark(Row::Prefix("fd00::/64".parse().unwrap()), Phase::Add);
        rows.mark(Row::Network, Phase::Look);
        rows.mark(Row::Network, Phase::Look);
        let mut order = Vec::new();
        while let Some(row) = rows.take() {
            order.push(row.to_string());
        }
        assert_eq!(
            order,
            [
                "routes to other nodes",
                "next hop to node a (IPv6)",
                "ipcache entry fd00::/64",
                "removal of leftovers"
            ]
        );
        assert!(rows.is_clean());
    }

    #[test]
    fn waits_double_up_to_the_longest_and_begin_anew_after_success() {
        let mut rows = Rows::default();
        let now = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..12 {
            rows.fail(hop("a"), "full".to_owned(), now);
            waits.push(rows.next_due().unwrap() - now);
        }
        assert_eq!(waits[..3], [FIRST_WAIT, FIRST_WAIT * 2, FIRST_WAIT * 4]);
        assert_eq!(waits[11], LONGEST_WAIT);
        assert!(!rows.is_clean());
        assert!(rows.due(now).is_empty());
        assert_eq!(rows.due(now + LONGEST_WAIT), [hop("a")]);
        rows.succeeded(&hop("a"));
        assert!(rows.is_clean() && rows.next_due().is_none());
        assert_eq!(rows.fail(hop("a"), "full".to_owned(), now), 1);
    }

    #[test]
    fn a_failed_row_that_waits_for_its_turn_needs_no_timer() {
        let mut rows = Rows::default();
        let now = Instant::now();
        rows.fail(hop("a"), "full".to_owned(), now);
        rows.mark(hop("a"), Phase::Hops);
        assert_eq!(rows.next_due(), None);
        assert_eq!(rows.take(), Some(hop("a")));
        assert!(rows.next_due().is_some());
    }
}
