use std::{collections::BTreeSet, net::IpAddr};

use weir_agent::datapath::{EndpointRow, NodeConfig, TableError};
use weir_common::{
    ABI_VERSION, config,
    endpoint::{Endpoint, flag},
};

use crate::support::BpfFs;

pub fn node_config(ranges: &[&str]) -> NodeConfig {
    NodeConfig {
        pod_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        ..NodeConfig::default()
    }
}

pub fn row(number: u32, last: u8) -> EndpointRow {
    EndpointRow {
        number,
        ipv4: Some([10, 1, 0, last].into()),
        ipv6: Some([0xfd01, 0, 0, 0, 0, 0, 0, u16::from(last)].into()),
        ifindex: number.saturating_add(100),
        mtu: 1500,
        netns_cookie: u64::from(number) << 32,
        flags: 0,
    }
}

/// The endpoint that an address leads to in the kernel.
fn local(fs: &BpfFs, datapath: &weir_agent::datapath::Datapath, address: IpAddr) -> u32 {
    let (_, index) = datapath.config().local_index(address).unwrap();
    let name = if address.is_ipv4() {
        "LOCAL_ADDRESSES_V4"
    } else {
        "LOCAL_ADDRESSES_V6"
    };
    fs.array::<u32>(name).get(&index, 0).unwrap()
}

#[test]
fn an_endpoint_is_published_by_address_and_device() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    datapath
        .config_mut()
        .apply(&node_config(&["10.1.0.0/24", "fd01::/64"]))
        .unwrap();
    let pod = row(7, 9);
    datapath.insert_endpoint(&pod).unwrap();
    let kernel: Endpoint = fs.array("ENDPOINTS").get(&7, 0).unwrap();
    assert_eq!(
        (kernel.ifindex, kernel.generation, kernel.mtu),
        (107, 1, 1500)
    );
    assert_eq!(kernel.ipv4, pod.ipv4.unwrap().into());
    assert_eq!(kernel.ipv6, pod.ipv6.unwrap().into());
    for address in [IpAddr::V4(pod.ipv4.unwrap()), IpAddr::V6(pod.ipv6.unwrap())] {
        assert_eq!(local(&fs, &datapath, address), 7);
    }
    assert_eq!(
        fs.hash::<u32, u32>("ENDPOINT_BY_IFINDEX")
            .get(&107, 0)
            .unwrap(),
        7
    );

    datapath.remove_endpoint(7).unwrap();
    datapath.remove_endpoint(7).unwrap();
    for address in [IpAddr::V4(pod.ipv4.unwrap()), IpAddr::V6(pod.ipv6.unwrap())] {
        assert_eq!(local(&fs, &datapath, address), 0);
    }
    assert!(
        fs.hash::<u32, u32>("ENDPOINT_BY_IFINDEX")
            .get(&107, 0)
            .is_err()
    );
    assert_eq!(datapath.endpoints().iter().count(), 0);
}

/// Cookie → number, in order.
fn cookies(fs: &BpfFs) -> Vec<(u64, u32)> {
    let map = fs.hash::<u64, u32>("ENDPOINT_BY_COOKIE");
    let mut all: Vec<_> = map.iter().flatten().collect();
    all.sort_unstable();
    all
}

#[test]
fn an_endpoint_is_found_by_the_cookie_of_its_namespace() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    datapath
        .config_mut()
        .apply(&node_config(&["10.1.0.0/24", "fd01::/64"]))
        .unwrap();
    let with_cookie = |number, netns_cookie| EndpointRow {
        netns_cookie,
        ..row(number, number as u8)
    };
    datapath.insert_endpoint(&with_cookie(7, 70)).unwrap();
    datapath.insert_endpoint(&with_cookie(8, 80)).unwrap();
    // Unknown, and not to be taken for a namespace.
    datapath.insert_endpoint(&with_cookie(9, 0)).unwrap();
    assert_eq!(cookies(&fs), [(70, 7), (80, 8)]);
    // Two interfaces of one namespace: the first counts, then the other.
    datapath.insert_endpoint(&with_cookie(10, 70)).unwrap();
    assert_eq!(cookies(&fs), [(70, 7), (80, 8)]);
    datapath.remove_endpoint(7).unwrap();
    assert_eq!(cookies(&fs), [(70, 10), (80, 8)]);
    // Another pod without a removal in between.
    datapath.insert_endpoint(&with_cookie(8, 81)).unwrap();
    assert_eq!(cookies(&fs), [(70, 10), (81, 8)]);
    drop(datapath);

    // Leftovers of crashes: of nobody, and of somebody else. And a map of an older version, empty.
    let mut map = fs.hash::<u64, u32>("ENDPOINT_BY_COOKIE");
    map.insert(99, 5, 0).unwrap();
    map.insert(98, 8, 0).unwrap();
    map.remove(&81).unwrap();
    let mut datapath = fs.open();
    datapath.insert_endpoint(&with_cookie(8, 81)).unwrap();
    datapath.prune_endpoints(&BTreeSet::from([8])).unwrap();
    assert_eq!(cookies(&fs), [(81, 8)]);
    datapath.remove_endpoint(8).unwrap();
    assert_eq!(cookies(&fs), []);
}

