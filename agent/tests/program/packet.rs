//! Frames by description. Checksums are computed from scratch when the bytes are made, so that
//! comparing the bytes of an expected packet with those that came out checks every checksum.

use std::net::IpAddr;

use weir_common::{MacAddress, protocol};

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// A packet of either family.
#[derive(Clone, Debug)]
pub struct Packet {
    pub macs: Macs,
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// Type of service or traffic class.
    pub tos: u8,
    /// IPv6 only.
    pub flow_label: u32,
    /// IPv4 only.
    pub dont_fragment: bool,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers: type, and content without the byte that names the next.
    pub extensions: Vec<(u8, Vec<u8>)>,
    pub fragment: Option<Fragment>,
    pub l4: L4,
}

/// Ethernet addresses.
#[derive(Clone, Copy, Debug)]
pub struct Macs {
    pub destination: MacAddress,
    pub source: MacAddress,
}

/// A piece of a datagram; `offset` in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Fragment {
    pub identification: u16,
    pub offset: u16,
    pub more: bool,
}

/// Layer 4.
#[derive(Clone, Debug)]
pub enum L4 {
    Tcp(Tcp),
    Udp(Udp),
    /// ICMP or ICMPv6, by the family.
    Icmp(Icmp),
    Sctp(Sctp),
    /// Any protocol, or the middle of a datagram.
    Raw {
        protocol: u8,
        bytes: Vec<u8>,
    },
}

#[derive(Clone, Debug)]
pub struct Tcp {
    pub source: u16,
    pub destination: u16,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub window: u16,
    pub flags: u8,
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
}

#[derive(Clone, Debug)]
pub struct Udp {
    pub source: u16,
    pub destination: u16,
    /// Sent without a checksum.
    pub unsummed: bool,
    /// Length and checksum of a datagram of which this is the first piece: the whole payload.
    pub whole: Option<Vec<u8>>,
    pub payload: Vec<u8>,
}

#[derive(Clone, Debug)]
pub struct Icmp {
    pub kind: u8,
    pub code: u8,
    /// Bytes 4 to 8 of the header.
    pub rest: [u8; 4],
    pub payload: Vec<u8>,
}

#[derive(Clone, Debug)]
pub struct Sctp {
    pub source: u16,
    pub destination: u16,
    pub payload: Vec<u8>,
}

pub fn tcp(source: u16, destination: u16, flags: u8) -> L4 {
    let payload = if flags & (SYN | FIN | RST) == 0 {
        b"GET / HTTP/1.1\r\n\r\n".to_vec()
    } else {
        Vec::new()
    };
    L4::Tcp(Tcp {
        source,
        destination,
        sequence: 1,
        acknowledgement: 2,
        window: 0x2000,
        flags,
        options: Vec::new(),
        payload,
    })
}

pub fn udp(source: u16, destination: u16) -> L4 {
    L4::Udp(Udp {
        source,
        destination,
        unsummed: false,
        whole: None,
        payload: b"a question".to_vec(),
    })
}

pub fn sctp(source: u16, destination: u16) -> L4 {
    L4::Sctp(Sctp {
        source,
        destination,
        payload: b"chunk".to_vec(),
    })
}

pub fn echo(v4: bool, identifier: u16) -> L4 {
    let [a, b] = identifier.to_be_bytes();
    L4::Icmp(Icmp {
        kind: if v4 { 8 } else { 128 },
        code: 0,
        rest: [a, b, 0, 1],
        payload: b"abcdefgh".to_vec(),
    })
}

impl Packet {
    pub fn new(macs: Macs, source: IpAddr, destination: IpAddr, l4: L4) -> Self {
        assert_eq!(source.is_ipv4(), destination.is_ipv4());
        Self {
            macs,
            source,
            destination,
            ttl: 64,
            tos: 0,
            flow_label: 0x1_2345,
            dont_fragment: true,
            options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            l4,
        }
    }

    /// The same one hop further.
    pub fn forwarded(mut self) -> Self {
        self.ttl -= 1;
        self
    }

    pub fn with_macs(mut self, macs: Macs) -> Self {
        self.macs = macs;
        self
    }

    pub fn with_ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    pub fn from(mut self, address: IpAddr) -> Self {
        self.source = address;
        self
    }

    pub fn to(mut self, address: IpAddr) -> Self {
        self.destination = address;
        self
    }

    pub fn source_port(mut self, port: u16) -> Self {
        match &mut self.l4 {
            L4::Tcp(h) => h.source = port,
            L4::Udp(h) => h.source = port,
            L4::Sctp(h) => h.source = port,
            _ => panic!("no ports"),
        }
        self
    }

    pub fn destination_port(mut self, port: u16) -> Self {
        match &mut self.l4 {
            L4::Tcp(h) => h.destination = port,
            L4::Udp(h) => h.destination = port,
            L4::Sctp(h) => h.destination = port,
            _ => panic!("no ports"),
        }
        self
    }

    pub fn with_payload(mut self, bytes: Vec<u8>) -> Self {
        match &mut self.l4 {
            L4::Tcp(h) => h.payload = bytes,
            L4::Udp(h) => h.payload = bytes,
            L4::Icmp(h) => h.payload = bytes,
            L4::Sctp(h) => h.payload = bytes,
            L4::Raw { bytes: b, .. } => *b = bytes,
        }
        self
    }

    pub fn unsummed(mut self) -> Self {
        let L4::Udp(h) = &mut self.l4 else {
            panic!("not UDP")
        };
        h.unsummed = true;
        self
    }

    /// The whole frame.
    pub fn frame(&self) -> Vec<u8> {
        let mut frame = [self.macs.destination.0, self.macs.source.0].concat();
        frame.extend(if self.source.is_ipv4() {
            [0x08, 0x00]
        } else {
            [0x86, 0xdd]
        });
        frame.extend(self.datagram());
        frame
    }

