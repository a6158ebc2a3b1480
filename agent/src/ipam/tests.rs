//! Properties over random sequences, and the edges of ranges of both families.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn with(ranges: &[&str], rest: u64) -> Ipam {
    let mut ipam = Ipam::new(rest);
    let ranges: Vec<IpNet> = ranges.iter().map(|r| net(r)).collect();
    assert_eq!(ipam.set_ranges(&ranges), []);
    ipam
}

fn all(ipam: &mut Ipam, family: Family) -> Vec<String> {
    std::iter::from_fn(|| ipam.allocate(family, 0).ok())
        .map(|address| address.to_string())
        .collect()
}

/// xorshift64*: the same numbers on every run.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

#[test]
fn a_range_is_usable_from_end_to_end() {
    for (range, family, first, last, count) in [
        ("10.0.0.0/29", Family::V4, "10.0.0.1", "10.0.0.6", 6),
        ("10.0.0.8/30", Family::V4, "10.0.0.9", "10.0.0.10", 2),
        ("10.0.0.8/31", Family::V4, "10.0.0.8", "10.0.0.9", 2),
        ("10.0.0.8/32", Family::V4, "10.0.0.8", "10.0.0.8", 1),
        ("10.0.7.0/18", Family::V4, "10.0.0.1", "10.0.63.254", 16_382),
        ("10.0.0.0/8", Family::V4, "10.0.0.1", "10.0.63.255", 16_383),
        ("0.0.0.0/0", Family::V4, "0.0.0.1", "0.0.63.255", 16_383),
        ("fd00::/64", Family::V6, "fd00::1", "fd00::3fff", 16_383),
        ("fd00::/125", Family::V6, "fd00::1", "fd00::7", 7),
        ("fd00::2/127", Family::V6, "fd00::2", "fd00::3", 2),
        ("fd00::2/128", Family::V6, "fd00::2", "fd00::2", 1),
        ("::/0", Family::V6, "::1", "::3fff", 16_383),
    ] {
        let mut ipam = with(&[range], 0);
        let addresses = all(&mut ipam, family);
        assert_eq!(addresses.len(), count, "{range}");
        assert_eq!(addresses.first().unwrap(), first, "{range}");
        assert_eq!(addresses.last().unwrap(), last, "{range}");
        let distinct: BTreeSet<_> = addresses.iter().collect();
        assert_eq!(distinct.len(), count, "{range}");
    }
}

#[test]
fn ranges_are_used_in_their_order() {
    let mut ipam = with(&["fd00::/126", "10.0.1.0/30", "10.0.0.0/30"], 0);
    assert_eq!(
        all(&mut ipam, Family::V4),
        ["10.0.1.1", "10.0.1.2", "10.0.0.1", "10.0.0.2"]
    );
    let ranges: Vec<(String, u32)> = ipam
        .ranges()
        .map(|r| (r.network.to_string(), r.length))
        .collect();
    assert_eq!(
        ranges,
        [
            ("10.0.1.0/30".into(), 4),
            ("10.0.0.0/30".into(), 4),
            ("fd00::/126".into(), 4),
        ]
    );
}

#[test]
fn exhaustion_names_ranges_and_counts() {
    let mut ipam = with(&["10.0.0.0/30", "10.0.1.0/30"], 0);
    all(&mut ipam, Family::V4);
    let message = ipam.allocate(Family::V4, 0).unwrap_err().to_string();
    assert!(
        message.contains("10.0.0.0/30: 2 of 2 in use, 10.0.1.0/30: 2 of 2 in use"),
        "{message}"
    );
    let message = ipam.allocate(Family::V6, 0).unwrap_err().to_string();
    assert!(message.contains("no IPv6 pod range"), "{message}");
}

#[test]
fn rest_is_honoured_over_all_ranges_until_nothing_else_is_free() {
    let mut ipam = with(&["10.0.0.0/32", "10.0.1.0/32"], 60);
    let first = ipam.allocate(Family::V4, 0).unwrap();
    assert!(ipam.release(first, 10));
    let second = ipam.allocate(Family::V4, 20).unwrap();
    assert_ne!(first, second, "the other range, although it comes later");
    assert!(ipam.release(second, 5));
    assert_eq!(
        ipam.allocate(Family::V4, 30).unwrap(),
        second,
        "the longest rested of all ranges"
    );
    assert_eq!(ipam.allocate(Family::V4, 30).unwrap(), first);
}

#[test]
fn a_range_that_left_the_node_keeps_its_pods_and_then_goes() {
    let mut ipam = with(&["10.0.0.0/29"], 0);
    let old = ipam.allocate(Family::V4, 0).unwrap();
    assert_eq!(ipam.set_ranges(&[net("10.0.1.0/29"), net("fd00::/64")]), []);
    assert_eq!(
        ipam.allocate(Family::V4, 0).unwrap().to_string(),
        "10.0.1.1"
    );
    assert_eq!(ipam.families().count(), 2);
    assert_eq!(ipam.reserve(old), Err(IpamError::InUse(old)));
    assert_eq!(ipam.ranges().filter(|r| !r.active).count(), 1);
    assert!(ipam.release(old, 0));
    assert_eq!(ipam.ranges().filter(|r| !r.active).count(), 0);
    assert_eq!(ipam.reserve(old), Err(IpamError::Outside(old)));
}

