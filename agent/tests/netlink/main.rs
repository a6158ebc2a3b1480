//! The kernel's side of `netlink` and `node`, in network namespaces made for each test. They need
//! root (CAP_NET_ADMIN and CAP_SYS_ADMIN), and the programs `ip` and `unshare`.

#![expect(clippy::unwrap_used, reason = "a test may stop where it fails")]

mod host;
mod nodes;
mod support;
mod watch;
