//! What comes in at a device, packet by packet: for tests of what must never be on a wire.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    netns::NetNs,
    packet::{IPV4, IPV6},
    traffic::POLL,
};

/// Bytes kept of each packet.
const KEPT: usize = 128;
/// Room for what the kernel tells beside a packet, bytes.
const BESIDE: usize = 64;
/// What may wait to be read, bytes: seconds of what these machines send.
const BUFFER: libc::c_int = 64 << 20;

/// A packet that came in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Number of the protocol after the IP header; of IPv6 that of the first header.
    pub protocol: u8,
    /// A fragment, the first or a later one.
    pub is_fragment: bool,
    /// Bytes from the IP header on.
    pub length: usize,
    /// VLAN tag that it came with (IEEE 802.1Q): priority and the VLAN's number.
    pub tag: Option<u16>,
}

/// Packets that come in at a device from [`Capture::start`] to [`Capture::stop`].
#[derive(Debug)]
pub struct Capture {
    socket: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    packets: Arc<Mutex<Vec<Packet>>>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Begins. What the device's own namespace sends is not among the packets.
    ///
    /// # Errors
    ///
    /// When there is no such device.
    pub fn start(netns: &NetNs, device: &str) -> Result<Self> {
        let socket = Arc::new(netns.run(|| open(device))?);
        let stop = Arc::new(AtomicBool::new(false));
        let packets = Arc::new(Mutex::new(Vec::new()));
        let (reader, stopped, list) = (socket.clone(), stop.clone(), packets.clone());
        let thread = std::thread::spawn(move || {
            loop {
                // Read to the end: what came in before the stop counts.
                let was_stopped = stopped.load(Ordering::Relaxed);
                match receive(&reader) {
                    Some(Some(packet)) => list
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(packet),
                    Some(None) => {}
                    None if was_stopped => return,
                    None => {}
                }
            }
        });
        Ok(Self {
            socket,
            stop,
            packets,
            thread: Some(thread),
        })
    }

    /// What came in so far.
    #[must_use]
    pub fn so_far(&self) -> Vec<Packet> {
        self.packets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Ends it and returns all that came in.
    ///
    /// # Errors
    ///
    /// When packets were lost, as the reader was too slow: then nothing can be said of what was not there.
    pub fn stop(mut self) -> Result<Vec<Packet>> {
        self.end();
        // SAFETY: all-zero is a valid value of this plain structure.
        let mut statistics: libc::tpacket_stats = unsafe { std::mem::zeroed() };
        let mut length = u32::try_from(size_of_val(&statistics))?;
        // SAFETY: pointer and length describe `statistics`, which lives through the call.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        ensure!(
            result == 0,
            "statistics of a packet socket: {}",
            std::io::Error::last_os_error()
        );
        ensure!(
            statistics.tp_drops == 0,
            "{} packets were not captured",
            statistics.tp_drops
        );
        Ok(self.so_far())
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end();
    }
}

/// A packet socket on a device of the calling thread's namespace.
fn open(device: &str) -> Result<OwnedFd> {
    let index =
        nix::net::if_::if_nametoindex(device).with_context(|| format!("device {device}"))?;
    let every = u16::try_from(libc::ETH_P_ALL)?.to_be();
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    // Without a protocol: nothing may come in before it is bound to the device.
    // SAFETY: a plain system call; its result is checked.
    let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    ensure!(
        socket >= 0,
        "packet socket: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let wait = libc::timeval {
        tv_sec: 0,
        tv_usec: POLL.subsec_micros().into(),
    };
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &BUFFER)?;
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &wait)?;
    // The kernel takes tags out of the bytes.
    let wanted: libc::c_int = 1;
    set(&socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, &wanted)?;
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET)?;
    address.sll_protocol = every;
    address.sll_ifindex = i32::try_from(index)?;
    // SAFETY: pointer and length describe `address`, which lives through the call.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            u32::try_from(size_of_val(&address))?,
        )
    };
    ensure!(
        result == 0,
        "capture at {device}: {}",
        std::io::Error::last_os_error()
    );
    Ok(socket)
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> Result<()> {
    // SAFETY: pointer and length describe `value`, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const *value).cast(),
            u32::try_from(size_of::<T>())?,
        )
    };
    ensure!(
        result == 0,
        "option {option} of a packet socket: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// The next frame: `None` if none comes for a while, `Some(None)` for one that is no IP packet or goes out.
fn receive(socket: &OwnedFd) -> Option<Option<Packet>> {
    let mut bytes = [0_u8; KEPT];
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut beside = [0_u64; BESIDE / 8];
    // SAFETY: as above.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = (&raw mut from).cast();
    message.msg_namelen = libc::socklen_t::try_from(size_of_val(&from)).ok()?;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = beside.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&beside);
    // SAFETY: pointers and lengths in `message` describe `from`, `bytes` and `beside`, which live through the call.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_TRUNC) };
    let length = usize::try_from(length).ok()?;
    if from.sll_pkttype == libc::PACKET_OUTGOING {
        return Some(None);
    }
    let kept = &bytes[..length.min(KEPT)];
    let tag = tag_of(&message);
    Some(parse(u16::from_be(from.sll_protocol), kept, length, tag))
}

/// The VLAN tag that the kernel tells beside the bytes.
fn tag_of(message: &libc::msghdr) -> Option<u16> {
    // SAFETY: the kernel has filled the room that `message` describes, which still lives.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const *message).as_ref() }?;
    if (header.cmsg_level, header.cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
        return None;
    }
    // SAFETY: messages of this type are of this structure; unaligned, as only its header is aligned for sure.
    let told: libc::tpacket_auxdata =
        unsafe { std::ptr::read_unaligned(libc::CMSG_DATA(&raw const *header).cast()) };
    (told.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(told.tp_vlan_tci)
}

fn parse(ethertype: u16, bytes: &[u8], length: usize, tag: Option<u16>) -> Option<Packet> {
    /// Number of the fragment header.
    const FRAGMENT: u8 = 44;
    match ethertype {
        IPV4 => Some(Packet {
            source: Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(12..16)?).ok()?).into(),
            destination: Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(16..20)?).ok()?).into(),
            protocol: *bytes.get(9)?,
            // More fragments, or an offset.
            is_fragment: u16::from_be_bytes(bytes.get(6..8)?.try_into().ok()?) & 0x3fff != 0,
            length,
            tag,
        }),
        IPV6 => Some(Packet {
            source: Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(8..24)?).ok()?).into(),
            destination: Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(24..40)?).ok()?).into(),
            protocol: *bytes.get(6)?,
            is_fragment: *bytes.get(6)? == FRAGMENT,
            length,
            tag,
        }),
        _ => None,
    }
}
