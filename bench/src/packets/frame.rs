//! Packets as they stand on the wire, and the tuples that make them.

use std::net::{IpAddr, SocketAddr};

use weir_common::{
    MacAddress,
    checksum::fold16,
    protocol::{self, ether_type, tcp_flag},
};

/// Bytes of a row of the wrapper's templates.
pub const ROOM: usize = 80;

/// A packet; IPv4 uses the first 64 bytes, IPv6 all 80.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Frame(pub [u8; ROOM]);

/// Source and destination of a TCP connection; both of one family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tuple {
    /// Who sends.
    pub source: SocketAddr,
    /// To whom.
    pub destination: SocketAddr,
}

/// What a packet does to a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Opens it.
    Syn,
    /// Belongs to it.
    Ack,
}

/// Bytes of a packet of this family.
pub const fn length(v6: bool) -> usize {
    if v6 { ROOM } else { 64 }
}

impl Frame {
    /// A TCP packet with right checksums.
    pub fn new(tuple: &Tuple, kind: Kind, to: MacAddress, from: MacAddress) -> Self {
        let mut bytes = [0; ROOM];
        let v6 = tuple.source.is_ipv6();
        bytes[..6].copy_from_slice(&to.0);
        bytes[6..12].copy_from_slice(&from.0);
        let (l4, addresses) = if v6 {
            bytes[12..14].copy_from_slice(&ether_type::IPV6.to_be_bytes());
            ipv6_header(&mut bytes[14..54], tuple);
            (54, 22..54)
        } else {
            bytes[12..14].copy_from_slice(&ether_type::IPV4.to_be_bytes());
            ipv4_header(&mut bytes[14..34], tuple);
            (34, 26..34)
        };
        let end = length(v6);
        bytes[l4..l4 + 2].copy_from_slice(&tuple.source.port().to_be_bytes());
        bytes[l4 + 2..l4 + 4].copy_from_slice(&tuple.destination.port().to_be_bytes());
        bytes[l4 + 12] = 5 << 4;
        bytes[l4 + 13] = match kind {
            Kind::Syn => tcp_flag::SYN,
            Kind::Ack => tcp_flag::ACK,
        };
        // The pseudo-header's length and protocol, in the byte order of the words summed.
        let pseudo = u64::from(((end - l4) as u16).to_be())
            + u64::from(u16::from(protocol::TCP).to_be())
            + sum(&bytes[addresses]);
        let checksum = !fold16(pseudo + sum(&bytes[l4..end]));
        bytes[l4 + 16..l4 + 18].copy_from_slice(&checksum.to_ne_bytes());
        Self(bytes)
    }
}

fn ipv4_header(header: &mut [u8], tuple: &Tuple) {
    header[0] = 0x45;
    let total = (length(false) - 14) as u16;
    header[2..4].copy_from_slice(&total.to_be_bytes());
    // Don't fragment.
    header[6] = 0x40;
    header[8] = 64;
    header[9] = protocol::TCP;
    copy_address(&mut header[12..16], tuple.source.ip());
    copy_address(&mut header[16..20], tuple.destination.ip());
    let checksum = !fold16(sum(header));
    header[10..12].copy_from_slice(&checksum.to_ne_bytes());
}

fn ipv6_header(header: &mut [u8], tuple: &Tuple) {
    header[0] = 0x60;
    let payload = (length(true) - 54) as u16;
    header[4..6].copy_from_slice(&payload.to_be_bytes());
    header[6] = protocol::TCP;
    header[7] = 64;
    copy_address(&mut header[8..24], tuple.source.ip());
    copy_address(&mut header[24..40], tuple.destination.ip());
}

fn copy_address(to: &mut [u8], address: IpAddr) {
    match address {
        IpAddr::V4(v4) => to.copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => to.copy_from_slice(&v6.octets()),
    }
}

fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks_exact(2)
        .map(|pair| u64::from(u16::from_ne_bytes([pair[0], pair[1]])))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_right() {
        for (source, destination) in [("10.0.0.1:1", "10.0.0.2:2"), ("[fd00::1]:1", "[fd00::2]:2")]
        {
            let tuple = Tuple {
                source: source.parse().unwrap(),
                destination: destination.parse().unwrap(),
            };
            let mac = MacAddress([2; 6]);
            let Frame(bytes) = Frame::new(&tuple, Kind::Syn, mac, mac);
            let v6 = tuple.source.is_ipv6();
            let (l4, addresses) = if v6 { (54, 22..54) } else { (34, 26..34) };
            if !v6 {
                assert_eq!(fold16(sum(&bytes[14..34])), 0xffff);
            }
            let length = (length(v6) - l4) as u16;
            let pseudo = u64::from(length.to_be()) + u64::from(6u16.to_be());
            let all = pseudo + sum(&bytes[addresses]) + sum(&bytes[l4..l4 + usize::from(length)]);
            assert_eq!(fold16(all), 0xffff);
        }
    }
}
