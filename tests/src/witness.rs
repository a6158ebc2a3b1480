//! Who answers a client, and which client the one who answers sees: the client's own address, or that of a
//! node that put its own in its place.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    sctp::Association,
    traffic::{Connection, DATAGRAM, Protocol, WHO_AM_I},
};

/// What came of a question.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Seen {
    /// Name of the server that answered.
    pub server: String,
    /// Where the server sees the client.
    pub client: SocketAddr,
    /// Where the client is.
    pub own: SocketAddr,
}

/// Asks a server over any protocol, from the calling thread's namespace.
///
/// # Errors
///
/// When nobody answers within `timeout`; with an [`io::Error`] at the bottom when it is refused
/// ([`is_refusal`]).
pub fn ask(protocol: Protocol, to: SocketAddr, timeout: Duration) -> Result<Seen> {
    match protocol {
        Protocol::Tcp => {
            let mut connection = Connection::open_within(to, timeout)?;
            let client = connection.who_am_i()?;
            Ok(Seen {
                own: connection.local_address()?,
                server: connection.server,
                client,
            })
        }
        Protocol::Udp => ask_over_udp(to, timeout),
        Protocol::Sctp => {
            let mut association = Association::open(to, timeout)?;
            let (server, client) = association.who_am_i(timeout)?;
            Ok(Seen {
                server,
                client,
                own: association.local_address()?,
            })
        }
    }
}

fn ask_over_udp(to: SocketAddr, timeout: Duration) -> Result<Seen> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(timeout))?;
    socket
        .connect(to)
        .with_context(|| format!("connect UDP to {to}"))?;
    ask_by(&socket)
}

/// Asks the server that a UDP socket is connected to, from whichever thread.
///
/// # Errors
///
/// When nobody answers within the socket's time-out, or it is refused.
pub fn ask_by(socket: &UdpSocket) -> Result<Seen> {
    let to = socket.peer_addr()?;
    socket.send(WHO_AM_I)?;
    let mut buffer = vec![0; DATAGRAM];
    let length = socket
        .recv(&mut buffer)
        .with_context(|| format!("ask {to} over UDP"))?;
    let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
    let (server, client) = answer
        .split_once('\0')
        .context("an answer without a name")?;
    Ok(Seen {
        server: server.to_owned(),
        client: client
            .parse()
            .with_context(|| format!("{server} sees a client at {client:?}"))?,
        own: socket.local_addr()?,
    })
}

/// Whether an error of [`ask`] is a refusal: a TCP reset or ICMP port unreachable.
#[must_use]
pub fn is_refusal(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == ErrorKind::ConnectionRefused)
}
