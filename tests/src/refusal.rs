//! What a client gets where nobody shall serve it: refused at once, or no sign of anybody.

use std::{
    io::{self, ErrorKind},
    net::{SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use crate::{netns::NetNs, sctp::Association, traffic::Protocol};

/// How long a refusal may take: `agnhost connect --timeout=3s`.
const REFUSAL: Duration = Duration::from_secs(3);
/// How long an answer that must not come is waited for, where no refusal has to come either.
const SILENCE: Duration = Duration::from_secs(1);

/// Requires that a connection is refused, at once: TCP with a reset or ICMP, UDP and SCTP with ICMP.
/// Upstream: `agnhost connect --timeout=3s` answers `REFUSED`.
///
/// # Errors
///
/// When it is not so.
pub fn is_refused(client: &NetNs, protocol: Protocol, to: SocketAddr) -> Result<()> {
    let begin = Instant::now();
    let result = attempt(client, protocol, to, REFUSAL)?;
    let took = begin.elapsed();
    match result {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => bail!(
            "{} {to}: {error} after {took:?} instead of a refusal",
            protocol.name()
        ),
        Ok(()) => bail!("{} {to} answered instead of refusing", protocol.name()),
    }
}

/// Requires that nobody answers at an address that is no Service's (any more): silence, a refusal or a
/// router's word that there is no way, as upstream leaves it open with `curl --connect-timeout`. Not for
/// what Weir promises to refuse: that is [`is_refused`].
///
/// # Errors
///
/// When it is not so.
pub fn is_unreachable(client: &NetNs, protocol: Protocol, to: SocketAddr) -> Result<()> {
    match attempt(client, protocol, to, SILENCE)? {
        Err(error) => match error.kind() {
            // A receiving socket's time-out is `WouldBlock`.
            ErrorKind::TimedOut
            | ErrorKind::WouldBlock
            | ErrorKind::ConnectionRefused
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable => Ok(()),
            // What a stack without SCTP says, by ICMP and ICMPv6.
            _ if matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EPROTO))
                && protocol == Protocol::Sctp =>
            {
                Ok(())
            }
            _ => bail!("{} {to}: {error}, no sign of absence", protocol.name()),
        },
        Ok(()) => bail!("{} {to} answered", protocol.name()),
    }
}

/// Requires that what a client sends is dropped: no answer, and no refusal either.
///
/// # Errors
///
/// When it is not so.
pub fn is_dropped(client: &NetNs, protocol: Protocol, to: SocketAddr) -> Result<()> {
    match attempt(client, protocol, to, SILENCE)? {
        Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => Ok(()),
        Err(error) => bail!("{} {to}: {error} instead of silence", protocol.name()),
        Ok(()) => bail!("{} {to} answered", protocol.name()),
    }
}

/// Asks once, for as long as `timeout`: what the client's socket says.
fn attempt(
    client: &NetNs,
    protocol: Protocol,
    to: SocketAddr,
    timeout: Duration,
) -> Result<io::Result<()>> {
    client.run(|| match protocol {
        Protocol::Tcp => Ok(TcpStream::connect_timeout(&to, timeout).map(drop)),
        Protocol::Udp => Ok(ask(to, timeout).map(drop)),
        Protocol::Sctp => match Association::open(to, timeout) {
            Ok(_) => Ok(Ok(())),
            Err(error) => Ok(Err(error.downcast::<io::Error>()?)),
        },
    })
}

/// One datagram and its answer.
fn ask(to: SocketAddr, timeout: Duration) -> io::Result<usize> {
    let any = if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(timeout))?;
    socket.connect(to)?;
    socket.send(b"hostname")?;
    socket.recv(&mut [0; 2048])
}
