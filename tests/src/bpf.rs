//! Programs and links of others, made by `bpf(2)`: the smallest there are, with a name.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use anyhow::{Context as _, Result};

/// Commands of `bpf(2)` (linux/bpf.h).
const PROG_LOAD: libc::c_long = 5;
const OBJ_PIN: libc::c_long = 6;
const LINK_CREATE: libc::c_long = 28;
/// `BPF_TCX_INGRESS`.
const TCX_INGRESS: u32 = 46;

/// Types of programs.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// `BPF_PROG_TYPE_SCHED_CLS`.
    Tc = 3,
    /// `BPF_PROG_TYPE_XDP`.
    Xdp = 6,
}

/// Start of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// A program that says "go on" (`TC_ACT_OK`, `XDP_PASS`), with a name of at most 15 bytes.
///
/// # Errors
///
/// When the kernel refuses it.
pub fn program(kind: Kind, name: &str) -> Result<OwnedFd> {
    let go_on: u64 = match kind {
        Kind::Tc => 0,
        Kind::Xdp => 2,
    };
    // r0 = go_on; exit.
    let instructions: [u64; 2] = [0xb7 | go_on << 32, 0x95];
    let mut load = Load {
        kind: kind as u32,
        instruction_count: 2,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        ..Load::default()
    };
    load.name[..name.len()].copy_from_slice(name.as_bytes());
    call(PROG_LOAD, &load).with_context(|| format!("load the program {name}"))
}

/// A link of a program to the ingress of a device by tcx, in the caller's network namespace.
///
/// # Errors
///
/// When the kernel refuses it.
pub fn tcx_link(program: &OwnedFd, ifindex: u32) -> Result<OwnedFd> {
    let descriptor = u32::try_from(program.as_raw_fd())?;
    // prog_fd, target_ifindex, attach_type, flags, and no place among the others.
    let attributes: [u32; 8] = [descriptor, ifindex, TCX_INGRESS, 0, 0, 0, 0, 0];
    call(LINK_CREATE, &attributes).context("make a tcx link")
}

/// Pins a program or a link; the folder is made.
///
/// # Errors
///
/// When the path is not on a bpffs, or taken.
pub fn pin(object: &OwnedFd, path: &Path) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let name = CString::new(path.as_os_str().as_bytes())?;
    let descriptor = u64::try_from(object.as_raw_fd())?;
    let attributes: [u64; 2] = [name.as_ptr() as u64, descriptor];
    syscall(OBJ_PIN, &attributes).with_context(|| format!("pin {}", path.display()))?;
    Ok(())
}

fn call<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    let descriptor = syscall(command, attributes)?;
    let descriptor = i32::try_from(descriptor).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it, for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn syscall<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads no more than the size; what the attributes point to lives in the callers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw const *attributes,
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
