//! Has the kernel put datagrams together in a network namespace: links of an empty netfilter program
//! with `BPF_F_NETFILTER_IP_DEFRAG`, one for each family, pinned as `BPF-ROOT/links/defrag-FAMILY`. The
//! pins keep the links, and the namespace, alive while no agent runs.

use std::{
    fs, io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya_obj::generated::{bpf_attach_type, bpf_cmd, bpf_link_type, bpf_prog_type};

use super::sys::{self, bpf, owned, raw, zeroed_attr};

/// Pins with the number of their family (`NFPROTO_…`, include/uapi/linux/netfilter.h).
const PINS: [(&str, u32); 2] = [("defrag-v4", 2), ("defrag-v6", 10)];
/// `BPF_F_NETFILTER_IP_DEFRAG` (include/uapi/linux/bpf.h, kernel 6.6).
const BPF_F_NETFILTER_IP_DEFRAG: u32 = 1;
/// `NF_INET_PRE_ROUTING`.
const PRE_ROUTING: u32 = 0;

/// Whether this kernel knows such links (6.6, `CONFIG_NETFILTER_BPF_LINK`): asks for one that would be called
/// before anything is put together, which a kernel that knows them refuses for that reason.
///
/// # Errors
///
/// An answer that says neither yes nor no.
pub fn is_available() -> io::Result<bool> {
    let program = match load() {
        Ok(program) => program,
        Err(error) => return no(error),
    };
    match link(program.as_fd(), PINS[0].1, i32::MIN + 1) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ERANGE) => Ok(true),
        Err(error) => no(error),
    }
}

fn no(error: io::Error) -> io::Result<bool> {
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::ENOENT) => Ok(false),
        _ => Err(error),
    }
}

/// Attaches in the network namespace of the calling thread and pins in `links`, in place of what is
/// there.
///
/// # Errors
///
/// The kernel's, with the pin; nothing of ours is pinned then.
pub fn attach(links: &Path) -> io::Result<()> {
    detach(links)?;
    let program = load()?;
    for (name, family) in PINS {
        let pin = links.join(name);
        let pinned = link(program.as_fd(), family, 0).and_then(|link| sys::pin(link.as_fd(), &pin));
        if let Err(error) = pinned {
            let _ = detach(links);
            return Err(io::Error::new(
                error.kind(),
                format!("cannot attach and pin {}: {error}", pin.display()),
            ));
        }
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
