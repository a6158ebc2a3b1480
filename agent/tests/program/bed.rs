//! A node with three pods, another node and the outside, as far as the programs can see: devices
//! in a network namespace, and maps filled by the agent's own code. What tests say of its packets is
//! in [`case`].

mod case;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::Command,
};

use weir_agent::{
    datapath::{AppliedService, Datapath, DatapathOptions, EndpointRow, Hop, HopRef, NodeConfig},
    model::{BackendAddress, BackendState, Frontend, ServicePort, ServicePortKey},
    objects::{Family, ObjectName, Protocol},
};
use weir_common::{
    Ipv4, Ipv6, MacAddress,
    address::Address,
    config, endpoint,
    flow::{FlowEntry, FlowKey},
    ipcache::class,
};

pub use self::case::{
    Case, ESTABLISHED, Lookups, Seen, TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, Verdict, hex, on,
};
use crate::{
    packet::{L4, Macs, Packet},
    support::{BpfFs, FAMILIES, backend},
};

/// The pods of this node. Each one's number is also the last byte of its addresses.
pub const CLIENT: u32 = 5;
pub const SERVER: u32 = 6;
pub const OTHER: u32 = 7;
/// The node's device.
pub const ETH0: u32 = 90;
/// MTU of the pods' devices.
pub const POD_MTU: u32 = 1500;
/// MTU of the way to the other node.
pub const HOP_MTU: u32 = 1400;

/// Interface index of a pod's device.
pub fn device(pod: u32) -> u32 {
    100 + pod
}

pub struct Bed {
    pub datapath: Datapath,
    pub family: Family,
    pub fs: BpfFs,
    options: DatapathOptions,
    failures: Vec<String>,
}

/// Runs `test` for each family, each time in a network namespace that ends with it.
pub fn with_beds(options: fn(&mut DatapathOptions), test: fn(&mut Bed)) {
    for family in FAMILIES {
        with_bed(family, options, test);
    }
}

/// Runs `test` with a bed of one family to begin with, in a network namespace that ends with it.
pub fn with_bed(
    family: Family,
    options: fn(&mut DatapathOptions),
    test: impl FnOnce(&mut Bed) + Send + 'static,
) {
    std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("unshare: needs root");
        let mut bed = Bed::new(family, options);
        test(&mut bed);
        bed.end();
    })
    .join()
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// As [`with_beds`], with the usual options.
pub fn for_both_families(test: fn(&mut Bed)) {
    with_beds(|_| {}, test);
}

fn ip(arguments: &str) {
    tool(&format!("ip {arguments}"));
}

/// Runs a command whose words are separated by single spaces.
pub fn tool(command: &str) {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {said}");
}

impl Bed {
    fn new(family: Family, change: fn(&mut DatapathOptions)) -> Self {
        let fs = BpfFs::new();
        ip(&format!(
            "link add eth0 index {ETH0} address {} type veth peer name wire",
            wire_macs().destination
        ));
        let mut options = fs.options();
        options.count_lookups = true;
        change(&mut options);
        let mut datapath = Datapath::open(&options).unwrap();
        datapath.config_mut().apply(&node_config()).unwrap();
        let mut bed = Self {
            datapath,
            family,
            fs,
            options,
            failures: Vec::new(),
        };
        for pod in [CLIENT, SERVER, OTHER] {
            ip(&format!(
                "link add pod{pod} index {} type veth peer name in{pod}",
                device(pod)
            ));
            bed.add_pod(pod, pod);
        }
        bed.add_nodes();
        bed
    }

    /// The agent ends, and the next one loads its programs and takes over: nodes and pods; Services and devices are
    /// for the test to tell of.
    pub fn restart(&mut self) {
        self.datapath = Datapath::open(&self.options).unwrap();
        self.datapath.config_mut().apply(&node_config()).unwrap();
        for pod in [CLIENT, SERVER, OTHER] {
            self.add_pod(pod, pod);
        }
        self.add_nodes();
    }

    /// Tells the programs of both nodes, in the family that the bed has now.
    pub fn add_nodes(&mut self) {
        let prefixes = [self.remote_pods(), self.remote_node().into()];
        self.datapath
            .set_hop(
                "node2",
                self.family,
                &prefixes,
                Some(Hop {
                    ifindex: ETH0,
                    gateway: self.remote_node(),
                    mtu: HOP_MTU,
                    source: Some(self.node()),
                }),
            )
            .unwrap();
        let far = HopRef::Node("node2", self.family);
        let own = self.node().into();
        for (prefix, kind, hop) in [
            (prefixes[0], class::REMOTE_PODS, far),
            (prefixes[1], class::REMOTE_NODE, far),
            (own, class::THIS_NODE, HopRef::Host),
        ] {
            self.datapath.set_ipcache(prefix, kind, 0, hop).unwrap();
        }
    }

