//! The setting `nat-ports`: the source ports that translated connections get.

use std::fmt;

use super::{Refusal, refuse};

/// Ports below belong to well-known services.
const LOWEST: u16 = 1024;
/// With fewer, connections to one destination are refused at once.
const LEAST: u16 = 16;
/// The API server's default range of NodePorts (`--service-node-port-range`).
const NODE_PORTS: NatPorts = NatPorts {
    first: 30_000,
    last: 32_767,
};

/// A range of ports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NatPorts {
    /// First port.
    pub first: u16,
    /// Last port, not below the first.
    pub last: u16,
}

impl NatPorts {
    /// Number of ports.
    #[must_use]
    pub const fn count(self) -> u16 {
        self.last - self.first + 1
    }

    /// What may be wrong with it, as far as can be told without the cluster's own settings.
    #[must_use]
    pub fn problem(self) -> Option<String> {
        let apart = self.last < NODE_PORTS.first || self.first > NODE_PORTS.last;
        (!apart).then(|| {
            format!(
                "nat-ports {self} overlaps {NODE_PORTS}, where NodePorts are by default: replies to translated \
                 connections and connections to a NodePort cannot be told apart there; give nat-ports a range \
                 apart from the API server's --service-node-port-range"
            )
        })
    }
}

impl fmt::Display for NatPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// Reads `FIRST-LAST`.
pub(super) fn parse(text: &str) -> Result<NatPorts, Refusal> {
    let remedy = format!("give FIRST-LAST, two ports from {LOWEST} to 65535: 61000-65534");
    let port = |text: &str| text.trim().parse::<u16>().ok();
    let Some((Some(first), Some(last))) = text
        .split_once('-')
        .map(|(first, last)| (port(first), port(last)))
    else {
        return refuse("not a range of ports", remedy);
    };
    if first < LOWEST {
        return refuse(format!("port {first} is below {LOWEST}"), remedy);
    }
    if last < first {
        return refuse("the first port is greater than the last", remedy);
    }
    if last - first < LEAST - 1 {
        return refuse(
            format!("{} ports are too few", last - first + 1),
            format!("give at least {LEAST}; each destination can have as many connections"),
        );
    }
    Ok(NatPorts { first, last })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        for (text, first, last, count) in [
            ("61000-65534", 61_000, 65_534, 4535),
            (" 1024 - 65535 ", 1024, 65_535, 64_512),
            ("40000-40015", 40_000, 40_015, 16),
        ] {
            let ports = parse(text).ok().unwrap();
            assert_eq!(
                (ports.first, ports.last, ports.count()),
                (first, last, count)
            );
        }
        assert_eq!(parse("2000-3000").ok().unwrap().to_string(), "2000-3000");
    }

    #[test]
    fn what_is_no_range_is_refused_with_the_remedy() {
        for (text, problem) in [
            ("", "not a range"),
            ("61000", "not a range"),
            ("61000-65536", "not a range"),
            ("a-b", "not a range"),
            ("1023-2000", "below 1024"),
            ("3000-2000", "greater"),
            ("3000-3014", "15 ports are too few"),
        ] {
            let refusal = parse(text).err().unwrap();
            assert!(
                refusal.problem.contains(problem),
                "{text}: {}",
                refusal.problem
            );
            assert!(refusal.remedy.contains("give"), "{text}");
        }
    }

    #[test]
    fn a_range_among_the_node_ports_is_a_problem() {
        for (text, is_problem) in [
            ("61000-65534", false),
            ("20000-29999", false),
            ("32768-40000", false),
            ("29000-30000", true),
            ("32767-40000", true),
            ("30100-30200", true),
            ("1024-65535", true),
        ] {
            let problem = parse(text).ok().unwrap().problem();
            assert_eq!(problem.is_some(), is_problem, "{text}: {problem:?}");
        }
    }
}
