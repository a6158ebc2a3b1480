//! A link between two namespaces made of two tun devices, which have no link layer: their packets begin with the IP
//! header. Threads carry them from one to the other.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{netns::NetNs, traffic::POLL};

/// Longest packet, bytes.
const PACKET: usize = 65_536;

/// The link. Its devices go when it is dropped.
#[derive(Debug)]
pub struct TunLink {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl TunLink {
    /// Makes a device of the same name in each namespace; both are up.
    ///
    /// # Errors
    ///
    /// When a name is taken, or the kernel has no tun devices.
    pub fn new(one: &NetNs, other: &NetNs, device: &str) -> Result<Self> {
        let ends = [one.run(|| open(device))?, other.run(|| open(device))?];
        for namespace in [one, other] {
            namespace.ip(&format!("link set {device} up\n"))?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (from, to) in [(0, 1), (1, 0)] {
            let (from, to) = (ends[from].try_clone()?, ends[to].try_clone()?);
            let stop = stop.clone();
            threads.push(std::thread::spawn(move || carry(from, to, &stop)));
        }
        Ok(Self { stop, threads })
    }
}

impl Drop for TunLink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn carry(mut from: File, mut to: File, stop: &AtomicBool) {
    let mut packet = vec![0; PACKET];
    let timeout = PollTimeout::try_from(POLL).unwrap_or(PollTimeout::ZERO);
    while !stop.load(Ordering::Relaxed) {
        let mut files = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        if !poll(&mut files, timeout).is_ok_and(|ready| ready > 0) {
            continue;
        }
        let Ok(length) = from.read(&mut packet) else {
            continue;
        };
        // A device that is down takes nothing, as a wire that is cut.
        let _ = to.write(&packet[..length]);
    }
}

/// A device of the calling thread's namespace.
fn open(device: &str) -> Result<File> {
    ensure!(
        device.len() < libc::IFNAMSIZ,
        "{device} is too long for a device"
    );
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = libc::c_char::try_from(from)?;
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI)?;
    let path = "/dev/net/tun";
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("open {path}"))?;
    // SAFETY: the pointer is to `request`, which lives through the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure!(
        result == 0,
        "make {device}: {}",
        std::io::Error::last_os_error()
    );
    Ok(file)
}
