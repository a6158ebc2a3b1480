//! The list of ports that the kernel gives no process by itself. It belongs to the whole node: what others have entered
//! in it stays, also what they enter later.

use std::{io, ops::RangeInclusive};

use super::{Changed, SysctlError, Sysctls, read, write};
use crate::netlink::ports::Ports;

/// Ports that the kernel gives nobody by itself.
pub(super) const RESERVED_PORTS: &str = "net/ipv4/ip_local_reserved_ports";
/// First and last port that it gives by itself.
const LOCAL_PORTS: &str = "net/ipv4/ip_local_port_range";

impl Sysctls {
    /// Has the kernel give no process a port of `nat` by itself, nor one of those in `served`, if it would
    /// otherwise: one sysctl is for both families. What stands in the switch besides is kept; ports of an earlier call are
    /// not, but where `served` is `None`: it is not known yet.
    ///
    /// # Errors
    ///
    /// The switches cannot be read or set, or the kernel's lists not be understood.
    pub fn reserve_ports(
        &mut self,
        nat: RangeInclusive<u16>,
        served: Option<impl Iterator<Item = u16>>,
    ) -> Result<(), SysctlError> {
        let (current, others, own) = self.reserved_ports()?;
        let local = self.local_ports()?;
        let mut wanted = if served.is_some() { Ports::none() } else { own };
        if nat.start() <= local.end() && nat.end() >= local.start() {
            wanted.add(nat);
        }
        for port in served
            .into_iter()
            .flatten()
            .filter(|port| local.contains(port))
        {
            wanted.add(port..=port);
        }
        let wanted = wanted.with(&others);
        // Kept before it is changed: a crash between the two loses nothing.
        let changed = (wanted != others).then(|| Changed {
            previous: others.to_string(),
            written: wanted.to_string(),
        });
        if self.changed.get(RESERVED_PORTS) != changed.as_ref() {
            match changed {
                Some(changed) => self.changed.insert(RESERVED_PORTS.to_owned(), changed),
                None => self.changed.remove(RESERVED_PORTS),
            };
            self.save()?;
        }
        if wanted != current {
            write(&self.root.join(RESERVED_PORTS), &wanted.to_string())?;
        }
        Ok(())
    }

    /// The ports that the kernel gives nobody by itself: all of them, those that others have entered, and those that
    /// Weir has. Of a list that somebody has added to, the addition is his; a list that he has put in the place of
    /// ours is his altogether.
    fn reserved_ports(&self) -> Result<(Ports, Ports, Ports), SysctlError> {
        let text = read(&self.root.join(RESERVED_PORTS))?;
        let understood = |text: &str| {
            Ports::parse(text).ok_or_else(|| self.not_understood(RESERVED_PORTS, text))
        };
        let current = understood(&text)?;
        let Some(changed) = self.changed.get(RESERVED_PORTS) else {
            return Ok((current.clone(), current, Ports::none()));
        };
        let (previous, written) = (
            understood(&changed.previous)?,
            understood(&changed.written)?,
        );
        if !current.has_all_of(&written) {
            return Ok((current.clone(), current, Ports::none()));
        }
        let added = current.clone().without(&written);
        let own = written.without(&previous);
        Ok((current, previous.with(&added), own))
    }

    fn local_ports(&self) -> Result<RangeInclusive<u16>, SysctlError> {
        let local = read(&self.root.join(LOCAL_PORTS))?;
        let bounds: Vec<u16> = local
            .split_whitespace()
            .filter_map(|bound| bound.parse().ok())
            .collect();
        match bounds[..] {
            [first, last] => Ok(first..=last),
            _ => Err(self.not_understood(LOCAL_PORTS, &local)),
        }
    }

