//! A generator of random changes of a small world, in which everything collides: few names, few
//! addresses, few ports. The same seed gives the same changes. Knows only the objects, so that tests
//! of maps and packets can use it as well.

use std::{collections::BTreeMap, net::IpAddr};

use weir_agent::{
    model::{HostPort, PodInterface},
    objects::{
        EndpointSlice, Family, Hints, Node, Object, ObjectName, Pod, Protocol, Service,
        ServicePort, ServiceType, SliceEndpoint, SlicePort, SourceRanges, TrafficPolicy,
    },
    source::Change,
};

use super::{EXCLUDED_LABEL, Step, THIS_NODE, World};

pub const ADDRESSES: [&str; 10] = [
    "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "fd00::1", "fd00::2", "fd00::3",
    "fd00::4", "fd00::5",
];

const CIDRS: [&str; 5] = [
    "10.0.0.2/31",
    "10.0.0.0/30",
    "10.0.0.4/32",
    "fd00::2/127",
    "fd01::/64",
];

/// xorshift64.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % limit
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    fn some<T>(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(most + 1)).map(|_| make(self)).collect()
    }

    pub fn address(&mut self) -> IpAddr {
        self.pick(&ADDRESSES).parse().unwrap()
    }

    /// Now and then none, as when an address is not of the slice's family.
    fn address_of(&mut self, family: Option<Family>) -> Option<IpAddr> {
        let family = family?;
        let of_family = |a: &&str| Family::of(a.parse().unwrap()) == family;
        let addresses: Vec<&str> = ADDRESSES.iter().copied().filter(|a| of_family(a)).collect();
        let address = self.pick(&addresses).parse().unwrap();
        (!self.one_in(10)).then_some(address)
    }

    fn name(&mut self, names: &[&str]) -> ObjectName {
        ObjectName::new(self.pick(&["blue", "green"]), self.pick(names))
    }

    /// The next change of a world.
    pub fn step(&mut self, world: &World) -> Step {
        if self.one_in(10) {
            let interface = PodInterface {
                pod: self.name(&["p1", "p2"]),
                container_id: self.pick(&["c1", "c2"]).to_owned(),
                ifname: "eth0".to_owned(),
            };
            let ports = (!self.one_in(3)).then(|| self.some(3, Self::host_port));
            return Step::HostPorts(interface, ports);
        }
        if !world.objects.is_empty() && self.one_in(5) {
            let keys: Vec<_> = world.objects.keys().cloned().collect();
            return Step::Object(Change::Delete(self.pick(&keys)));
        }
        Step::Object(Change::Upsert(match self.below(10) {
            0..3 => Object::Service(self.service()),
            3..8 => Object::EndpointSlice(self.slice()),
            8 => Object::Pod(Pod {
                name: self.name(&["p1", "p2", "p3"]),
                host_network: self.one_in(4),
                ips: self.some(2, Self::address),
                ..Pod::default()
            }),
            _ => Object::Node(self.node()),
        }))
    }

    fn node(&mut self) -> Node {
        let zone = self.pick(&["", "z1", "z2"]);
        let zone = (!zone.is_empty()).then(|| (ZONE.to_owned(), zone.to_owned()));
        Node {
            name: ObjectName::new("", self.pick(&[THIS_NODE, "n2"])),
            internal_ips: self.some(1, Self::address),
            external_ips: self.some(1, Self::address),
            pod_cidrs: self.some(1, |random| random.pick(&CIDRS).parse().unwrap()),
            labels: zone.into_iter().collect(),
            leaving: self.one_in(8),
        }
    }

    fn labels(&mut self, names: &[&str]) -> BTreeMap<String, String> {
        let label = self.pick(names).to_owned();
        if self.one_in(6) {
            BTreeMap::from([(label, self.pick(&["", "x"]).to_owned())])
        } else {
            BTreeMap::new()
        }
    }

    fn protocol(&mut self) -> Protocol {
        self.pick(&[
            Protocol::Tcp,
            Protocol::Tcp,
            Protocol::Tcp,
            Protocol::Udp,
            Protocol::Sctp,
        ])
    }

    fn policy(&mut self) -> TrafficPolicy {
        self.pick(&[TrafficPolicy::Cluster, TrafficPolicy::Local])
    }

    fn service(&mut self) -> Service {
        Service {
            name: self.name(&["a", "b"]),
            labels: self.labels(&[
                "service.kubernetes.io/headless",
                "service.kubernetes.io/service-proxy-name",
                EXCLUDED_LABEL,
            ]),
            created: self.pick(&[None, Some(1), Some(1), Some(2), Some(-1)]),
            service_type: self.pick(&[
                ServiceType::ClusterIp,
                ServiceType::NodePort,
                ServiceType::LoadBalancer,
                ServiceType::LoadBalancer,
                ServiceType::ExternalName,
            ]),
            cluster_ips: self.some(2, Self::address),
            external_ips: self.some(1, Self::address),
            load_balancer_ips: self.some(1, Self::address),
            health_check_node_port: self.pick(&[0, 31_000, 31_001]),
            source_ranges: SourceRanges::parse(self.some(2, |random| {
                let ranges = ["192.0.2.0/24", "192.0.2.7/24", "2001:db8::/32", "everybody"];
                random.pick(&ranges).to_owned()
            })),
            internal_policy: self.policy(),
            external_policy: self.policy(),
            affinity: self.pick(&[None, None, Some(10_800), Some(1)]),
            ports: self.some(3, |random| ServicePort {
                name: random.pick(&["", "web", "web"]).to_owned(),
                protocol: random.protocol(),
                port: random.pick(&[80, 53, 8080]),
                node_port: random.pick(&[0, 30_000, 30_001]),
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
        // Hints are followed only where all have them.
        let with_hints = self.one_in(2);
        EndpointSlice {
            name: self.name(&["s1", "s2", "s3", "s4"]),
            service: self.pick(&["a", "a", "b", "b", ""]).to_owned(),
            family,
            endpoints: self.some(4, |random| SliceEndpoint {
                address: random.address_of(family),
                ready: random.one_in(2),
                serving: random.one_in(2),
                terminating: random.one_in(2),
                node: random.pick(&["", THIS_NODE, "n2"]).to_owned(),
                zone: random.pick(&["", "z1"]).to_owned(),
                target: random.pick(&["", "blue/p1"]).to_owned(),
                hints: with_hints.then(|| Box::new(random.hints())),
            }),
            ports: self.some(3, |random| SlicePort {
                name: random.pick(&["", "web", "web"]).to_owned(),
                protocol: random.protocol(),
                port: random.pick(&[8080, 5353]),
            }),
        }
    }

    fn hints(&mut self) -> Hints {
        let some = |random: &mut Self, names: &[&str]| {
            let count = random.pick(&[0, 1, 1, 1, 2]);
            (0..count).map(|_| random.pick(names).to_owned()).collect()
        };
        Hints {
            nodes: if self.one_in(2) {
                some(self, &[THIS_NODE, "n2"])
            } else {
                Vec::new()
            },
            zones: some(self, &["z1", "z2", "z3"]),
        }
    }

    fn host_port(&mut self) -> HostPort {
        let (v4, v6) = ("10.244.0.7".parse().unwrap(), "fd00:1::7".parse().unwrap());
        let host_ip = self.pick(&["", "0.0.0.0", "::", "10.0.0.1", "fd00::1", "10.0.0.4"]);
        HostPort {
            host_ip: host_ip.parse().ok(),
            host_port: self.pick(&[80, 30_000, 30_002]),
            protocol: self.protocol(),
            addresses: self.pick(&[vec![v4], vec![v4, v6], vec![v6]]),
            container_port: self.pick(&[80, 8080]),
        }
    }
}

const ZONE: &str = "topology.kubernetes.io/zone";
