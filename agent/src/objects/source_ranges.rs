//! `spec.loadBalancerSourceRanges` of a Service: who may use its load balancer addresses. As kube-proxy
//! has it, each family is by itself, and one without a range is not restricted.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::Family;

/// The ranges of both families.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SourceRanges {
    /// Ranges, truncated: bits beyond the length do not count.
    pub ranges: BTreeSet<IpNet>,
    /// What is no range, as it stands there.
    pub invalid: Vec<String>,
}

impl SourceRanges {
    /// Reads the list. Nothing in it makes the Service invalid: what is no range is kept apart.
    pub fn parse(list: impl IntoIterator<Item = String>) -> Self {
        let mut parsed = Self::default();
        for text in list {
            match text.trim().parse::<IpNet>() {
                Ok(range) => {
                    parsed.ranges.insert(range.trunc());
                }
                Err(_) => parsed.invalid.push(text),
            }
        }
        parsed
    }

    /// The clients of a family that are served; `None`: all. What is no range might have been one of the
    /// family: a family that has no other is closed, never open to all.
    pub fn of_family(&self, family: Family) -> Option<BTreeSet<IpNet>> {
        let is_of_family = |range: &&IpNet| Family::of(range.addr()) == family;
        let ranges: BTreeSet<IpNet> = self.ranges.iter().filter(is_of_family).copied().collect();
        (!ranges.is_empty() || !self.invalid.is_empty()).then_some(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_both(list: &[&str]) -> [Option<Vec<String>>; 2] {
        let ranges = SourceRanges::parse(list.iter().map(|text| (*text).to_owned()));
        [Family::V4, Family::V6].map(|family| {
            let ranges = ranges.of_family(family)?;
            Some(ranges.iter().map(ToString::to_string).collect())
        })
    }

    #[test]
    fn each_family_is_by_itself() {
        let some = |ranges: &[&str]| Some(ranges.iter().map(|r| (*r).to_owned()).collect());
        for (list, v4, v6) in [
            (&[][..], None, None),
            (&["192.0.2.0/24"], some(&["192.0.2.0/24"]), None),
            (&["2001:db8::/32"], None, some(&["2001:db8::/32"])),
            // As kube-proxy: host bits do not count, nor spaces around.
            (
                &[" 192.0.2.7/24 ", "192.0.2.0/24", "2001:db8::7/32"],
                some(&["192.0.2.0/24"]),
                some(&["2001:db8::/32"]),
            ),
            (
                &["0.0.0.0/0", "::/0"],
                some(&["0.0.0.0/0"]),
                some(&["::/0"]),
            ),
            // What is no range opens nothing.
            (&["192.0.2.0/33"], some(&[]), some(&[])),
            (
                &["192.0.2.1", "2001:db8::/32"],
                some(&[]),
                some(&["2001:db8::/32"]),
            ),
        ] {
            assert_eq!(of_both(list), [v4, v6], "{list:?}");
        }
    }
}
