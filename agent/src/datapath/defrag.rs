//! Has the kernel put datagrams together in a network namespace: links of an empty netfilter program
//! with `BPF_F_NETFILTER_IP_DEFRAG`, one for each family, pinned as `BPF-ROOT/links/defrag-FAMILY`. The
//! pins keep the links, and the namespace, alive while no agent runs.

use std::{
    fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya_obj::generated::{bpf_attach_type, bpf_cmd, bpf_link_type, bpf_prog_type};

use thiserror::Error;

use super::sys::{self, bpf, owned, raw, zeroed_attr};

/// Pins with the number of their family (`NFPROTO_…`, include/uapi/linux/netfilter.h).
const PINS: [(&str, u32); 2] = [("defrag-v4", 2), ("defrag-v6", 10)];
/// `BPF_F_NETFILTER_IP_DEFRAG` (include/uapi/linux/bpf.h, kernel 6.6).
const BPF_F_NETFILTER_IP_DEFRAG: u32 = 1;
/// `NF_INET_PRE_ROUTING`.
const PRE_ROUTING: u32 = 0;

/// Whether this kernel knows such links (6.6, `CONFIG_NETFILTER_BPF_LINK`): asks for one that would be called
/// before anything is put together, which a kernel that knows them refuses for that reason. It does so before
/// it looks for its modules: [`attach`] may find later that one is not there.
///
/// # Errors
///
/// An answer that says neither yes nor no.
pub fn is_available() -> io::Result<bool> {
    let program = match load() {
        Ok(program) => program,
        Err(error) => return no(error),
    };
    for (_, family) in PINS {
        match link(program.as_fd(), family, i32::MIN + 1) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ERANGE) => {}
            Err(error) => return no(error),
        }
    }
    Ok(true)
}

fn no(error: io::Error) -> io::Result<bool> {
    if is_no(&error) { Ok(false) } else { Err(error) }
}

/// Whether the kernel says that it has no such thing, or not the module `nf_defrag_ipv4` or `nf_defrag_ipv6`.
fn is_no(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::ENOENT)
    )
}

/// Why nothing is attached.
#[derive(Debug, Error)]
pub enum AttachError {
    /// This kernel cannot, and will not before something about it changes.
    #[error("the kernel cannot put datagrams together for {pin}: {error}")]
    Unavailable {
        /// The pin.
        pin: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
    /// Anything else.
    #[error("cannot attach and pin {pin}: {error}")]
    Failed {
        /// The pin.
        pin: PathBuf,
        /// What the kernel says.
        error: io::Error,
    },
    /// What was there cannot be removed, or no program loaded.
    #[error(transparent)]
    Before(#[from] io::Error),
}

/// Attaches in the network namespace of the calling thread and pins in `links`, in place of what is
/// there.
///
/// # Errors
///
/// The kernel's, with the pin; nothing of ours is pinned then.
pub fn attach(links: &Path) -> Result<(), AttachError> {
    detach(links)?;
    let program = load()?;
    attach_by(links, |family| link(program.as_fd(), family, 0))
}

/// `link` makes the link of a family.
fn attach_by(links: &Path, link: impl Fn(u32) -> io::Result<OwnedFd>) -> Result<(), AttachError> {
    for (name, family) in PINS {
        let pin = links.join(name);
        let failure = match link(family) {
            Ok(link) => match sys::pin(link.as_fd(), &pin) {
                Ok(()) => continue,
                Err(error) => AttachError::Failed { pin, error },
            },
            Err(error) if is_no(&error) => AttachError::Unavailable { pin, error },
            Err(error) => AttachError::Failed { pin, error },
        };
        let _ = detach(links);
        return Err(failure);
    }
    Ok(())
}

/// Whether both are pinned.
pub fn is_attached(links: &Path) -> bool {
    PINS.iter().all(|(name, _)| {
        sys::type_of_link(&links.join(name))
            .is_ok_and(|kind| kind == bpf_link_type::BPF_LINK_TYPE_NETFILTER as u32)
    })
}

/// Lets go of both; none attached is no error. The namespace, and the device in it, go if nobody else has
/// them.
///
/// # Errors
///
/// A pin cannot be removed.
pub fn detach(links: &Path) -> io::Result<()> {
    for (name, _) in PINS {
        let pin: PathBuf = links.join(name);
        match fs::remove_file(&pin) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io::Error::new(
                    error.kind(),
                    format!("cannot remove {}: {error}", pin.display()),
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A program that accepts everything: only what comes with its link is wanted.
fn load() -> io::Result<OwnedFd> {
    // r0 = NF_ACCEPT; exit (RFC 9669).
    const PROGRAM: [u64; 2] = [
        u64::from_ne_bytes([0xb7, 0, 0, 0, 1, 0, 0, 0]),
        u64::from_ne_bytes([0x95, 0, 0, 0, 0, 0, 0, 0]),
    ];
    let licence = c"Dual MIT/GPL";
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_NETFILTER as u32;
    attr.__bindgen_anon_3.expected_attach_type = bpf_attach_type::BPF_NETFILTER as u32;
    attr.__bindgen_anon_3.insns = PROGRAM.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = PROGRAM.len() as u32;
    attr.__bindgen_anon_3.license = licence.as_ptr() as u64;
    // SAFETY: `insns` holds `insn_cnt` instructions and the licence ends with a zero byte.
    unsafe { bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr) }.map(owned)
}

fn link(program: BorrowedFd<'_>, family: u32, priority: i32) -> io::Result<OwnedFd> {
    let mut attr = zeroed_attr();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.attach_type = bpf_attach_type::BPF_NETFILTER as u32;
    attr.link_create.__bindgen_anon_3.netfilter.pf = family;
    attr.link_create.__bindgen_anon_3.netfilter.hooknum = PRE_ROUTING;
    attr.link_create.__bindgen_anon_3.netfilter.priority = priority;
    attr.link_create.__bindgen_anon_3.netfilter.flags = BPF_F_NETFILTER_IP_DEFRAG;
    // SAFETY: the command reads no pointer of `attr`.
    unsafe { bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr) }.map(owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_that_is_not_there_is_told_from_what_may_pass() {
        let directory = tempfile::tempdir().unwrap();
        // As if the first family had been attached.
        let first = directory.path().join(PINS[0].0);
        for errno in [
            libc::ENOENT,
            libc::EOPNOTSUPP,
            libc::EAFNOSUPPORT,
            libc::EINVAL,
        ] {
            fs::write(&first, "").unwrap();
            let error = attach_by(directory.path(), |_| {
                Err(io::Error::from_raw_os_error(errno))
            });
            let error = error.unwrap_err();
            assert!(matches!(error, AttachError::Unavailable { .. }), "{error}");
            assert!(!first.exists(), "nothing stays");
        }
        let error = attach_by(directory.path(), |_| {
            Err(io::Error::from_raw_os_error(libc::ENOMEM))
        });
        let error = error.unwrap_err();
        assert!(matches!(error, AttachError::Failed { .. }), "{error}");
        // No place for a pin says nothing about the kernel.
        let gone = directory.path().join("gone");
        let error = attach_by(&gone, |_| Ok(fs::File::open("/dev/null").unwrap().into()));
        let error = error.unwrap_err();
        assert!(matches!(error, AttachError::Failed { .. }), "{error}");
    }
}
