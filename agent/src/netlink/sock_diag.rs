//! TCP sockets of a network namespace by `NETLINK_SOCK_DIAG`: lists those that have a value in a
//! socket-local storage map, with the value, and ends single ones. Knows nothing of what the values
//! mean. Every call may take long where there are many sockets: not for the event loop.
//!
//! The crate `netlink-packet-sock-diag` knows neither the storage nor how to end a socket.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd as _, BorrowedFd},
};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NlasIterator};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};

use crate::objects::Family;

/// linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const SK_DIAG_BPF_STORAGE: u16 = 1;
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;
/// linux/inet_diag.h.
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
/// linux/netlink.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// Bytes of `nlmsghdr`, `inet_diag_sockid` and `inet_diag_msg`.
const HEADER: usize = 16;
const SOCKET_ID: usize = 48;
const MESSAGE: usize = 72;
/// Where the identity begins in `inet_diag_msg`.
const ID_AT: usize = 4;

/// A bit for each state (net/tcp_states.h) in which a socket has a peer: all but `TIME_WAIT`, of which
/// no process waits for anything, `CLOSE` and `LISTEN`.
const WITH_PEER: u32 = {
    const ESTABLISHED: u32 = 1;
    const SYN_SENT: u32 = 2;
    const SYN_RECV: u32 = 3;
    const FIN_WAIT1: u32 = 4;
    const FIN_WAIT2: u32 = 5;
    const CLOSE_WAIT: u32 = 8;
    const LAST_ACK: u32 = 9;
    const CLOSING: u32 = 11;
    1 << ESTABLISHED
        | 1 << SYN_SENT
        | 1 << SYN_RECV
        | 1 << FIN_WAIT1
        | 1 << FIN_WAIT2
        | 1 << CLOSE_WAIT
        | 1 << LAST_ACK
        | 1 << CLOSING
};

/// Bytes of one datagram from the kernel, which makes none above 32 KiB.
const DATAGRAM_BYTES: usize = 64 * 1024;

/// What the kernel knows a socket by: family, addresses, ports and cookie. Another socket with the
/// same addresses and ports has another cookie.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SocketId {
    /// `AF_INET` or `AF_INET6`.
    family: u8,
    /// `inet_diag_sockid`.
    id: [u8; SOCKET_ID],
}

impl SocketId {
    /// Its peer; that of an IPv6 socket with an IPv4 peer is an IPv4 address.
    pub fn peer(&self) -> SocketAddr {
        let port = u16::from_be_bytes([self.id[2], self.id[3]]);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.id[20..36]);
        let address = if i32::from(self.family) == libc::AF_INET {
            let [a, b, c, d, ..] = bytes;
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        } else {
            IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
        };
        SocketAddr::new(address, port)
    }
}

/// What became of a socket that was to be ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    /// It is ended: its next call says `ECONNABORTED`.
    Now,
    /// It was gone by itself.
    Before,
}

/// A socket with the kernel as its peer, in one network namespace.
pub struct SockDiag {
    socket: Socket,
    sequence: u32,
    received: Vec<u8>,
}

