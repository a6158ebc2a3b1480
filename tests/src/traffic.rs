//! Servers that say who they are, and clients that check what comes back; every wait has a deadline.
//!
//! A TCP server sends its name and a line feed, then serves commands: `E` echoes until the client has
//! sent all, `T` and two lengths (big-endian u64) receives and then sends that many bytes of a known
//! pattern, `W` sends the address and port that the server sees the client at, and a line feed. A UDP server answers with
//! its name, a zero byte and what it got, or that address if it got [`WHO_AM_I`].

use std::{
    io::{BufRead as _, BufReader, ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{netns::NetNs, sctp};

/// How long a client waits for a connection or an answer.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// A datagram or message that asks a server for the address and port that it sees the client at.
pub const WHO_AM_I: &[u8] = b"who am I?";
/// How often servers look whether they shall stop.
pub(crate) const POLL: Duration = Duration::from_millis(50);
/// Largest datagram.
pub(crate) const DATAGRAM: usize = 65_535;
/// Unit of transfers, bytes.
const BLOCK: usize = 65_536;

/// Layer-4 protocol of a test.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP, by [`crate::sctp`].
    Sctp,
}

impl Protocol {
    /// TCP and UDP, which every [`Server`] serves.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    /// As Kubernetes writes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// A TCP and UDP server on one address and port. Stops when dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens on `address` inside a namespace.
    ///
    /// # Errors
    ///
    /// When the address cannot be bound.
    pub fn start(netns: &NetNs, address: SocketAddr, name: &str) -> Result<Self> {
        let (tcp, udp) = netns
            .run(|| -> std::io::Result<_> {
                Ok((TcpListener::bind(address)?, UdpSocket::bind(address)?))
            })
            .with_context(|| format!("listen on {address} in {}", netns.name()))?;
        tcp.set_nonblocking(true)?;
        udp.set_read_timeout(Some(POLL))?;
        let stop = Arc::new(AtomicBool::new(false));
        let accepted = Arc::new(AtomicU64::new(0));
        let threads = vec![
            {
                let (stop, accepted, name) = (stop.clone(), accepted.clone(), name.to_owned());
                std::thread::spawn(move || serve_tcp(&tcp, &name, &stop, &accepted))
            },
            {
                let (stop, name) = (stop.clone(), name.to_owned());
                std::thread::spawn(move || serve_udp(&udp, &name, &stop))
            },
        ];
        Ok(Self {
            stop,
            accepted,
            threads,
        })
    }

    /// TCP connections accepted so far.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve_tcp(
    listener: &TcpListener,
    name: &str,
    stop: &Arc<AtomicBool>,
    accepted: &Arc<AtomicU64>,
) {
    while !stop.load(Ordering::Relaxed) {
        if !readable(listener) {
            continue;
        }
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        accepted.fetch_add(1, Ordering::Relaxed);
        let (name, stop) = (name.to_owned(), stop.clone());
        // Ends with its client, or at the next look at `stop`.
        std::thread::spawn(move || {
            let _ = serve_connection(stream, &name, &stop);
        });
    }
}

/// Waits, at most [`POLL`], until the socket has something to read.
fn readable(socket: &impl std::os::fd::AsFd) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut sockets = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(POLL).unwrap_or(PollTimeout::ZERO);
    poll(&mut sockets, timeout).is_ok_and(|ready| ready > 0)
}

fn serve_connection(stream: TcpStream, name: &str, stop: &AtomicBool) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    let mut stream = Patient { stream, stop };
    stream.write_all(format!("{name}\n").as_bytes())?;
    loop {
        let mut command = [0];
        if stream.read(&mut command)? == 0 {
            return Ok(());
        }
        match command[0] {
            b'E' => return echo_to_the_end(&mut stream),
            b'T' => {
                let mut lengths = [0; 16];
                stream.read_exact(&mut lengths)?;
                let (receive, send) = lengths.split_at(8);
                receive_pattern(&mut stream, u64::from_be_bytes(receive.try_into()?))?;
                return send_pattern(&mut stream, u64::from_be_bytes(send.try_into()?));
            }
            b'W' => {
                let peer = stream.stream.peer_addr()?;
                stream.write_all(format!("{peer}\n").as_bytes())?;
            }
            other => bail!("unknown command {other}"),
        }
    }
}

