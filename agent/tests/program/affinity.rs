//! Session affinity: a client of a Service port stays with its endpoint, as long as both last.

use std::{collections::BTreeSet, net::IpAddr};

use weir_agent::{
    model::{BackendAddress, EndpointSet, Frontend, ServicePort},
    objects::Protocol,
};
use weir_common::{
    Ipv6,
    affinity::{Affinity, AffinityKey},
    flow::TICKS_PER_SECOND,
    metrics::{Hook, outcome},
};

use crate::{
    bed::{Bed, CLIENT, ESTABLISHED, OTHER, Verdict, for_both_families, on, service_port},
    host::{NET_DEVICE, host_macs, own_device},
    packet::{ACK, L4, Packet, SYN, tcp, udp},
};

const TARGET: u16 = 8080;
const TIMEOUT: u32 = 600;

fn endpoints(bed: &Bed, numbers: impl IntoIterator<Item = u32>) -> Vec<(IpAddr, u16)> {
    let address = |number| (bed.remote_pod(number), TARGET);
    numbers.into_iter().map(address).collect()
}

/// A Service port with affinity and these endpoints.
fn wanted(bed: &Bed, index: u32, numbers: impl IntoIterator<Item = u32>) -> ServicePort {
    let frontend = Frontend::cluster_ip(bed.cluster_ip(index), 80);
    ServicePort {
        affinity: Some(TIMEOUT),
        ..service_port([frontend], &endpoints(bed, numbers))
    }
}

fn opening(protocol: Protocol, port: u16) -> L4 {
    match protocol {
        Protocol::Tcp => tcp(port, 80, SYN),
        _ => udp(port, 80),
    }
}

/// Number of the endpoint that a packet came out for: the last byte of its address.
fn chosen(bed: &Bed, frame: &[u8]) -> u32 {
    u32::from(frame[if bed.is_v4() { 33 } else { 53 }])
}

/// Opens a connection from `pod` to an address, and gives the endpoint that it was led to.
fn connect(bed: &mut Bed, pod: u32, address: IpAddr, l4: L4) -> u32 {
    let request = bed.leaving(pod, address, l4);
    let seen = bed.pod_sends(pod, &request);
    assert_eq!(seen.verdict, Verdict::Remote);
    chosen(bed, &seen.output.frame)
}

fn entries(bed: &Bed) -> Vec<(AffinityKey, Affinity)> {
    let map = bed.fs.hash::<AffinityKey, Affinity>("AFFINITY");
    map.iter().map(Result::unwrap).collect()
}

fn set(bed: &Bed, key: &AffinityKey, entry: &Affinity) {
    let mut map = bed.fs.hash::<AffinityKey, Affinity>("AFFINITY");
    map.insert(key, entry, 0).unwrap();
}

#[test]
fn a_client_stays_with_its_endpoint() {
    for_both_families(|bed| {
        for (index, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp)] {
            let desired = wanted(bed, index, 1..=8);
            bed.apply(index, protocol, 80, desired);
            let vip = bed.cluster_ip(index);
            for pod in [CLIENT, OTHER] {
                let went: BTreeSet<u32> = (1..100)
                    .map(|port| connect(bed, pod, vip, opening(protocol, port)))
                    .collect();
                assert_eq!(went.len(), 1, "{protocol:?}: {went:?}");
            }
            assert_eq!(entries(bed).len(), 2 * index as usize);
            // One look and one note for a connection, none for what follows.
            let request = bed.leaving(CLIENT, vip, opening(protocol, 500));
            assert_eq!(bed.pod_sends(CLIENT, &request).lookups.affinity, 2);
            let l4 = match protocol {
                Protocol::Tcp => tcp(500, 80, ACK),
                _ => udp(500, 80),
            };
            let request = bed.leaving(CLIENT, vip, l4);
            assert_eq!(bed.pod_sends(CLIENT, &request).lookups, ESTABLISHED);
        }
        // Without affinity a hundred connections go everywhere.
        let backends = endpoints(bed, 1..=8);
        bed.service(3, Protocol::Tcp, 80, &backends);
        let vip = bed.cluster_ip(3);
        let went: BTreeSet<u32> = (1..100)
            .map(|port| connect(bed, CLIENT, vip, tcp(port, 80, SYN)))
            .collect();
        assert_eq!(went.len(), 8);
        let request = bed.leaving(CLIENT, vip, tcp(500, 80, SYN));
        assert_eq!(bed.pod_sends(CLIENT, &request).lookups.affinity, 0);
    });
}