#[test]
fn a_range_in_the_way_is_told_and_its_successor_comes_by_itself() {
    let mut ipam = with(&["10.0.0.0/24"], 0);
    let old = ipam.allocate(Family::V4, 0).unwrap();
    let refused = ipam.set_ranges(&[net("10.0.0.0/16")]);
    assert_eq!(
        refused[0].to_string(),
        "pod range 10.0.0.0/16 is not used: it overlaps 10.0.0.0/24, which 1 addresses of this \
         node belong to; it is tried again when that range is gone from the Node object and empty"
    );
    assert_eq!(
        ipam.allocate(Family::V4, 0),
        Err(IpamError::NoRange(Family::V4))
    );
    assert!(ipam.release(old, 0));
    assert!(ipam.allocate(Family::V4, 0).is_ok());
}

#[test]
fn a_family_has_four_ranges() {
    let mut ipam = Ipam::new(0);
    let ranges: Vec<IpNet> = (0..5).map(|i| net(&format!("10.0.{i}.0/24"))).collect();
    let refused = ipam.set_ranges(&ranges);
    assert_eq!(refused, [IpamError::TooManyRanges(ranges[4])]);
    assert_eq!(ipam.set_ranges(&ranges[1..]), []);
    assert_eq!(ipam.set_ranges(&[net("fd00::/64")]), []);
}

#[test]
fn state_survives_a_restart() {
    let mut before = with(&["10.0.0.0/28", "fd00::/64"], 60);
    for family in [Family::V4, Family::V6] {
        let first = before.allocate(family, 0).unwrap();
        before.allocate(family, 0).unwrap();
        before.release(first, 5);
    }
    let text = serde_json::to_string(&before.state()).unwrap();
    let state: IpamState = serde_json::from_str(&text).unwrap();

    let mut after = Ipam::new(60);
    assert_eq!(after.restore(&state, 6), []);
    for address in ["10.0.0.2", "fd00::2"] {
        after.reserve(address.parse().unwrap()).unwrap();
    }
    assert_eq!(after.families().count(), 0, "the node is not known yet");
    assert_eq!(
        after.set_ranges(&[net("10.0.0.0/28"), net("fd00::/64")]),
        []
    );
    for (family, next) in [(Family::V4, "10.0.0.3"), (Family::V6, "fd00::3")] {
        assert_eq!(after.allocate(family, 6).unwrap().to_string(), next);
    }
    assert_eq!(after.state().resting, before.state().resting);
}

#[test]
fn resting_addresses_survive_though_no_pod_was_left() {
    let mut before = with(&["10.0.0.0/28"], 60);
    let address = before.allocate(Family::V4, 0).unwrap();
    before.release(address, 100);
    let mut after = Ipam::new(60);
    after.restore(&before.state(), 101);
    // A pod that vanished while no agent ran is released before the node is known.
    after.reserve("10.0.0.9".parse().unwrap()).unwrap();
    after.release("10.0.0.9".parse().unwrap(), 101);
    after.set_ranges(&[net("10.0.0.0/28")]);
    assert_eq!(after.state().resting.len(), 2);
}

#[test]
fn times_of_another_clock_do_not_rest_for_ever() {
    let mut ipam = Ipam::new(60);
    let state = IpamState {
        ranges: vec![RangeState {
            network: net("10.0.0.0/32"),
            cursor: 0,
        }],
        resting: vec![RestingAddress {
            address: "10.0.0.0".parse().unwrap(),
            released: 1_000_000,
        }],
    };
    assert_eq!(ipam.restore(&state, 10), []);
    ipam.set_ranges(&[net("10.0.0.0/32")]);
    assert_eq!(ipam.state().resting[0].released, 10);
}

/// Against a plain model: no address twice, none lost, rest honoured unless nothing else was free.
#[test]
fn random_sequences_agree_with_the_model() {
    const REST: u64 = 20;
    for (range, family, size) in [
        ("10.0.0.0/28", Family::V4, 14),
        ("fd00::/124", Family::V6, 15),
    ] {
        for seed in 1..=50 {
            let mut random = Random(seed * 0x9e37_79b9);
            let mut ipam = with(&[range], REST);
            let mut used: BTreeSet<IpAddr> = BTreeSet::new();
            let mut released: BTreeMap<IpAddr, u64> = BTreeMap::new();
            let mut now = 0;
            for _ in 0..2000 {
                now += random.below(3) as u64;
                match random.below(10) {
                    0..5 => match ipam.allocate(family, now) {
                        Ok(address) => {
                            assert!(used.insert(address), "{address} twice");
                            let early = released.get(&address).is_some_and(|t| t + REST > now);
                            let rested = released
                                .iter()
                                .filter(|(a, t)| !used.contains(a) && **t + REST <= now)
                                .count();
                            let fresh =
                                size - used.union(&released.keys().copied().collect()).count();
                            assert!(
                                !early || rested + fresh == 0,
                                "{address} did not rest although others were free"
                            );
                        }
                        Err(error) => {
                            assert!(matches!(error, IpamError::Exhausted { .. }), "{error}");
                            assert_eq!(used.len(), size);
                        }
                    },
                    5..9 => {
                        let nth = random.below(size);
                        if let Some(&address) = used.iter().nth(nth) {
                            assert!(ipam.release(address, now));
                            assert!(!ipam.release(address, now), "twice");
                            used.remove(&address);
                            released.insert(address, now);
                        }
                    }
                    _ => {
                        // A restart.
                        let state = ipam.state();
                        ipam = Ipam::new(REST);
                        assert_eq!(ipam.restore(&state, now), []);
                        for &address in &used {
                            ipam.reserve(address).unwrap();
                        }
                        assert_eq!(ipam.set_ranges(&[net(range)]), []);
                    }
                }
                let info = ipam.ranges().next().unwrap();
                assert_eq!(info.used as usize, used.len());
                assert_eq!(info.size as usize, size);
            }
        }
    }
}