    /// Puts a pod with the addresses of `address` at the device of `number`.
    pub fn add_pod(&mut self, number: u32, address: u32) {
        self.datapath
            .insert_endpoint(&EndpointRow {
                number,
                ipv4: Some(Ipv4Addr::new(10, 1, 0, address as u8)),
                ipv6: Some(Ipv6Addr::from_bits(0xfd01 << 112 | u128::from(address))),
                ifindex: device(number),
                mtu: POD_MTU,
                netns_cookie: u64::from(address),
                flags: 0,
            })
            .unwrap();
    }

    /// Pods keep their address outside, and what the outside sends to pods makes no entry.
    pub fn without_masquerade(&mut self) {
        let config = NodeConfig {
            masquerade_v4: false,
            masquerade_v6: false,
            ..node_config()
        };
        self.datapath.config_mut().apply(&config).unwrap();
    }

    /// The configuration that the bed starts with.
    pub fn node_config(&self) -> NodeConfig {
        node_config()
    }

    fn pick(&self, v4: [u8; 4], v6: &str) -> IpAddr {
        match self.family {
            Family::V4 => IpAddr::V4(v4.into()),
            Family::V6 => v6.parse().unwrap(),
        }
    }

    pub fn is_v4(&self) -> bool {
        self.family == Family::V4
    }

    /// Address of a pod of this node.
    pub fn pod(&self, number: u32) -> IpAddr {
        self.pick([10, 1, 0, number as u8], &format!("fd01::{number:x}"))
    }

    /// Address of a pod of the other node.
    pub fn remote_pod(&self, number: u32) -> IpAddr {
        self.pick([10, 1, 1, number as u8], &format!("fd01:0:0:1::{number:x}"))
    }

    pub fn remote_pods(&self) -> ipnet::IpNet {
        let range = match self.family {
            Family::V4 => "10.1.1.0/24",
            Family::V6 => "fd01:0:0:1::/64",
        };
        range.parse().unwrap()
    }

    pub fn node(&self) -> IpAddr {
        self.pick([192, 168, 7, 1], "fd77::1")
    }

    pub fn remote_node(&self) -> IpAddr {
        self.pick([192, 168, 7, 2], "fd77::2")
    }

    pub fn outside(&self) -> IpAddr {
        self.pick([203, 0, 113, 9], "2001:db8::9")
    }

    pub fn cluster_ip(&self, number: u32) -> IpAddr {
        self.pick([10, 96, 0, number as u8], &format!("fd96::{number:x}"))
    }

    /// Source of hairpin traffic.
    pub fn loopback(&self) -> IpAddr {
        self.pick(
            config::LOOPBACK_V4.0,
            &Ipv6Addr::from(config::LOOPBACK_V6).to_string(),
        )
    }

    pub fn gateway(&self) -> IpAddr {
        self.pick(
            config::GATEWAY_V4.0,
            &Ipv6Addr::from(config::GATEWAY_V6).to_string(),
        )
    }

    /// A packet as it leaves a pod.
    pub fn leaving(&self, pod: u32, destination: IpAddr, l4: L4) -> Packet {
        Packet::new(leaving_macs(pod), self.pod(pod), destination, l4)
    }

    /// A packet as it comes in from the other node or the outside.
    pub fn incoming(&self, source: IpAddr, destination: IpAddr, l4: L4) -> Packet {
        Packet::new(wire_macs(), source, destination, l4)
    }

    /// A packet as the host's stack sends it to a pod.
    pub fn host_sends(&self, source: IpAddr, pod: u32, l4: L4) -> Packet {
        Packet::new(delivered_macs(pod), source, self.pod(pod), l4)
    }

    /// Applies a Service with one port; `index` makes its address and its name.
    pub fn service(
        &mut self,
        index: u32,
        protocol: Protocol,
        port: u16,
        backends: &[(IpAddr, u16)],
    ) -> AppliedService {
        let address = self.cluster_ip(index);
        self.service_at(index, &[address], protocol, port, backends)
    }

    /// A Service with several addresses.
    pub fn service_at(
        &mut self,
        index: u32,
        addresses: &[IpAddr],
        protocol: Protocol,
        port: u16,
        backends: &[(IpAddr, u16)],
    ) -> AppliedService {
        let frontends = addresses
            .iter()
            .map(|address| Frontend::cluster_ip(*address, port));
        self.apply(index, protocol, port, service_port(frontends, backends))
    }