#[test]
fn it_lasts_from_the_last_connection_on() {
    for_both_families(|bed| {
        let desired = wanted(bed, 1, 1..=8);
        bed.apply(1, Protocol::Udp, 80, desired);
        let vip = bed.cluster_ip(1);
        let endpoint = connect(bed, CLIENT, vip, udp(1, 80));
        let (key, entry) = entries(bed)[0];
        let aged = |seconds: u32| Affinity {
            last_used: entry.last_used.wrapping_sub(seconds * TICKS_PER_SECOND),
            ..entry
        };
        let mut went = [BTreeSet::new(), BTreeSet::new()];
        for port in 2..60 {
            for (at, seconds) in [(0, TIMEOUT - 60), (1, TIMEOUT + 1)] {
                set(bed, &key, &aged(seconds));
                let port = port * 2 + at as u16;
                went[at].insert(connect(bed, CLIENT, vip, udp(port, 80)));
                let (_, now) = entries(bed)[0];
                let since = now.last_used.wrapping_sub(entry.last_used);
                assert!(since < 60 * TICKS_PER_SECOND, "begins anew: {since}");
            }
        }
        assert_eq!(went[0], BTreeSet::from([endpoint]), "before the time");
        assert_eq!(went[1].len(), 8, "after it");
    });
}

#[test]
fn an_endpoint_that_goes_is_left_for_good() {
    for_both_families(|bed| {
        let desired = wanted(bed, 1, 1..=4);
        bed.apply(1, Protocol::Tcp, 80, desired);
        let vip = bed.cluster_ip(1);
        let before = connect(bed, CLIENT, vip, tcp(1, 80, SYN));
        let desired = wanted(bed, 1, (1..=4).filter(|number| *number != before));
        bed.apply(1, Protocol::Tcp, 80, desired);
        let after = connect(bed, CLIENT, vip, tcp(2, 80, SYN));
        assert_ne!(after, before);
        let desired = wanted(bed, 1, 1..=4);
        bed.apply(1, Protocol::Tcp, 80, desired);
        for port in 3..50 {
            let again = connect(bed, CLIENT, vip, tcp(port, 80, SYN));
            assert_eq!(again, after);
        }
        // The connection that was there before stays where it is.
        let request = bed.leaving(CLIENT, vip, tcp(1, 80, ACK));
        let frame = bed.pod_sends(CLIENT, &request).output.frame;
        assert_eq!(chosen(bed, &frame), before);
        // Affinity of another life of the row counts for nothing.
        let (key, entry) = entries(bed)[0];
        let generation = entry.generation.wrapping_sub(1);
        let mut went = BTreeSet::new();
        for port in 100..160 {
            set(
                bed,
                &key,
                &Affinity {
                    generation,
                    ..entry
                },
            );
            went.insert(connect(bed, CLIENT, vip, tcp(port, 80, SYN)));
        }
        assert_eq!(went.len(), 4);
    });
}

