//! Weir's kernel programs. A file per hook in `hooks/`, a module per feature beside it.
//!
//! Helpers return `Result<_, DropReason>`; only [`verdict::conclude`], called by the entry
//! functions below, turns that into an action, counts it and reports it. Nothing here is compiled
//! for another target than BPF: what can be tested on the host is in `weir-common`.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch, core_intrinsics))]
#![cfg_attr(
    target_arch = "bpf",
    allow(
        internal_features,
        reason = "read-modify-write atomics have no stable door on BPF"
    )
)]
#![cfg_attr(
    target_arch = "bpf",
    allow(
        clippy::needless_borrows_for_generic_args,
        reason = "keys and values of maps given by value are copied to the stack of 512 bytes"
    )
)]

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod access;
#[cfg(target_arch = "bpf")]
mod affinity;
#[cfg(target_arch = "bpf")]
mod answer;
#[cfg(target_arch = "bpf")]
mod bare;
#[cfg(target_arch = "bpf")]
mod decide;
#[cfg(target_arch = "bpf")]
mod deliver;
#[cfg(target_arch = "bpf")]
mod event;
#[cfg(target_arch = "bpf")]
mod family;
#[cfg(target_arch = "bpf")]
mod flow;
#[cfg(target_arch = "bpf")]
mod fragment;
#[cfg(target_arch = "bpf")]
mod global;
#[cfg(target_arch = "bpf")]
mod hooks;
#[cfg(target_arch = "bpf")]
mod icmp;
#[cfg(target_arch = "bpf")]
mod local;
#[cfg(all(target_arch = "bpf", feature = "log-packets"))]
mod log;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod nat_port;
#[cfg(target_arch = "bpf")]
mod neighbour;
#[cfg(target_arch = "bpf")]
mod packet;
#[cfg(target_arch = "bpf")]
mod policy;
#[cfg(target_arch = "bpf")]
mod refuse;
#[cfg(target_arch = "bpf")]
mod rewrite;
#[cfg(target_arch = "bpf")]
mod ring;
#[cfg(target_arch = "bpf")]
mod route;
#[cfg(target_arch = "bpf")]
mod scratch;
#[cfg(target_arch = "bpf")]
mod service;
#[cfg(target_arch = "bpf")]
mod socket;
#[cfg(target_arch = "bpf")]
mod switches;
#[cfg(target_arch = "bpf")]
mod verdict;

#[cfg(target_arch = "bpf")]
mod entry {
    use aya_ebpf::{macros::classifier, programs::TcContext};
    use weir_common::metrics::Hook;

    use crate::{hooks, verdict};

    /// tcx ingress on the host side of a pod's veth: all that leaves a pod.
    #[classifier]
    pub fn from_pod(ctx: TcContext) -> i32 {
        verdict::conclude(&ctx, Hook::FromPod, hooks::from_pod::run(&ctx))
    }

    /// tcx egress on the host side of a pod's veth: what the host's stack sends to a pod.
    #[classifier]
    pub fn to_pod(ctx: TcContext) -> i32 {
        verdict::conclude(&ctx, Hook::ToPod, hooks::to_pod::run(&ctx))
    }

    /// tcx ingress on the node's devices: all that enters the node.
    #[classifier]
    pub fn from_netdev(ctx: TcContext) -> i32 {
        verdict::conclude(&ctx, Hook::FromNetdev, hooks::from_netdev::run(&ctx))
    }

    /// tcx ingress on our end of the node's own device and on the loopback device: what the node
    /// itself sends to Services, and to its own addresses.
    #[classifier]
    pub fn from_host(ctx: TcContext) -> i32 {
        verdict::conclude(&ctx, Hook::FromHost, hooks::from_host::run(&ctx))
    }

    /// tcx ingress on the device behind which datagrams are put together: what comes back.
    #[classifier]
    pub fn from_defrag(ctx: TcContext) -> i32 {
        verdict::conclude(&ctx, Hook::FromDefrag, hooks::from_defrag::run(&ctx))
    }

    /// tcx egress on the node's devices: all that leaves the node.
    #[classifier]
    pub fn to_netdev(ctx: TcContext) -> i32 {
        verdict::conclude(&ctx, Hook::ToNetdev, hooks::to_netdev::run(&ctx))
    }

    /// tcx ingress on the node's devices that have no link layer.
    #[classifier]
    pub fn from_netdev_bare(ctx: TcContext) -> i32 {
        verdict::conclude(&ctx, Hook::FromNetdev, hooks::from_netdev::run_bare(&ctx))
    }

    /// tcx egress on the node's devices that have no link layer.
    #[classifier]
    pub fn to_netdev_bare(ctx: TcContext) -> i32 {
        verdict::conclude(&ctx, Hook::ToNetdev, hooks::to_netdev::run_bare(&ctx))
    }
}

/// Programs of the cgroup: system calls on sockets.
#[cfg(target_arch = "bpf")]
mod socket_entry {
    use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

    use crate::socket::{self, Call};

    /// `connect()` of IPv4 sockets.
    #[cgroup_sock_addr(connect4)]
    pub fn sock_connect4(ctx: SockAddrContext) -> i32 {
        socket::to_v4(&ctx, Call::Connect)
    }

    /// `connect()` of IPv6 sockets.
    #[cgroup_sock_addr(connect6)]
    pub fn sock_connect6(ctx: SockAddrContext) -> i32 {
        socket::to_v6(&ctx, Call::Connect)
    }

    /// `sendmsg()` of unconnected IPv4 sockets.
    #[cgroup_sock_addr(sendmsg4)]
    pub fn sock_sendmsg4(ctx: SockAddrContext) -> i32 {
        socket::to_v4(&ctx, Call::Send)
    }

    /// `sendmsg()` of unconnected IPv6 sockets.
    #[cgroup_sock_addr(sendmsg6)]
    pub fn sock_sendmsg6(ctx: SockAddrContext) -> i32 {
        socket::to_v6(&ctx, Call::Send)
    }

    /// `getpeername()` of IPv4 sockets.
    #[cgroup_sock_addr(getpeername4)]
    pub fn sock_getpeername4(ctx: SockAddrContext) -> i32 {
        socket::from_v4(&ctx)
    }

    /// `getpeername()` of IPv6 sockets.
    #[cgroup_sock_addr(getpeername6)]
    pub fn sock_getpeername6(ctx: SockAddrContext) -> i32 {
        socket::from_v6(&ctx)
    }

    /// `recvmsg()` of IPv4 sockets.
    #[cgroup_sock_addr(recvmsg4)]
    pub fn sock_recvmsg4(ctx: SockAddrContext) -> i32 {
        socket::from_v4(&ctx)
    }

    /// `recvmsg()` of IPv6 sockets.
    #[cgroup_sock_addr(recvmsg6)]
    pub fn sock_recvmsg6(ctx: SockAddrContext) -> i32 {
        socket::from_v6(&ctx)
    }

    /// `bind()` of IPv4 sockets.
    #[cgroup_sock_addr(bind4)]
    pub fn sock_bind4(ctx: SockAddrContext) -> i32 {
        socket::bind_v4(&ctx)
    }

    /// `bind()` of IPv6 sockets.
    #[cgroup_sock_addr(bind6)]
    pub fn sock_bind6(ctx: SockAddrContext) -> i32 {
        socket::bind_v6(&ctx)
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
static LICENSE: [u8; 4] = *b"GPL\0";