#[test]
fn flags_change_and_nothing_else_does() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    datapath
        .config_mut()
        .apply(&node_config(&["10.1.0.0/24", "fd01::/64"]))
        .unwrap();
    let kernel = || fs.array::<Endpoint>("ENDPOINTS").get(&7, 0).unwrap();
    datapath
        .insert_endpoint(&EndpointRow {
            flags: flag::NO_SOCKET_TRANSLATION,
            ..row(7, 9)
        })
        .unwrap();
    let before = kernel();
    assert_eq!(before.flags, flag::NO_SOCKET_TRANSLATION);
    datapath.set_endpoint_flags(7, 0).unwrap();
    assert_eq!(kernel(), Endpoint { flags: 0, ..before });
    datapath
        .insert_endpoint(&EndpointRow {
            flags: 1,
            ..row(7, 9)
        })
        .unwrap();
    assert_eq!(kernel(), before, "the same pod: the generation stays");
    // Of nobody: nothing is written.
    datapath.set_endpoint_flags(8, 1).unwrap();
    datapath.set_endpoint_flags(u32::MAX, 1).unwrap();
    let free: Endpoint = fs.array("ENDPOINTS").get(&8, 0).unwrap();
    assert_eq!(free, Endpoint::default());
}

#[test]
fn the_generation_rises_for_another_pod_only() {
    let fs = BpfFs::new();
    let generation = || {
        fs.array::<Endpoint>("ENDPOINTS")
            .get(&7, 0)
            .unwrap()
            .generation
    };
    let mut datapath = fs.open();
    datapath
        .config_mut()
        .apply(&node_config(&["10.1.0.0/24", "fd01::/64"]))
        .unwrap();
    datapath.insert_endpoint(&row(7, 9)).unwrap();
    let first = generation();
    fs.array::<u32>("ENDPOINT_FLOWS").set(7, 1, 0).unwrap();
    drop(datapath);

    // The same pod after a restart, with another MTU.
    let mut datapath = fs.open();
    let same = EndpointRow {
        mtu: 1400,
        ..row(7, 9)
    };
    datapath.insert_endpoint(&same).unwrap();
    assert_eq!(generation(), first);
    assert_eq!(fs.array::<u32>("ENDPOINT_FLOWS").get(&7, 0).unwrap(), 1);

    // Another pod, without a removal in between.
    datapath.insert_endpoint(&row(7, 10)).unwrap();
    assert!(generation() > first);
    assert_eq!(fs.array::<u32>("ENDPOINT_FLOWS").get(&7, 0).unwrap(), 0);
    assert_eq!(local(&fs, &datapath, [10, 1, 0, 9].into()), 0);
    assert_eq!(local(&fs, &datapath, [10, 1, 0, 10].into()), 7);
}

#[test]
fn an_address_given_to_another_number_survives_the_removal_of_the_first() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    datapath
        .config_mut()
        .apply(&node_config(&["10.1.0.0/24", "fd01::/64"]))
        .unwrap();
    datapath.insert_endpoint(&row(7, 9)).unwrap();
    datapath.insert_endpoint(&row(8, 9)).unwrap();
    datapath.remove_endpoint(7).unwrap();
    assert_eq!(local(&fs, &datapath, [10, 1, 0, 9].into()), 8);
}