#[test]
fn an_endpoint_counts_in_its_sets_only() {
    for_both_families(|bed| {
        let (everywhere, local) = (bed.cluster_ip(1), bed.cluster_ip(2));
        let mut desired = wanted(bed, 1, 1..=4);
        desired.frontends.insert(Frontend {
            set: EndpointSet::Local,
            ..Frontend::cluster_ip(local, 80)
        });
        let only = BackendAddress {
            address: bed.remote_pod(3),
            port: TARGET,
        };
        desired.backends.get_mut(&only).unwrap().local = true;
        bed.apply(1, Protocol::Tcp, 80, desired.clone());
        // Until the client has one of the others.
        let mut port = 0;
        let mut next = || {
            port += 1;
            tcp(port, 80, SYN)
        };
        let mut first = connect(bed, CLIENT, everywhere, next());
        while first == 3 {
            let (key, _) = entries(bed)[0];
            let mut map = bed.fs.hash::<AffinityKey, Affinity>("AFFINITY");
            map.remove(&key).unwrap();
            first = connect(bed, CLIENT, everywhere, next());
        }
        assert_eq!(connect(bed, CLIENT, local, next()), 3, "not in this set");
        for _ in 0..30 {
            assert_eq!(connect(bed, CLIENT, everywhere, next()), 3, "in both");
        }
        // The policy changes while the client has an endpoint of the other set.
        let (key, entry) = entries(bed)[0];
        let mut others = BTreeSet::new();
        for _ in 0..30 {
            let mut map = bed.fs.hash::<AffinityKey, Affinity>("AFFINITY");
            map.remove(&key).unwrap();
            others.insert(connect(bed, CLIENT, everywhere, next()));
        }
        assert!(others.len() > 1);
        set(bed, &key, &entry);
        desired.frontends = [everywhere, local]
            .map(|address| Frontend {
                set: EndpointSet::Local,
                ..Frontend::cluster_ip(address, 80)
            })
            .into();
        desired.backends.retain(|address, _| *address == only);
        desired.backends.get_mut(&only).unwrap().cluster = false;
        bed.apply(1, Protocol::Tcp, 80, desired);
        for address in [everywhere, local] {
            for _ in 0..10 {
                assert_eq!(connect(bed, CLIENT, address, next()), 3);
            }
        }
    });
}

#[test]
fn the_node_is_one_client_whatever_its_address() {
    for_both_families(|bed| {
        own_device(bed, true);
        let desired = wanted(bed, 1, 1..=8);
        bed.apply(1, Protocol::Udp, 80, desired);
        let vip = bed.cluster_ip(1);
        let mut went = BTreeSet::new();
        for port in 1..50 {
            for source in [bed.node(), bed.outside(), bed.gateway()] {
                let request = Packet::new(host_macs(NET_DEVICE), source, vip, udp(port, 80));
                let seen = bed.run_with(Hook::FromHost, &request.frame(), on(NET_DEVICE));
                assert_eq!(seen.verdict, Verdict::Remote);
                went.insert(chosen(bed, &seen.output.frame));
            }
        }
        assert_eq!(went.len(), 1, "{went:?}");
        let entries = entries(bed);
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].0.client, Ipv6::default());
    });
}

#[test]
fn a_full_table_stops_nobody() {
    for_both_families(|bed| {
        let desired = wanted(bed, 1, 1..=4);
        bed.apply(1, Protocol::Udp, 80, desired);
        let vip = bed.cluster_ip(1);
        let mut map = bed.fs.hash::<AffinityKey, Affinity>("AFFINITY");
        for number in 0..70_000_u32 {
            let mut client = Ipv6::default();
            client.0[..4].copy_from_slice(&number.to_be_bytes());
            client.0[15] = 1;
            let key = AffinityKey {
                client,
                service_port: 9,
            };
            map.insert(key, Affinity::default(), 0).unwrap();
        }
        let full = entries(bed).len();
        assert!(full > 50_000, "{full}");
        let went: BTreeSet<u32> = (1..500)
            .map(|port| {
                let request = bed.leaving(CLIENT, vip, udp(port, 80));
                let seen = bed.pod_sends(CLIENT, &request);
                assert_eq!(seen.verdict, Verdict::Remote);
                assert_eq!(seen.flow_counter(outcome::FLOW_CREATED), 1);
                chosen(bed, &seen.output.frame)
            })
            .collect();
        assert_eq!(went.len(), 1, "the one used last stays: {went:?}");
    });
}
