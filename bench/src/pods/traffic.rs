//! Generators of traffic: each runs a server and a client on a thread in its namespace, on
//! processors of their own, for a given time.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};
use weir_tests::netns::NetNs;

use crate::{
    statistics::quantile,
    threads::{CLIENT, SERVER, Stop, finish, start},
};

/// How long anything may hang before it is an error.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often servers look whether they shall end.
const POLL: Duration = Duration::from_millis(20);
/// Bytes of one write of a transfer, as iperf3's.
const BLOCK: usize = 128 * 1024;
/// Bytes of a datagram.
const DATAGRAM: usize = 64;
/// Datagrams handed over with one system call.
const BURST: usize = 32;
/// Connections that may wait to be accepted: `net.core.somaxconn`'s default.
const BACKLOG: i32 = 4096;
/// Round trips before those that count.
const WARM_UP: usize = 200;

/// Where a client sends, and where its server listens.
#[derive(Clone, Copy, Debug)]
pub struct Path<'a> {
    /// Name for people.
    pub name: &'a str,
    /// Namespace of the client.
    pub client: &'a NetNs,
    /// Namespace of the server.
    pub server: &'a NetNs,
    /// Address that the server binds.
    pub listen: SocketAddr,
    /// Address that the client uses: the server's own or a Service's.
    pub to: SocketAddr,
}

/// Bits per second of one TCP stream, as the receiver sees them.
///
/// # Errors
///
/// When the path does not carry it.
pub fn tcp_throughput(path: &Path<'_>, time: Duration) -> Result<f64> {
    let listener = path.server.run(|| TcpListener::bind(path.listen))?;
    let received = Arc::new(AtomicU64::new(0));
    let stop = Stop::new();
    let server = {
        let (received, stop) = (received.clone(), stop.clone());
        start(path.server, SERVER, move || {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(POLL))?;
            let mut block = vec![0; BLOCK];
            while !stop.is_set() {
                match stream.read(&mut block) {
                    Ok(0) => break,
                    Ok(length) => {
                        received.fetch_add(length as u64, Ordering::Relaxed);
                    }
                    Err(error) if is_timeout(&error) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(())
        })?
    };
    let client = {
        let (to, stop) = (path.to, stop.clone());
        start(path.client, CLIENT, move || {
            let mut stream = connect(to)?;
            stream.set_write_timeout(Some(POLL))?;
            let block = vec![0; BLOCK];
            while !stop.is_set() {
                match stream.write(&block) {
                    Ok(_) => {}
                    Err(error) if is_timeout(&error) => {}
                    Err(_) if stop.is_set() => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(())
        })?
    };
    // The window opens during the first tenth.
    std::thread::sleep(time / 10);
    let (begin, before) = (Instant::now(), received.load(Ordering::Relaxed));
    std::thread::sleep(time);
    let bytes = received.load(Ordering::Relaxed) - before;
    let seconds = begin.elapsed().as_secs_f64();
    stop.set();
    finish(client)?;
    finish(server)?;
    ensure!(bytes > 0, "nothing came through");
    Ok(bytes as f64 * 8.0 / seconds)
}

/// Datagrams of 64 bytes per second that arrive, while the client sends as fast as it can.
///
/// # Errors
///
/// When the path does not carry them.
pub fn udp_rate(path: &Path<'_>, time: Duration) -> Result<f64> {
    let socket = path.server.run(|| UdpSocket::bind(path.listen))?;
    socket.set_read_timeout(Some(POLL))?;
    setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20))?;
    let received = Arc::new(AtomicU64::new(0));
    let stop = Stop::new();
    let server = {
        let (received, stop) = (received.clone(), stop.clone());
        start(path.server, SERVER, move || {
            let mut burst = Burst::new();
            while !stop.is_set() {
                let count = burst.receive(&socket)?;
                received.fetch_add(count as u64, Ordering::Relaxed);
            }
            Ok(())
        })?
    };
    let client = {
        let (to, stop) = (path.to, stop.clone());
        start(path.client, CLIENT, move || {
            let socket = UdpSocket::bind(if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })?;
            socket.connect(to)?;
            let mut burst = Burst::new();
            while !stop.is_set() {
                burst.send(&socket)?;
            }
            Ok(())
        })?
    };
    std::thread::sleep(time / 10);
    let (begin, before) = (Instant::now(), received.load(Ordering::Relaxed));
    std::thread::sleep(time);
    let count = received.load(Ordering::Relaxed) - before;
    let seconds = begin.elapsed().as_secs_f64();
    stop.set();
    finish(client)?;
    finish(server)?;
    ensure!(count > 0, "no datagram came through");
    Ok(count as f64 / seconds)
}

/// Round trip times of one byte over TCP.
#[derive(Clone, Copy, Debug)]
pub struct RoundTrip {
    /// Median, seconds.
    pub p50: f64,
    /// 99th percentile, seconds.
    pub p99: f64,
}

