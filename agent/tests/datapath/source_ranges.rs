//! Who may use load balancer addresses: what stands in the maps, in which order it gets there, and what a
//! restart makes of it.

use std::{collections::BTreeSet, net::IpAddr};

use aya::maps::lpm_trie::Key;
use ipnet::IpNet;
use weir_agent::{
    datapath::Datapath,
    model::{EndpointSet, Frontend, FrontendKind, Scope, ServicePort},
    objects::Family,
};
use weir_common::{
    Ipv4, Ipv6,
    service::{SourceRangeKey, frontend::SOURCE_RANGES, service_port_of_row},
};

use crate::support::{BpfFs, FAMILIES, ReadOnly, backend_address, cluster_ip, key, pod_ip, port};

const BALANCED: u32 = 900;

/// Port 80 of a ClusterIP and of a load balancer address, for these clients.
fn balanced(family: Family, ranges: Option<&[IpNet]>) -> ServicePort {
    let mut desired = port(family, 1, [1]);
    for scope in [Scope::Inside, Scope::Outside] {
        desired.frontends.insert(Frontend {
            address: Some(cluster_ip(family, BALANCED)),
            port: 80,
            kind: FrontendKind::LoadBalancer,
            scope,
            set: EndpointSet::Cluster,
        });
    }
    desired.source_ranges = ranges.map(|ranges| ranges.iter().copied().collect());
    desired
}

/// The range of the family that ends in `number`.
fn range(family: Family, number: u8) -> IpNet {
    match family {
        Family::V4 => format!("192.0.{number}.0/24"),
        Family::V6 => format!("2001:db8:{number}::/48"),
    }
    .parse()
    .unwrap()
}

/// The value that leads from the load balancer address to the Service port.
fn value(fs: &BpfFs, family: Family, scope: Scope) -> u32 {
    fs.frontend_row(cluster_ip(family, BALANCED), 80, scope)
        .unwrap()
}

/// Whether both frontends at the load balancer address are restricted.
fn is_restricted(fs: &BpfFs, family: Family) -> bool {
    let scopes = [Scope::Inside, Scope::Outside];
    let [inside, outside] = scopes.map(|scope| value(fs, family, scope) & SOURCE_RANGES != 0);
    assert_eq!(inside, outside);
    let cluster = fs
        .frontend_row(cluster_ip(family, 1), 80, Scope::Inside)
        .unwrap();
    assert_eq!(cluster & SOURCE_RANGES, 0, "a ClusterIP is not");
    inside
}

/// Whether the program would find a range for a client of a Service port.
fn serves(fs: &BpfFs, number: u32, client: IpAddr) -> bool {
    let service_port = number.to_be_bytes();
    match client {
        IpAddr::V4(v4) => {
            let address = Ipv4::from(v4);
            let key = SourceRangeKey {
                service_port,
                address,
            };
            let map = fs.trie::<SourceRangeKey<Ipv4>, u32>("SOURCE_RANGES_V4");
            map.get(&Key::new(64, key), 0).is_ok()
        }
        IpAddr::V6(v6) => {
            let address = Ipv6::from(v6);
            let key = SourceRangeKey {
                service_port,
                address,
            };
            let map = fs.trie::<SourceRangeKey<Ipv6>, u32>("SOURCE_RANGES_V6");
            map.get(&Key::new(160, key), 0).is_ok()
        }
    }
}

/// Of the ranges 1 to 4, those whose first client is served.
fn served(fs: &BpfFs, family: Family, number: u32) -> Vec<u8> {
    let clients = 1..=4u8;
    clients
        .filter(|n| serves(fs, number, range(family, *n).addr()))
        .collect()
}

fn apply(datapath: &mut Datapath, family: Family, ranges: Option<&[IpNet]>) -> u32 {
    let desired = balanced(family, ranges);
    datapath
        .apply_service(&key(family, 1), Some(&desired))
        .unwrap()
        .number
}

fn fill(datapath: &Datapath, family: Family) -> u32 {
    let name = match family {
        Family::V4 => "SOURCE_RANGES_V4",
        Family::V6 => "SOURCE_RANGES_V6",
    };
    let fill = datapath.fill();
    fill.iter().find(|fill| fill.map == name).unwrap().entries
}

#[test]
fn ranges_are_switched_live_and_go_with_their_service() {
    for family in FAMILIES {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        let number = apply(&mut datapath, family, None);
        assert!(!is_restricted(&fs, family));
        let range = |n| range(family, n);
        for (ranges, expected) in [
            (&[range(1), range(2)][..], &[1, 2][..]),
            (&[range(2), range(3)], &[2, 3]),
            (&[], &[]),
            (&[range(4)], &[4]),
        ] {
            assert_eq!(apply(&mut datapath, family, Some(ranges)), number);
            assert!(is_restricted(&fs, family));
            assert_eq!(served(&fs, family, number), expected);
            assert_eq!(fill(&datapath, family), ranges.len() as u32);
        }
        assert!(!serves(&fs, number + 1, range(4).addr()), "another Service");
        apply(&mut datapath, family, None);
        assert!(!is_restricted(&fs, family));
        assert_eq!(fill(&datapath, family), 0);
        apply(&mut datapath, family, Some(&[range(1)]));
        datapath.apply_service(&key(family, 1), None).unwrap();
        assert_eq!(served(&fs, family, number), [0; 0]);
        assert_eq!(fill(&datapath, family), 0);
    }
}

