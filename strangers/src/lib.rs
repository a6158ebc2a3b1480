//! Who else is on a node: leftovers of kube-proxy and Cilium, programs on its devices, CNI
//! configurations, rules and switches that drop packets which Weir leaves to the stack. It looks at the network namespace
//! of the calling thread, with the system's own tools where there are some. The agent shows what it finds; the
//! command line removes what kube-proxy and Cilium have left.

use std::path::{Path, PathBuf};

use serde::Serialize;

mod cleanup;
mod cni;
mod devices;
mod netfilter;
mod pins;
mod rules;
mod tools;

pub use cleanup::{Refusal, Report, Request, cleanup};

/// Whose leftovers can be removed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Owner {
    /// kube-proxy in any of its modes.
    KubeProxy,
    /// Cilium.
    Cilium,
}

impl Owner {
    /// Both.
    pub const ALL: [Self; 2] = [Self::KubeProxy, Self::Cilium];

    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::KubeProxy => "kube-proxy",
            Self::Cilium => "Cilium",
        }
    }

    /// What removes its leftovers.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::KubeProxy => "weir cleanup --kube-proxy",
            Self::Cilium => "weir cleanup --cilium",
        }
    }

    /// Name of its process, as `/proc/PID/comm` has it.
    const fn process(self) -> &'static str {
        match self {
            Self::KubeProxy => "kube-proxy",
            Self::Cilium => "cilium-agent",
        }
    }

    /// Whether a chain of iptables is its own. Those of the kubelet and of kube-router, which begin like
    /// kube-proxy's, are not.
    fn owns_chain(self, name: &str) -> bool {
        const OF_KUBELET: [&str; 4] = [
            "KUBE-FIREWALL",
            "KUBE-IPTABLES-HINT",
            "KUBE-KUBELET-CANARY",
            "KUBE-MARK-DROP",
        ];
        const OF_KUBE_ROUTER: [&str; 3] = ["KUBE-NWPLCY-", "KUBE-POD-FW-", "KUBE-ROUTER-"];
        let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
        match self {
            Self::KubeProxy => {
                name.starts_with("KUBE-") && !OF_KUBELET.contains(&name) && !begins(&OF_KUBE_ROUTER)
            }
            Self::Cilium => begins(&["CILIUM_", "OLD_CILIUM_"]),
        }
    }

    fn owns_device(self, name: &str) -> bool {
        match self {
            Self::KubeProxy => name == cleanup::KUBE_IPVS,
            Self::Cilium => name.starts_with("cilium_"),
        }
    }

    /// Whether a program on a device is its own.
    fn owns_program(self, name: &str) -> bool {
        self == Self::Cilium && name.starts_with("cil_")
    }

    /// Whether a table of nftables is its own.
    fn owns_table(self, family: &str, name: &str) -> bool {
        self == Self::KubeProxy && ["ip", "ip6"].contains(&family) && name == "kube-proxy"
    }
}

/// Something of somebody else.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Stranger {
    /// What it is and where.
    pub what: String,
    /// Why it matters.
    pub why: String,
    /// The command that removes it.
    pub remedy: String,
}

/// What [`look`] has found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Findings {
    /// All of it, in order.
    pub strangers: Vec<Stranger>,
    /// What could not be looked at, and why. Tools that are not installed do not stand here.
    pub errors: Vec<String>,
}

impl Findings {
    fn add(&mut self, what: String, why: &str, remedy: impl Into<String>) {
        self.strangers.push(Stranger {
            what,
            why: why.to_owned(),
            remedy: remedy.into(),
        });
    }

    /// The value, or nothing and an error.
    fn or_default<T: Default, E: std::fmt::Display>(
        &mut self,
        what: &str,
        result: Result<T, E>,
    ) -> T {
        result.unwrap_or_else(|error| {
            self.errors.push(format!("cannot look at {what}: {error}"));
            T::default()
        })
    }
}