impl SockDiag {
    /// Opens it in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
            received: Vec::with_capacity(DATAGRAM_BYTES),
        })
    }

    /// Whether this kernel reads the request for values of storages (5.7):
    /// then it refuses one with a descriptor that is no map. One that does not would list all sockets
    /// without them.
    ///
    /// # Errors
    ///
    /// The kernel lists no TCP sockets at all (`CONFIG_INET_DIAG`, `CONFIG_INET_TCP_DIAG`).
    pub fn tells_storage(&mut self) -> io::Result<bool> {
        // One that nobody can have: it is above every limit.
        let request = list_request(Family::V4, i32::MAX as u32);
        match self.exchange(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &request, |_, _| {}) {
            Ok(()) => Ok(false),
            Err(error) => match error.raw_os_error() {
                Some(libc::EBADF) => Ok(true),
                _ => Err(error),
            },
        }
    }

    /// Whether this kernel can end sockets (`CONFIG_INET_DIAG_DESTROY`), tried with one that cannot be.
    ///
    /// # Errors
    ///
    /// The kernel's, missing rights above all.
    pub fn can_end(&mut self) -> io::Result<bool> {
        let nobody = SocketId {
            family: libc::AF_INET as u8,
            id: [0; SOCKET_ID],
        };
        match self.end(&nobody) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Calls `each` with every TCP socket of a family that has a peer and a value in the storage map
    /// `map`, and with the value. IPv6 sockets include those with IPv4 peers.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn list(
        &mut self,
        family: Family,
        map: BorrowedFd<'_>,
        mut each: impl FnMut(SocketId, &[u8]),
    ) -> io::Result<()> {
        let request = list_request(family, map.as_raw_fd() as u32);
        self.exchange(
            SOCK_DIAG_BY_FAMILY,
            NLM_F_DUMP,
            &request,
            |kind, payload| {
                if kind == SOCK_DIAG_BY_FAMILY
                    && let Some((id, value)) = socket_with_value(payload)
                {
                    each(id, value);
                }
            },
        )
    }

    /// Ends a socket. Its process gets `ECONNABORTED`, its peer a reset.
    ///
    /// # Errors
    ///
    /// The kernel's: `EOPNOTSUPP` without `CONFIG_INET_DIAG_DESTROY`.
    pub fn end(&mut self, socket: &SocketId) -> io::Result<Ended> {
        let request = request(socket.family, u32::MAX, &socket.id);
        match self.exchange(SOCK_DESTROY, NLM_F_ACK, &request, |_, _| {}) {
            Ok(()) => Ok(Ended::Now),
            Err(error) => match error.raw_os_error() {
                // ESTALE: another socket has its addresses and ports now.
                Some(libc::ENOENT | libc::ESTALE) => Ok(Ended::Before),
                _ => Err(error),
            },
        }
    }

    /// Sends a request and calls `each` with type and payload of every answer until the last one.
    fn exchange(
        &mut self,
        kind: u16,
        flags: u16,
        payload: &[u8],
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(HEADER + payload.len());
        bytes.extend(((HEADER + payload.len()) as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(payload);
        self.socket.send(&bytes, 0)?;
        loop {
            self.received.clear();
            match self.socket.recv(&mut self.received, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            for message in Messages(&self.received) {
                // Others belong to an exchange that ended with an error.
                if message.sequence != self.sequence {
                    continue;
                }
                match message.kind {
                    NLMSG_ERROR | NLMSG_DONE => return result_of(message.payload),
                    kind => each(kind, message.payload),
                }
            }
        }
    }
}

/// `inet_diag_req_v2` for TCP.
fn request(family: u8, states: u32, id: &[u8; SOCKET_ID]) -> Vec<u8> {
    let mut bytes = vec![family, libc::IPPROTO_TCP as u8, 0, 0];
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// Asks for all sockets of a family with their values in one map.
fn list_request(family: Family, map: u32) -> Vec<u8> {
    let family = match family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    };
    let mut bytes = request(family as u8, WITH_PEER, &[0; SOCKET_ID]);
    let map = map.to_ne_bytes();
    let inner = (4 + map.len()) as u16;
    bytes.extend((4 + inner).to_ne_bytes());
    bytes.extend(INET_DIAG_REQ_SK_BPF_STORAGES.to_ne_bytes());
    bytes.extend(inner.to_ne_bytes());
    bytes.extend(SK_DIAG_BPF_STORAGE_REQ_MAP_FD.to_ne_bytes());
    bytes.extend(map);
    bytes
}

/// The error number at the beginning of an acknowledgement, or of the end of a listing.
fn result_of(payload: &[u8]) -> io::Result<()> {
    match payload.first_chunk::<4>().map(|b| i32::from_ne_bytes(*b)) {
        None | Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_abs())),
    }
}

/// One message of a datagram.
struct Message<'a> {
    kind: u16,
    sequence: u32,
    payload: &'a [u8],
}

/// The messages of a datagram.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let header = self.0.first_chunk::<HEADER>()?;
        let word = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let length = word(0) as usize;
        let payload = self.0.get(HEADER..length)?;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind,
            sequence: word(8),
            payload,
        })
    }
}

/// The socket of an `inet_diag_msg`, with its value; `None` if it has none.
fn socket_with_value(payload: &[u8]) -> Option<(SocketId, &[u8])> {
    let (message, attributes) = payload.split_at_checked(MESSAGE)?;
    let id = message[ID_AT..].first_chunk::<SOCKET_ID>()?;
    let storages = attribute(attributes, INET_DIAG_SK_BPF_STORAGES)?;
    let storage = attribute(storages, SK_DIAG_BPF_STORAGE)?;
    let value = attribute(storage, SK_DIAG_BPF_STORAGE_MAP_VALUE)?;
    let family = message[0];
    Some((SocketId { family, id: *id }, value))
}

