//! Finds out what the running kernel can do, by trying rather than by its version: distributions
//! take features back to older versions.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use aya_obj::generated::{bpf_attach_type, bpf_cmd, bpf_prog_type};

use super::sys::{bpf, owned, raw, zeroed_attr};

/// `BPF_F_IPV6` of `bpf_l4_csum_replace` (include/uapi/linux/bpf.h, kernel 6.16).
const BPF_F_IPV6: u64 = 128;

/// Whether tcx links exist (kernel 6.6). Asks for one on a device that does not exist: a kernel
/// that knows them says ENODEV, an older one EINVAL.
///
/// # Errors
///
/// Any other answer.
pub fn has_tcx(program: BorrowedFd<'_>) -> io::Result<bool> {
    let mut attr = zeroed_attr();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_ifindex = i32::MAX as u32;
    attr.link_create.attach_type = bpf_attach_type::BPF_TCX_INGRESS as u32;
    // SAFETY: the command reads no pointer of `attr`.
    match unsafe { bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr) } {
        Ok(link) => {
            drop(owned(link));
            Ok(true)
        }
        Err(error) => match error.raw_os_error() {
            Some(libc::ENODEV) => Ok(true),
            Some(libc::EINVAL) => Ok(false),
            _ => Err(error),
        },
    }
}

/// `BPF_F_IPV6` if `bpf_l4_csum_replace` takes it, else 0. The helper checks its flags when it is
/// called, so a program that calls it is run once on an empty frame.
///
/// # Errors
///
/// The program cannot be loaded or run.
pub fn csum_ipv6_flag() -> io::Result<u64> {
    let program = load_csum_program()?;
    let frame = [0u8; 64];
    let mut attr = zeroed_attr();
    attr.test.prog_fd = raw(program.as_fd());
    attr.test.data_in = frame.as_ptr() as u64;
    attr.test.data_size_in = frame.len() as u32;
    attr.test.repeat = 1;
    // SAFETY: `data_in` holds `data_size_in` bytes, and no output is asked for.
    unsafe { bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr) }?;
    // SAFETY: written by the call above, and plain bytes in any case.
    let result = unsafe { attr.test.retval };
    Ok(if result == 0 { BPF_F_IPV6 } else { 0 })
}

fn load_csum_program() -> io::Result<OwnedFd> {
    const BPF_FUNC_L4_CSUM_REPLACE: i32 = 11;
    // A difference of zero (size 0) at byte 16 of the frame: nothing is changed.
    let program: [u64; 6] = [
        move_immediate(2, 16),
        move_immediate(3, 0),
        move_immediate(4, 0),
        move_immediate(5, BPF_F_IPV6 as i32),
        instruction(0x85, 0, BPF_FUNC_L4_CSUM_REPLACE),
        instruction(0x95, 0, 0),
    ];
    let licence = c"Dual MIT/GPL";
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32;
    attr.__bindgen_anon_3.insns = program.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = program.len() as u32;
    attr.__bindgen_anon_3.license = licence.as_ptr() as u64;
    // SAFETY: `insns` holds `insn_cnt` instructions and the licence ends with a zero byte.
    unsafe { bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr) }.map(owned)
}

/// `register = value` (BPF_ALU64 | BPF_MOV | BPF_K).
fn move_immediate(register: u8, value: i32) -> u64 {
    instruction(0xb7, register, value)
}

/// An instruction with a destination register and an immediate value (RFC 9669, section 3).
fn instruction(opcode: u8, register: u8, immediate: i32) -> u64 {
    let [a, b, c, d] = immediate.to_ne_bytes();
    u64::from_ne_bytes([opcode, register & 0xf, 0, 0, a, b, c, d])
}
