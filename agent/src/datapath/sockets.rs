//! The programs of the cgroup: they see system calls on sockets of all processes in it. Attached by
//! links that are pinned as `BPF-ROOT/links/PROGRAM`, and replaced in place at a restart.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    maps::Map,
    programs::{
        CgroupAttachMode, CgroupSockAddr, cgroup_sock_addr::CgroupSockAddrLink, links::FdLink,
    },
};
use weir_common::{
    Ipv4, Ipv6,
    address::Address as _,
    socket::{SocketFrontends, Translation},
};

use super::{
    DatapathError,
    attach::{pin_error, program_error, unfolded},
    sys,
};

/// The programs, in the order in which they are attached: what was translated must be known before
/// anything is.
pub const PROGRAMS: [&str; 10] = [
    "sock_getpeername4",
    "sock_getpeername6",
    "sock_recvmsg4",
    "sock_recvmsg6",
    "sock_bind4",
    "sock_bind6",
    "sock_sendmsg4",
    "sock_sendmsg6",
    "sock_connect4",
    "sock_connect6",
];

/// The map in which sockets remember what they were translated from.
const SOCKET_FRONTENDS: &str = "SOCKET_FRONTENDS";

/// A handle on `SOCKET_FRONTENDS`, for the kernel's lists of sockets.
pub(super) fn frontends(ebpf: &Ebpf) -> Result<OwnedFd, DatapathError> {
    let Some(Map::SkStorage(map)) = ebpf.map(SOCKET_FRONTENDS) else {
        return Err(DatapathError::Object(format!(
            "has no map {SOCKET_FRONTENDS} of socket-local storage"
        )));
    };
    let handle = map.fd().as_fd().try_clone_to_owned();
    handle.map_err(|source| DatapathError::Map {
        name: SOCKET_FRONTENDS,
        source,
    })
}

/// What a socket that talks to `peer` (an IPv4 address not in IPv6 form) asked for, by its value in
/// `SOCKET_FRONTENDS`; `None` if it asked for just that, or the value has another size.
pub(crate) fn frontend_of(value: &[u8], peer: SocketAddr) -> Option<SocketAddr> {
    if value.len() != size_of::<SocketFrontends>() {
        return None;
    }
    let value: SocketFrontends = sys::from_bytes(value);
    let is_peers = |row: &&Translation| {
        row.backend_port.get() != 0
            && row.backend_port.get() == peer.port()
            && row.backend == Ipv6::from_ip(peer.ip())
    };
    let row = value.rows.iter().find(is_peers)?;
    let address: IpAddr = match peer.ip() {
        IpAddr::V4(_) => Ipv4::from_shared(row.frontend).to_ip(),
        IpAddr::V6(_) => row.frontend.to_ip(),
    };
    Some(SocketAddr::new(address, row.frontend_port.get()))
}

/// A program of the object.
pub(super) fn program<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut CgroupSockAddr, DatapathError> {
    ebpf.program_mut(name)
        .ok_or_else(|| DatapathError::Object(format!("has no program {name}")))?
        .try_into()
        .map_err(|error| DatapathError::Object(format!("program {name}: {error}")))
}

/// Attaches every program to the cgroup, or replaces what an earlier agent attached.
pub(super) fn attach(ebpf: &mut Ebpf, links: &Path, cgroup: &Path) -> Result<(), DatapathError> {
    let failed = |program: &'static str| {
        let cgroup = cgroup.to_path_buf();
        move |source: io::Error| DatapathError::AttachCgroup {
            program,
            cgroup,
            source,
        }
    };
    for name in PROGRAMS {
        let folder = File::open(cgroup).map_err(failed(name))?;
        attach_one(program(ebpf, name)?, &folder, &links.join(name)).map_err(failed(name))?;
    }
    Ok(())
}

