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
/// `BPF_FIB_LOOKUP_SKIP_NEIGH` of `bpf_fib_lookup` (kernel 6.3): the neighbour's address is not asked for.
pub const FIB_SKIP_NEIGHBOUR: u32 = 4;
/// `BPF_FIB_LOOKUP_SRC` of `bpf_fib_lookup` (kernel 6.7): the address to send from is answered too.
pub const FIB_SOURCE: u32 = 16;

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
    const BPF_FUNC_L4_CSUM_REPLACE: i32 = 11;
    // A difference of zero (size 0) at byte 16 of the frame: nothing is changed.
    let result = run(&[
        move_immediate(2, 16),
        move_immediate(3, 0),
        move_immediate(4, 0),
        move_immediate(5, BPF_F_IPV6 as i32),
        instruction(0x85, 0, BPF_FUNC_L4_CSUM_REPLACE),
        instruction(0x95, 0, 0),
    ])?;
    Ok(if result == 0 { BPF_F_IPV6 } else { 0 })
}

/// `flag` if `bpf_fib_lookup` takes it, else 0.
///
/// # Errors
///
/// The program cannot be loaded or run.
pub fn fib_flag(flag: u32) -> io::Result<u32> {
    const BPF_FUNC_FIB_LOOKUP: i32 = 69;
    /// Bytes of `struct bpf_fib_lookup`.
    const QUESTION: i32 = 64;
    // A question of no family, which has no answer: with flags that it does not know the helper does not look
    // at it.
    let mut program: Vec<u64> = (1..=QUESTION / 8)
        .map(|word| store_zero_on_stack(-8 * word as i16))
        .collect();
    program.extend([
        copy_register(2, 10),
        add_immediate(2, -QUESTION),
        move_immediate(3, QUESTION),
        move_immediate(4, flag as i32),
        instruction(0x85, 0, BPF_FUNC_FIB_LOOKUP),
        instruction(0x95, 0, 0),
    ]);
    let result = run(&program)?;
    Ok(if result == (-libc::EINVAL) as u32 {
        0
    } else {
        flag
    })
}

/// Loads a program, runs it once on an empty frame and gives what it returns.
fn run(instructions: &[u64]) -> io::Result<u32> {
    let program = load(instructions)?;
    let frame = [0u8; 64];
    let mut attr = zeroed_attr();
    attr.test.prog_fd = raw(program.as_fd());
    attr.test.data_in = frame.as_ptr() as u64;
    attr.test.data_size_in = frame.len() as u32;
    attr.test.repeat = 1;
    // SAFETY: `data_in` holds `data_size_in` bytes, and no output is asked for.
    unsafe { bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr) }?;
    // SAFETY: written by the call above, and plain bytes in any case.
    Ok(unsafe { attr.test.retval })
}

fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    let licence = c"Dual MIT/GPL";
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32;
    attr.__bindgen_anon_3.insns = instructions.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = instructions.len() as u32;
    attr.__bindgen_anon_3.license = licence.as_ptr() as u64;
    // SAFETY: `insns` holds `insn_cnt` instructions and the licence ends with a zero byte.
    unsafe { bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr) }.map(owned)
}

/// `*(u64 *)(r10 + offset) = 0` (BPF_ST | BPF_MEM | BPF_DW).
fn store_zero_on_stack(offset: i16) -> u64 {
    let [a, b] = offset.to_ne_bytes();
    u64::from_ne_bytes([0x7a, 10, a, b, 0, 0, 0, 0])
}

/// `register = source` (BPF_ALU64 | BPF_MOV | BPF_X).
fn copy_register(register: u8, source: u8) -> u64 {
    instruction(0xbf, register | source << 4, 0)
}

/// `register += value` (BPF_ALU64 | BPF_ADD | BPF_K).
fn add_immediate(register: u8, value: i32) -> u64 {
    instruction(0x07, register, value)
}

/// `register = value` (BPF_ALU64 | BPF_MOV | BPF_K).
fn move_immediate(register: u8, value: i32) -> u64 {
    instruction(0xb7, register, value)
}

/// An instruction with its registers, the source in the upper half, and an immediate value (RFC 9669, section 3).
fn instruction(opcode: u8, registers: u8, immediate: i32) -> u64 {
    let [a, b, c, d] = immediate.to_ne_bytes();
    u64::from_ne_bytes([opcode, registers, 0, 0, a, b, c, d])
}
