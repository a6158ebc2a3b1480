//! Random changes of a small world, in which everything collides: the incremental model says
//! what the reference computes from scratch, and its deltas lead there.

use std::{collections::BTreeMap, net::IpAddr};

use weir_agent::{
    model::Model,
    objects::{
        EndpointSlice, Family, Node, Object, ObjectName, Pod, Protocol, Service, ServicePort,
        ServiceType, SliceEndpoint, SlicePort,
    },
    source::Change,
};

use crate::{
    Mirror,
    reference::{self, Objects},
};

const SEEDS: u64 = 200;
const CHANGES: usize = 150;

#[test]
fn the_incremental_model_equals_the_reference() {
    for seed in 1..=SEEDS {
        let result = std::panic::catch_unwind(|| run(seed));
        assert!(result.is_ok(), "seed {seed}");
    }
}

fn run(seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut objects = Objects::new();
    let mut model = Model::new();
    let mut mirror = Mirror::default();
    for step in 0..CHANGES {
        let change = random.change(&objects);
        match &change {
            Change::Upsert(object) => {
                objects.insert(object.key(), object.clone());
            }
            Change::Delete(key) => {
                objects.remove(key);
            }
        }
        model.apply(change);
        if random.one_in(3) || step + 1 == CHANGES {
            mirror.follow(model.take_delta());
            compare(&model, &mirror, &objects);
        }
    }
    let keys: Vec<_> = objects.keys().cloned().collect();
    for key in keys {
        model.apply(Change::Delete(key));
    }
    mirror.follow(model.take_delta());
    compare(&model, &mirror, &Objects::new());
    assert_eq!(mirror, Mirror::default());
    assert!(model.object_counts().values().all(|count| *count == 0));
}

fn compare(model: &Model, mirror: &Mirror, objects: &Objects) {
    let expected = reference::compute(objects);
    assert_eq!(mirror.services, expected.services);
    assert_eq!(*mirror, Mirror::of(model));
    assert_eq!(model.problems().count(), expected.problems);
    for address in addresses() {
        assert_eq!(
            model.name_of(address).map(ToString::to_string),
            reference::owners(objects, address).into_iter().next(),
            "{address}"
        );
    }
    let counts = objects.keys().fold(BTreeMap::new(), |mut counts, key| {
        *counts.entry(key.kind).or_insert(0) += 1;
        counts
    });
    for (kind, count) in model.object_counts() {
        assert_eq!(counts.get(&kind).copied().unwrap_or(0), count, "{kind}");
    }
}

const ADDRESSES: [&str; 8] = [
    "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "fd00::1", "fd00::2", "fd00::3", "fd00::4",
];

const CIDRS: [&str; 5] = [
    "10.0.0.2/31",
    "10.0.0.0/30",
    "10.0.0.4/32",
    "fd00::2/127",
    "fd01::/64",
];

fn addresses() -> impl Iterator<Item = IpAddr> {
    ADDRESSES.iter().map(|text| text.parse().unwrap())
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % limit
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    fn some<T>(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(most + 1)).map(|_| make(self)).collect()
    }

    fn address(&mut self) -> IpAddr {
        self.pick(&ADDRESSES).parse().unwrap()
    }

    fn name(&mut self, names: &[&str]) -> ObjectName {
        ObjectName::new(self.pick(&["blue", "green"]), self.pick(names))
    }

    fn change(&mut self, objects: &Objects) -> Change {
        if !objects.is_empty() && self.one_in(4) {
            let keys: Vec<_> = objects.keys().cloned().collect();
            return Change::Delete(self.pick(&keys));
        }
        Change::Upsert(match self.below(10) {
            0..4 => Object::Service(self.service()),
            4..8 => Object::EndpointSlice(self.slice()),
            8 => Object::Pod(Pod {
                name: self.name(&["p1", "p2", "p3"]),
                host_network: self.one_in(4),
                ips: self.some(2, Self::address),
                ..Pod::default()
            }),
            _ => Object::Node(Node {
                name: ObjectName::new("", self.pick(&["n1", "n2"])),
                internal_ips: self.some(1, Self::address),
                external_ips: self.some(1, Self::address),
                pod_cidrs: self.some(1, |random| random.pick(&CIDRS).parse().unwrap()),
                labels: self.labels(&["topology.kubernetes.io/zone", "other"]),
            }),
        })
    }

    fn labels(&mut self, names: &[&str]) -> BTreeMap<String, String> {
        let label = self.pick(names).to_owned();
        if self.one_in(4) {
            BTreeMap::from([(label, self.pick(&["", "x"]).to_owned())])
        } else {
            BTreeMap::new()
        }
    }

    fn protocol(&mut self) -> Protocol {
        self.pick(&[Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp])
    }

    fn service(&mut self) -> Service {
        Service {
            name: self.name(&["a", "b", "c"]),
            labels: self.labels(&[
                "service.kubernetes.io/headless",
                "service.kubernetes.io/service-proxy-name",
            ]),
            created: self.pick(&[None, Some(1), Some(1), Some(2), Some(-1)]),
            service_type: self.pick(&[
                ServiceType::ClusterIp,
                ServiceType::ClusterIp,
                ServiceType::NodePort,
                ServiceType::LoadBalancer,
                ServiceType::ExternalName,
            ]),
            cluster_ips: self.some(2, Self::address),
            ports: self.some(3, |random| ServicePort {
                name: random.pick(&["", "web", "dns"]).to_owned(),
                protocol: random.protocol(),
                port: random.pick(&[80, 53]),
                node_port: 0,
            }),
        }
    }

    fn slice(&mut self) -> EndpointSlice {
        let family = self.pick(&[
            Some(Family::V4),
            Some(Family::V4),
            Some(Family::V6),
            Some(Family::V6),
            None,
        ]);
        EndpointSlice {
            name: self.name(&["s1", "s2", "s3", "s4"]),
            service: self.pick(&["a", "b", "c", ""]).to_owned(),
            family,
            endpoints: self.some(4, |random| SliceEndpoint {
                address: Some(random.address()).filter(|a| Some(Family::of(*a)) == family),
                ready: random.one_in(3),
                serving: random.one_in(2),
                terminating: random.one_in(2),
                node: random.pick(&["", "n1"]).to_owned(),
                zone: random.pick(&["", "z1"]).to_owned(),
                target: random.pick(&["", "blue/p1"]).to_owned(),
            }),
            ports: self.some(3, |random| SlicePort {
                name: random.pick(&["", "web", "dns"]).to_owned(),
                protocol: random.protocol(),
                port: random.pick(&[8080, 5353]),
            }),
        }
    }
}
