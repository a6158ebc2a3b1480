//! Attaches the programs to devices, replaces them at a restart without a gap, and detaches.
//!
//! Where the kernel has tcx links they are used, appended after those of others, and pinned as
//! `BPF-ROOT/links/PROGRAM-IFINDEX`: the pin keeps a program attached while no agent runs.
//! Elsewhere the programs are filters of a clsact qdisc with a priority and handle of ours, and
//! the file pins the program, only to remember the attachment.

use std::{
    collections::BTreeSet,
    error::Error,
    fs, io, mem,
    os::{fd::AsRawFd as _, unix::net::UnixDatagram},
    path::{Path, PathBuf},
};

use aya::{
    pin::PinError,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, Link as _, LinkError, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    },
};
use weir_common::metrics::{DEVICE_HOOKS, Hook};

use super::{DatapathError, sys};

/// Priority of our filters: after those that others insist on having first.
const PRIORITY: u16 = 0x5765;
/// Handle of our filters.
const HANDLE: TcHandle = TcHandle::new(0, 0x6972);

/// How programs are attached.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum AttachMode {
    /// tcx links (kernel 6.6).
    Tcx,
    /// Filters of a clsact qdisc.
    Clsact,
}

impl AttachMode {
    /// For people: `tcx`, `clsact`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// A program on a device.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Attachment {
    /// The program.
    pub hook: Hook,
    /// Interface index of the device.
    pub ifindex: u32,
    /// How.
    pub mode: AttachMode,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Attacher {
    pub folder: PathBuf,
    pub mode: AttachMode,
}

impl Attacher {
    /// Attaches, or replaces what an earlier agent attached.
    pub fn attach(
        &self,
        program: &mut SchedClassifier,
        hook: Hook,
        ifindex: u32,
        device: &str,
    ) -> Result<(), DatapathError> {
        let failed = |source: io::Error| DatapathError::Attach {
            program: hook.name(),
            device: device.to_owned(),
            ifindex,
            source,
        };
        // aya takes names, and a name can have gone to another device since it was looked up.
        let found = nix::net::if_::if_nametoindex(device).map_err(|error| failed(error.into()))?;
        if found != ifindex {
            return Err(failed(io::Error::new(
                io::ErrorKind::NotFound,
                format!("the name now belongs to the device with index {found}"),
            )));
        }
        match self.mode {
            AttachMode::Tcx => self.attach_tcx(program, hook, ifindex, device),
            AttachMode::Clsact => self.attach_clsact(program, hook, ifindex, device),
        }
        .map_err(failed)
    }

    fn attach_tcx(
        &self,
        program: &mut SchedClassifier,
        hook: Hook,
        ifindex: u32,
        device: &str,
    ) -> io::Result<()> {
        let path = self.path(hook, ifindex);
        if path.exists() {
            match replace(program, &path) {
                Ok(()) => return Ok(()),
                // The link's device is gone and its index has been given to another, or the file
                // is a leftover of the other mode.
                Err(error) => {
                    tracing::debug!(%error, pin = %path.display(), "pinned link is of no use");
                    self.detach_one(hook, ifindex)?;
                }
            }
        }
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        let link = program
            .attach_with_options(device, attach_type(hook), options)
            .and_then(|id| program.take_link(id))
            .map_err(program_error)?;
        FdLink::try_from(link)
            .map_err(|error| io::Error::other(unfolded(&error)))?
            .pin(&path)
            .map_err(|error| pin_error(&path, &error))?;
        Ok(())
    }

    fn attach_clsact(
        &self,
        program: &mut SchedClassifier,
        hook: Hook,
        ifindex: u32,
        device: &str,
    ) -> io::Result<()> {
        // Fails if it is there; if it is not there afterwards, attaching says so.
        let qdisc = tc::qdisc_add_clsact(device);
        let old = SchedClassifierLink::attached(device, attach_type(hook), PRIORITY, HANDLE, None)?;
        let replaced = program.attach_to_link(old);
        let id = match replaced {
            Ok(id) => id,
            Err(_) => program
                .attach_with_options(
                    device,
                    attach_type(hook),
                    TcAttachOptions::Netlink(NlOptions {
                        priority: PRIORITY,
                        handle: HANDLE,
                        classid: None,
                    }),
                )
                .map_err(|error| match &qdisc {
                    Ok(()) => program_error(error),
                    Err(cause) => io::Error::other(format!(
                        "{} (adding clsact: {})",
                        unfolded(&error),
                        unfolded(&cause)
                    )),
                })?,
        };
        let link = program.take_link(id).map_err(program_error)?;
        // Dropping it would detach; the filter is to outlive the agent.
        mem::forget(link);
        let path = self.path(hook, ifindex);
        if path.exists() {
            fs::remove_file(&path)?;
        }
        program.pin(&path).map_err(|error| pin_error(&path, &error))
    }

