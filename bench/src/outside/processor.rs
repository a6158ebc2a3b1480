//! What the processors of the machine have done, by the first line of `/proc/stat`: all namespaces
//! share them, so it counts the whole way of a packet.

use std::{fs, time::Instant};

use anyhow::{Context as _, Result};
use nix::unistd::{SysconfVar, sysconf};

/// Processor time, of all processors together, seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Used {
    /// Between the two readings.
    pub elapsed: f64,
    /// In soft interrupts.
    pub softirq: f64,
    /// Not idle.
    pub busy: f64,
}

/// A reading.
#[derive(Clone, Copy, Debug)]
pub struct Busy {
    at: Instant,
    softirq: f64,
    busy: f64,
}

impl Busy {
    /// Reads.
    ///
    /// # Errors
    ///
    /// `/proc/stat` is not as proc_stat(5) says.
    pub fn now() -> Result<Self> {
        let ticks = sysconf(SysconfVar::CLK_TCK)?.context("no CLK_TCK")? as f64;
        let text = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let [softirq, busy] = parse(&text).context("/proc/stat does not begin with `cpu`")?;
        Ok(Self {
            at: Instant::now(),
            softirq: softirq as f64 / ticks,
            busy: busy as f64 / ticks,
        })
    }

    /// What was used since an earlier reading.
    pub fn since(&self, before: &Self) -> Used {
        Used {
            elapsed: (self.at - before.at).as_secs_f64(),
            softirq: self.softirq - before.softirq,
            busy: self.busy - before.busy,
        }
    }
}

/// Ticks in soft interrupts, and all but idle and waiting ones. (Time of guests is in `user` already.)
fn parse(text: &str) -> Option<[u64; 2]> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .map(|word| word.parse().ok())
        .collect::<Option<_>>()?;
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else {
        return None;
    };
    Some([softirq, user + nice + system + irq + softirq])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_stolen_time_does_not_count() {
        let text = "cpu  1 2 4 1000 2000 8 16 4000 0 0\ncpu0 1 1 1 1 1 1 1\n";
        assert_eq!(parse(text), Some([16, 31]));
        assert_eq!(parse("cpu0 1 2 3 4 5 6 7"), None);
        assert_eq!(parse("cpu 1 2 3"), None);
    }
}
