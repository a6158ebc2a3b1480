//! One listening address of the health checks: bound, or tried again with growing pauses. HTTP is
//! hyper's; an answer needs nothing but what is in memory.

use std::{
    convert::Infallible,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
    task::JoinSet,
};

use super::{
    DataPath,
    answer::{Now, Site, answer},
};
use crate::objects::Family;

/// Wait after the first failure; it doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Connections that the kernel keeps until they are accepted.
const BACKLOG: u32 = 128;
/// Connections of one address at a time; more wait.
const CONNECTIONS: usize = 256;
/// A connection that asks for nothing for that long is closed.
const SILENCE: Duration = Duration::from_secs(30);
/// After an accept that failed, as without file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// The addresses that an address means: for an unspecified one both families (as Go listens).
pub fn addresses(address: SocketAddr) -> Vec<SocketAddr> {
    if address.ip().is_unspecified() {
        let port = address.port();
        vec![
            (Ipv4Addr::UNSPECIFIED, port).into(),
            (Ipv6Addr::UNSPECIFIED, port).into(),
        ]
    } else {
        vec![address]
    }
}

/// A listening address and what is served there.
#[derive(Debug)]
pub struct Socket {
    address: SocketAddr,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The server; it ends with this, and so do its connections.
    Serving { _task: JoinSet<()> },
    /// The node has no IPv6.
    NoSuchFamily,
    Failed {
        error: io::Error,
        attempts: u32,
        due: Instant,
    },
}

impl Socket {
    /// Begins to serve, or to try to.
    pub fn open(
        address: SocketAddr,
        site: &watch::Receiver<Site>,
        data_path: &watch::Receiver<DataPath>,
    ) -> Self {
        let state = attempt(address, site, data_path, 1);
        Self { address, state }
    }

    /// Tries again if it is time.
    pub fn retry(
        &mut self,
        now: Instant,
        site: &watch::Receiver<Site>,
        data_path: &watch::Receiver<DataPath>,
    ) {
        if let State::Failed { attempts, due, .. } = self.state
            && due <= now
        {
            self.state = attempt(self.address, site, data_path, attempts + 1);
        }
    }

    /// When it is tried again.
    pub fn due(&self) -> Option<Instant> {
        match self.state {
            State::Failed { due, .. } => Some(due),
            _ => None,
        }
    }

    /// Why it is not served: `0.0.0.0:10256: Address already in use`.
    pub fn failure(&self) -> Option<String> {
        match &self.state {
            State::Failed { error, .. } => Some(format!("{}: {error}", self.address)),
            _ => None,
        }
    }
}

fn attempt(
    address: SocketAddr,
    site: &watch::Receiver<Site>,
    data_path: &watch::Receiver<DataPath>,
    attempts: u32,
) -> State {
    match bind(address) {
        Ok(listener) => {
            let mut task = JoinSet::new();
            task.spawn(serve(listener, site.clone(), data_path.clone()));
            State::Serving { _task: task }
        }
        Err(error) if is_family_missing(address, &error) => State::NoSuchFamily,
        Err(error) => {
            let doubled = FIRST_WAIT.saturating_mul(1 << (attempts - 1).min(16));
            State::Failed {
                error,
                attempts,
                due: Instant::now() + doubled.min(LONGEST_WAIT),
            }
        }
    }
}

/// Whether the node has no IPv6, so that nobody can ask there.
fn is_family_missing(address: SocketAddr, error: &io::Error) -> bool {
    let is_every = address.is_ipv6() && address.ip().is_unspecified();
    let no_address = Some(libc::EADDRNOTAVAIL);
    let no_family = Some(libc::EAFNOSUPPORT);
    is_every && [no_address, no_family].contains(&error.raw_os_error())
}

/// IPv4 has a socket of its own: that of IPv6 takes IPv6 alone.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        let socket = TcpSocket::new_v6()?;
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
        socket
    };
    // Connections of an earlier agent may linger.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn serve(
    listener: TcpListener,
    site: watch::Receiver<Site>,
    data_path: watch::Receiver<DataPath>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, site.clone(), data_path.clone()));
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a connection of a health check");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(
    stream: TcpStream,
    site: watch::Receiver<Site>,
    data_path: watch::Receiver<DataPath>,
) {
    let Ok(local) = stream.local_addr() else {
        return;
    };
    let family = Family::of(local.ip());
    let service = service_fn(|request: hyper::Request<hyper::body::Incoming>| {
        let response = answer(
            &site.borrow(),
            request.uri().path(),
            family,
            &data_path.borrow(),
            Now::read(),
        );
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(SILENCE)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a health check ended badly");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unspecified_address_means_both_families() {
        let text = |address: &str| -> Vec<String> {
            let all = addresses(address.parse().unwrap());
            all.iter().map(ToString::to_string).collect()
        };
        assert_eq!(text("0.0.0.0:1"), ["0.0.0.0:1", "[::]:1"]);
        assert_eq!(text("[::]:1"), ["0.0.0.0:1", "[::]:1"]);
        assert_eq!(text("127.0.0.1:1"), ["127.0.0.1:1"]);
        assert_eq!(text("[::1]:1"), ["[::1]:1"]);
    }

    #[test]
    fn only_every_address_of_ipv6_may_be_missing() {
        for (address, number, missing) in [
            ("[::]:1", libc::EAFNOSUPPORT, true),
            ("[::]:1", libc::EADDRNOTAVAIL, true),
            ("[::]:1", libc::EADDRINUSE, false),
            ("[::2]:1", libc::EADDRNOTAVAIL, false),
            ("0.0.0.0:1", libc::EADDRNOTAVAIL, false),
        ] {
            let error = io::Error::from_raw_os_error(number);
            let found = is_family_missing(address.parse().unwrap(), &error);
            assert_eq!(found, missing, "{address} {error}");
        }
    }
}