    /// Detaches every program from a device, also from one that is gone.
    pub fn detach(&self, ifindex: u32) -> Result<(), DatapathError> {
        for hook in DEVICE_HOOKS {
            let path = self.path(hook, ifindex);
            if path.exists() {
                self.detach_one(hook, ifindex)
                    .map_err(|error| DatapathError::pin(&path, error))?;
            }
        }
        Ok(())
    }

    fn detach_one(&self, hook: Hook, ifindex: u32) -> io::Result<()> {
        let path = self.path(hook, ifindex);
        if mode_of(&path) == AttachMode::Tcx {
            // It fails when the device is gone, and the attachment with it.
            if let Err(error) = sys::detach_link(&path) {
                tracing::debug!(%error, pin = %path.display(), "link was not attached");
            }
        } else if let Some(device) = device_name(ifindex) {
            let link =
                SchedClassifierLink::attached(&device, attach_type(hook), PRIORITY, HANDLE, None)?;
            // It fails when the qdisc has been removed, and the filter with it.
            if let Err(error) = link.detach() {
                tracing::debug!(%error, %device, "filter was not there");
            }
        }
        fs::remove_file(path)
    }

    /// What is attached, by the pins.
    pub fn attachments(&self) -> Result<Vec<Attachment>, DatapathError> {
        let entries =
            fs::read_dir(&self.folder).map_err(|error| DatapathError::pin(&self.folder, error))?;
        let mut found: Vec<Attachment> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let name = entry.file_name();
                let (program, ifindex) = name.to_str()?.rsplit_once('-')?;
                Some(Attachment {
                    hook: DEVICE_HOOKS
                        .into_iter()
                        .find(|hook| hook.name() == program)?,
                    ifindex: ifindex.parse().ok()?,
                    mode: mode_of(&entry.path()),
                })
            })
            .collect();
        found.sort_by_key(|attachment| (attachment.ifindex, attachment.hook));
        Ok(found)
    }

    /// Detaches from devices that are not in `keep` and forgets those that are gone. The indices
    /// swept.
    pub fn sweep(&self, keep: &BTreeSet<u32>) -> Result<BTreeSet<u32>, DatapathError> {
        let stale: BTreeSet<u32> = self
            .attachments()?
            .into_iter()
            .map(|attachment| attachment.ifindex)
            .filter(|ifindex| !keep.contains(ifindex) || device_name(*ifindex).is_none())
            .collect();
        for ifindex in &stale {
            self.detach(*ifindex)?;
        }
        Ok(stale)
    }

    /// Whether there is something to replace.
    pub fn is_attached(&self, hook: Hook, ifindex: u32) -> bool {
        self.path(hook, ifindex).exists()
    }

    fn path(&self, hook: Hook, ifindex: u32) -> PathBuf {
        self.folder.join(format!("{}-{ifindex}", hook.name()))
    }
}

/// Puts `program` in the place of the one in a pinned link; packets see either.
fn replace(program: &mut SchedClassifier, path: &Path) -> io::Result<()> {
    let failed = |error: LinkError| io::Error::other(unfolded(&error));
    let link = PinnedLink::from_pin(path).map_err(failed)?;
    let link = SchedClassifierLink::try_from(FdLink::from(link)).map_err(failed)?;
    let id = program.attach_to_link(link).map_err(program_error)?;
    // The pin holds the link; our descriptor is not needed.
    program.take_link(id).map(drop).map_err(program_error)
}

/// What the file pins: a tcx link, or (clsact) a program.
fn mode_of(path: &Path) -> AttachMode {
    let is_link = PinnedLink::from_pin(path)
        .is_ok_and(|link| SchedClassifierLink::try_from(FdLink::from(link)).is_ok());
    if is_link {
        AttachMode::Tcx
    } else {
        AttachMode::Clsact
    }
}

