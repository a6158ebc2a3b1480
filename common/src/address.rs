//! Addresses and ports as they stand in packets: bytes in network order with the alignment of
//! the word they fill, so that the BPF target loads and compares them as whole words.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{assert_abi_size, map_types};

/// An IPv4 address, network byte order.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Ipv4(pub [u8; 4]);

/// An IPv6 address, network byte order.
///
/// Also the container for an address of either family in the tables that both share
/// ([`crate::service::Backend`], [`crate::next_hop::NextHop`]): IPv4 then fills the first four
/// bytes, the rest is zero.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialOrd)]
pub struct Ipv6(pub [u8; 16]);

/// A TCP, UDP or SCTP port, or the identifier of an ICMP echo; network byte order.
#[repr(C, align(2))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Port(pub [u8; 2]);

/// An Ethernet address.
#[repr(C, align(2))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct MacAddress(pub [u8; 6]);

assert_abi_size!(Ipv4 = 4, Ipv6 = 16, Port = 2, MacAddress = 6);
map_types!(Ipv4, Ipv6, Port, MacAddress);

impl Ipv4 {
    /// The four bytes as one word, in the order they have in memory.
    #[inline(always)]
    #[must_use]
    pub const fn word(self) -> u32 {
        u32::from_ne_bytes(self.0)
    }

    /// The address whose bytes in memory are those of `word`.
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u32) -> Self {
        Self(word.to_ne_bytes())
    }
}

impl PartialEq for Ipv6 {
    /// By words: the comparison of byte arrays becomes a loop in the kernel programs.
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (a, b) = (self.words(), other.words());
        (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) == 0
    }
}

impl core::hash::Hash for Ipv6 {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl Ipv6 {
    /// The sixteen bytes as four words, in the order they have in memory.
    #[inline(always)]
    #[must_use]
    pub const fn words(self) -> [u32; 4] {
        // SAFETY: both types are 16 bytes for which every bit pattern is valid. (Word by word from
        // the bytes, LLVM's BPF back end takes sixteen loads and overruns the stack.)
        unsafe { core::mem::transmute::<[u8; 16], [u32; 4]>(self.0) }
    }

    /// An address of either family in the shared form described at the type.
    #[must_use]
    pub const fn from_ip(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => {
                let o = v4.octets();
                Self([o[0], o[1], o[2], o[3], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
            }
            IpAddr::V6(v6) => Self(v6.octets()),
        }
    }

    /// The address whose bytes in memory are those of `words`.
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u32; 4]) -> Self {
        // SAFETY: as in `words`.
        Self(unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(words) })
    }

    /// The first four bytes: the IPv4 address held in the shared form.
    #[inline(always)]
    #[must_use]
    pub const fn as_v4(self) -> Ipv4 {
        Ipv4::from_word(self.words()[0])
    }

    /// Whether all bytes are zero (`::`, or no address).
    #[inline(always)]
    #[must_use]
    pub const fn is_zero(self) -> bool {
        let w = self.words();
        w[0] | w[1] | w[2] | w[3] == 0
    }
}

impl Port {
    /// From a number in the byte order of the machine.
    #[inline(always)]
    #[must_use]
    pub const fn new(port: u16) -> Self {
        Self(port.to_be_bytes())
    }

    /// The number in the byte order of the machine.
    #[inline(always)]
    #[must_use]
    pub const fn get(self) -> u16 {
        u16::from_be_bytes(self.0)
    }

    /// The two bytes as one word, in the order they have in memory.
    #[inline(always)]
    #[must_use]
    pub const fn word(self) -> u16 {
        u16::from_ne_bytes(self.0)
    }
}

impl From<Ipv4Addr> for Ipv4 {
    fn from(address: Ipv4Addr) -> Self {
        Self(address.octets())
    }
}

impl From<Ipv4> for Ipv4Addr {
    fn from(address: Ipv4) -> Self {
        Self::from(address.0)
    }
}

impl From<Ipv6Addr> for Ipv6 {
    fn from(address: Ipv6Addr) -> Self {
        Self(address.octets())
    }
}

impl From<Ipv6> for Ipv6Addr {
    fn from(address: Ipv6) -> Self {
        Self::from(address.0)
    }
}

impl core::fmt::Display for MacAddress {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An address of one family as the tables of that family hold it.
pub trait Address: Copy + Default + Eq + core::fmt::Debug {
    /// Bits in an address.
    const BITS: u8;
    /// The address in the shared form described at [`Ipv6`].
    fn to_shared(self) -> Ipv6;
    /// The address of this family in the shared form.
    fn from_shared(shared: Ipv6) -> Self;
    /// The address as the standard library has it.
    fn to_ip(self) -> IpAddr;
    /// 32 bits that depend on every bit of the address; for [`crate::flow::FlowKey::tag`].
    fn fold(self) -> u32;
}

impl Address for Ipv4 {
    const BITS: u8 = 32;
    #[inline(always)]
    fn to_shared(self) -> Ipv6 {
        Ipv6::from_words([self.word(), 0, 0, 0])
    }
    #[inline(always)]
    fn from_shared(shared: Ipv6) -> Self {
        shared.as_v4()
    }
    fn to_ip(self) -> IpAddr {
        IpAddr::V4(self.into())
    }
    #[inline(always)]
    fn fold(self) -> u32 {
        self.word()
    }
}

impl Address for Ipv6 {
    const BITS: u8 = 128;
    #[inline(always)]
    fn to_shared(self) -> Ipv6 {
        self
    }
    #[inline(always)]
    fn from_shared(shared: Ipv6) -> Self {
        shared
    }
    fn to_ip(self) -> IpAddr {
        IpAddr::V6(self.into())
    }
    #[inline(always)]
    fn fold(self) -> u32 {
        let w = self.words();
        (w[0] ^ w[1].rotate_left(9)) ^ (w[2].rotate_left(17) ^ w[3].rotate_left(25))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_held_in_network_order() {
        assert_eq!(Port::new(80).0, [0, 80]);
        assert_eq!(Port::new(0x1234).get(), 0x1234);
    }

    #[test]
    fn the_shared_form_keeps_both_families() {
        let v4 = Ipv4([10, 0, 0, 1]);
        assert_eq!(Ipv4::from_shared(v4.to_shared()), v4);
        assert_eq!(Ipv6::from_ip(v4.to_ip()), v4.to_shared());
        let v6 = Ipv6::from("fd00::1".parse::<Ipv6Addr>().unwrap());
        assert_eq!(Ipv6::from_shared(v6.to_shared()), v6);
    }
}
