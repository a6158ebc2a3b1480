//! SCTP (RFC 9260) spoken over raw sockets, so that tests of it need no `sctp` module, which no program of
//! Weir may load. One-homed, one message each way at a time. Clients send again what is not answered within a
//! second, as the receive queues of a machine that runs many tests overflow now and then.
//!
//! Both sides check the CRC of every packet and the verification tag. Servers sign their cookies, so that
//! an association which comes to two servers by halves fails.

mod wire;

use std::{
    collections::HashMap,
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::socket::{SockaddrStorage, bind};

use self::wire::{Chunk, Packet, REFLECTED_TAG, STATE_COOKIE, kind};
use crate::{
    netns::NetNs,
    traffic::{DATAGRAM, POLL, TIMEOUT, WHO_AM_I, answer_of},
};

/// A client's next port. Raw sockets own none; nobody else's SCTP is in the test's namespaces.
static NEXT_PORT: AtomicU16 = AtomicU16::new(20_000);
/// How long an answer may take before a packet is sent again (`RTO.Initial`, RFC 9260 section 16).
const SEND_AGAIN: Duration = Duration::from_secs(1);
/// Numbers for tags, first sequence numbers and secrets.
static NEXT_NUMBER: AtomicU32 = AtomicU32::new(1);

/// Another number than all before, never 0; neighbours differ in every byte.
fn number() -> u32 {
    NEXT_NUMBER
        .fetch_add(1, Ordering::Relaxed)
        .wrapping_mul(0x9e37_79b1)
}

/// A raw socket for SCTP, with the comforts of a datagram socket.
#[derive(Debug)]
struct Socket {
    socket: UdpSocket,
    v6: bool,
}

impl Socket {
    /// In the calling thread's namespace.
    fn new(v6: bool) -> io::Result<Self> {
        let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: a plain system call; its result is checked.
        let socket = unsafe { libc::socket(family, kind, libc::IPPROTO_SCTP) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        Ok(Self {
            socket: socket.into(),
            v6,
        })
    }

    /// Receives what is sent to `address` and sends from there.
    fn bound(address: IpAddr) -> io::Result<Self> {
        let this = Self::new(address.is_ipv6())?;
        let address = SockaddrStorage::from(SocketAddr::new(address, 0));
        bind(this.socket.as_raw_fd(), &address)?;
        Ok(this)
    }

    /// Sends to `address` and receives only what comes from there, ICMP errors included.
    fn connected(address: IpAddr) -> io::Result<Self> {
        let this = Self::new(address.is_ipv6())?;
        this.socket.connect((address, 0))?;
        Ok(this)
    }

    /// One packet and where it came from.
    fn receive(&self, timeout: Duration) -> io::Result<(Vec<u8>, IpAddr)> {
        self.socket.set_read_timeout(Some(timeout))?;
        let mut buffer = vec![0; DATAGRAM];
        let (length, from) = self.socket.recv_from(&mut buffer)?;
        buffer.truncate(length);
        // IPv4 hands over its header, IPv6 does not.
        if !self.v6 {
            let header = usize::from(buffer.first().map_or(0, |first| first & 0xf)) * 4;
            buffer.drain(..header.min(length));
        }
        Ok((buffer, from.ip()))
    }
}

/// An SCTP server on one address and port: answers each message with its name, a zero byte and what it
/// got. Stops when dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on `address` inside a namespace.
    ///
    /// # Errors
    ///
    /// When the namespace has no such address.
    pub fn start(netns: &NetNs, address: SocketAddr, name: &str) -> Result<Self> {
        let socket = netns
            .run(|| Socket::bound(address.ip()))
            .with_context(|| format!("listen on {address} over SCTP in {}", netns.name()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut listener = Listener {
            port: address.port(),
            name: name.to_owned(),
            secret: number(),
            associations: HashMap::new(),
        };
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // Errors are timeouts and ICMP answers to earlier packets.
                let Ok((bytes, from)) = socket.receive(POLL) else {
                    continue;
                };
                // A wrong checksum is not answered: the client waits in vain and says so.
                let Ok(packet) = Packet::decode(&bytes) else {
                    continue;
                };
                if let Ok(Some(answer)) = listener.answer(&packet, from)
                    && let Ok(bytes) = answer.encode()
                {
                    let _ = socket.socket.send_to(&bytes, (from, 0));
                }
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The server's side of an association.
#[derive(Clone, Copy, Debug)]
struct Established {
    own_tag: u32,
    peer_tag: u32,
    /// Of what is sent next.
    next: u32,
}

/// What a server knows. Until a client has shown its cookie that is nothing about it.
struct Listener {
    port: u16,
    name: String,
    /// Begins its cookies.
    secret: u32,
    associations: HashMap<SocketAddr, Established>,
}

impl Listener {
    fn answer(&mut self, packet: &Packet, from: IpAddr) -> Result<Option<Packet>> {
        // Each raw socket of the namespace sees every packet to its address.
        if packet.destination != self.port {
            return Ok(None);
        }
        let peer = SocketAddr::new(from, packet.source);
        let answer = |tag, chunks| Packet {
            source: packet.destination,
            destination: packet.source,
            tag,
            chunks,
        };
        if let Some(init) = packet.chunk(kind::INIT) {
            let (peer_tag, own_tag, first) = (init.word(0)?, number(), number());
            let cookie = [self.secret, own_tag, peer_tag, first].map(u32::to_be_bytes);
            let mut parameter = STATE_COOKIE.to_be_bytes().to_vec();
            parameter.extend(20_u16.to_be_bytes());
            parameter.extend(cookie.concat());
            let acknowledged = Chunk::init(kind::INIT_ACK, own_tag, first, &parameter);
            return Ok(Some(answer(peer_tag, vec![acknowledged])));
        }
        if let Some(echo) = packet.chunk(kind::COOKIE_ECHO) {
            let (own_tag, peer_tag) = (echo.word(4)?, echo.word(8)?);
            if echo.word(0)? != self.secret || packet.tag != own_tag {
                return Ok(None);
            }
            let next = echo.word(12)?;
            self.associations.insert(
                peer,
                Established {
                    own_tag,
                    peer_tag,
                    next,
                },
            );
            let acknowledged = Chunk::new(kind::COOKIE_ACK, Vec::new());
            return Ok(Some(answer(peer_tag, vec![acknowledged])));
        }
        let Some(data) = packet.chunk(kind::DATA) else {
            return Ok(None);
        };
        let Some(association) = self.associations.get_mut(&peer) else {
            // Out of the blue, RFC 9260 section 8.4.
            let mut abort = Chunk::new(kind::ABORT, Vec::new());
            abort.flags = REFLECTED_TAG;
            return Ok(Some(answer(packet.tag, vec![abort])));
        };
        if packet.tag != association.own_tag {
            return Ok(None);
        }
        let mut message = format!("{}\0", self.name).into_bytes();
        message.extend(answer_of(data.message()?, peer));
        let chunks = vec![
            Chunk::sack(data.word(0)?),
            Chunk::data(association.next, &message),
        ];
        association.next = association.next.wrapping_add(1);
        Ok(Some(answer(association.peer_tag, chunks)))
    }
}

/// A client's association.
#[derive(Debug)]
pub struct Association {
    socket: Socket,
    source: u16,
    to: SocketAddr,
    own_tag: u32,
    peer_tag: u32,
    /// Of what is sent next.
    next: u32,
    /// Something was sent twice, and may be answered twice.
    has_sent_again: bool,
}

impl Association {
    /// Opens one from the calling thread's namespace, with a port of its own.
    ///
    /// # Errors
    ///
    /// When a step is not answered within `timeout`, or answered by an ICMP error: both with an [`io::Error`]
    /// at the bottom. When an answer is wrong.
    pub fn open(to: SocketAddr, timeout: Duration) -> Result<Self> {
        let socket =
            Socket::connected(to.ip()).with_context(|| format!("no way to {to} for SCTP"))?;
        let mut this = Self {
            socket,
            source: NEXT_PORT.fetch_add(1, Ordering::Relaxed),
            to,
            own_tag: number(),
            peer_tag: 0,
            next: number(),
            has_sent_again: false,
        };
        let first = this.next;
        let init = Chunk::init(kind::INIT, this.own_tag, first, &[]);
        let packet = this.exchange(init, kind::INIT_ACK, timeout)?;
        let accepted = packet.chunk(kind::INIT_ACK).context("no INIT ACK")?;
        this.peer_tag = accepted.word(0)?;
        let echo = Chunk::new(kind::COOKIE_ECHO, accepted.cookie()?.to_vec());
        this.exchange(echo, kind::COOKIE_ACK, timeout)?;
        Ok(this)
    }

    /// Sends a message and returns the name of the server that answered it.
    ///
    /// # Errors
    ///
    /// As [`Association::open`].
    pub fn ask(&mut self, message: &[u8], timeout: Duration) -> Result<String> {
        let (name, echo) = self.send_and_receive(message, timeout)?;
        ensure!(echo == message, "{} echoed something else", self.to);
        Ok(name)
    }

    /// Name of the server and the address and port that it sees the client at.
    ///
    /// # Errors
    ///
    /// As [`Association::open`], and when the answer is no address.
    pub fn who_am_i(&mut self, timeout: Duration) -> Result<(String, SocketAddr)> {
        let (name, answer) = self.send_and_receive(WHO_AM_I, timeout)?;
        let answer = String::from_utf8_lossy(&answer);
        let seen = answer
            .parse()
            .with_context(|| format!("{name} sees a client at {answer:?}"))?;
        Ok((name, seen))
    }

    /// The client's own address and port.
    ///
    /// # Errors
    ///
    /// When the socket has none.
    pub fn local_address(&self) -> Result<SocketAddr> {
        let own = self.socket.socket.local_addr()?;
        Ok(SocketAddr::new(own.ip(), self.source))
    }

    /// The name of the server that answers a message, and its answer.
    fn send_and_receive(&mut self, message: &[u8], timeout: Duration) -> Result<(String, Vec<u8>)> {
        let sequence = self.next;
        self.next = sequence.wrapping_add(1);
        let deadline = Instant::now() + timeout;
        let packet = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let packet = self.exchange(Chunk::data(sequence, message), kind::DATA, left)?;
            let acknowledged = packet.chunk(kind::SACK).context("no SACK")?.word(0)?;
            if acknowledged == sequence {
                break packet;
            }
            ensure!(
                self.has_sent_again,
                "{acknowledged} is acknowledged instead of {sequence}"
            );
        };
        let data = packet.chunk(kind::DATA).context("no DATA")?;
        self.send(Chunk::sack(data.word(0)?))?;
        let answer = data.message()?;
        let end = answer.iter().position(|byte| *byte == 0);
        let (name, echo) = answer.split_at(end.context("an answer without a name")?);
        Ok((
            String::from_utf8_lossy(name).into_owned(),
            echo[1..].to_vec(),
        ))
    }

    /// Sends, again after a while, until the answer is there.
    fn exchange(&mut self, chunk: Chunk, wanted: u8, timeout: Duration) -> Result<Packet> {
        let deadline = Instant::now() + timeout;
        loop {
            self.send(chunk.clone())?;
            let again = Instant::now() + SEND_AGAIN;
            if let Some(packet) = self.receive(wanted, again.min(deadline))? {
                return Ok(packet);
            }
            if Instant::now() >= deadline {
                return Err(io::Error::from(ErrorKind::TimedOut))
                    .with_context(|| format!("wait for chunk {wanted} of {}", self.to));
            }
            self.has_sent_again = true;
        }
    }

    fn send(&self, chunk: Chunk) -> Result<()> {
        let packet = Packet {
            source: self.source,
            destination: self.to.port(),
            tag: self.peer_tag,
            chunks: vec![chunk],
        };
        self.socket.socket.send(&packet.encode()?)?;
        Ok(())
    }

    /// The next packet of the association, `None` if none comes; it must have a chunk of this kind.
    fn receive(&self, wanted: u8, deadline: Instant) -> Result<Option<Packet>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let bytes = match self.socket.receive(left) {
                Ok((bytes, _)) => bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error).context("receive SCTP"),
            };
            let packet =
                Packet::decode(&bytes).with_context(|| format!("an SCTP packet of {}", self.to))?;
            // Another client's in the same namespace.
            if (packet.source, packet.destination) != (self.to.port(), self.source) {
                continue;
            }
            if packet.chunk(kind::ABORT).is_some() {
                bail!("{} aborted the association", self.to);
            }
            ensure!(
                packet.tag == self.own_tag,
                "{} sent tag {:x} instead of {:x}",
                self.to,
                packet.tag,
                self.own_tag
            );
            if packet.chunk(wanted).is_some() {
                return Ok(Some(packet));
            }
            ensure!(
                self.has_sent_again,
                "{} sent {packet:?} instead of chunk {wanted}",
                self.to
            );
        }
    }
}

/// Opens an association, sends two messages and returns the server's name.
///
/// # Errors
///
/// As [`Association::open`], with [`TIMEOUT`].
pub fn name(to: SocketAddr) -> Result<String> {
    let mut association = Association::open(to, TIMEOUT)?;
    let first = association.ask(b"first", TIMEOUT)?;
    let second = association.ask(b"second message", TIMEOUT)?;
    ensure!(first == second, "{first} answered, then {second}");
    Ok(first)
}

/// Whether the kernel's own SCTP is there, by the protocols that its sockets know.
///
/// # Errors
///
/// When `/proc` cannot be read.
pub fn kernel_speaks() -> Result<bool> {
    let list = "/proc/net/protocols";
    let protocols = std::fs::read_to_string(list).with_context(|| format!("read {list}"))?;
    Ok(lists_sctp(&protocols))
}

/// Lines begin with the name: `SCTP` and `SCTPv6`.
fn lists_sctp(protocols: &str) -> bool {
    protocols.lines().any(|line| line.starts_with("SCTP"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_sctp_is_found_among_its_protocols() {
        let without = "protocol  size sockets\nUDP 1 2\n";
        assert!(!lists_sctp(without));
        assert!(lists_sctp(&format!("{without}SCTPv6 1 0\nSCTP 1 0\n")));
    }
}
