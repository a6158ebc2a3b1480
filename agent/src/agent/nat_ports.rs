//! The ports that translated connections get, for `weir status`: how many are in use, and whether packets were dropped
//! of late because none was free. The tick looks at the count of such drops, the status asks what has been added in the
//! last minute.

use std::{
    collections::VecDeque,
    io,
    time::{Duration, Instant},
};

use weir_api::v1;
use weir_common::DropReason;

use super::Agent;
use crate::settings::NatPorts;

/// How long drops are a problem.
const WINDOW: Duration = Duration::from_secs(60);

/// What a counter was in the last minute.
#[derive(Debug, Default)]
pub(super) struct RecentDrops {
    /// When it was looked at, and its value; the first is what is compared with.
    samples: VecDeque<(Instant, u64)>,
}

impl RecentDrops {
    /// Takes the value that the counter has now. To be called again and again, with times that do not decrease.
    fn note(&mut self, now: Instant, value: u64) {
        self.samples.push_back((now, value));
        while let Some((then, _)) = self.samples.get(1)
            && now.duration_since(*then) >= WINDOW
        {
            self.samples.pop_front();
        }
    }

    /// What has been added in the last minute, or since the first look, to make it `value`.
    fn added(&self, value: u64) -> u64 {
        let before = self.samples.front().map_or(value, |(_, before)| *before);
        value.saturating_sub(before)
    }
}

impl Agent {
    /// Looks at the drops for want of a port.
    pub(super) fn watch_nat_ports(&mut self) {
        // Without the counters the status cannot be told either, and says why.
        if let Ok(count) = self.exhausted_nat_ports() {
            self.nat_port_drops.note(Instant::now(), count);
        }
    }

    /// Packets dropped for want of a port since the maps were made.
    fn exhausted_nat_ports(&self) -> io::Result<u64> {
        let reason = DropReason::NatPortsExhausted as u8;
        Ok(self.datapath.counters().outcome(reason)?.packets)
    }

    /// The NAT ports, for the status.
    ///
    /// # Errors
    ///
    /// The counters cannot be read.
    pub(super) fn nat_ports(&self) -> io::Result<v1::NatPorts> {
        let (v4, v6) = self.datapath.nat_ports();
        let range = self.settings.nat_ports;
        Ok(v1::NatPorts {
            first: range.first.into(),
            last: range.last.into(),
            in_use_ipv4: v4,
            in_use_ipv6: v6,
            exhausted_in_last_minute: self.nat_port_drops.added(self.exhausted_nat_ports()?),
        })
    }
}

/// What is wrong with the ports `range` when so many packets found none in the last minute.
pub(super) fn problem(range: NatPorts, dropped: u64) -> Option<String> {
    (dropped > 0).then(|| {
        format!(
            "{dropped} packets of new connections were dropped in the last minute (NAT_PORTS_EXHAUSTED): of the {} ports \
             {range} none was free for their destination; give the setting nat-ports a larger range, and see who uses \
             the ports with `weir bpf nat list`",
            range.count()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_count_for_a_minute() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut drops = RecentDrops::default();
        assert_eq!(drops.added(7), 0, "nothing is known of earlier ones");
        drops.note(start, 7);
        assert_eq!(drops.added(7), 0);
        assert_eq!(drops.added(9), 2, "before the next tick");
        drops.note(at(1), 9);
        for second in 2..=60 {
            drops.note(at(second), 9);
            assert_eq!(drops.added(9), 2, "after {second} s");
        }
        drops.note(at(61), 9);
        assert_eq!(drops.added(9), 0, "a minute later");
        assert_eq!(drops.added(12), 3);
        assert!(drops.samples.len() <= 62, "{}", drops.samples.len());
    }

    #[test]
    fn ticks_that_come_late_lose_no_drop() {
        let start = Instant::now();
        let mut drops = RecentDrops::default();
        drops.note(start, 0);
        drops.note(start + 2 * WINDOW, 5);
        assert_eq!(drops.added(5), 5, "some of them may be of this minute");
    }

    #[test]
    fn the_problem_names_count_range_and_remedy() {
        let range = NatPorts {
            first: 61_000,
            last: 61_063,
        };
        assert_eq!(problem(range, 0), None);
        let text = problem(range, 12).unwrap();
        for part in [
            "12 packets",
            "NAT_PORTS_EXHAUSTED",
            "the 64 ports 61000-61063",
            "give the setting nat-ports a larger range",
        ] {
            assert!(text.contains(part), "{part:?} is not in: {text}");
        }
    }
}