fn attach_one(program: &mut CgroupSockAddr, cgroup: &File, pin: &Path) -> io::Result<()> {
    if pin.exists() {
        match replace(program, cgroup, pin) {
            Ok(()) => return Ok(()),
            // Another cgroup was given, or it was removed, and the link with it.
            Err(error) => {
                tracing::debug!(%error, pin = %pin.display(), "pinned link is of no use");
                detach_one(pin)?;
            }
        }
    }
    let id = program
        .attach(cgroup, CgroupAttachMode::Single)
        .map_err(program_error)?;
    let link: CgroupSockAddrLink = program.take_link(id).map_err(program_error)?;
    FdLink::try_from(link)
        .map_err(|error| io::Error::other(unfolded(&error)))?
        .pin(pin)
        .map_err(|error| pin_error(pin, &error))?;
    Ok(())
}

/// Puts `program` in the place of the one in a pinned link; a system call sees either.
fn replace(program: &CgroupSockAddr, cgroup: &File, pin: &Path) -> io::Result<()> {
    let attached_to = sys::cgroup_of_link(pin)?;
    // The identifier of a cgroup is the number of its folder.
    if attached_to != cgroup.metadata()?.ino() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("it is attached to the cgroup with identifier {attached_to}"),
        ));
    }
    let program = program.fd().map_err(program_error)?;
    sys::update_link(pin, program.as_fd())
}

/// Whether every program is attached, by the pins.
pub(super) fn are_attached(links: &Path) -> bool {
    PROGRAMS.iter().all(|name| is_attached(&links.join(name)))
}

/// The programs that are attached, each with its identifier, 0 if that is not known.
pub(super) fn attached(ebpf: &Ebpf, links: &Path) -> Vec<(&'static str, u32)> {
    PROGRAMS
        .into_iter()
        .filter(|name| is_attached(&links.join(name)))
        .map(|name| {
            let info = ebpf.program(name).and_then(|program| program.info().ok());
            (name, info.map_or(0, |info| info.id()))
        })
        .collect()
}

/// The link of a cgroup that is gone stands for nothing.
fn is_attached(pin: &Path) -> bool {
    sys::cgroup_of_link(pin).is_ok_and(|cgroup| cgroup != 0)
}

/// Detaches every program. Those that are not attached are no error.
pub(super) fn detach(links: &Path) -> Result<(), DatapathError> {
    // The other way round: nothing is translated any more before the way back is forgotten.
    for name in PROGRAMS.into_iter().rev() {
        let pin: PathBuf = links.join(name);
        if pin.exists() {
            detach_one(&pin).map_err(|error| DatapathError::pin(&pin, error))?;
        }
    }
    Ok(())
}

fn detach_one(pin: &Path) -> io::Result<()> {
    // It fails when the cgroup is gone, and the attachment with it.
    if let Err(error) = sys::detach_link(pin) {
        tracing::debug!(%error, pin = %pin.display(), "link was not attached");
    }
    fs::remove_file(pin)
}

#[cfg(test)]
mod tests {
    use weir_common::Port;

    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn row(frontend: &str, backend: &str) -> Translation {
        let (frontend, backend) = (address(frontend), address(backend));
        Translation {
            frontend: Ipv6::from_ip(frontend.ip()),
            backend: Ipv6::from_ip(backend.ip()),
            frontend_port: Port::new(frontend.port()),
            backend_port: Port::new(backend.port()),
        }
    }

    #[test]
    fn the_frontend_is_that_of_the_peer_that_the_socket_has_now() {
        let mut value = SocketFrontends::default();
        value.rows[1] = row("10.96.0.1:80", "10.0.0.1:8080");
        value.rows[3] = row("[fd00:96::1]:80", "[fd00::1]:8080");
        for (peer, expected) in [
            ("10.0.0.1:8080", Some("10.96.0.1:80")),
            ("[fd00::1]:8080", Some("[fd00:96::1]:80")),
            ("10.0.0.1:8081", None),
            ("10.0.0.2:8080", None),
            ("[fd00::2]:8080", None),
            // Unused rows are all zero.
            ("0.0.0.0:0", None),
        ] {
            let bytes = sys::bytes_of(&value);
            let found = frontend_of(bytes, address(peer));
            assert_eq!(found, expected.map(address), "{peer}");
            assert_eq!(frontend_of(&bytes[1..], address(peer)), None);
        }
        // The socket was connected to something else: its rows are taken back.
        value.rows[1].backend_port = Port::new(0);
        let bytes = sys::bytes_of(&value);
        assert_eq!(frontend_of(bytes, address("10.0.0.1:8080")), None);
    }
}
