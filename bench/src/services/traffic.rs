//! Connections that one client opens one after another, to several addresses in turn, and the
//! server of a node's endpoints, which lives as long as the node.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{Backlog, listen, setsockopt, sockopt},
};
use weir_tests::netns::NetNs;

use crate::{
    statistics::quantile,
    threads::{CLIENT, SERVER, Stop, finish, start},
};

/// How long the server waits for the byte of a client before it gives it up.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How long the first connection of all may take.
const PROBE: Duration = Duration::from_secs(1);
/// How often the server looks whether it shall end.
const POLL: u16 = 100;
/// Connections that may wait to be accepted: `net.core.somaxconn`'s default.
const BACKLOG: i32 = 4096;

/// Accepts connections at several addresses, on one thread. Ends when dropped.
#[derive(Debug)]
pub struct Server {
    stop: Stop,
    echo: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Server {
    /// Listens at addresses, each in a namespace.
    ///
    /// # Errors
    ///
    /// An address cannot be bound.
    pub fn start(places: &[(&NetNs, SocketAddr)]) -> Result<Self> {
        let listeners = places
            .iter()
            .map(|(netns, address)| {
                let listener = netns
                    .run(|| TcpListener::bind(address))
                    .with_context(|| format!("listen on {address}"))?;
                // With the library's 128 a server that is late loses SYNs, which cost a second.
                listen(&listener, Backlog::new(BACKLOG)?)?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            })
            .collect::<Result<Vec<_>>>()?;
        let (stop, echo) = (Stop::new(), Arc::new(AtomicBool::new(false)));
        let (anywhere, _) = places.first().context("a server without an address")?;
        let thread = {
            let (stop, echo) = (stop.clone(), echo.clone());
            start(anywhere, SERVER, move || {
                while !stop.is_set() {
                    for ready in readable(&listeners) {
                        accept_all(ready, &echo)?;
                    }
                }
                Ok(())
            })?
        };
        Ok(Self {
            stop,
            echo,
            thread: Some(thread),
        })
    }

    /// From now on every connection sends a byte that is sent back, or none does.
    pub fn set_echo(&self, echo: bool) {
        self.echo.store(echo, Ordering::Relaxed);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.set();
        // What went wrong there went wrong at the client too.
        let _ = self.thread.take().map(finish);
    }
}

fn readable(listeners: &[TcpListener]) -> Vec<&TcpListener> {
    let mut sockets: Vec<PollFd<'_>> = listeners
        .iter()
        .map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN))
        .collect();
    // Interrupted or timed out: the caller looks again.
    let _ = poll(&mut sockets, PollTimeout::from(POLL));
    let ready: Vec<bool> = sockets
        .iter()
        .map(|socket| socket.any().unwrap_or_default())
        .collect();
    let all = listeners.iter().zip(ready);
    all.filter_map(|(listener, ready)| ready.then_some(listener))
        .collect()
}

fn accept_all(listener: &TcpListener, echo: &AtomicBool) -> Result<()> {
    loop {
        match listener.accept() {
            Ok((mut stream, _)) => {
                if echo.load(Ordering::Relaxed) {
                    // A client that resets ends only its own connection.
                    let _ = send_back(&mut stream);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            // Reset before it was accepted.
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn send_back(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    stream.write_all(&byte)
}

/// Whether a connection can be made at all, within a second.
///
/// # Errors
///
/// When not, with the cause.
pub fn probe(client: &NetNs, to: SocketAddr) -> Result<()> {
    client
        .run(|| TcpStream::connect_timeout(&to, PROBE))
        .map(drop)
        .with_context(|| format!("connect to {to}"))
}

/// Connections per second that one client opens and resets, one after another. Reset, because a
/// closed one would keep its port for a minute and the client run out of them.
///
/// # Errors
///
/// When one fails.
pub fn connection_rate(
    client: &NetNs,
    server: &Server,
    to: &[SocketAddr],
    time: Duration,
) -> Result<f64> {
    server.set_echo(false);
    let to = to.to_owned();
    finish(start(client, CLIENT, move || {
        let begin = Instant::now();
        let mut count = 0u64;
        for to in to.iter().cycle() {
            if begin.elapsed() >= time {
                break;
            }
            reset_at_close(&connect(*to)?)?;
            count += 1;
        }
        Ok(count as f64 / begin.elapsed().as_secs_f64())
    })?)
}

/// Time from `connect()` to the first byte that came back, seconds.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
}

/// Connects, sends a byte and waits for it to come back, again and again.
///
/// # Errors
///
/// When one fails.
pub fn latency(
    client: &NetNs,
    server: &Server,
    to: &[SocketAddr],
    time: Duration,
) -> Result<Latency> {
    server.set_echo(true);
    let to = to.to_owned();
    let mut times = finish(start(client, CLIENT, move || {
        let mut times = Vec::with_capacity(1 << 14);
        let end = Instant::now() + time;
        for to in to.iter().cycle() {
            let begin = Instant::now();
            if begin >= end {
                break;
            }
            let mut stream = connect(*to)?;
            let mut byte = [1];
            stream.write_all(&byte)?;
            stream.read_exact(&mut byte)?;
            times.push(begin.elapsed().as_secs_f64());
            reset_at_close(&stream)?;
        }
        Ok(times)
    })?)?;
    times.sort_by(f64::total_cmp);
    anyhow::ensure!(!times.is_empty(), "no connection within {time:?}");
    Ok(Latency {
        p50: quantile(&times, 0.5),
        p99: quantile(&times, 0.99),
    })
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect(to).with_context(|| format!("connect to {to}"))
}

fn reset_at_close(stream: &TcpStream) -> Result<()> {
    let reset = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    Ok(setsockopt(stream, sockopt::Linger, &reset)?)
}