fn echo_to_the_end(stream: &mut Patient<'_>) -> Result<()> {
    let mut buffer = vec![0; BLOCK];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..length])?;
    }
}

/// A server's side of a connection: waits for as long as the client lives and the server is not stopped.
struct Patient<'a> {
    stream: TcpStream,
    stop: &'a AtomicBool,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.stream.set_read_timeout(Some(POLL))?;
        loop {
            match self.stream.read(buffer) {
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
                        && !self.stop.load(Ordering::Relaxed) => {}
                other => return other,
            }
        }
    }
}

impl Write for Patient<'_> {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

fn serve_udp(socket: &UdpSocket, name: &str, stop: &AtomicBool) {
    let mut buffer = vec![0; DATAGRAM];
    while !stop.load(Ordering::Relaxed) {
        // Errors are timeouts and ICMP answers to earlier datagrams.
        let Ok((length, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let mut answer = format!("{name}\0").into_bytes();
        answer.extend(answer_of(&buffer[..length], from));
        let _ = socket.send_to(&answer, from);
    }
}

/// What a server answers to a datagram or message, after its name.
pub(crate) fn answer_of(question: &[u8], from: SocketAddr) -> Vec<u8> {
    if question == WHO_AM_I {
        return from.to_string().into_bytes();
    }
    question.to_vec()
}

/// Fills a block of the pattern that starts `offset` bytes (a multiple of 8) into a transfer.
fn pattern(offset: u64, block: &mut [u8]) {
    for (word, chunk) in (offset / 8..).zip(block.chunks_mut(8)) {
        // Multiplied by an odd constant, so that every byte of the word varies.
        let bytes = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
}

fn send_pattern(to: &mut impl Write, length: u64) -> Result<()> {
    let mut block = vec![0; BLOCK];
    let mut sent = 0;
    while sent < length {
        let now = block.len().min(usize::try_from(length - sent)?);
        pattern(sent, &mut block[..now]);
        to.write_all(&block[..now])
            .with_context(|| format!("send after {sent} of {length} bytes"))?;
        sent += now as u64;
    }
    Ok(())
}

fn receive_pattern(from: &mut impl Read, length: u64) -> Result<()> {
    let mut block = vec![0; BLOCK];
    let mut expected = vec![0; BLOCK];
    let mut received = 0;
    while received < length {
        let now = block.len().min(usize::try_from(length - received)?);
        from.read_exact(&mut block[..now])
            .with_context(|| format!("receive after {received} of {length} bytes"))?;
        pattern(received, &mut expected[..now]);
        ensure!(
            block[..now] == expected[..now],
            "wrong bytes between {received} and {} of {length}",
            received + now as u64
        );
        received += now as u64;
    }
    Ok(())
}

/// A client's connection, greeted by the server.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
    /// Name of the server.
    pub server: String,
}

impl Connection {
    /// Connects from the calling thread's namespace and reads the server's name.
    ///
    /// # Errors
    ///
    /// When it is refused or not answered within [`TIMEOUT`].
    pub fn open(to: SocketAddr) -> Result<Self> {
        Self::open_within(to, TIMEOUT)
    }

    /// As [`Connection::open`], with another time to wait for the connection.
    ///
    /// # Errors
    ///
    /// As [`Connection::open`].
    pub fn open_within(to: SocketAddr, timeout: Duration) -> Result<Self> {
        let stream =
            TcpStream::connect_timeout(&to, timeout).with_context(|| format!("connect to {to}"))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        stream.set_nodelay(true)?;
        let mut stream = BufReader::new(stream);
        let mut server = String::new();
        stream
            .read_line(&mut server)
            .with_context(|| format!("read the greeting of {to}"))?;
        ensure!(server.ends_with('\n'), "{to} closed without a greeting");
        server.pop();
        Ok(Self { stream, server })
    }

    /// Asks for an echo; to be called once, before [`Connection::echo`].
    ///
    /// # Errors
    ///
    /// When the connection is broken.
    pub fn start_echo(&mut self) -> Result<()> {
        Ok(self.stream.get_mut().write_all(b"E")?)
    }

    /// Sends bytes and compares what comes back.
    ///
    /// # Errors
    ///
    /// When something else comes back, or nothing within [`TIMEOUT`].
    pub fn echo(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.get_mut().write_all(bytes)?;
        let mut back = vec![0; bytes.len()];
        self.stream
            .read_exact(&mut back)
            .with_context(|| format!("wait for an echo of {}", self.server))?;
        ensure!(back == bytes, "{} echoed something else", self.server);
        Ok(())
    }

    /// Sends `up` bytes, then receives `down`, and checks them.
    ///
    /// # Errors
    ///
    /// When bytes are lost or changed, or nothing moves for [`TIMEOUT`].
    pub fn transfer(mut self, up: u64, down: u64) -> Result<()> {
        let mut request = vec![b'T'];
        request.extend(up.to_be_bytes());
        request.extend(down.to_be_bytes());
        self.stream.get_mut().write_all(&request)?;
        send_pattern(self.stream.get_mut(), up).context("upload")?;
        receive_pattern(&mut self.stream, down).context("download")
    }

    /// Asks for the address and port that the server sees the client at; before
    /// [`Connection::start_echo`].
    ///
    /// # Errors
    ///
    /// When the connection is broken, or the answer is no address.
    pub fn who_am_i(&mut self) -> Result<SocketAddr> {
        self.stream.get_mut().write_all(b"W")?;
        let mut answer = String::new();
        self.stream.read_line(&mut answer)?;
        let answer = answer.trim_end();
        answer
            .parse()
            .with_context(|| format!("{} sees a client at {answer:?}", self.server))
    }

    /// The client's own address and port.
    ///
    /// # Errors
    ///
    /// When the socket has none.
    pub fn local_address(&self) -> Result<SocketAddr> {
        Ok(self.stream.get_ref().local_addr()?)
    }
}

/// Connects once and returns the server's name.
///
/// # Errors
///
/// As [`Connection::open`].
pub fn tcp_name(to: SocketAddr) -> Result<String> {
    Ok(Connection::open(to)?.server)
}

/// A client's UDP socket with one port for its life.
#[derive(Debug)]
pub struct UdpClient {
    socket: UdpSocket,
}

impl UdpClient {
    /// Makes a socket in the calling thread's namespace, connected to `to`.
    ///
    /// # Errors
    ///
    /// When there is no way to `to`.
    pub fn new(to: SocketAddr) -> Result<Self> {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket
            .connect(to)
            .with_context(|| format!("connect UDP to {to}"))?;
        Ok(Self { socket })
    }

    /// Sends a datagram and returns the name of the server that answered it. Sends once: what is lost is an error.
    ///
    /// # Errors
    ///
    /// When no right answer comes within `timeout`.
    pub fn ask(&self, payload: &[u8], timeout: Duration) -> Result<String> {
        self.socket.send(payload)?;
        let deadline = Instant::now() + timeout;
        let mut buffer = vec![0; DATAGRAM];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no answer within {timeout:?}");
            self.socket.set_read_timeout(Some(left))?;
            let length = match self.socket.recv(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error).context("receive"),
            };
            let end = buffer[..length]
                .iter()
                .position(|byte| *byte == 0)
                .context("an answer without a name")?;
            // An answer to an earlier question came late.
            if buffer[end + 1..length] != *payload {
                continue;
            }
            return Ok(String::from_utf8_lossy(&buffer[..end]).into_owned());
        }
    }
}

/// Sends one datagram of `length` bytes and returns the server's name.
///
/// # Errors
///
/// As [`UdpClient::ask`], with [`TIMEOUT`].
pub fn udp_name(to: SocketAddr, length: usize) -> Result<String> {
    let mut payload = vec![0; length];
    pattern(0, &mut payload);
    UdpClient::new(to)?
        .ask(&payload, TIMEOUT)
        .with_context(|| format!("ask {to} over UDP with {length} bytes"))
}

/// The server's name, over any protocol.
///
/// # Errors
///
/// As [`tcp_name`], [`udp_name`] and [`sctp::name`].
pub fn name(protocol: Protocol, to: SocketAddr) -> Result<String> {
    match protocol {
        Protocol::Tcp => tcp_name(to),
        Protocol::Udp => udp_name(to, 32),
        Protocol::Sctp => sctp::name(to),
    }
}
