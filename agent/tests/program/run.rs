//! `BPF_PROG_TEST_RUN`, with the members and flags that aya leaves out.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use aya_obj::generated::{bpf_attr, bpf_cmd};

/// `BPF_F_TEST_SKB_CHECKSUM_COMPLETE` (kernel 6.11): the packet arrives with the sum that a device
/// has made of it, and the kernel checks that the program has kept it true.
pub const CHECKSUM_COMPLETE: u32 = 4;

/// The kernel's answer when it has not.
pub const WRONG_SUM: i32 = libc::EBADMSG;

/// `struct __sk_buff` (include/uapi/linux/bpf.h); the members that a test sets or reads.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Context([u32; 48]);

const MARK: usize = 2;
const IFINDEX: usize = 10;
const GSO_SIZE: usize = 44;

/// What goes in besides the frame.
#[derive(Clone, Copy, Debug, Default)]
pub struct Input {
    /// The device that the program runs on; must exist in the namespace of the caller.
    pub ifindex: u32,
    pub mark: u32,
    /// Bytes in a segment of an offloaded packet, 0 for an ordinary one.
    pub gso_size: u32,
    pub flags: u32,
}

/// What comes out.
#[derive(Clone, Debug)]
pub struct Output {
    /// What the program returned.
    pub action: i32,
    pub frame: Vec<u8>,
    pub mark: u32,
}

/// Runs a program once.
pub fn run(program: BorrowedFd<'_>, frame: &[u8], input: Input) -> io::Result<Output> {
    let mut context_in = Context([0; 48]);
    context_in.0[MARK] = input.mark;
    context_in.0[IFINDEX] = input.ifindex;
    context_in.0[GSO_SIZE] = input.gso_size;
    let mut context_out = Context([0; 48]);
    let mut out = vec![0u8; frame.len() + 256];
    // SAFETY: a union of plain integers; zero is valid for each.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    attr.test.prog_fd = program.as_raw_fd() as u32;
    attr.test.data_in = frame.as_ptr() as u64;
    attr.test.data_size_in = frame.len() as u32;
    attr.test.data_out = out.as_mut_ptr() as u64;
    attr.test.data_size_out = out.len() as u32;
    attr.test.ctx_in = (&raw const context_in) as u64;
    attr.test.ctx_size_in = size_of::<Context>() as u32;
    attr.test.ctx_out = (&raw mut context_out) as u64;
    attr.test.ctx_size_out = size_of::<Context>() as u32;
    attr.test.repeat = 1;
    attr.test.flags = input.flags;
    // SAFETY: every pointer in `attr` leads to as many bytes as the size beside it says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            bpf_cmd::BPF_PROG_TEST_RUN as libc::c_long,
            &raw mut attr,
            size_of::<bpf_attr>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has written both members.
    let (action, length) = unsafe { (attr.test.retval, attr.test.data_size_out) };
    out.truncate(length as usize);
    Ok(Output {
        action: action as i32,
        frame: out,
        mark: context_out.0[MARK],
    })
}