/// Sends a byte back and forth, without Nagle's algorithm.
///
/// # Errors
///
/// When the path does not carry it.
pub fn round_trip(path: &Path<'_>, time: Duration) -> Result<RoundTrip> {
    let listener = path.server.run(|| TcpListener::bind(path.listen))?;
    let server = start(path.server, SERVER, move || {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut byte = [0];
        while stream.read(&mut byte)? == 1 {
            stream.write_all(&byte)?;
        }
        Ok(())
    })?;
    let to = path.to;
    let client = start(path.client, CLIENT, move || {
        let mut stream = connect(to)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut byte = [1];
        let mut times = Vec::with_capacity(1 << 18);
        let mut end = None;
        loop {
            let begin = Instant::now();
            stream.write_all(&byte)?;
            stream.read_exact(&mut byte)?;
            times.push(begin.elapsed().as_secs_f64());
            if times.len() == WARM_UP && end.is_none() {
                times.clear();
                end = Some(begin + time);
            }
            if end.is_some_and(|end| begin >= end) {
                return Ok(times);
            }
        }
    })?;
    let mut times = finish(client)?;
    finish(server)?;
    times.sort_by(f64::total_cmp);
    Ok(RoundTrip {
        p50: quantile(&times, 0.5),
        p99: quantile(&times, 0.99),
    })
}

/// Connections per second that one client opens and resets, one after another. Reset, because a
/// closed one would keep its port for a minute and the client run out of them.
///
/// # Errors
///
/// When one fails.
pub fn connection_rate(path: &Path<'_>, time: Duration) -> Result<f64> {
    let listener = path.server.run(|| TcpListener::bind(path.listen))?;
    // The library's 128 overflow as soon as the server is late by some milliseconds, and then SYNs
    // are lost and repeated after a second: it would be that second that is measured.
    listen(&listener, Backlog::new(BACKLOG)?)?;
    listener.set_nonblocking(true)?;
    let stop = Stop::new();
    let server = {
        let stop = stop.clone();
        start(path.server, SERVER, move || {
            while !stop.is_set() {
                match listener.accept() {
                    Ok(accepted) => drop(accepted),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => wait_readable(&listener),
                    // Reset before it was accepted.
                    Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(())
        })?
    };
    let to = path.to;
    let client = start(path.client, CLIENT, move || {
        let begin = Instant::now();
        let mut count = 0u64;
        while begin.elapsed() < time {
            let stream = connect(to)?;
            let reset = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            setsockopt(&stream, sockopt::Linger, &reset)?;
            count += 1;
        }
        Ok(count as f64 / begin.elapsed().as_secs_f64())
    })?;
    let rate = finish(client);
    stop.set();
    finish(server)?;
    rate
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect(to).with_context(|| format!("connect to {to}"))
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn wait_readable(socket: &impl std::os::fd::AsFd) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut sockets = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(POLL).unwrap_or(PollTimeout::ZERO);
    // Interrupted or timed out: the caller looks again.
    let _ = poll(&mut sockets, timeout);
}

/// Datagrams for one call of `sendmmsg` or `recvmmsg`.
struct Burst {
    buffers: Vec<[u8; DATAGRAM]>,
}

impl Burst {
    fn new() -> Self {
        Self {
            buffers: vec![[0; DATAGRAM]; BURST],
        }
    }

    /// Calls `call` with as many message headers as there are buffers.
    fn with_headers<T>(&mut self, call: impl FnOnce(&mut [libc::mmsghdr]) -> T) -> T {
        let mut parts: Vec<libc::iovec> = self
            .buffers
            .iter_mut()
            .map(|buffer| libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: DATAGRAM,
            })
            .collect();
        let mut headers: Vec<libc::mmsghdr> = parts
            .iter_mut()
            .map(|part| {
                // SAFETY: plain integers and pointers; zero is valid for each.
                let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
                header.msg_hdr.msg_iov = part;
                header.msg_hdr.msg_iovlen = 1;
                header
            })
            .collect();
        call(&mut headers)
    }

    fn send(&mut self, socket: &UdpSocket) -> Result<usize> {
        self.with_headers(|headers| {
            // SAFETY: each header names one buffer that outlives the call.
            let sent = unsafe {
                libc::sendmmsg(
                    socket.as_raw_fd(),
                    headers.as_mut_ptr(),
                    BURST as libc::c_uint,
                    0,
                )
            };
            if sent < 0 {
                let error = std::io::Error::last_os_error();
                // The queue of a device is full, or the server has gone already.
                return match error.raw_os_error() {
                    Some(libc::ENOBUFS | libc::ECONNREFUSED) => Ok(0),
                    _ => Err(error.into()),
                };
            }
            Ok(sent as usize)
        })
    }

    /// Datagrams received; none if none came within the socket's time-out.
    fn receive(&mut self, socket: &UdpSocket) -> Result<usize> {
        self.with_headers(|headers| {
            // SAFETY: each header names one buffer that outlives the call.
            let received = unsafe {
                libc::recvmmsg(
                    socket.as_raw_fd(),
                    headers.as_mut_ptr(),
                    BURST as libc::c_uint,
                    libc::MSG_WAITFORONE,
                    std::ptr::null_mut(),
                )
            };
            if received < 0 {
                let error = std::io::Error::last_os_error();
                return if is_timeout(&error) {
                    Ok(0)
                } else {
                    Err(error.into())
                };
            }
            Ok(received as usize)
        })
    }
}
