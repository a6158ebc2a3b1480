//! Globals that the agent sets before it loads the programs. The verifier knows their values and
//! removes the code of what is off.

use aya_ebpf::Global;

/// Places by which Weir's four bits of the packet mark are shifted.
#[unsafe(no_mangle)]
static MARK_SHIFT: Global<u32> = Global::new(20);

/// 1: count every table lookup in `LOOKUPS`.
#[unsafe(no_mangle)]
static COUNT_LOOKUPS: Global<u8> = Global::new(0);

/// `BPF_F_IPV6` where `bpf_l4_csum_replace` knows it (kernel 6.16 and stable trees that took
/// "bpf: Fix L4 csum update on IPv6 in CHECKSUM_COMPLETE"), else 0.
#[unsafe(no_mangle)]
static CSUM_IPV6_FLAG: Global<u64> = Global::new(0);

/// `BPF_FIB_LOOKUP_SRC` where `bpf_fib_lookup` knows it (kernel 6.7), else 0.
#[unsafe(no_mangle)]
static FIB_SOURCE_FLAG: Global<u32> = Global::new(0);

/// `BPF_FIB_LOOKUP_SKIP_NEIGH` where `bpf_fib_lookup` knows it (kernel 6.3), else 0.
#[unsafe(no_mangle)]
static FIB_NEIGHBOUR_FLAG: Global<u32> = Global::new(0);

/// See [`MARK_SHIFT`].
#[inline(always)]
pub fn mark_shift() -> u32 {
    MARK_SHIFT.load() & 31
}

/// See [`COUNT_LOOKUPS`].
#[inline(always)]
pub fn count_lookups() -> bool {
    COUNT_LOOKUPS.load() != 0
}

/// See [`CSUM_IPV6_FLAG`].
#[inline(always)]
pub fn csum_ipv6_flag() -> u64 {
    CSUM_IPV6_FLAG.load()
}

/// See [`FIB_SOURCE_FLAG`].
#[inline(always)]
pub fn fib_source_flag() -> u32 {
    FIB_SOURCE_FLAG.load()
}

/// See [`FIB_NEIGHBOUR_FLAG`].
#[inline(always)]
pub fn fib_neighbour_flag() -> u32 {
    FIB_NEIGHBOUR_FLAG.load()
}