#[test]
fn a_frontend_is_restricted_after_its_ranges_are_there_and_until_before_they_go() {
    for family in FAMILIES {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        let number = apply(&mut datapath, family, None);
        let frontends = match family {
            Family::V4 => "FRONTENDS_V4",
            Family::V6 => "FRONTENDS_V6",
        };
        let restricted = balanced(family, Some(&[range(family, 1)]));
        let refused = ReadOnly::new(&fs, frontends);
        let key = key(family, 1);
        datapath.apply_service(&key, Some(&restricted)).unwrap_err();
        assert_eq!(served(&fs, family, number), [1], "before the bit");
        assert!(!is_restricted(&fs, family));
        drop(refused);
        datapath.apply_service(&key, Some(&restricted)).unwrap();
        assert!(is_restricted(&fs, family));

        // Clients that are served by the old and the new ranges are served all the time.
        let refused = ReadOnly::new(&fs, frontends);
        let open = balanced(family, None);
        datapath.apply_service(&key, Some(&open)).unwrap_err();
        assert_eq!(served(&fs, family, number), [1], "after the bit");
        drop(refused);
        datapath.apply_service(&key, Some(&open)).unwrap();
        assert_eq!(served(&fs, family, number), [0; 0]);
    }
}

#[test]
fn ranges_that_cannot_be_entered_let_nobody_in_and_hold_nothing_up() {
    for family in FAMILIES {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        let ranges = match family {
            Family::V4 => "SOURCE_RANGES_V4",
            Family::V6 => "SOURCE_RANGES_V6",
        };
        let refused = ReadOnly::new(&fs, ranges);
        let mut desired = balanced(family, Some(&[range(family, 1)]));
        let key = key(family, 1);
        let error = datapath.apply_service(&key, Some(&desired)).unwrap_err();
        assert!(error.to_string().contains(ranges), "{error}");
        assert!(is_restricted(&fs, family));
        let number = service_port_of_row(value(&fs, family, Scope::Inside));
        assert_eq!(served(&fs, family, number), [0; 0]);
        // Endpoints change all the same.
        desired.backends = port(family, 1, [2]).backends;
        datapath.apply_service(&key, Some(&desired)).unwrap_err();
        let spread = fs.spread(number);
        let backend = fs.backend(*spread.keys().next().unwrap());
        assert_eq!(spread.len(), 1);
        assert_eq!(
            backend.port.get(),
            backend_address(family, 2).port,
            "{backend:?}"
        );
        assert_eq!(backend.address, Ipv6::from_ip(pod_ip(family, 2)));
        drop(refused);
        datapath.apply_service(&key, Some(&desired)).unwrap();
        assert_eq!(served(&fs, family, number), [1]);
    }
}

#[test]
fn a_restart_keeps_what_is_wanted_and_prunes_the_rest() {
    for family in FAMILIES {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        let range = |n| range(family, n);
        let number = apply(&mut datapath, family, Some(&[range(1), range(2)]));
        let mut other = balanced(family, Some(&[range(3)]));
        other.frontends = port(family, 2, [1]).frontends;
        let gone = datapath
            .apply_service(&key(family, 2), Some(&other))
            .unwrap()
            .number;
        drop(datapath);

        // An agent that died before the frontend: nobody is to inherit this.
        let stale = number.max(gone) + 1;
        match range(4) {
            IpNet::V4(net) => {
                let key = SourceRangeKey {
                    service_port: stale.to_be_bytes(),
                    address: Ipv4::from(net.addr()),
                };
                let mut map = fs.trie::<SourceRangeKey<Ipv4>, u32>("SOURCE_RANGES_V4");
                map.insert(&Key::new(56, key), 0, 0).unwrap();
            }
            IpNet::V6(net) => {
                let key = SourceRangeKey {
                    service_port: stale.to_be_bytes(),
                    address: Ipv6::from(net.addr()),
                };
                let mut map = fs.trie::<SourceRangeKey<Ipv6>, u32>("SOURCE_RANGES_V6");
                map.insert(&Key::new(80, key), 0, 0).unwrap();
            }
        }
        let mut datapath = fs.open();
        assert_eq!(served(&fs, family, stale), [4]);
        assert_eq!(
            apply(&mut datapath, family, Some(&[range(2), range(4)])),
            number
        );
        assert_eq!(served(&fs, family, number), [2, 4]);
        let mut new = balanced(family, Some(&[range(2)]));
        new.frontends = port(family, 3, [1]).frontends;
        let taken = datapath
            .apply_service(&key(family, 3), Some(&new))
            .unwrap()
            .number;
        assert_eq!(taken, stale, "the number that was to be taken");
        assert_eq!(served(&fs, family, taken), [2]);
        datapath.prune().unwrap();
        assert_eq!(served(&fs, family, gone), [0; 0]);
        assert_eq!(fill(&datapath, family), 3);
    }
}

#[test]
fn a_full_map_names_the_remedy_and_serves_who_found_room() {
    let family = Family::V4;
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let many: BTreeSet<IpNet> = (0..=65_536u32)
        .map(|i| IpNet::new(IpAddr::V4((0x0a00_0000 + (i << 4)).into()), 28).unwrap())
        .collect();
    let mut desired = balanced(family, None);
    desired.source_ranges = Some(many.clone());
    let error = datapath
        .apply_service(&key(family, 1), Some(&desired))
        .unwrap_err()
        .to_string();
    for part in [
        "SOURCE_RANGES_V4",
        "65536",
        "loadBalancerSourceRanges",
        "not served",
    ] {
        assert!(error.contains(part), "{part:?}: {error}");
    }
    assert!(is_restricted(&fs, family));
    let number = service_port_of_row(value(&fs, family, Scope::Outside));
    assert!(serves(&fs, number, many.first().unwrap().addr()));
    assert!(!serves(&fs, number, many.last().unwrap().addr()));
}
