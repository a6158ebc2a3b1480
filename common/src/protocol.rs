//! Numbers from the headers that Weir reads: IANA protocol numbers, EtherTypes, TCP flags.

/// ICMP (RFC 792).
pub const ICMP: u8 = 1;
/// TCP (RFC 9293).
pub const TCP: u8 = 6;
/// UDP (RFC 768).
pub const UDP: u8 = 17;
/// ICMPv6 (RFC 4443).
pub const ICMPV6: u8 = 58;
/// SCTP (RFC 9260).
pub const SCTP: u8 = 132;

/// IPv6 extension headers (RFC 8200, IANA registry).
pub mod extension {
    /// Hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// Routing header.
    pub const ROUTING: u8 = 43;
    /// Fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Authentication header (RFC 4302); its length is counted in units of four bytes.
    pub const AUTHENTICATION: u8 = 51;
    /// No next header.
    pub const NONE: u8 = 59;
    /// Destination options.
    pub const DESTINATION: u8 = 60;
    /// Mobility header (RFC 6275).
    pub const MOBILITY: u8 = 135;
}

/// EtherTypes, in the byte order of the machine.
pub mod ether_type {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
}

/// Bits of the TCP flags byte.
pub mod tcp_flag {
    /// FIN.
    pub const FIN: u8 = 0x01;
    /// SYN.
    pub const SYN: u8 = 0x02;
    /// RST.
    pub const RST: u8 = 0x04;
    /// ACK.
    pub const ACK: u8 = 0x10;
}

/// The name of a protocol as Kubernetes and people write it, or `None` for one without a name.
#[must_use]
pub const fn name(protocol: u8) -> Option<&'static str> {
    match protocol {
        ICMP => Some("ICMP"),
        TCP => Some("TCP"),
        UDP => Some("UDP"),
        ICMPV6 => Some("ICMPv6"),
        SCTP => Some("SCTP"),
        _ => None,
    }
}