    /// From the network header on.
    pub fn datagram(&self) -> Vec<u8> {
        let (protocol, l4) = self.l4_bytes();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let header = 20 + self.options.len();
                let mut bytes = vec![0x40 | (header / 4) as u8, self.tos];
                bytes.extend(((header + l4.len()) as u16).to_be_bytes());
                let fragment = self.fragment.unwrap_or(NO_FRAGMENT);
                bytes.extend(fragment.identification.to_be_bytes());
                let place = (fragment.offset / 8)
                    | (u16::from(fragment.more) << 13)
                    | (u16::from(self.dont_fragment && self.fragment.is_none()) << 14);
                bytes.extend(place.to_be_bytes());
                bytes.extend([self.ttl, protocol, 0, 0]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                bytes.extend(&self.options);
                let sum = checksum(&[&bytes]);
                bytes[10..12].copy_from_slice(&sum);
                bytes.extend(l4);
                bytes
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut chain = self.extensions.clone();
                if let Some(fragment) = self.fragment {
                    let place = (fragment.offset & 0xfff8) | u16::from(fragment.more);
                    let [a, b] = place.to_be_bytes();
                    let [c, d] = fragment.identification.to_be_bytes();
                    chain.push((protocol::extension::FRAGMENT, vec![0, a, b, 0, 0, c, d]));
                }
                let mut body = Vec::new();
                for (at, (_, content)) in chain.iter().enumerate() {
                    body.push(chain.get(at + 1).map_or(protocol, |(next, _)| *next));
                    body.extend(content);
                }
                body.extend(l4);
                let flow = (u32::from(self.tos) << 20) | (6 << 28) | self.flow_label;
                let mut bytes = flow.to_be_bytes().to_vec();
                bytes.extend((body.len() as u16).to_be_bytes());
                bytes.extend([chain.first().map_or(protocol, |(kind, _)| *kind), self.ttl]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                bytes.extend(body);
                bytes
            }
            _ => panic!("two families"),
        }
    }

    /// The number of the protocol, and header and payload with their checksum.
    pub fn l4_bytes(&self) -> (u8, Vec<u8>) {
        match &self.l4 {
            L4::Tcp(h) => {
                let mut bytes = [h.source.to_be_bytes(), h.destination.to_be_bytes()].concat();
                bytes.extend(h.sequence.to_be_bytes());
                bytes.extend(h.acknowledgement.to_be_bytes());
                bytes.extend([((20 + h.options.len()) * 4) as u8, h.flags]);
                bytes.extend(h.window.to_be_bytes());
                bytes.extend([0; 4]);
                bytes.extend(&h.options);
                bytes.extend(&h.payload);
                let sum = self.l4_checksum(protocol::TCP, &bytes);
                bytes[16..18].copy_from_slice(&sum);
                (protocol::TCP, bytes)
            }
            L4::Udp(h) => {
                let whole = h.whole.as_ref().unwrap_or(&h.payload);
                let mut bytes = [h.source.to_be_bytes(), h.destination.to_be_bytes()].concat();
                bytes.extend(((8 + whole.len()) as u16).to_be_bytes());
                bytes.extend([0, 0]);
                let mut datagram = bytes.clone();
                datagram.extend(whole);
                let sum = match self.l4_checksum(protocol::UDP, &datagram) {
                    _ if h.unsummed => [0, 0],
                    [0, 0] => [0xff, 0xff],
                    sum => sum,
                };
                bytes[6..8].copy_from_slice(&sum);
                bytes.extend(&h.payload);
                (protocol::UDP, bytes)
            }
            L4::Icmp(h) => {
                let mut bytes = vec![h.kind, h.code, 0, 0];
                bytes.extend(h.rest);
                bytes.extend(&h.payload);
                let (protocol, sum) = if self.source.is_ipv4() {
                    (protocol::ICMP, checksum(&[&bytes]))
                } else {
                    let sum = self.l4_checksum(protocol::ICMPV6, &bytes);
                    (protocol::ICMPV6, sum)
                };
                bytes[2..4].copy_from_slice(&sum);
                (protocol, bytes)
            }
            L4::Sctp(h) => {
                let mut bytes = [h.source.to_be_bytes(), h.destination.to_be_bytes()].concat();
                // Verification tag, and a CRC that nobody here looks at: it covers no addresses.
                bytes.extend([1, 2, 3, 4, 0xc, 0xc, 0xc, 0xc]);
                bytes.extend(&h.payload);
                (protocol::SCTP, bytes)
            }
            L4::Raw { protocol, bytes } => (*protocol, bytes.clone()),
        }
    }

    fn l4_checksum(&self, protocol: u8, bytes: &[u8]) -> [u8; 2] {
        let length = (bytes.len() as u32).to_be_bytes();
        let pseudo = match (self.source, self.destination) {
            (IpAddr::V4(a), IpAddr::V4(b)) => [a.octets(), b.octets()].concat(),
            (IpAddr::V6(a), IpAddr::V6(b)) => [a.octets(), b.octets()].concat(),
            _ => panic!("two families"),
        };
        checksum(&[&pseudo, &length, &[0, 0, 0, protocol], bytes])
    }
}

const NO_FRAGMENT: Fragment = Fragment {
    identification: 0,
    offset: 0,
    more: false,
};

/// The internet checksum (RFC 1071) over parts of which all but the last have even lengths.
pub fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    (!sum(parts)).to_be_bytes()
}

/// One's complement sum, folded.
pub fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for word in parts.iter().flat_map(|part| part.chunks(2)) {
        sum += (u64::from(word[0]) << 8) | word.get(1).map_or(0, |b| u64::from(*b));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
