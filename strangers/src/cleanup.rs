//! Removes what kube-proxy and Cilium have left. What is not there is no error: twice is as good as once.
//! Everything is tried; what stays is named with the reason.

use std::{fmt::Display, fs, io, path::PathBuf};

use serde::Serialize;

use crate::{
    Owner, counted, devices,
    netfilter::{self, Tools},
    pins, rules,
    tools::{self, ToolError},
};

/// What is to be removed, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// Whose leftovers.
    pub owners: Vec<Owner>,
    /// Says what would be removed, and removes nothing.
    pub dry_run: bool,
    /// Also while they run.
    pub force: bool,
    /// Mount point of the bpffs, usually `/sys/fs/bpf`.
    pub bpffs: PathBuf,
}

/// Why nothing was done.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "{process} runs (process {pid}) and would make everything anew: stop it and keep it from coming back \
     (delete its DaemonSet), then try again; --force removes all the same. Nothing has been changed"
)]
pub struct Refusal {
    /// Name of the process.
    pub process: &'static str,
    /// Its number.
    pub pid: u32,
}

/// What was done.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Report {
    /// Each thing that was removed, or would be.
    pub removed: Vec<String>,
    /// Each thing that stays, and why.
    pub failed: Vec<String>,
}

/// Removes the leftovers in the network namespace of the calling thread.
///
/// # Errors
///
/// If one of those who are to be cleaned up after still runs in this network namespace.
pub fn cleanup(request: &Request) -> Result<Report, Refusal> {
    if !request.dry_run && !request.force {
        for owner in &request.owners {
            if let Some(pid) = tools::process_of(*owner) {
                let process = owner.process();
                return Err(Refusal { process, pid });
            }
        }
    }
    let mut cleanup = Cleanup {
        dry_run: request.dry_run,
        report: Report::default(),
    };
    for owner in &request.owners {
        if *owner == Owner::Cilium {
            // Links go with their pins, and programs with their links.
            cleanup.pins(request);
        }
        cleanup.programs(*owner);
        cleanup.tables(*owner);
        cleanup.chains(*owner);
        cleanup.devices(*owner);
    }
    Ok(cleanup.report)
}

/// The device on which kube-proxy keeps addresses of Services in the mode ipvs.
pub(crate) const KUBE_IPVS: &str = "kube-ipvs0";

/// Whether `/proc/net/ip_vs` names one.
fn has_virtual_servers(text: &str) -> bool {
    let protocols = ["TCP ", "UDP ", "SCTP "];
    text.lines()
        .any(|line| protocols.iter().any(|protocol| line.starts_with(protocol)))
}

struct Cleanup {
    dry_run: bool,
    report: Report,
}

impl Cleanup {
    /// Does one thing, unless it is only to be told of.
    fn step<E: Display>(&mut self, what: String, act: impl FnOnce() -> Result<(), E>) {
        if self.dry_run {
            self.report.removed.push(what);
            return;
        }
        match act() {
            Ok(()) => self.report.removed.push(what),
            Err(error) => self.report.failed.push(format!("{what}: {error}")),
        }
    }

    /// What is there, or nothing and a failure.
    fn listed<T: Default, E: Display>(&mut self, what: &str, result: Result<T, E>) -> T {
        result.unwrap_or_else(|error| {
            self.report
                .failed
                .push(format!("cannot list {what}: {error}"));
            T::default()
        })
    }

    fn pins(&mut self, request: &Request) {
        let found = pins::of_cilium(&request.bpffs);
        let what = format!("pins in {}", request.bpffs.display());
        for path in self.listed(&what, found) {
            self.step(format!("pins {}", path.display()), || pins::remove(&path));
        }
    }

    fn programs(&mut self, owner: Owner) {
        let attached = devices::devices().and_then(|devices| devices::attached(&devices));
        let attached = self.listed("programs of devices", attached);
        for program in attached.iter().filter(|p| owner.owns_program(&p.program)) {
            let (name, device) = (&program.program, &program.device);
            let what = format!("program {name} on {device} ({})", program.hook_name());
            self.step(what, || {
                program.detach()?;
                // The kernel may say that all is well where it has found nothing to do.
                let attached =
                    devices::devices().and_then(|devices| devices::attached(&devices))?;
                if attached.contains(program) {
                    return Err(io::Error::other(
                        "it is still there, though the kernel said otherwise",
                    ));
                }
                Ok(())
            });
        }
    }

    fn tables(&mut self, owner: Owner) {
        if owner != Owner::KubeProxy {
            return;
        }
        let tables = netfilter::own_tables(owner);
        for table in self.listed("tables of nftables", tables) {
            self.step(format!("table {table} of nftables"), || {
                netfilter::remove_table(&table)
            });
        }
    }

    fn chains(&mut self, owner: Owner) {
        for tools in Tools::all() {
            let tables = match tools.tables() {
                // Nothing is missed where there are no chains.
                Err(ToolError::Missing(_))
                    if tools.is_nft() && matches!(netfilter::has_chains(owner), Ok(false)) =>
                {
                    continue;
                }
                tables => self.listed(&format!("chains of {}", tools.name), tables),
            };
            let removal = rules::removal(&tables, owner);
            if removal.chains == 0 {
                continue;
            }
            let what = format!(
                "{} of {} in {}, and {} to them",
                counted(removal.chains, "chain"),
                owner.name(),
                tools.name,
                counted(removal.jumps, "rule")
            );
            self.step(what, || tools.restore(&removal.text));
        }
    }

    fn devices(&mut self, owner: Owner) {
        let devices = self.listed("devices", devices::devices());
        if devices.iter().any(|device| device.name == KUBE_IPVS) && owner == Owner::KubeProxy {
            let servers = fs::read_to_string("/proc/thread-self/net/ip_vs");
            if has_virtual_servers(&servers.unwrap_or_default()) {
                self.report.failed.push(
                    "virtual servers of IPVS stay: kube-proxy's look like those of others; `ipvsadm --clear` \
                     removes all of them"
                        .to_owned(),
                );
            }
        }
        for device in devices
            .iter()
            .filter(|device| owner.owns_device(&device.name))
        {
            self.step(format!("device {}", device.name), || {
                devices::remove(device)
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_servers_are_told_from_the_head() {
        let head = "IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\n  \
                    -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n";
        assert!(!has_virtual_servers(head) && !has_virtual_servers(""));
        let server =
            "TCP  0A60000A:0050 rr  \n  -> 0AF40102:1F90      Masq    1      0          0\n";
        assert!(has_virtual_servers(&format!("{head}{server}")));
    }
}
