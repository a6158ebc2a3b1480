//! Kernel programs of the benchmark; never part of the product.
//!
//! `restore_v4` and `restore_v6` put a packet back as it was before the last repetition and call
//! the program that is measured; with `nothing` in its place they measure themselves. `repeat` of
//! `BPF_PROG_TEST_RUN` alone would hand over a packet that the last repetition has translated.
//! `sketch_*` are the least that a flow table with one lookup can cost, over each kind of hash.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod restore;
#[cfg(target_arch = "bpf")]
mod sketch;

#[cfg(target_arch = "bpf")]
mod entry {
    use aya_ebpf::{bindings::TC_ACT_UNSPEC, macros::classifier, programs::TcContext};

    use crate::{
        restore::{V4_WORDS, V6_WORDS, restore},
        sketch::{self, Changed, sketch},
    };

    /// Restores an IPv4 packet and calls the target.
    #[classifier]
    pub fn restore_v4(ctx: TcContext) -> i32 {
        restore::<V4_WORDS>(&ctx)
    }

    /// Restores an IPv6 packet and calls the target.
    #[classifier]
    pub fn restore_v6(ctx: TcContext) -> i32 {
        restore::<V6_WORDS>(&ctx)
    }

    /// The target that costs nothing.
    #[classifier]
    pub fn nothing(_ctx: TcContext) -> i32 {
        TC_ACT_UNSPEC
    }

    /// The sketch over a plain hash whose elements are allocated with the map.
    #[classifier]
    pub fn sketch_hash(ctx: TcContext) -> i32 {
        sketch(&ctx, &sketch::SKETCH_HASH, Changed::Destination)
    }

    /// The sketch over a plain hash whose elements are allocated as they are used.
    #[classifier]
    pub fn sketch_on_demand(ctx: TcContext) -> i32 {
        sketch(&ctx, &sketch::SKETCH_ON_DEMAND, Changed::Destination)
    }

    /// The sketch over an LRU hash.
    #[classifier]
    pub fn sketch_lru(ctx: TcContext) -> i32 {
        sketch(&ctx, &sketch::SKETCH_LRU, Changed::Destination)
    }

    /// The sketch that gives each connection an address and port of the node as its source, over a plain hash.
    #[classifier]
    pub fn sketch_nat(ctx: TcContext) -> i32 {
        sketch(&ctx, &sketch::SKETCH_NAT, Changed::Both)
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // No code path panics; were one left, the verifier would refuse the endless loop.
    loop {}
}

/// The licence that the kernel checks before it lets a program call GPL-only helpers.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
