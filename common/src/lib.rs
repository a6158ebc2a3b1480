//! The ABI between Weir's kernel programs and its user space: the keys and values of every BPF
//! map, the drop reasons, the event layout and the few pure functions (hash, checksum difference,
//! flow time-outs) that both sides must compute alike. It knows nobody, allocates nothing and
//! does no I/O; `weir-ebpf`, `weir-agent` and `weir` are its users.
//!
//! Addresses and ports are held in network byte order behind accessors; everything else is in
//! the byte order of the machine. No type has padding that is not a named field, so that a value
//! can be used as a map key, and sizes are asserted at compile time.
#![cfg_attr(not(test), no_std)]

pub mod address;
pub mod affinity;
pub mod checksum;
pub mod config;
pub mod drop_reason;
pub mod endpoint;
pub mod event;
pub mod flow;
pub mod hash;
pub mod ipcache;
pub mod limits;
pub mod lookup;
pub mod mark;
pub mod metrics;
pub mod next_hop;
pub mod protocol;
pub mod service;
pub mod socket;

pub use address::{Ipv4, Ipv6, MacAddress, Port};
pub use drop_reason::DropReason;

/// Version of the layout of all pinned maps together. A change of any type in this crate that is
/// stored in a pinned map raises it; the agent refuses or migrates pins of another version.
pub const ABI_VERSION: u32 = 3;

/// Asserts the size of a type that is part of the ABI.
macro_rules! assert_abi_size {
    ($($type:ty = $size:expr),+ $(,)?) => {
        $(const _: () = assert!(core::mem::size_of::<$type>() == $size);)+
    };
}
pub(crate) use assert_abi_size;

/// Lets user space read and write a type as a map key or value.
///
/// Only for `repr(C)` types without padding for which every bit pattern is valid.
macro_rules! map_types {
    ($($type:ty),+ $(,)?) => {
        $(
            #[cfg(feature = "user")]
            // SAFETY: the type is `repr(C)`, `Copy`, without padding, and valid for every bit
            // pattern; its size is asserted beside its definition.
            unsafe impl aya::Pod for $type {}
        )+
    };
}
pub(crate) use map_types;
