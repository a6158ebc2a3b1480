//! Maglev consistent hashing (Eisenbud et al., NSDI 2016, section 3.4): how the endpoints of a
//! Service port share its slots. Every node computes the same choice, because it follows from the
//! addresses alone. Pure arithmetic; called by the datapath when it fills a region of slots.

use std::net::IpAddr;

use super::BackendAddress;

/// Tables by number of endpoints: the most endpoints of a class, and its size, a prime (or one).
const CLASSES: [(usize, usize); 7] = [
    (1, 1),
    (4, 251),
    (10, 1021),
    (20, 4093),
    (50, 16_381),
    (100, 32_749),
    (usize::MAX, 65_521),
];

/// Seeds of the two hashes of an endpoint. Part of what nodes agree on: a change moves
/// connections in a cluster in which two versions run.
const OFFSET_SEED: u64 = 0x5765_6972_0000_0001;
const SKIP_SEED: u64 = 0x5765_6972_0000_0002;

/// Number of slots for `endpoints` endpoints of a Service port that now has `current` slots (0: none).
///
/// A table grows as soon as it has to, and shrinks only when the endpoints are fewer than half of
/// what the smaller size is meant for: a change of size moves most connections, so endpoints
/// that come and go around a limit must not cause it. The result is 0, 1 or a prime below 65,536.
#[must_use]
pub fn table_size(endpoints: usize, current: usize) -> usize {
    if endpoints == 0 {
        return 0;
    }
    let wanted = class_for(endpoints);
    let mut class = CLASSES
        .iter()
        .position(|&(_, size)| size == current)
        .unwrap_or(wanted)
        .max(wanted);
    while class > wanted && endpoints < CLASSES[class - 1].0.div_ceil(2) {
        class -= 1;
    }
    CLASSES[class].1
}

fn class_for(endpoints: usize) -> usize {
    CLASSES
        .iter()
        .position(|&(most, _)| endpoints <= most)
        .unwrap_or(CLASSES.len() - 1)
}

/// Fills every slot of `table` with the number that comes with one of `endpoints`.
///
/// The length of the table is a size that [`table_size`] gives. The order of `endpoints` does not
/// matter; their addresses differ. Each endpoint gets the floor or the ceiling of slots/endpoints;
/// if there are more endpoints than slots, the first ones by address get one each. Without
/// endpoints every slot becomes 0, which is no backend.
pub fn fill(endpoints: &[(BackendAddress, u32)], table: &mut [u32]) {
    let mut order: Vec<&(BackendAddress, u32)> = endpoints.iter().collect();
    order.sort_unstable_by_key(|(address, _)| *address);
    let slots = table.len() as u64;
    let mut walks: Vec<Walk> = order
        .iter()
        .map(|(address, _)| Walk::new(address, slots))
        .collect();
    table.fill(FREE);
    let mut left = if walks.is_empty() { 0 } else { table.len() };
    // In turn, each endpoint takes the first slot of its own permutation that is still free.
    while left > 0 {
        for (owner, walk) in (1..).zip(&mut walks).take(left) {
            let mut slot = walk.next(slots);
            while table[slot] != FREE {
                slot = walk.next(slots);
            }
            table[slot] = owner;
            left -= 1;
        }
    }
    for slot in table.iter_mut().filter(|slot| **slot != FREE) {
        *slot = order[*slot as usize - 1].1;
    }
}

/// While a table is being filled its slots hold the rank of their owner, counted from one.
const FREE: u32 = 0;

/// The walk of one endpoint through all slots: `offset`, `offset + skip`, … modulo the prime size.
struct Walk {
    position: u64,
    skip: u64,
}

impl Walk {
    fn new(endpoint: &BackendAddress, slots: u64) -> Self {
        let (position, skip) = match slots {
            0 | 1 => (0, 0),
            _ => (
                hash(endpoint, OFFSET_SEED) % slots,
                hash(endpoint, SKIP_SEED) % (slots - 1) + 1,
            ),
        };
        Self { position, skip }
    }

    fn next(&mut self, slots: u64) -> usize {
        let slot = self.position;
        self.position += self.skip;
        if self.position >= slots {
            self.position -= slots;
        }
        slot as usize
    }
}

