//! Why a packet was dropped. One list for kernel and user space; numbers are stable and never
//! reused, names are Cilium's where the meaning is the same.

/// A reason for a drop. The number stands in events and, as an index, in the `METRICS` array.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum DropReason {
    /// A reason this version does not know.
    Unknown = 1,
    /// The source address is not one that the sender may use: a pod with another's address, or a packet from outside that claims to be from inside.
    InvalidSource = 130,
    /// The packet's Ethernet addresses name an endpoint that is not the one on this device.
    InvalidSourceMac = 131,
    /// A header is truncated, has an impossible length, or contradicts another.
    Malformed = 132,
    /// No policy allows it.
    PolicyDenied = 133,
    /// Neither IPv4, IPv6 nor ARP.
    UnsupportedL3 = 134,
    /// More IPv6 extension headers than are followed.
    ExtensionHeaders = 135,
    /// An address of this node's pod range that no pod has.
    NoEndpoint = 136,
    /// The node it should go to cannot be reached now.
    NoNextHop = 137,
    /// The pod it was for is gone.
    StaleEndpoint = 138,
    /// The Service has no endpoint.
    NoBackend = 139,
    /// A Service has this address but not this port.
    NoServicePort = 140,
    /// A later fragment came before its first.
    FragmentNotFound = 141,
    /// The time to live (hop limit) is used up; answered with ICMP.
    TtlExceeded = 142,
    /// Larger than the way allows; answered with ICMP.
    TooBig = 143,
    /// No room for a new connection and none that may be forgotten.
    FlowTableFull = 144,
    /// No free source port for the translation.
    NatPortsExhausted = 145,
    /// The kernel could not update the layer-4 checksum.
    ChecksumUpdate = 146,
    /// A protocol that cannot be translated this way (SCTP with another port).
    UnsupportedProtocol = 147,
    /// A table that must be there is not; a fault of Weir.
    MissingConfig = 148,
    /// A destination that may not be sent to from there.
    InvalidDestination = 149,
    /// The kernel could not make the headers readable (memory).
    PullFailed = 150,
    /// An ICMP answer could not be built.
    IcmpReplyFailed = 151,
    /// A malformed or foreign ARP or neighbour discovery packet from a pod.
    Neighbour = 152,
    /// The client is in none of the Service's loadBalancerSourceRanges.
    NotInSourceRange = 153,
    /// The node has no address that it could send from there.
    NoSourceAddress = 154,
}

const FIRST: DropReason = DropReason::InvalidSource;
const LAST: DropReason = DropReason::NoSourceAddress;

/// Every reason, in the order of their numbers.
pub const ALL: &[DropReason] = &[
    DropReason::Unknown,
    DropReason::InvalidSource,
    DropReason::InvalidSourceMac,
    DropReason::Malformed,
    DropReason::PolicyDenied,
    DropReason::UnsupportedL3,
    DropReason::ExtensionHeaders,
    DropReason::NoEndpoint,
    DropReason::NoNextHop,
    DropReason::StaleEndpoint,
    DropReason::NoBackend,
    DropReason::NoServicePort,
    DropReason::FragmentNotFound,
    DropReason::TtlExceeded,
    DropReason::TooBig,
    DropReason::FlowTableFull,
    DropReason::NatPortsExhausted,
    DropReason::ChecksumUpdate,
    DropReason::UnsupportedProtocol,
    DropReason::MissingConfig,
    DropReason::InvalidDestination,
    DropReason::PullFailed,
    DropReason::IcmpReplyFailed,
    DropReason::Neighbour,
    DropReason::NotInSourceRange,
    DropReason::NoSourceAddress,
];

