//! Packets made by hand and put on the wire past the network stack, for what no honest program sends.

use std::{
    net::IpAddr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::netns::NetNs;

/// Ethernet type of IPv4.
pub const IPV4: u16 = 0x0800;
/// Ethernet type of IPv6.
pub const IPV6: u16 = 0x86dd;
/// Ethernet type of a VLAN tag (IEEE 802.1Q).
const VLAN: u16 = 0x8100;
/// Number of TCP.
const TCP: u8 = 6;
/// Number of UDP.
const UDP: u8 = 17;
/// Number of the IPv6 fragment header.
const FRAGMENT: u8 = 44;

/// An Ethernet frame with a UDP packet of any addresses, checksums right.
///
/// # Errors
///
/// When the addresses are of different families.
pub fn udp_frame(
    destination_mac: [u8; 6],
    source_mac: [u8; 6],
    (source, source_port): (IpAddr, u16),
    (destination, destination_port): (IpAddr, u16),
    payload: &[u8],
) -> Result<Vec<u8>> {
    let length = u16::try_from(8 + payload.len())?;
    let mut udp = Vec::new();
    udp.extend(source_port.to_be_bytes());
    udp.extend(destination_port.to_be_bytes());
    udp.extend(length.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(payload);
    let macs = (destination_mac, source_mac);
    frame(macs, source, destination, UDP, udp, 6)
}

/// An Ethernet frame with a TCP segment of any addresses and flags, without options and payload, checksums right.
///
/// # Errors
///
/// When the addresses are of different families.
pub fn tcp_frame(
    destination_mac: [u8; 6],
    source_mac: [u8; 6],
    (source, source_port): (IpAddr, u16),
    (destination, destination_port): (IpAddr, u16),
    flags: u8,
) -> Result<Vec<u8>> {
    let mut tcp = Vec::new();
    tcp.extend(source_port.to_be_bytes());
    tcp.extend(destination_port.to_be_bytes());
    // Sequence number, acknowledgement, length of the header in words of four bytes, window.
    tcp.extend(1_u32.to_be_bytes());
    tcp.extend(0_u32.to_be_bytes());
    tcp.extend([5 << 4, flags]);
    tcp.extend(65_535_u16.to_be_bytes());
    tcp.extend([0; 4]);
    let macs = (destination_mac, source_mac);
    frame(macs, source, destination, TCP, tcp, 16)
}

/// An Ethernet frame with a packet whose checksum stands at `checksum_at` in the segment.
fn frame(
    (destination_mac, source_mac): ([u8; 6], [u8; 6]),
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    mut segment: Vec<u8>,
    checksum_at: usize,
) -> Result<Vec<u8>> {
    let length = u16::try_from(segment.len())?;
    let (ethertype, mut header, pseudo) = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = vec![0x45, 0];
            header.extend((20 + length).to_be_bytes());
            header.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
            header.extend(source.octets());
            header.extend(destination.octets());
            let sum = checksum(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            (
                IPV4,
                header,
                [source.octets(), destination.octets()].concat(),
            )
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(length.to_be_bytes());
            header.extend([protocol, 64]);
            header.extend(source.octets());
            header.extend(destination.octets());
            (
                IPV6,
                header,
                [source.octets(), destination.octets()].concat(),
            )
        }
        _ => bail!("{source} and {destination} are of different families"),
    };
    let mut summed = pseudo;
    summed.extend([0, protocol]);
    summed.extend(length.to_be_bytes());
    summed.extend(&segment);
    let sum = match (checksum(&summed), protocol) {
        (0, UDP) => 0xffff,
        (sum, _) => sum,
    };
    segment[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
    let mut frame = Vec::new();
    frame.extend(destination_mac);
    frame.extend(source_mac);
    frame.extend(ethertype.to_be_bytes());
    frame.append(&mut header);
    frame.append(&mut segment);
    Ok(frame)
}

/// The Internet checksum (RFC 1071) of bytes.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// The fragments of a frame of [`udp_frame`], in their order, each with `piece` bytes (a multiple of 8) of its
/// payload, the last with the rest.
///
/// # Errors
///
/// When the datagram is too long.
pub fn fragments(frame: &[u8], identification: u32, piece: usize) -> Result<Vec<Vec<u8>>> {
    let (ethernet, packet) = frame.split_at(14);
    let is_v4 = packet[0] >> 4 == 4;
    let (header, payload) = packet.split_at(if is_v4 { 20 } else { 40 });
    let mut fragments = Vec::new();
    for (number, bytes) in payload.chunks(piece).enumerate() {
        let offset = u16::try_from(number * piece)?;
        let more = usize::from(offset) + bytes.len() < payload.len();
        let mut fragment = [ethernet, header].concat();
        let place = &mut fragment[14..];
        let length = u16::try_from(bytes.len())?;
        if is_v4 {
            place[2..4].copy_from_slice(&(20 + length).to_be_bytes());
            place[4..6].copy_from_slice(&identification.to_be_bytes()[2..]);
            place[6..8].copy_from_slice(&((offset / 8) | (u16::from(more) << 13)).to_be_bytes());
            place[10..12].fill(0);
            let sum = checksum(place);
            place[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            place[4..6].copy_from_slice(&(8 + length).to_be_bytes());
            let next = std::mem::replace(&mut place[6], FRAGMENT);
            fragment.extend([next, 0]);
            fragment.extend((offset | u16::from(more)).to_be_bytes());
            fragment.extend(identification.to_be_bytes());
        }
        fragment.extend(bytes);
        fragments.push(fragment);
    }
    Ok(fragments)
}

/// The frame with a VLAN tag (IEEE 802.1Q): three bits of priority, one whether it may be dropped, twelve of the VLAN's
/// number.
#[must_use]
pub fn tagged(frame: &[u8], tag: u16) -> Vec<u8> {
    let (addresses, rest) = frame.split_at(12);
    let tag = [VLAN.to_be_bytes(), tag.to_be_bytes()].concat();
    [addresses, &tag, rest].concat()
}

/// Ethernet address of a device.
///
/// # Errors
///
/// When there is no such device, or it has none.
pub fn mac_of(netns: &NetNs, device: &str) -> Result<[u8; 6]> {
    let links: serde_json::Value =
        serde_json::from_str(&netns.tool("ip", &["-j", "link", "show", device])?)?;
    parse_mac(
        links[0]["address"]
            .as_str()
            .context("no Ethernet address")?,
    )
}

/// Permanent neighbour of a pod: the host side of its veth pair.
///
/// # Errors
///
/// When it has none.
pub fn gateway_mac(pod: &NetNs) -> Result<[u8; 6]> {
    let neighbours: serde_json::Value =
        serde_json::from_str(&pod.tool("ip", &["-j", "neigh", "show", "nud", "permanent"])?)?;
    parse_mac(
        neighbours[0]["lladdr"]
            .as_str()
            .context("the pod has no permanent neighbour")?,
    )
}

/// Sends a frame as it is from a device of the calling thread's namespace.
///
/// # Errors
///
/// When there is no such device, or the frame is not taken.
pub fn send(device: &str, frame: &[u8]) -> Result<()> {
    send_all(device, &[frame])
}

/// Sends frames as they are, in their order, from a device of the calling thread's namespace.
///
/// # Errors
///
/// When there is no such device, or a frame is not taken.
pub fn send_all<F: AsRef<[u8]>>(device: &str, frames: &[F]) -> Result<()> {
    // SAFETY: a plain system call; its result is checked.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    ensure!(
        socket >= 0,
        "packet socket: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let index =
        nix::net::if_::if_nametoindex(device).with_context(|| format!("device {device}"))?;
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET)?;
    address.sll_ifindex = i32::try_from(index)?;
    address.sll_halen = 6;
    for frame in frames {
        let frame = frame.as_ref();
        address.sll_addr[..6].copy_from_slice(&frame[..6]);
        // SAFETY: pointers and lengths describe `frame` and `address`, which live through the call.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                u32::try_from(size_of::<libc::sockaddr_ll>())?,
            )
        };
        ensure!(
            usize::try_from(sent).is_ok_and(|sent| sent == frame.len()),
            "send on {device}: {}",
            std::io::Error::last_os_error()
        );
    }
    Ok(())
}

/// Ethernet address in text to bytes.
///
/// # Errors
///
/// When it is none.
pub fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Vec<u8> = text
        .trim()
        .split(':')
        .map(|part| u8::from_str_radix(part, 16))
        .collect::<std::result::Result<_, _>>()
        .with_context(|| format!("Ethernet address {text:?}"))?;
    <[u8; 6]>::try_from(bytes).map_err(|_| anyhow::anyhow!("Ethernet address {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_rfc_1071() {
        assert_eq!(
            checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            !0xddf2
        );
        assert_eq!(checksum(&[1]), !0x0100);
    }
}