/// Where bpffs is mounted nearly everywhere.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Where to look, besides the network namespace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Places {
    /// Mount point of the bpffs (or the folder that stands for it), usually [`BPFFS`].
    pub bpffs: PathBuf,
    /// Folder of the CNI configurations, usually `/etc/cni/net.d`.
    pub cni: PathBuf,
}

/// Looks at everything. May take seconds where there are many rules; changes nothing.
#[must_use]
pub fn look(places: &Places) -> Findings {
    let mut findings = Findings::default();
    netfilter::look(&mut findings);
    devices::look(&mut findings);
    pins::look(&places.bpffs, &mut findings);
    cni::look(&places.cni, &mut findings);
    strict_filters(Path::new("/proc/sys/net/ipv4/conf"), &mut findings);
    if places.bpffs != Path::new(BPFFS) {
        let remedy = Owner::Cilium.remedy();
        let of_cilium = |stranger: &&mut Stranger| stranger.remedy == remedy;
        for stranger in findings.strangers.iter_mut().filter(of_cilium) {
            stranger.remedy = format!("{remedy} --bpffs {}", places.bpffs.display());
        }
    }
    findings.strangers.sort();
    findings
}

/// Devices with strict reverse-path filtering; that of `all` has a problem of its own in the agent's status.
fn strict_filters(conf: &Path, findings: &mut Findings) {
    let Ok(devices) = std::fs::read_dir(conf) else {
        return;
    };
    for device in devices.flatten() {
        let name = device.file_name().to_string_lossy().into_owned();
        let is_strict = || {
            let value = std::fs::read_to_string(device.path().join("rp_filter"));
            value.is_ok_and(|value| value.trim() == "1")
        };
        if !["all", "default", "lo"].contains(&name.as_str()) && is_strict() {
            findings.add(
                format!("the device {name} has strict reverse-path filtering (rp_filter 1)"),
                "the kernel drops what comes in by another way than its own route to the sender, as \
                 answers may with several devices",
                // Dots in names of devices are written as slashes.
                format!("sysctl -w net.ipv4.conf.{}.rp_filter=2", name.replace('.', "/")),
            );
        }
    }
}

/// A number of things, in words.
fn counted(count: usize, thing: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {thing}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_belong_to_those_who_make_them() {
        for (name, owner) in [
            ("KUBE-SERVICES", Some(Owner::KubeProxy)),
            ("KUBE-SVC-NPX46M4PTMTKRN6Y", Some(Owner::KubeProxy)),
            ("KUBE-PROXY-CANARY", Some(Owner::KubeProxy)),
            ("KUBE-KUBELET-CANARY", None),
            ("KUBE-FIREWALL", None),
            ("KUBE-MARK-DROP", None),
            ("KUBE-ROUTER-INPUT", None),
            ("KUBE-POD-FW-X", None),
            ("CILIUM_FORWARD", Some(Owner::Cilium)),
            ("OLD_CILIUM_POST_nat", Some(Owner::Cilium)),
            ("DOCKER", None),
            ("MY-KUBE-CHAIN", None),
        ] {
            let found = Owner::ALL.into_iter().find(|owner| owner.owns_chain(name));
            assert_eq!(found, owner, "{name}");
        }
    }

    #[test]
    fn strict_devices_are_named() {
        let conf = tempfile::tempdir().unwrap();
        for (device, value) in [("all", "1"), ("lo", "1"), ("eth0.7", "1"), ("eth1", "2")] {
            std::fs::create_dir(conf.path().join(device)).unwrap();
            std::fs::write(
                conf.path().join(device).join("rp_filter"),
                format!("{value}\n"),
            )
            .unwrap();
        }
        let mut findings = Findings::default();
        strict_filters(conf.path(), &mut findings);
        assert_eq!(findings.strangers.len(), 1, "{findings:?}");
        assert!(findings.strangers[0].what.contains("eth0.7"));
        assert!(
            findings.strangers[0]
                .remedy
                .ends_with("conf.eth0/7.rp_filter=2")
        );
    }
}
