//! What has still to be brought into the kernel: rows that wait for their turn, and rows that
//! failed and wait for their next attempt. Pure: the caller tells the time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::{Duration, Instant},
};

use ipnet::IpNet;

use crate::{
    endpoint::EndpointKey,
    model::ServicePortKey,
    objects::{Family, ObjectName},
};

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
    /// Ports of the node that its own connections must not get by themselves.
    LocalPorts,
    /// Removal of what nobody asks for any more; once, after everything else.
    Sweep,
}

impl Row {
    /// Whether the whole data path suffers when it fails, not one Service, node, pod or network beside: the row of
    /// `CONFIG`, and that the programs are attached where the node is reached and reaches others, which is by the devices
    /// `leading`.
    fn carries_everything(&self, leading: &BTreeSet<u32>) -> bool {
        match self {
            Self::Config | Self::Host | Self::Sockets => true,
            Self::Device(ifindex) => leading.contains(ifindex),
            _ => false,
        }
    }
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
            Self::LocalPorts => f.write_str("ports kept from the node's own connections"),
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
    /// The first failure.
    pub since: Instant,
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
    /// With the time since when they wait.
    phases: BTreeMap<Row, (Phase, Instant)>,
    failed: BTreeMap<Row, Failure>,
}

impl Rows {
    /// The row has changed: its turn comes, also if it failed before.
    pub fn mark(&mut self, row: Row, phase: Phase, now: Instant) {
        let known = self.phases.get(&row).copied();
        let since = known.map_or(now, |(_, since)| since);
        if let Some((before, _)) = known {
            self.waiting.remove(&(before, row.clone()));
        }
        self.phases.insert(row.clone(), (phase, since));
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

    /// Since when the oldest row waits for its turn. One that failed waits only once its time has come
    /// again: what it waits for is not the loop.
    pub fn waiting_since(&self) -> Option<Instant> {
        self.phases.values().map(|(_, since)| *since).min()
    }

    /// Whether some row waits, or failed, that attaches programs.
    pub fn is_attaching(&self) -> bool {
        let known = self.phases.keys().chain(self.failed.keys());
        known.into_iter().any(|row| {
            matches!(
                row,
                Row::Host | Row::Sockets | Row::Defrag | Row::Device(_) | Row::Sweep
            )
        })
    }

    /// Since when the oldest row fails without which nothing is served as it should be. `leading` are the interface indices of
    /// the devices by which the node is reached, or reaches others.
    pub fn broken_since(&self, leading: &BTreeSet<u32>) -> Option<Instant> {
        let failed = self.failed.iter();
        let carrying = failed.filter(|(row, _)| row.carries_everything(leading));
        carrying.map(|(_, failure)| failure.since).min()
    }

    /// Services with rows that fail, and since when the oldest of each does.
    pub fn failing_services(&self) -> BTreeMap<ObjectName, Instant> {
        let mut services = BTreeMap::new();
        for (row, failure) in &self.failed {
            if let Row::Service(key) = row
                && let Some(name) = key.owner.service()
            {
                let since = services.entry(name.clone()).or_insert(failure.since);
                *since = failure.since.min(*since);
            }
        }
        services
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
        let before = self.failed.get(&row);
        let attempts = before.map_or(0, |f| f.attempts) + 1;
        let since = before.map_or(now, |f| f.since);
        let doubled = FIRST_WAIT.saturating_mul(1 << (attempts - 1).min(16));
        let failure = Failure {
            error,
            attempts,
            since,
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
    use crate::objects::Protocol;

    fn hop(node: &str) -> Row {
        Row::Hop(node.to_owned(), Family::V6)
    }

    #[test]
    fn rows_come_in_the_order_of_their_phases_and_once() {
        let mut rows = Rows::default();
        let now = Instant::now();
        rows.mark(Row::Sweep, Phase::Sweep, now);
        rows.mark(hop("a"), Phase::Clear, now);
        rows.mark(hop("a"), Phase::Hops, now);
        rows.mark(Row::Prefix("fd00::/64".parse().unwrap()), Phase::Add, now);
        rows.mark(Row::Network, Phase::Look, now);
        rows.mark(Row::Network, Phase::Look, now);
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
        rows.mark(hop("a"), Phase::Hops, now);
        assert_eq!(rows.next_due(), None);
        assert_eq!(rows.take(), Some(hop("a")));
        assert!(rows.next_due().is_some());
    }

    #[test]
    fn a_row_waits_from_its_mark_until_its_turn() {
        let mut rows = Rows::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(rows.waiting_since(), None);
        rows.mark(hop("a"), Phase::Hops, at(1));
        rows.mark(hop("a"), Phase::Clear, at(2));
        rows.mark(hop("b"), Phase::Hops, at(3));
        assert_eq!(
            rows.waiting_since(),
            Some(at(1)),
            "a change makes it no younger"
        );
        assert_eq!(rows.take(), Some(hop("b")));
        assert_eq!(rows.take(), Some(hop("a")));
        assert_eq!(rows.waiting_since(), None);
        // One that fails waits for nothing but its next attempt.
        rows.fail(hop("a"), "full".to_owned(), at(4));
        assert_eq!(rows.waiting_since(), None);
        rows.mark(hop("a"), Phase::Hops, at(5));
        assert_eq!(rows.waiting_since(), Some(at(5)));
    }

    fn service(name: &str, port: u16) -> Row {
        Row::Service(Box::new(ServicePortKey {
            owner: ObjectName::new("ns", name).into(),
            port_name: String::new(),
            protocol: Protocol::Tcp,
            family: Family::V4,
            port,
        }))
    }

    #[test]
    fn the_data_path_is_broken_only_by_what_carries_everything() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let leading = BTreeSet::from([7, 8]);
        let fails = |row: Row| {
            let mut rows = Rows::default();
            rows.fail(row.clone(), "full".to_owned(), at(1));
            rows.mark(row.clone(), Phase::Add, at(2));
            rows.take();
            rows.fail(row, "full".to_owned(), at(3));
            rows.broken_since(&leading)
        };
        for row in [Row::Config, Row::Host, Row::Sockets, Row::Device(7)] {
            assert_eq!(fails(row.clone()), Some(at(1)), "{row}");
        }
        let prefix = Row::Prefix("fd00::/64".parse().unwrap());
        for row in [
            service("a", 80),
            hop("a"),
            prefix,
            Row::ServiceRoutes,
            Row::Network,
            // A bridge of a container engine, or a tunnel.
            Row::Device(9),
        ] {
            assert_eq!(fails(row.clone()), None, "{row}");
        }
        let mut rows = Rows::default();
        rows.fail(Row::Config, "full".to_owned(), at(1));
        rows.succeeded(&Row::Config);
        assert_eq!(rows.broken_since(&leading), None);
    }

    #[test]
    fn programs_are_being_attached_until_their_rows_have_succeeded() {
        let mut rows = Rows::default();
        let now = Instant::now();
        rows.mark(hop("a"), Phase::Hops, now);
        assert!(!rows.is_attaching());
        rows.mark(Row::Defrag, Phase::Found, now);
        assert!(rows.is_attaching());
        assert_eq!(rows.take(), Some(Row::Defrag));
        assert!(!rows.is_attaching());
        rows.fail(Row::Sockets, "no cgroup".to_owned(), now);
        assert!(rows.is_attaching());
        rows.succeeded(&Row::Sockets);
        assert!(!rows.is_attaching());
    }

    #[test]
    fn a_service_fails_from_the_first_failure_of_its_rows() {
        let mut rows = Rows::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        rows.fail(service("a", 80), "full".to_owned(), at(2));
        rows.fail(service("a", 81), "full".to_owned(), at(1));
        rows.fail(service("a", 80), "full".to_owned(), at(3));
        rows.fail(Row::Config, "full".to_owned(), at(1));
        let a = ObjectName::new("ns", "a");
        assert_eq!(
            rows.failing_services(),
            BTreeMap::from([(a.clone(), at(1))])
        );
        rows.succeeded(&service("a", 81));
        assert_eq!(rows.failing_services(), BTreeMap::from([(a, at(2))]));
        rows.succeeded(&service("a", 80));
        assert!(rows.failing_services().is_empty());
    }
}