#[test]
fn prune_sweeps_endpoints_and_stray_entries() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    datapath
        .config_mut()
        .apply(&node_config(&["10.1.0.0/24", "fd01::/64"]))
        .unwrap();
    for number in 1..=5 {
        datapath
            .insert_endpoint(&row(number, number as u8))
            .unwrap();
    }
    drop(datapath);
    // A crash between two steps.
    fs.array::<u32>("LOCAL_ADDRESSES_V4")
        .set(200, 77, 0)
        .unwrap();
    fs.hash::<u32, u32>("ENDPOINT_BY_IFINDEX")
        .insert(999, 3, 0)
        .unwrap();

    let mut datapath = fs.open();
    assert_eq!(datapath.endpoints().iter().count(), 5);
    let removed = datapath.prune_endpoints(&BTreeSet::from([2, 4])).unwrap();
    assert_eq!(removed, 3);
    let left: Vec<u32> = datapath
        .endpoints()
        .iter()
        .map(|(number, _)| number)
        .collect();
    assert_eq!(left, [2, 4]);
    for (name, wanted) in [("LOCAL_ADDRESSES_V4", 2), ("LOCAL_ADDRESSES_V6", 2)] {
        let leading = fs
            .array::<u32>(name)
            .iter()
            .flatten()
            .filter(|n| *n != 0)
            .count();
        assert_eq!(leading, wanted, "{name}");
    }
    let devices: BTreeSet<u32> = fs
        .hash::<u32, u32>("ENDPOINT_BY_IFINDEX")
        .keys()
        .flatten()
        .collect();
    assert_eq!(devices, BTreeSet::from([102, 104]));
}

#[test]
fn what_cannot_be_expressed_is_refused_with_its_value() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    datapath
        .config_mut()
        .apply(&node_config(&["10.1.0.0/24"]))
        .unwrap();
    for number in [0, 4096, u32::MAX] {
        let error = datapath.insert_endpoint(&row(number, 1)).unwrap_err();
        assert!(error.to_string().contains(&number.to_string()), "{error}");
    }
    let error = datapath.insert_endpoint(&row(1, 1)).unwrap_err();
    assert!(matches!(error, TableError::Invalid(_)));
    assert!(error.to_string().contains("fd01::1"), "{error}");
    assert_eq!(datapath.endpoints().iter().count(), 0);
    let error = datapath
        .config_mut()
        .apply(&node_config(&["10.1.0.0/24", "10.1.0.128/25"]))
        .unwrap_err();
    assert!(error.to_string().contains("overlap"), "{error}");
}

#[test]
fn configuration_and_places_survive_a_restart() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let ranges = ["10.1.0.0/24", "10.2.0.0/24", "fd01::/64"];
    datapath.config_mut().apply(&node_config(&ranges)).unwrap();
    datapath.config_mut().set_new_flow_events(true).unwrap();
    let place = datapath.config().local_index([10, 2, 0, 5].into());
    drop(datapath);

    let mut datapath = fs.open();
    assert_eq!(datapath.config().local_index([10, 2, 0, 5].into()), place);
    datapath
        .config_mut()
        .apply(&node_config(&["10.2.0.0/24", "10.3.0.0/24", "fd01::/64"]))
        .unwrap();
    assert_eq!(datapath.config().local_index([10, 2, 0, 5].into()), place);
    assert_eq!(datapath.config().local_index([10, 1, 0, 5].into()), None);
    let kernel: config::Config = fs.array("CONFIG").get(&0, 0).unwrap();
    assert_eq!(kernel, *datapath.config().row());
    assert_eq!(kernel.abi_version, ABI_VERSION);
    assert_eq!(kernel.connections, fs.options().connections);
    let masquerade = config::flag::MASQUERADE_V4 | config::flag::MASQUERADE_V6;
    assert_eq!(kernel.flags, config::flag::EVENT_NEW_FLOW | masquerade);
}

#[test]
fn masquerade_is_switched_for_each_family_beside_other_flags() {
    use weir_common::config::{
        Config,
        flag::{EVENT_NEW_FLOW, MASQUERADE_V4, MASQUERADE_V6},
    };
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let row = || fs.array::<Config>("CONFIG").get(&0, 0).unwrap();
    datapath.config_mut().set_new_flow_events(true).unwrap();
    for (masquerade_v4, masquerade_v6, expected) in [
        (true, true, MASQUERADE_V4 | MASQUERADE_V6),
        (true, false, MASQUERADE_V4),
        (false, true, MASQUERADE_V6),
        (false, false, 0),
    ] {
        let config = NodeConfig {
            masquerade_v4,
            masquerade_v6,
            nat_port_first: 40_000,
            nat_port_count: 17,
            ..NodeConfig::default()
        };
        datapath.config_mut().apply(&config).unwrap();
        assert_eq!(row().flags, expected | EVENT_NEW_FLOW);
        assert_eq!((row().nat_port_first, row().nat_port_count), (40_000, 17));
    }
}