/// The value of the first attribute of a kind.
fn attribute(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    let found = NlasIterator::new(attributes)
        .flatten()
        .find(|attribute| attribute.kind() == kind)?;
    let end = usize::from(found.length());
    found.into_inner().get(4..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        // The kernel sets NLA_F_NESTED on those that hold others.
        bytes.extend((kind | 1 << 15).to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// `inet_diag_msg` of a socket, with attributes behind it.
    fn message(family: i32, peer: &[u8], port: u16, attributes: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; MESSAGE];
        bytes[0] = family as u8;
        bytes[ID_AT + 2..ID_AT + 4].copy_from_slice(&port.to_be_bytes());
        bytes[ID_AT + 20..ID_AT + 20 + peer.len()].copy_from_slice(peer);
        bytes.extend(attributes);
        bytes
    }

    fn storage(value: &[u8]) -> Vec<u8> {
        let mut of_map = nested(2, &7_u32.to_ne_bytes());
        of_map.extend(nested(SK_DIAG_BPF_STORAGE_MAP_VALUE, value));
        let storages = nested(SK_DIAG_BPF_STORAGE, &of_map);
        let mut attributes = nested(8, &[0]);
        attributes.extend(nested(INET_DIAG_SK_BPF_STORAGES, &storages));
        attributes
    }

    #[test]
    fn sockets_are_read_with_their_value() {
        let mut mapped = [0; 16];
        mapped[10..12].fill(0xff);
        mapped[12..].copy_from_slice(&[10, 0, 0, 1]);
        let v6 = "fd00::1".parse::<Ipv6Addr>().unwrap().octets();
        for (family, peer, expected) in [
            (libc::AF_INET, &[10, 0, 0, 1][..], "10.0.0.1:8080"),
            (libc::AF_INET6, &mapped[..], "10.0.0.1:8080"),
            (libc::AF_INET6, &v6[..], "[fd00::1]:8080"),
        ] {
            let bytes = message(family, peer, 8080, &storage(b"value"));
            let (id, value) = socket_with_value(&bytes).unwrap();
            assert_eq!(id.peer().to_string(), expected);
            assert_eq!(value, b"value");
        }
    }

    #[test]
    fn sockets_without_a_value_are_none() {
        let whole = message(libc::AF_INET, &[10, 0, 0, 1], 80, &storage(b"value"));
        let empty = nested(INET_DIAG_SK_BPF_STORAGES, &[]);
        for bytes in [
            message(libc::AF_INET, &[10, 0, 0, 1], 80, &[]),
            message(libc::AF_INET, &[10, 0, 0, 1], 80, &empty),
            whole[..MESSAGE - 1].to_vec(),
            whole[..MESSAGE + 20].to_vec(),
        ] {
            assert_eq!(socket_with_value(&bytes), None);
        }
    }

    #[test]
    fn a_datagram_is_read_message_by_message_and_not_beyond_its_end() {
        let mut datagram = Vec::new();
        for (length, sequence) in [(HEADER + 3, 1_u32), (HEADER, 2), (1000, 3)] {
            datagram.extend((length as u32).to_ne_bytes());
            datagram.extend([SOCK_DIAG_BY_FAMILY.to_ne_bytes(), [0; 2]].concat());
            datagram.extend(sequence.to_ne_bytes());
            datagram.extend([0; 4]);
            if sequence == 1 {
                datagram.extend([1, 2, 3, 0]);
            }
        }
        let found: Vec<_> = Messages(&datagram)
            .map(|message| (message.kind, message.sequence, message.payload))
            .collect();
        let kind = SOCK_DIAG_BY_FAMILY;
        assert_eq!(found, [(kind, 1, &[1, 2, 3][..]), (kind, 2, &[])]);
    }

    #[test]
    fn errors_are_told_from_the_end() {
        assert!(result_of(&[]).is_ok());
        assert!(result_of(&0_i32.to_ne_bytes()).is_ok());
        let refused = result_of(&(-libc::EOPNOTSUPP).to_ne_bytes()).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP));
    }

    /// In the namespace of the test: nothing is listed and nobody is ended.
    #[test]
    fn this_kernel_tells_storages_and_ends_sockets() {
        let mut diag = SockDiag::open().unwrap();
        assert!(diag.tells_storage().unwrap());
        assert!(diag.can_end().unwrap());
        let no_map = std::fs::File::open("/dev/null").unwrap();
        let error = diag
            .list(Family::V6, std::os::fd::AsFd::as_fd(&no_map), |_, _| {})
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
