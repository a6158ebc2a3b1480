//! The endpoint table: pods attached to this node, by number.
//!
//! A number is found without a hash lookup: at a pod's device from the Ethernet address that the
//! packet carries ([`host_mac`], [`pod_mac`]), elsewhere from the offset of its address in the
//! pod range (`LOCAL_ADDRESSES_*`). Either is a claim of the packet; the row is what proves it.

use crate::{Ipv4, Ipv6, MacAddress, assert_abi_size, limits::ENDPOINTS_MAX, map_types};

/// A row of `ENDPOINTS`. All zero: no such endpoint.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Endpoint {
    /// Cookie of the pod's network namespace (`SO_NETNS_COOKIE`), 0 if unknown.
    pub netns_cookie: u64,
    /// Interface index of the host side of the veth pair; 0 marks a free row.
    pub ifindex: u32,
    /// Raised each time the number is given to another pod, so that flows of the former one are
    /// recognised as stale.
    pub generation: u32,
    /// IPv4 address, or zero.
    pub ipv4: Ipv4,
    /// IPv6 address, or zero.
    pub ipv6: Ipv6,
    /// Address of the pod's own device: [`pod_mac`] of the number.
    pub pod_mac: MacAddress,
    /// Address of the host side, the pod's gateway: [`host_mac`] of the number.
    pub host_mac: MacAddress,
    /// Policy set that judges what the pod sends; [`POLICY_SET_ALLOW_ALL`] judges nothing.
    pub egress_set: u32,
    /// Policy set that judges what the pod receives.
    pub ingress_set: u32,
    /// Identity of the pod's labels, local to this node.
    pub identity: u32,
    /// MTU of the pod's device in bytes (layer 3).
    pub mtu: u16,
    /// Bits of [`flag`].
    pub flags: u16,
}

assert_abi_size!(Endpoint = 64);
map_types!(Endpoint);

/// Bits of [`Endpoint::flags`].
pub mod flag {
    /// TCP `connect()` is not translated at the socket; tc translates what the pod sends.
    pub const NO_SOCKET_TRANSLATION: u16 = 0x1;
}

/// The policy set of endpoints that no policy selects: every packet is allowed and none needs an
/// entry in the flow table for it.
pub const POLICY_SET_ALLOW_ALL: u32 = 0;

/// First two bytes of the Ethernet address of the host side (locally administered, unicast).
pub const HOST_MAC_PREFIX: [u8; 2] = [0x0a, 0x57];
/// First two bytes of the Ethernet address of the pod side.
pub const POD_MAC_PREFIX: [u8; 2] = [0x0e, 0x57];

/// Ethernet address of the host side of endpoint `number`.
#[must_use]
pub const fn host_mac(number: u32) -> MacAddress {
    with_prefix(HOST_MAC_PREFIX, number)
}

/// Ethernet address of the pod side of endpoint `number`.
#[must_use]
pub const fn pod_mac(number: u32) -> MacAddress {
    with_prefix(POD_MAC_PREFIX, number)
}

const fn with_prefix(prefix: [u8; 2], number: u32) -> MacAddress {
    let n = number.to_be_bytes();
    MacAddress([prefix[0], prefix[1], n[0], n[1], n[2], n[3]])
}

/// The number that one of our Ethernet addresses carries; 0 if it is not one of ours or out of
/// range.
#[inline(always)]
#[must_use]
pub const fn number_of_mac(prefix: [u8; 2], mac: MacAddress) -> u32 {
    let m = mac.0;
    let number = u32::from_be_bytes([m[2], m[3], m[4], m[5]]);
    if m[0] == prefix[0] && m[1] == prefix[1] && number < ENDPOINTS_MAX {
        number
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_carries_the_number_and_nothing_else_does() {
        for number in [1, 255, 256, ENDPOINTS_MAX - 1] {
            assert_eq!(number_of_mac(HOST_MAC_PREFIX, host_mac(number)), number);
            assert_eq!(number_of_mac(POD_MAC_PREFIX, host_mac(number)), 0);
        }
        assert_eq!(number_of_mac(HOST_MAC_PREFIX, host_mac(ENDPOINTS_MAX)), 0);
        assert_eq!(number_of_mac(HOST_MAC_PREFIX, MacAddress([0xff; 6])), 0);
    }
}
