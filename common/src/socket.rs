//! What a socket remembers of its translation: the value of the socket-local storage
//! `SOCKET_FRONTENDS`, which the kernel frees with the socket.

use crate::{Ipv6, Port, assert_abi_size, map_types};

/// One translation of a socket's destination.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Translation {
    /// Address that the process asked for, in the shared form.
    pub frontend: Ipv6,
    /// Address that the socket talks to, in the shared form.
    pub backend: Ipv6,
    /// Port that the process asked for.
    pub frontend_port: Port,
    /// Port that the socket talks to; zero in an unused row.
    pub backend_port: Port,
}

/// Destinations of one socket that are remembered. A connected socket has one; a UDP socket that
/// sends to NodePorts of the loopback addresses may have several.
pub const TRANSLATIONS: usize = 4;

/// The value of `SOCKET_FRONTENDS`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SocketFrontends {
    /// Row that gives way next.
    pub next: u32,
    /// Zero.
    pub reserved: u32,
    /// The rows.
    pub rows: [Translation; TRANSLATIONS],
}

assert_abi_size!(Translation = 36, SocketFrontends = 152);
map_types!(SocketFrontends);