    fn not_understood(&self, key: &str, value: &str) -> SysctlError {
        SysctlError::Read {
            path: self.root.join(key),
            source: io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{value:?} is not a list of ports"),
            ),
        }
    }

    /// Leaves in the switch what others have entered.
    pub(super) fn give_ports_back(&self) -> Result<(), SysctlError> {
        let (current, others, _) = self.reserved_ports()?;
        if current == others {
            return Ok(());
        }
        write(&self.root.join(RESERVED_PORTS), &others.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{
        super::{
            STORE,
            tests::{tree, value},
        },
        *,
    };

    const SERVES_NONE: Option<std::iter::Empty<u16>> = Some(std::iter::empty());

    #[test]
    fn ports_are_reserved_beside_those_of_others_and_given_back() {
        let reserved = |root: &tempfile::TempDir| value(root, RESERVED_PORTS);
        let root = tree(&[
            (LOCAL_PORTS, "32768\t60999"),
            (RESERVED_PORTS, "8080,60000-60009"),
        ]);
        let run_dir = tempfile::tempdir().unwrap();
        let open = || Sysctls::with_root(root.path(), run_dir.path());
        // Apart from what the kernel gives.
        open().reserve_ports(61_000..=65_534, SERVES_NONE).unwrap();
        assert_eq!(reserved(&root), "8080,60000-60009");
        assert!(!run_dir.path().join(STORE).exists());
        open().reserve_ports(60_010..=65_000, SERVES_NONE).unwrap();
        assert_eq!(reserved(&root), "8080,60000-65000");
        // Another range after a restart: what the first has entered goes.
        open().reserve_ports(40_000..=40_100, SERVES_NONE).unwrap();
        assert_eq!(reserved(&root), "8080,40000-40100,60000-60009");
        open().reserve_ports(40_000..=40_100, SERVES_NONE).unwrap();
        assert!(open().restore().is_empty());
        assert_eq!(reserved(&root), "8080,60000-60009");
    }

    #[test]
    fn the_last_range_apart_from_local_ports_takes_the_entry_back() {
        let root = tree(&[(LOCAL_PORTS, "32768\t60999"), (RESERVED_PORTS, "")]);
        let run_dir = tempfile::tempdir().unwrap();
        let mut sysctls = Sysctls::with_root(root.path(), run_dir.path());
        sysctls.reserve_ports(60_999..=65_535, SERVES_NONE).unwrap();
        assert_eq!(value(&root, RESERVED_PORTS), "60999-65535");
        sysctls.reserve_ports(61_000..=65_535, SERVES_NONE).unwrap();
        assert_eq!(value(&root, RESERVED_PORTS), "");
    }

    #[test]
    fn ports_that_somebody_enters_meanwhile_are_his() {
        let root = tree(&[(LOCAL_PORTS, "32768\t60999"), (RESERVED_PORTS, "")]);
        let run_dir = tempfile::tempdir().unwrap();
        let set = |list: &str| fs::write(root.path().join(RESERVED_PORTS), list).unwrap();
        let mut sysctls = Sysctls::with_root(root.path(), run_dir.path());
        sysctls.reserve_ports(50_000..=50_100, SERVES_NONE).unwrap();
        // Added.
        set("9,50000-50100\n");
        sysctls.reserve_ports(50_000..=50_101, SERVES_NONE).unwrap();
        assert_eq!(value(&root, RESERVED_PORTS), "9,50000-50101");
        set("9,11,50000-50101\n");
        assert!(sysctls.restore().is_empty());
        assert_eq!(value(&root, RESERVED_PORTS), "9,11");
        // In the place of ours.
        sysctls.reserve_ports(50_000..=50_100, SERVES_NONE).unwrap();
        set("9,50000-50050\n");
        assert!(sysctls.restore().is_empty());
        assert_eq!(value(&root, RESERVED_PORTS), "9,50000-50050");
    }

    #[test]
    fn served_ports_are_reserved_where_the_kernel_would_give_them() {
        let root = tree(&[
            (LOCAL_PORTS, "30000\t60999"),
            (RESERVED_PORTS, "30081,40000"),
        ]);
        let run_dir = tempfile::tempdir().unwrap();
        let open = || Sysctls::with_root(root.path(), run_dir.path());
        let nat = 61_000..=65_534;
        let served = |ports: &'static [u16]| Some(ports.iter().copied());
        let mut sysctls = open();
        sysctls
            .reserve_ports(nat.clone(), served(&[8080, 30_080, 30_081]))
            .unwrap();
        assert_eq!(value(&root, RESERVED_PORTS), "30080-30081,40000");
        // Another agent does not know yet what is served.
        let mut sysctls = open();
        sysctls
            .reserve_ports(nat.clone(), None::<std::iter::Empty<u16>>)
            .unwrap();
        assert_eq!(value(&root, RESERVED_PORTS), "30080-30081,40000");
        sysctls
            .reserve_ports(nat.clone(), served(&[30_081, 30_090]))
            .unwrap();
        assert_eq!(value(&root, RESERVED_PORTS), "30081,30090,40000");
        sysctls.reserve_ports(nat, SERVES_NONE).unwrap();
        assert_eq!(
            value(&root, RESERVED_PORTS),
            "30081,40000",
            "it was there before"
        );
        assert!(sysctls.restore().is_empty());
        assert_eq!(value(&root, RESERVED_PORTS), "30081,40000");
    }

    #[test]
    fn lists_that_are_not_understood_are_left_alone() {
        let root = tree(&[(LOCAL_PORTS, "many"), (RESERVED_PORTS, "1-2")]);
        let run_dir = tempfile::tempdir().unwrap();
        let mut sysctls = Sysctls::with_root(root.path(), run_dir.path());
        let error = sysctls
            .reserve_ports(61_000..=65_535, SERVES_NONE)
            .unwrap_err();
        assert!(error.to_string().contains("ip_local_port_range"), "{error}");
        fs::write(root.path().join(LOCAL_PORTS), "1024 65535").unwrap();
        fs::write(root.path().join(RESERVED_PORTS), "x").unwrap();
        let error = sysctls
            .reserve_ports(61_000..=65_535, SERVES_NONE)
            .unwrap_err();
        assert!(
            error.to_string().contains("ip_local_reserved_ports"),
            "{error}"
        );
        assert_eq!(value(&root, RESERVED_PORTS), "x");
    }
}
