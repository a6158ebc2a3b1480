//! Incremental internet checksums (RFC 1624): the difference that a rewrite makes, computed once
//! when a flow begins and applied to every packet.

use crate::{Ipv4, Ipv6, Port};

/// Something that stands in a packet and takes part in a checksum.
pub trait Summed {
    /// Sum of the 32-bit words, in the byte order they have in memory, with room for carries.
    fn sum(self) -> u64;
    /// Sum of the complements of the same words.
    fn complement_sum(self) -> u64;
}

impl Summed for Ipv4 {
    #[inline(always)]
    fn sum(self) -> u64 {
        self.word() as u64
    }
    #[inline(always)]
    fn complement_sum(self) -> u64 {
        !self.word() as u64
    }
}

impl Summed for Ipv6 {
    #[inline(always)]
    fn sum(self) -> u64 {
        let w = self.words();
        w[0] as u64 + w[1] as u64 + w[2] as u64 + w[3] as u64
    }
    #[inline(always)]
    fn complement_sum(self) -> u64 {
        let w = self.words();
        !w[0] as u64 + !w[1] as u64 + !w[2] as u64 + !w[3] as u64
    }
}

impl Summed for Port {
    #[inline(always)]
    fn sum(self) -> u64 {
        self.word() as u64
    }
    #[inline(always)]
    fn complement_sum(self) -> u64 {
        !self.word() as u64
    }
}

/// What replacing `old` by `new` adds to a checksum: to be given to `bpf_l4_csum_replace` as
/// `to` with `from` 0 and size 0, or to [`apply`].
#[inline(always)]
#[must_use]
pub fn difference<T: Summed>(old: T, new: T) -> u32 {
    fold32(old.complement_sum() + new.sum())
}

/// The sum of two differences.
#[inline(always)]
#[must_use]
pub const fn add(a: u32, b: u32) -> u32 {
    fold32(a as u64 + b as u64)
}

/// A checksum field (byte order as in memory) after a difference.
#[inline(always)]
#[must_use]
pub const fn apply(checksum: u16, difference: u32) -> u16 {
    !fold16((!checksum) as u32 as u64 + difference as u64)
}

/// Folds carries into 32 bits.
#[inline(always)]
const fn fold32(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    ((sum & 0xffff_ffff) + (sum >> 32)) as u32
}

/// Folds a sum of 16- or 32-bit words into 16 bits.
#[inline(always)]
#[must_use]
pub const fn fold16(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(bytes: &[u8]) -> u16 {
        let sum = bytes
            .chunks(2)
            .map(|c| u64::from(u16::from_ne_bytes([c[0], c[1]])))
            .sum();
        !fold16(sum)
    }

    #[test]
    fn a_difference_equals_a_checksum_from_scratch() {
        let mut seed = 1u32;
        let mut random = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        };
        for _ in 0..2000 {
            let mut packet = [0u8; 40];
            packet.fill_with(&mut random);
            let before = checksum(&packet);
            let old = Ipv6(packet[8..24].try_into().unwrap());
            let old_port = Port([packet[30], packet[31]]);
            let new = Ipv6(core::array::from_fn(|_| random()));
            let new_port = Port([random(), random()]);
            packet[8..24].copy_from_slice(&new.0);
            packet[30..32].copy_from_slice(&new_port.0);
            let by_difference = apply(
                before,
                add(difference(old, new), difference(old_port, new_port)),
            );
            assert_eq!(by_difference, checksum(&packet));
        }
    }
}