impl DropReason {
    /// The stable name, as metrics and `-o json` show it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "UNKNOWN",
            Self::InvalidSource => "INVALID_SOURCE",
            Self::InvalidSourceMac => "INVALID_SOURCE_MAC",
            Self::Malformed => "INVALID_PACKET",
            Self::PolicyDenied => "POLICY_DENIED",
            Self::UnsupportedL3 => "UNSUPPORTED_L3_PROTOCOL",
            Self::ExtensionHeaders => "UNSUPPORTED_IPV6_EXTENSIONS",
            Self::NoEndpoint => "NO_LOCAL_ENDPOINT",
            Self::NoNextHop => "NO_NEXT_HOP",
            Self::StaleEndpoint => "STALE_ENDPOINT",
            Self::NoBackend => "SERVICE_BACKEND_NOT_FOUND",
            Self::NoServicePort => "SERVICE_PORT_NOT_FOUND",
            Self::FragmentNotFound => "FRAG_NOT_FOUND",
            Self::TtlExceeded => "TTL_EXCEEDED",
            Self::TooBig => "PACKET_TOO_BIG",
            Self::FlowTableFull => "FLOW_TABLE_FULL",
            Self::NatPortsExhausted => "NAT_PORTS_EXHAUSTED",
            Self::ChecksumUpdate => "CSUM_L4",
            Self::UnsupportedProtocol => "UNSUPPORTED_L4_PROTOCOL",
            Self::MissingConfig => "MISSED_CONFIG",
            Self::InvalidDestination => "INVALID_DESTINATION",
            Self::PullFailed => "SKB_PULL_FAILED",
            Self::IcmpReplyFailed => "ICMP_REPLY_FAILED",
            Self::Neighbour => "NEIGHBOUR_INVALID",
            Self::NotInSourceRange => "NOT_IN_SRC_RANGE",
            Self::NoSourceAddress => "NO_SOURCE_ADDRESS",
        }
    }

    /// What it means, for people.
    #[must_use]
    pub const fn description(self) -> &'static str {
        match self {
            Self::Unknown => "a reason this version does not know",
            Self::InvalidSource => {
                "the source address is not one that the sender may use: a pod with another's address, or a packet from outside that claims to be from inside"
            }
            Self::InvalidSourceMac => {
                "the packet's Ethernet addresses name an endpoint that is not the one on this device"
            }
            Self::Malformed => {
                "a header is truncated, has an impossible length, or contradicts another"
            }
            Self::PolicyDenied => "no policy allows it",
            Self::UnsupportedL3 => "neither IPv4, IPv6 nor ARP",
            Self::ExtensionHeaders => "more IPv6 extension headers than are followed",
            Self::NoEndpoint => "an address of this node's pod range that no pod has",
            Self::NoNextHop => "the node it should go to cannot be reached now",
            Self::StaleEndpoint => "the pod it was for is gone",
            Self::NoBackend => "no endpoint, or none on this node with a traffic policy Local",
            Self::NoServicePort => "a Service has this address but not this port",
            Self::FragmentNotFound => "a later fragment came before its first",
            Self::TtlExceeded => "the time to live (hop limit) is used up; answered with ICMP",
            Self::TooBig => "larger than the way allows; answered with ICMP",
            Self::FlowTableFull => "no room for a new connection and none that may be forgotten",
            Self::NatPortsExhausted => "no free source port for the translation",
            Self::ChecksumUpdate => "the kernel could not update the layer-4 checksum",
            Self::UnsupportedProtocol => {
                "a protocol that cannot be translated this way (SCTP with another port)"
            }
            Self::MissingConfig => "a table that must be there is not; a fault of Weir",
            Self::InvalidDestination => {
                "may not be sent to from there (ClusterIPs from outside: see cluster-ips-outside)"
            }
            Self::PullFailed => "the kernel could not make the headers readable (memory)",
            Self::IcmpReplyFailed => "an ICMP answer could not be built",
            Self::NotInSourceRange => {
                "the client is in none of the Service's loadBalancerSourceRanges"
            }
            Self::NoSourceAddress => {
                "this node has no address of the family that it could send from there"
            }
            Self::Neighbour => {
                "a malformed or foreign ARP or neighbour discovery packet from a pod"
            }
        }
    }

    /// The reason with a number that a function of the kernel programs gave as `reason as u32`.
    /// Loops are dear there, so the number is taken at its word; others become
    /// [`DropReason::Unknown`].
    #[inline(always)]
    #[must_use]
    pub const fn of_kernel(number: u32) -> Self {
        if number >= FIRST as u32 && number <= LAST as u32 {
            // SAFETY: the numbers from the first to the last reason are all taken, as a test
            // asserts.
            unsafe { core::mem::transmute::<u8, Self>(number as u8) }
        } else {
            Self::Unknown
        }
    }

    /// The reason with this number; [`DropReason::Unknown`] for a number of another version.
    #[must_use]
    pub fn from_number(number: u8) -> Self {
        ALL.iter()
            .copied()
            .find(|r| *r as u8 == number)
            .unwrap_or(Self::Unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_that_the_kernel_gives_have_no_gap() {
        for number in FIRST as u8..=LAST as u8 {
            assert!(ALL.iter().any(|r| *r as u8 == number), "{number}");
            assert_eq!(DropReason::of_kernel(number.into()) as u8, number);
        }
        assert_eq!(DropReason::of_kernel(3), DropReason::Unknown);
        assert_eq!(DropReason::of_kernel(0x1_0082), DropReason::Unknown);
    }

    #[test]
    fn numbers_and_names_are_unique_and_round_trip() {
        for (i, a) in ALL.iter().enumerate() {
            assert_eq!(DropReason::from_number(*a as u8), *a);
            for b in &ALL[i + 1..] {
                assert_ne!(a.name(), b.name());
            }
        }
        assert_eq!(DropReason::from_number(255), DropReason::Unknown);
    }
}