/// The name of a device, or `None` if there is none with this index.
fn device_name(ifindex: u32) -> Option<String> {
    let name = nix::net::if_::if_indextoname(ifindex).ok()?;
    // nix takes the null pointer for success and gives an empty name.
    let name = name.to_string_lossy().into_owned();
    (!name.is_empty()).then_some(name)
}

/// Whether packets at a device have an Ethernet header; otherwise they begin with the network header, by the
/// same list as the kernel's (`dev_is_mac_header_xmit`, include/linux/if_arp.h).
///
/// # Errors
///
/// The device is gone, or the kernel's.
pub(super) fn has_link_layer(device: &str) -> io::Result<bool> {
    /// <linux/if_arp.h>.
    const ARPHRD_IP6GRE: u16 = 823;
    const ARPHRD_RAWIP: u16 = 519;
    const WITHOUT: [u16; 9] = [
        libc::ARPHRD_TUNNEL,
        libc::ARPHRD_TUNNEL6,
        libc::ARPHRD_SIT,
        libc::ARPHRD_IPGRE,
        ARPHRD_IP6GRE,
        libc::ARPHRD_VOID,
        libc::ARPHRD_NONE,
        ARPHRD_RAWIP,
        libc::ARPHRD_PPP,
    ];
    let socket = UnixDatagram::unbound()?;
    // SAFETY: all zeros is a request without a name.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the request has a name that ends with a zero byte, and room for the answer.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: written by the call.
    let kind = unsafe { request.ifr_ifru.ifru_hwaddr.sa_family };
    Ok(!WITHOUT.contains(&kind))
}

fn attach_type(hook: Hook) -> TcAttachType {
    match hook {
        Hook::FromPod | Hook::FromNetdev | Hook::FromHost | Hook::FromDefrag => {
            TcAttachType::Ingress
        }
        // Programs of sockets have no device.
        Hook::ToPod | Hook::ToNetdev | Hook::Socket => TcAttachType::Egress,
    }
}

pub(super) fn program_error(error: ProgramError) -> io::Error {
    match error {
        ProgramError::SyscallError(error) => error.io_error,
        other => io::Error::other(unfolded(&other)),
    }
}

/// Names the file, the kernel's answer and the remedy.
pub(super) fn pin_error(path: &Path, error: &PinError) -> io::Error {
    let cause = unfolded(error);
    let errno = match error {
        PinError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    };
    let remedy = match errno {
        Some(libc::ENOENT) => "; its folder is gone: restart the agent, which makes it anew",
        Some(libc::EPERM) => {
            "; is bpf-root still on a bpffs (`mount -t bpf bpf /sys/fs/bpf`), and has the agent \
             CAP_BPF? Restart the agent then"
        }
        Some(libc::EEXIST) => "; remove this file",
        Some(libc::ENOSPC | libc::ENOMEM) => "; free memory",
        _ => "",
    };
    io::Error::other(format!(
        "cannot pin it as {}: {cause}{remedy}",
        path.display()
    ))
}

/// An error with what lies behind it; aya tells only the name of the call on top.
pub(super) fn unfolded(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        // Some repeat their source.
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use aya::sys::SyscallError;

    use super::*;

    #[test]
    fn a_pin_that_fails_names_file_cause_and_remedy() {
        let path = Path::new("/sys/fs/bpf/weir/links/to_pod-2");
        for (errno, wanted) in [
            (
                libc::ENOENT,
                ["No such file", "os error 2", "restart the agent"],
            ),
            (libc::EPERM, ["not permitted", "os error 1", "mount -t bpf"]),
            (
                libc::EEXIST,
                ["File exists", "os error 17", "remove this file"],
            ),
        ] {
            let error = PinError::SyscallError(SyscallError {
                call: "BPF_OBJ_PIN",
                io_error: io::Error::from_raw_os_error(errno),
            });
            let text = pin_error(path, &error).to_string();
            for part in wanted.into_iter().chain(["links/to_pod-2", "BPF_OBJ_PIN"]) {
                assert!(text.contains(part), "{part:?}: {text}");
            }
        }
    }
}
