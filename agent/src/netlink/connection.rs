//! One `NETLINK_ROUTE` socket and the exchange of requests and replies over it. Knows nothing of
//! what the messages mean; [`super::Netlink`] calls it from a blocking thread.
//!
//! The kernel handles a request inside the sending system call: many requests sent at once cost
//! one call, and their replies are there when it returns. What takes time is waiting for the
//! kernel's one lock for network configuration, which other processes hold for milliseconds.

use std::{fmt, io};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;

/// Requests sent by one system call; their replies have to fit into the receive buffer.
const PIPELINE: usize = 32;
/// Bytes of one datagram from the kernel, which makes none above 32 KiB.
const DATAGRAM_BYTES: usize = 64 * 1024;
/// How often a listing is begun anew because the listed things changed meanwhile.
const DUMP_ATTEMPTS: usize = 8;
/// Type of the attribute of an acknowledgement that holds the kernel's explanation
/// (`NLMSGERR_ATTR_MSG`, linux/netlink.h).
const NLMSGERR_ATTR_MSG: u16 = 1;

/// A request: the message and its flags besides `NLM_F_REQUEST` and those for the reply.
#[derive(Debug)]
pub(super) struct Request {
    /// The message.
    pub(super) message: RouteNetlinkMessage,
    /// `NLM_F_CREATE`, `NLM_F_REPLACE` …
    pub(super) flags: u16,
}

/// Why the kernel refused a request: its error number and, where it gives one, its explanation.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// A positive `errno`.
    pub errno: i32,
    /// The kernel's own words (`NLMSGERR_ATTR_MSG`).
    pub explanation: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Errno::from_raw(self.errno) {
            Errno::UnknownErrno => write!(f, "error {}", self.errno)?,
            errno => f.write_str(errno.desc())?,
        }
        match &self.explanation {
            Some(text) => write!(f, " ({text})"),
            None => Ok(()),
        }
    }
}

/// What the kernel answered to one request.
pub(super) type Reply = Result<Vec<RouteNetlinkMessage>, Refusal>;

/// A socket with the kernel as its peer.
pub(super) struct Connection {
    socket: Socket,
    port: u32,
    sequence: u32,
    received: Vec<u8>,
}

impl Connection {
    /// Opens a socket in the network namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let port = socket.bind_auto()?.port_number();
        socket.connect(&SocketAddr::new(0, 0))?;
        // Errors come with the kernel's explanation and without a copy of the request, listings
        // are filtered by the kernel (4.20).
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        socket.set_netlink_get_strict_chk(true)?;
        Ok(Self {
            socket,
            port,
            sequence: 0,
            received: Vec::with_capacity(DATAGRAM_BYTES),
        })
    }

    /// The port number of the socket: it stands in the notifications of changes it asked for.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// Sends requests for single things and returns their replies in the same order. A request
    /// that is refused does not keep the others from being handled.
    pub(super) fn exchange(&mut self, requests: Vec<Request>) -> io::Result<Vec<Reply>> {
        let mut replies = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let chunk: Vec<Request> = requests.by_ref().take(PIPELINE).collect();
            replies.extend(self.round(chunk, NLM_F_REQUEST | NLM_F_ACK)?);
        }
        Ok(replies)
    }

    /// Asks for a listing.
    pub(super) fn dump(&mut self, message: &RouteNetlinkMessage) -> io::Result<Reply> {
        for _ in 0..DUMP_ATTEMPTS {
            let request = Request {
                message: message.clone(),
                flags: 0,
            };
            match self.round(vec![request], NLM_F_REQUEST | NLM_F_DUMP) {
                Ok(mut replies) => return Ok(replies.pop().unwrap_or_else(|| Ok(Vec::new()))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other(format!(
            "the listing changed under each of {DUMP_ATTEMPTS} attempts to read it"
        )))
    }

    /// Sends all requests by one call and collects their replies.
    fn round(&mut self, requests: Vec<Request>, flags: u16) -> io::Result<Vec<Reply>> {
        let first = self.sequence.wrapping_add(1);
        let count = requests.len();
        let mut bytes = Vec::new();
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            append(&mut bytes, self.sequence, flags | request.flags, request);
        }
        self.socket.send(&bytes, 0)?;

        let mut round = Round::new(first, count);
        while !round.is_complete() {
            self.received.clear();
            match self.socket.recv(&mut self.received, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            for_each_message(&self.received, |message| round.absorb(message));
        }
        if round.interrupted {
            return Err(io::ErrorKind::Interrupted.into());
        }
        Ok(round.replies)
    }
}

/// Serialises a request behind those already in `bytes`.
fn append(bytes: &mut Vec<u8>, sequence: u32, flags: u16, request: Request) {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request.message));
    message.finalize();
    let start = bytes.len();
    bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut bytes[start..]);
}

/// Calls `each` with every message of a datagram. One that cannot be understood is left out: the
/// kernel may be newer than our decoder, and one strange device must not hide the others.
pub(super) fn for_each_message(
    datagram: &[u8],
    mut each: impl FnMut(NetlinkMessage<RouteNetlinkMessage>),
) {
    let mut rest = datagram;
    while let Some(length) = rest
        .first_chunk::<4>()
        .map(|b| u32::from_ne_bytes(*b) as usize)
    {
        if length < 16 || length > rest.len() {
            break;
        }
        match NetlinkMessage::deserialize(&rest[..length]) {
            Ok(message) => each(message),
            Err(error) => {
                tracing::warn!(%error, "a netlink message of the kernel is not understood");
            }
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
}

/// The replies to requests with consecutive sequence numbers.
struct Round {
    first: u32,
    outstanding: usize,
    replied: Vec<bool>,
    replies: Vec<Reply>,
    interrupted: bool,
}

impl Round {
    fn new(first: u32, count: usize) -> Self {
        Self {
            first,
            outstanding: count,
            replied: vec![false; count],
            replies: vec![Ok(Vec::new()); count],
            interrupted: false,
        }
    }

    fn is_complete(&self) -> bool {
        self.outstanding == 0
    }

    fn absorb(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) {
        let (header, payload) = message.into_parts();
        let index = header.sequence_number.wrapping_sub(self.first) as usize;
        let Some(reply) = self.replies.get_mut(index) else {
            // Belongs to an exchange that ended with an error.
            return;
        };
        self.interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
        let outcome = match payload {
            NetlinkPayload::InnerMessage(inner) => {
                if let Ok(messages) = reply {
                    messages.push(inner);
                }
                return;
            }
            NetlinkPayload::Error(error) => {
                let attributes = (header.flags & NLM_F_ACK_TLVS != 0)
                    .then(|| error.header.get(16..))
                    .flatten();
                refusal(error.raw_code(), attributes)
            }
            NetlinkPayload::Done(done) => refusal(done.code, Some(&done.extended_ack)),
            _ => return,
        };
        if let Some(refusal) = outcome {
            *reply = Err(refusal);
        }
        if !std::mem::replace(&mut self.replied[index], true) {
            self.outstanding -= 1;
        }
    }
}

fn refusal(code: i32, attributes: Option<&[u8]>) -> Option<Refusal> {
    if code == 0 {
        return None;
    }
    let explanation = NlasIterator::new(attributes.unwrap_or_default())
        .flatten()
        .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
        .map(|attribute| {
            let text = String::from_utf8_lossy(attribute.value());
            text.trim_end_matches('\0').to_owned()
        });
    Some(Refusal {
        errno: code.abs(),
        explanation,
    })
}