    /// A Service port as it is to be; `port` is part of its identity.
    pub fn apply(
        &mut self,
        index: u32,
        protocol: Protocol,
        port: u16,
        desired: ServicePort,
    ) -> AppliedService {
        let key = self.service_key(index, protocol, port);
        self.datapath.apply_service(&key, Some(&desired)).unwrap()
    }

    pub fn service_key(&self, index: u32, protocol: Protocol, port: u16) -> ServicePortKey {
        ServicePortKey {
            owner: ObjectName::new("test", format!("service-{index}")).into(),
            port_name: "main".into(),
            protocol,
            family: self.family,
            port,
        }
    }

    /// The flow table of the family, addresses in the shared form.
    pub fn flows(&self) -> Vec<(FlowKey<Ipv6>, FlowEntry<Ipv6>)> {
        match self.family {
            Family::V4 => read_flows::<Ipv4>(&self.fs, "FLOWS_V4"),
            Family::V6 => read_flows::<Ipv6>(&self.fs, "FLOWS_V6"),
        }
    }

    /// Reports wrong rows.
    fn end(&mut self) {
        assert!(
            self.failures.is_empty(),
            "{} wrong:\n{}",
            self.failures.len(),
            self.failures.join("\n")
        );
    }
}

/// A Service port whose endpoints are ready and used by frontends of policy `Cluster`.
pub fn service_port(
    frontends: impl IntoIterator<Item = Frontend>,
    backends: &[(IpAddr, u16)],
) -> ServicePort {
    ServicePort {
        frontends: frontends.into_iter().collect::<BTreeSet<_>>(),
        backends: backends
            .iter()
            .map(|&(address, port)| {
                let address = BackendAddress { address, port };
                (address, backend(BackendState::Active))
            })
            .collect(),
        unused: BTreeMap::new(),
        affinity: None,
        source_ranges: None,
    }
}

fn read_flows<A: Address>(fs: &BpfFs, map: &str) -> Vec<(FlowKey<Ipv6>, FlowEntry<Ipv6>)>
where
    FlowKey<A>: aya::Pod,
    FlowEntry<A>: aya::Pod,
{
    fs.hash::<FlowKey<A>, FlowEntry<A>>(map)
        .iter()
        .map(|row| {
            let (key, entry) = row.unwrap();
            let shared_key = FlowKey {
                source: key.source.to_shared(),
                destination: key.destination.to_shared(),
                source_port: key.source_port,
                destination_port: key.destination_port,
                protocol: key.protocol,
                scope: key.scope,
                reserved: key.reserved,
            };
            let shared_entry = FlowEntry {
                tag: entry.tag,
                flags: entry.flags,
                tcp_flags: entry.tcp_flags,
                new_source: entry.new_source.to_shared(),
                new_destination: entry.new_destination.to_shared(),
                new_source_port: entry.new_source_port,
                new_destination_port: entry.new_destination_port,
                next_hop: entry.next_hop,
                backend: entry.backend,
                ring: entry.ring,
                packets: entry.packets,
                bytes: entry.bytes,
                ..FlowEntry::default()
            };
            (shared_key, shared_entry)
        })
        .collect()
}

fn node_config() -> NodeConfig {
    NodeConfig {
        pod_ranges: ["10.1.0.0/24", "fd01::/64"]
            .map(|r| r.parse().unwrap())
            .into(),
        node_v4: Some(Ipv4Addr::new(192, 168, 7, 1)),
        node_v6: Some("fd77::1".parse().unwrap()),
        ..NodeConfig::default()
    }
}

/// Ethernet addresses of what leaves a pod.
pub fn leaving_macs(pod: u32) -> Macs {
    Macs {
        destination: endpoint::host_mac(pod),
        source: endpoint::pod_mac(pod),
    }
}

/// Ethernet addresses of what is delivered to a pod.
pub fn delivered_macs(pod: u32) -> Macs {
    Macs {
        destination: endpoint::pod_mac(pod),
        source: endpoint::host_mac(pod),
    }
}

/// Ethernet addresses of what comes in.
pub fn wire_macs() -> Macs {
    Macs {
        destination: MacAddress([2, 0, 0, 0, 0, 1]),
        source: MacAddress([2, 0, 0, 0, 0, 2]),
    }
}

impl Macs {
    /// Those of an answer.
    pub fn turned(self) -> Self {
        Self {
            destination: self.source,
            source: self.destination,
        }
    }
}
