//! A set of ports, read and written as the kernel's lists of ports are: `1,5-9`. Pure; called by
//! [`super::sysctl`].

use std::{fmt, ops::RangeInclusive};

/// Number of ports, 0 included.
const COUNT: usize = 1 << 16;

/// A set of ports.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Ports(Vec<bool>);

impl Ports {
    pub fn none() -> Self {
        Self(vec![false; COUNT])
    }

    /// `None`: it is no list of ports.
    pub fn parse(list: &str) -> Option<Self> {
        let mut ports = Self::none();
        for part in list.split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            ports.add(first.trim().parse().ok()?..=last.trim().parse().ok()?);
        }
        Some(ports)
    }

    pub fn add(&mut self, range: RangeInclusive<u16>) {
        for port in range {
            self.0[usize::from(port)] = true;
        }
    }

    pub fn with(mut self, other: &Self) -> Self {
        for (port, more) in self.0.iter_mut().zip(&other.0) {
            *port |= more;
        }
        self
    }

    pub fn without(mut self, other: &Self) -> Self {
        for (port, less) in self.0.iter_mut().zip(&other.0) {
            *port &= !less;
        }
        self
    }

    pub fn has_all_of(&self, other: &Self) -> bool {
        self.0
            .iter()
            .zip(&other.0)
            .all(|(own, other)| *own || !*other)
    }
}

/// Ascending, and neighbours as one range.
impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = 0;
        let mut separator = "";
        while let Some(start) = (first..COUNT).find(|port| self.0[*port]) {
            let end = (start..COUNT).find(|port| !self.0[*port]).unwrap_or(COUNT);
            write!(f, "{separator}{start}")?;
            if end > start + 1 {
                write!(f, "-{}", end - 1)?;
            }
            (first, separator) = (end, ",");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        for (list, wanted) in [
            ("", ""),
            ("9", "9"),
            ("5-9,1", "1,5-9"),
            ("5,6,7", "5-7"),
            ("0,65535", "0,65535"),
            ("0-65535", "0-65535"),
        ] {
            assert_eq!(Ports::parse(list).unwrap().to_string(), wanted, "{list}");
        }
        for list in ["x", "1-", "65536", "1;2"] {
            assert_eq!(Ports::parse(list), None, "{list}");
        }
    }

    #[test]
    fn sets_are_added_and_taken_away() {
        let ports = |list| Ports::parse(list).unwrap();
        let both = ports("1-3").with(&ports("3-5"));
        assert_eq!(both.to_string(), "1-5");
        assert_eq!(both.clone().without(&ports("2,9")).to_string(), "1,3-5");
        assert!(both.has_all_of(&ports("1,5")) && !both.has_all_of(&ports("1,6")));
    }
}
