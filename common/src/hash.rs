//! The hash that chooses a slot. It is a function of the packet alone and the same on every node,
//! so that all nodes send a connection to the same endpoint and a lost flow entry changes nothing.

/// Mixes the words of a tuple into 32 well-spread bits (the finaliser of MurmurHash3 over a
/// multiply-rotate chain). The same words in the same order give the same value everywhere.
#[inline(always)]
#[must_use]
pub const fn mix<const N: usize>(words: [u32; N]) -> u32 {
    let mut hash = SEED;
    let mut i = 0;
    while i < N {
        hash = (hash
            ^ words[i]
                .wrapping_mul(0xcc9e_2d51)
                .rotate_left(15)
                .wrapping_mul(0x1b87_3593))
        .rotate_left(13)
        .wrapping_mul(5)
        .wrapping_add(0xe654_6b64);
        i += 1;
    }
    finish(hash)
}

/// Seed shared by all nodes and versions: changing it moves connections.
const SEED: u32 = 0x5765_6972;

#[inline(always)]
const fn finish(mut hash: u32) -> u32 {
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_values_are_part_of_the_abi() {
        // A change here moves every connection of a cluster in which two versions run.
        assert_eq!(mix([0; 4]), mix([0; 4]));
        assert_ne!(mix([0, 1]), mix([1, 0]));
    }

    #[test]
    fn consecutive_ports_spread_evenly() {
        let mut buckets = [0u32; 16];
        for port in 0..16_000u32 {
            let hash = mix([0x0a00_0001, 0x0a60_0001, port << 16 | 80, 6]);
            buckets[((u64::from(hash) * 16) >> 32) as usize] += 1;
        }
        // 1000 expected; six standard deviations are about 184.
        assert!(
            buckets.iter().all(|&n| (816..1184).contains(&n)),
            "{buckets:?}"
        );
    }
}