/// FNV-1a over the bytes of address and port, finished by SplitMix64's mixer. The same on every
/// machine, in every process and version.
fn hash(endpoint: &BackendAddress, seed: u64) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ seed;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    match endpoint.address {
        IpAddr::V4(v4) => add(&v4.octets()),
        IpAddr::V6(v6) => add(&v6.octets()),
    }
    add(&endpoint.port.to_be_bytes());
    hash ^= hash >> 30;
    hash = hash.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash ^= hash >> 27;
    hash = hash.wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn endpoint(index: u32, v6: bool) -> (BackendAddress, u32) {
        let address = if v6 {
            IpAddr::V6(Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(index)))
        } else {
            IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + index))
        };
        (
            BackendAddress {
                address,
                port: 8080,
            },
            index + 1,
        )
    }

    fn endpoints(first: u32, count: u32, v6: bool) -> Vec<(BackendAddress, u32)> {
        (first..first + count).map(|i| endpoint(i, v6)).collect()
    }

    fn filled(endpoints: &[(BackendAddress, u32)], slots: usize) -> Vec<u32> {
        let mut table = vec![u32::MAX; slots];
        fill(endpoints, &mut table);
        table
    }

    #[test]
    fn sizes_are_one_or_prime_and_fit_a_chunk() {
        for (_, size) in CLASSES {
            assert!(size <= weir_common::limits::SLOTS_PER_CHUNK as usize);
            assert!(size == 1 || (2..=size.isqrt()).all(|divisor| size % divisor != 0));
        }
    }

    #[test]
    fn a_table_grows_at_once_and_shrinks_late() {
        let size_after = |steps: &[usize]| steps.iter().fold(0, |size, &n| table_size(n, size));
        let cases: &[(&[usize], usize)] = &[
            (&[0], 0),
            (&[1], 1),
            (&[2], 251),
            (&[4], 251),
            (&[5], 1021),
            (&[11], 4093),
            (&[50], 16_381),
            (&[51], 32_749),
            (&[101], 65_521),
            (&[5000], 65_521),
            (&[11, 10, 5], 4093),
            (&[11, 4], 1021),
            (&[51, 25], 32_749),
            (&[51, 24], 16_381),
            (&[101, 50], 65_521),
            (&[101, 49], 32_749),
            (&[101, 1], 251),
            (&[2, 1], 251),
            (&[2, 0], 0),
            (&[2, 0, 1], 1),
        ];
        for (steps, size) in cases {
            assert_eq!(size_after(steps), *size, "{steps:?}");
        }
        assert_eq!(table_size(7, 12_345), 1021, "an unknown size is no guide");
    }

    #[test]
    fn every_endpoint_gets_its_fair_share() {
        for v6 in [false, true] {
            for count in [1, 2, 3, 4, 7, 10, 20, 50, 100, 651, 1000] {
                let slots = table_size(count as usize, 0);
                let table = filled(&endpoints(0, count, v6), slots);
                let mut shares = vec![0; count as usize + 1];
                for number in table {
                    shares[number as usize] += 1;
                }
                assert_eq!(shares[0], 0, "slots without an endpoint");
                let floor = slots / count as usize;
                for share in &shares[1..] {
                    assert!(
                        (floor..=floor + 1).contains(share),
                        "{share} of {slots} for one of {count}"
                    );
                }
            }
        }
    }

    #[test]
    fn removing_one_of_fifty_moves_few_other_slots() {
        let mut worst = 0.0f64;
        for seed in 0..20 {
            let before = endpoints(seed * 977, 50, seed % 2 == 1);
            let slots = table_size(50, 0);
            let removed = before[seed as usize * 2].1;
            let after: Vec<_> = before
                .iter()
                .copied()
                .filter(|(_, number)| *number != removed)
                .collect();
            assert_eq!(table_size(49, slots), slots);
            let (old, new) = (filled(&before, slots), filled(&after, slots));
            let others = old.iter().filter(|&&n| n != removed).count();
            let moved = std::iter::zip(&old, &new)
                .filter(|&(&old, &new)| old != removed && old != new)
                .count();
            worst = worst.max(moved as f64 / others as f64);
        }
        assert!(worst <= 0.02, "{worst}");
    }

    #[test]
    fn the_order_of_the_input_does_not_matter() {
        let mut shuffled = endpoints(0, 20, false);
        let table = filled(&shuffled, 4093);
        shuffled.reverse();
        shuffled.swap(3, 11);
        assert_eq!(filled(&shuffled, 4093), table);
    }

    #[test]
    fn the_choice_does_not_depend_on_the_numbers() {
        let numbered = endpoints(0, 10, true);
        let renumbered: Vec<_> = numbered.iter().map(|&(a, n)| (a, n + 1000)).collect();
        let shifted: Vec<u32> = filled(&numbered, 1021).iter().map(|n| n + 1000).collect();
        assert_eq!(filled(&renumbered, 1021), shifted);
    }

    #[test]
    fn small_and_empty_tables() {
        assert_eq!(filled(&endpoints(4, 1, false), 1), [5]);
        assert_eq!(filled(&endpoints(0, 3, false), 1), [1]);
        assert_eq!(filled(&[], 3), [0, 0, 0]);
        assert!(filled(&endpoints(0, 1, false), 0).is_empty());
    }

    #[test]
    fn the_hash_is_what_other_versions_compute() {
        let v4 = endpoint(1, false).0;
        let v6 = endpoint(1, true).0;
        assert_eq!(hash(&v4, OFFSET_SEED), V4_HASH);
        assert_eq!(hash(&v6, OFFSET_SEED), V6_HASH);
        assert_ne!(hash(&v4, OFFSET_SEED), hash(&v4, SKIP_SEED));
    }

    const V4_HASH: u64 = 0x20e2_2d58_8842_7548;
    const V6_HASH: u64 = 0x84e9_1754_e94c_76da;
}
