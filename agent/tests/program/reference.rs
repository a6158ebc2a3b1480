//! A second, slow and strict reading of the headers, written from the specifications, against
//! which the programs' own is held.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A packet whose headers agree with each other.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reading {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    /// Source and destination; `None` where there are none.
    pub ports: Option<(u16, u16)>,
    /// A later fragment of a datagram.
    pub later: bool,
    /// Where layer 4 begins and ends in the frame.
    pub l4: usize,
    pub end: usize,
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Reads a frame; `None` if a header is cut off, impossible, or contradicts another.
pub fn read(frame: &[u8]) -> Option<Reading> {
    match be16(frame, 12)? {
        0x0800 => read_v4(frame),
        0x86dd => read_v6(frame),
        _ => None,
    }
}

fn read_v4(frame: &[u8]) -> Option<Reading> {
    let ip = frame.get(14..)?;
    let header = ip.get(..20)?;
    let length = usize::from(header[0] & 15) * 4;
    let total = usize::from(be16(header, 2)?);
    if header[0] >> 4 != 4 || length < 20 || total < length || total > ip.len() {
        return None;
    }
    let address = |at: usize| {
        let bytes: [u8; 4] = header[at..at + 4].try_into().unwrap();
        IpAddr::V4(Ipv4Addr::from(bytes))
    };
    let place = be16(header, 6)?;
    let reading = Reading {
        source: address(12),
        destination: address(16),
        protocol: header[9],
        ports: None,
        later: place & 0x1fff != 0,
        l4: 14 + length,
        end: 14 + total,
    };
    with_ports(frame, reading, place & 0x2000 != 0)
}

fn read_v6(frame: &[u8]) -> Option<Reading> {
    let ip = frame.get(14..)?;
    let header = ip.get(..40)?;
    let end = 40 + usize::from(be16(header, 4)?);
    if header[0] >> 4 != 6 || end > ip.len() {
        return None;
    }
    let address = |at: usize| {
        let bytes: [u8; 16] = header[at..at + 16].try_into().unwrap();
        IpAddr::V6(Ipv6Addr::from(bytes))
    };
    let (mut next, mut at) = (header[6], 40);
    let (mut later, mut more, mut fragments) = (false, false, 0);
    while matches!(next, 0 | 43 | 44 | 51 | 60 | 135) && !later {
        let extension = ip.get(at..end)?;
        let size = match next {
            44 => 8,
            51 => (usize::from(*extension.get(1)?) + 2) * 4,
            _ => (usize::from(*extension.get(1)?) + 1) * 8,
        };
        if extension.len() < size.max(8) {
            return None;
        }
        if next == 44 {
            let place = be16(extension, 2)?;
            (later, more) = (place & 0xfff8 != 0, place & 1 != 0);
            fragments += 1;
        }
        next = extension[0];
        at += size;
    }
    if fragments > 1 {
        return None;
    }
    let reading = Reading {
        source: address(8),
        destination: address(24),
        protocol: next,
        ports: None,
        later,
        l4: 14 + at,
        end: 14 + end,
    };
    with_ports(frame, reading, more)
}

fn with_ports(frame: &[u8], mut reading: Reading, first_of_more: bool) -> Option<Reading> {
    if reading.later {
        return Some(reading);
    }
    let l4 = frame.get(reading.l4..reading.end)?;
    let has_ports = match reading.protocol {
        6 => {
            let header = usize::from(l4.get(12)? >> 4) * 4;
            if l4.len() < 20 || header < 20 || header > l4.len() {
                return None;
            }
            true
        }
        17 => {
            let length = usize::from(be16(l4, 4)?);
            if l4.len() < 8 || length < 8 || (!first_of_more && length > l4.len()) {
                return None;
            }
            true
        }
        132 => {
            if l4.len() < 12 {
                return None;
            }
            true
        }
        1 | 58 => {
            if l4.len() < 8 {
                return None;
            }
            false
        }
        _ => false,
    };
    if has_ports {
        reading.ports = Some((be16(l4, 0)?, be16(l4, 2)?));
    }
    Some(reading)
}
