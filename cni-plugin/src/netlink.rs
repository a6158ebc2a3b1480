//! A route netlink socket that sends several requests at once and checks each one's answer. It stays
//! in the network namespace in which it was opened.

use std::{io, os::fd::AsRawFd};

use netlink_packet_core::{
    Emitable, ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Larger than any single datagram the kernel sends here (dumps use 32 KiB at most).
const RECEIVE_BYTES: usize = 64 * 1024;
/// Option `SO_NETNS_COOKIE` (Linux 5.14), missing in `libc`.
const SO_NETNS_COOKIE: libc::c_int = 71;
/// Header flag: attributes follow the error.
const NLM_F_ACK_TLVS: u16 = 0x200;
/// Attribute of an error: text of the kernel.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {cause}{}{text}", if .text.is_empty() { "" } else { ": " })]
pub struct NetlinkError {
    /// What was tried: "add address 10.0.0.7/32 to eth0".
    pub what: String,
    /// The kernel's error.
    pub cause: io::Error,
    /// The kernel's explanation, or empty.
    pub text: String,
}

impl NetlinkError {
    /// Whether the kernel answered with this `errno`.
    pub fn is(&self, errno: i32) -> bool {
        self.cause.raw_os_error() == Some(errno)
    }

    fn new(what: &str, cause: io::Error) -> Self {
        Self {
            what: what.to_owned(),
            cause,
            text: String::new(),
        }
    }
}

/// A request.
#[derive(Debug)]
pub struct Request {
    what: String,
    flags: u16,
    message: RouteNetlinkMessage,
}

impl Request {
    /// `what` completes "cannot …"; `flags`: `NLM_F_*` besides those of every request.
    pub fn new(what: impl Into<String>, flags: u16, message: RouteNetlinkMessage) -> Self {
        Self {
            what: what.into(),
            flags,
            message,
        }
    }
}

/// The socket.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// What the kernel refuses.
    pub fn open() -> Result<Self, NetlinkError> {
        let open = || {
            let socket = Socket::new(NETLINK_ROUTE)?;
            // Both since Linux 4.12: the kernel's own words, without our request echoed.
            socket.set_ext_ack(true)?;
            socket.set_cap_ack(true)?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        match open() {
            Ok(socket) => Ok(Self {
                socket,
                sequence: 0,
            }),
            Err(cause) => Err(NetlinkError::new("open a netlink socket", cause)),
        }
    }

    /// Sends all requests in one system call; the kernel works through them in their order, whether or
    /// not one fails. Returns the answers of each (only queries have any), or the first error.
    ///
    /// # Errors
    ///
    /// That of the first request that failed.
    pub fn batch(
        &mut self,
        requests: Vec<Request>,
    ) -> Result<Vec<Vec<RouteNetlinkMessage>>, NetlinkError> {
        let first = self.sequence + 1;
        let whats: Vec<String> = requests.iter().map(|r| r.what.clone()).collect();
        let mut buffer = Vec::with_capacity(2048);
        for request in requests {
            self.sequence += 1;
            let mut message = NetlinkMessage::from(request.message);
            message.header.flags = NLM_F_REQUEST | NLM_F_ACK | request.flags;
            message.header.sequence_number = self.sequence;
            message.finalize();
            let start = buffer.len();
            // Messages of a batch are aligned to four bytes.
            buffer.resize(start + message.buffer_len().next_multiple_of(4), 0);
            message.emit(&mut buffer[start..]);
        }
        let all = || whats.join(", ");
        self.socket
            .send(&buffer, 0)
            .map_err(|cause| NetlinkError::new(&all(), cause))?;

        let mut answers: Vec<Vec<RouteNetlinkMessage>> = Vec::new();
        answers.resize_with(whats.len(), Vec::new);
        let mut first_error: Option<(usize, NetlinkError)> = None;
        let mut open = whats.len();
        while open > 0 {
            let mut datagram = Vec::with_capacity(RECEIVE_BYTES);
            self.socket
                .recv(&mut datagram, 0)
                .map_err(|cause| NetlinkError::new(&all(), cause))?;
            let mut rest = &datagram[..];
            while !rest.is_empty() {
                let (header_flags, length) = match NetlinkBuffer::new_checked(rest) {
                    Ok(header) => (header.flags(), header.length() as usize),
                    Err(error) => return Err(garbled(&all(), error)),
                };
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&rest[..length])
                    .map_err(|error| garbled(&all(), error))?;
                rest = &rest[length.next_multiple_of(4).min(rest.len())..];
                let index = message.header.sequence_number.wrapping_sub(first) as usize;
                // Answers to an earlier batch that was given up.
                let Some(slot) = answers.get_mut(index) else {
                    continue;
                };
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => slot.push(answer),
                    NetlinkPayload::Done(_) => open -= 1,
                    NetlinkPayload::Error(error) => {
                        open -= 1;
                        if let Some(code) = error.code
                            && first_error.as_ref().is_none_or(|(i, _)| index < *i)
                        {
                            let what = whats[index].clone();
                            let cause = io::Error::from_raw_os_error(-code.get());
                            let text = explanation(header_flags, &error);
                            first_error = Some((index, NetlinkError { what, cause, text }));
                        }
                    }
                    _ => {}
                }
            }
        }
        first_error.map_or(Ok(answers), |(_, error)| Err(error))
    }

    /// All objects that a dump request speaks of.
    ///
    /// # Errors
    ///
    /// What the kernel refuses.
    pub fn dump(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let answers = self.batch(vec![Request::new(what, NLM_F_DUMP, message)])?;
        Ok(answers.into_iter().flatten().collect())
    }

    /// Cookie of the namespace that the socket is in; 0 before Linux 5.14.
    pub fn netns_cookie(&self) -> u64 {
        let mut cookie = 0u64;
        let mut length = size_of::<u64>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes, the size of `cookie`, which outlives the
        // call; the descriptor is open as long as `self`.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        if result == 0 { cookie } else { 0 }
    }
}

fn garbled(what: &str, error: impl ToString) -> NetlinkError {
    NetlinkError::new(
        what,
        io::Error::new(io::ErrorKind::InvalidData, error.to_string()),
    )
}

/// The kernel's text: attributes behind the header of the request that the error repeats.
fn explanation(flags: u16, error: &ErrorMessage) -> String {
    const HEADER: usize = 16;
    if flags & NLM_F_ACK_TLVS == 0 {
        return String::new();
    }
    let mut rest = error.header.get(HEADER..).unwrap_or_default();
    while let [l0, l1, k0, k1, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let Some(value) = rest.get(4..length) else {
            break;
        };
        if u16::from_ne_bytes([k0, k1]) == NLMSGERR_ATTR_MSG {
            let text = value.split(|&byte| byte == 0).next().unwrap_or_default();
            return String::from_utf8_lossy(text).into_owned();
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    String::new()
}
