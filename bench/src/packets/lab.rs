//! A node for test runs: the real programs and maps, filled by the agent's own library, in a
//! network namespace and with a BPF file system that end with the thread that made them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::MapData;
use ipnet::IpNet;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use weir_agent::{
    datapath::{
        Datapath, DatapathOptions, EndpointRow, Hop, HopRef, NodeConfig,
        sys::{RawMap, bytes_of, from_bytes},
    },
    model::{
        Backend, BackendAddress, EndpointSet, Frontend, FrontendKind, Scope, ServicePort,
        ServicePortKey,
    },
    node::devices::SourceAddresses,
    objects::{Family, ObjectName, Protocol},
};
use weir_common::{
    MacAddress, Port,
    address::Address,
    endpoint::pod_mac,
    flow::{FlowEntry, FlowKey, scope},
    ipcache::{class, flag},
    protocol,
};

use super::frame::Tuple;

/// Services of each kind; connections go to them in turn.
pub const SERVICES: u32 = 16;
/// Endpoints of each Service that leads to the other node.
const REMOTE_ENDPOINTS: u32 = 8;
/// First source port.
const FIRST_PORT: u32 = 10_000;
/// Of this node's device: frames for another are left to the stack.
pub const UPLINK_MAC: MacAddress = pod_mac(9);
/// The only node beside this one.
const OTHER_NODE: &str = "node2";
/// NodePort of the first Service; the others follow.
const FIRST_NODE_PORT: u16 = 30_000;
/// Connections to the outside go to so many addresses: one of them alone would use up the ports.
const SERVERS: u32 = 128;

/// The pods. Only the first two have Services, the others never get an entry in the flow table.
pub const CLIENT: u32 = 1;
pub const LOCAL_SERVER: u32 = 2;
pub const PLAIN_CLIENT: u32 = 3;
pub const PLAIN_SERVER: u32 = 4;
const PODS: u32 = 4;

/// Where packets go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Route {
    /// To a Service with endpoints on the other node.
    RemoteService,
    /// To a Service with its endpoint on this node.
    LocalService,
    /// To a pod of this node by its own address.
    LocalPod,
    /// To a pod of the other node by its own address.
    RemotePod,
    /// From outside to a NodePort, with endpoints on the other node.
    NodePort,
    /// From outside to an address of a load balancer, with endpoints on the other node.
    LoadBalancer,
    /// From a pod to the outside.
    Outside,
}

impl Route {
    /// Where the first packet of a connection is seen.
    pub const fn scope(self) -> u8 {
        match self {
            Self::NodePort | Self::LoadBalancer => scope::UNDERLAY,
            _ => scope::POD,
        }
    }
}

/// Puts the calling thread into a network namespace and a mount namespace of its own.
///
/// # Errors
///
/// The caller is not root.
pub fn isolate() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .context("make a network and a mount namespace; are you root?")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("make mounts private")?;
    mount(
        Some("bpf"),
        "/sys/fs/bpf",
        Some("bpf"),
        MsFlags::empty(),
        none,
    )
    .context("mount a BPF file system")
}

/// See the module.
pub struct Lab {
    /// The programs and maps.
    pub datapath: Datapath,
    root: PathBuf,
    uplink: u32,
    uplink_name: String,
    devices: Vec<u32>,
}

impl Lab {
    /// Opens the data path and fills its tables, in the namespaces of the calling thread. `name`
    /// tells several on one thread apart.
    ///
    /// # Errors
    ///
    /// The kernel's, or the data path's.
    pub fn new(name: &str, connections: u32) -> Result<Self> {
        let root = Path::new("/sys/fs/bpf").join(name);
        let uplink_name = format!("{name}-up");
        let uplink = make_device(&uplink_name)?;
        wire_uplink(&uplink_name)?;
        let devices = (1..=PODS)
            .map(|number| make_device(&format!("{name}-{number}")))
            .collect::<Result<_>>()?;
        let options = DatapathOptions {
            bpf_root: root.clone(),
            connections,
            ..DatapathOptions::default()
        };
        let mut lab = Self {
            datapath: Datapath::open(&options)?,
            root,
            uplink,
            uplink_name,
            devices,
        };
        lab.fill()?;
        Ok(lab)
    }

    fn fill(&mut self) -> Result<()> {
        self.datapath.config_mut().apply(&NodeConfig {
            pod_ranges: vec![
                IpNet::new(pod(Family::V4, 0), 24)?,
                IpNet::new(pod(Family::V6, 0), 64)?,
            ],
            ..NodeConfig::default()
        })?;
        for (number, ifindex) in (1..).zip(self.devices.clone()) {
            let (IpAddr::V4(ipv4), IpAddr::V6(ipv6)) =
                (pod(Family::V4, number), pod(Family::V6, number))
            else {
                unreachable!("each of its family")
            };
            self.datapath.insert_endpoint(&EndpointRow {
                number,
                ipv4: Some(ipv4),
                ipv6: Some(ipv6),
                ifindex,
                mtu: 1500,
                netns_cookie: 0,
                flags: 0,
            })?;
        }
        let (IpAddr::V4(v4), IpAddr::V6(v6)) = (node(Family::V4), node(Family::V6)) else {
            unreachable!("each of its family")
        };
        let sources = SourceAddresses {
            v4: Some(v4),
            v6: Some(v6),
            sole_v6: true,
        };
        self.datapath
            .attach_device(self.uplink, &self.uplink_name, sources)?;
        for family in [Family::V4, Family::V6] {
            let flags = flag::NODE_PORTS | flag::HOST_PORTS;
            let address = IpNet::from(node(family));
            self.datapath
                .set_ipcache(address, class::THIS_NODE, flags, HopRef::Host)?;
            self.add_other_node(family)?;
            for service in 0..SERVICES {
                let remote = (0..REMOTE_ENDPOINTS)
                    .map(|i| (remote_pod(family, service * REMOTE_ENDPOINTS + i), 8080));
                self.add_service(family, service, remote)?;
                // A port for each Service, or the reply tuples of two connections would be one.
                let local = (pod(family, LOCAL_SERVER), 8080 + service as u16);
                self.add_service(family, SERVICES + service, [local])?;
            }
        }
        Ok(())
    }

    fn add_other_node(&mut self, family: Family) -> Result<()> {
        let (gateway, bits): (IpAddr, u8) = match family {
            Family::V4 => (Ipv4Addr::new(192, 168, 77, 12).into(), 24),
            Family::V6 => (Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 12).into(), 64),
        };
        let pods = IpNet::new(remote_pod(family, 0), bits)?.trunc();
        let hop = Hop {
            ifindex: self.uplink,
            gateway,
            mtu: 1500,
            source: Some(node(family)),
        };
        self.datapath
            .set_hop(OTHER_NODE, family, &[pods], Some(hop))?;
        let hop = HopRef::Node(OTHER_NODE, family);
        self.datapath
            .set_ipcache(pods, class::REMOTE_PODS, 0, hop)?;
        Ok(())
    }

    fn add_service(
        &mut self,
        family: Family,
        number: u32,
        endpoints: impl IntoIterator<Item = (IpAddr, u16)>,
    ) -> Result<()> {
        let (key, mut desired) = service(family, cluster_ip(family, number), number, endpoints);
        let outside = |address, port, kind| Frontend {
            address,
            port,
            kind,
            scope: Scope::Outside,
            set: EndpointSet::Cluster,
        };
        let balanced = Some(load_balancer(family, number));
        desired.frontends.extend([
            outside(None, node_port(number), FrontendKind::NodePort),
            outside(balanced, 80, FrontendKind::LoadBalancer),
        ]);
        self.datapath.apply_service(&key, Some(&desired))?;
        Ok(())
    }

    /// Interface index of a pod's device on the host.
    pub fn device(&self, pod: u32) -> u32 {
        self.devices[pod as usize - 1]
    }

    /// Interface index of the node's device.
    pub fn uplink(&self) -> u32 {
        self.uplink
    }

    /// A map by its pin.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    pub fn map(&self, name: &str) -> Result<RawMap> {
        let path = self.root.join("maps").join(name);
        let map = MapData::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
        Ok(RawMap::new(&map)?)
    }

    /// Forgets every connection, and that its place in the flow ring was ever taken.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn clear_flows(&self, family: Family) -> Result<()> {
        clear(&self.map(flows(family))?)?;
        let ring = self.map(flow_ring(family))?;
        let keys: Vec<u8> = (0..ring.max_entries()).flat_map(u32::to_ne_bytes).collect();
        let values = vec![0; ring.max_entries() as usize * ring.value_size()];
        ring.update_batch(&keys, &values)?;
        Ok(())
    }

    /// The tuples of the replies to connections that the flow table knows by `scope`, as they come
    /// back.
    ///
    /// # Errors
    ///
    /// A connection is not known.
    pub fn replies(&self, family: Family, scope: u8, tuples: &[Tuple]) -> Result<Vec<Tuple>> {
        let map = self.map(flows(family))?;
        tuples
            .iter()
            .map(|tuple| match (tuple.source.ip(), tuple.destination.ip()) {
                (IpAddr::V4(a), IpAddr::V4(b)) => {
                    reply::<weir_common::Ipv4>(&map, scope, tuple, (a.into(), b.into()))
                }
                (IpAddr::V6(a), IpAddr::V6(b)) => {
                    reply::<weir_common::Ipv6>(&map, scope, tuple, (a.into(), b.into()))
                }
                _ => unreachable!("a tuple has one family"),
            })
            .collect()
    }
}

/// Removes every element of a map.
///
/// # Errors
///
/// The kernel's.
pub fn clear(map: &RawMap) -> Result<()> {
    for key in map.keys()? {
        map.delete(&key)?;
    }
    Ok(())
}

fn reply<A>(map: &RawMap, scope: u8, tuple: &Tuple, (source, destination): (A, A)) -> Result<Tuple>
where
    A: Address,
    FlowKey<A>: aya::Pod,
    FlowEntry<A>: aya::Pod,
{
    let key = FlowKey {
        source,
        destination,
        source_port: Port::new(tuple.source.port()),
        destination_port: Port::new(tuple.destination.port()),
        protocol: protocol::TCP,
        scope,
        reserved: 0,
    };
    let mut value = vec![0; map.value_size()];
    anyhow::ensure!(
        map.lookup(bytes_of(&key), &mut value)?,
        "the flow table does not know {tuple:?}"
    );
    let partner = from_bytes::<FlowEntry<A>>(&value).partner_key(key.protocol);
    Ok(Tuple {
        source: SocketAddr::new(partner.source.to_ip(), partner.source_port.get()),
        destination: SocketAddr::new(partner.destination.to_ip(), partner.destination_port.get()),
    })
}

const fn flows(family: Family) -> &'static str {
    match family {
        Family::V4 => "FLOWS_V4",
        Family::V6 => "FLOWS_V6",
    }
}

const fn flow_ring(family: Family) -> &'static str {
    match family {
        Family::V4 => "FLOW_RING_V4",
        Family::V6 => "FLOW_RING_V6",
    }
}

/// Desired state of a Service port with one frontend.
pub fn service(
    family: Family,
    address: IpAddr,
    number: u32,
    endpoints: impl IntoIterator<Item = (IpAddr, u16)>,
) -> (ServicePortKey, ServicePort) {
    let key = ServicePortKey {
        owner: ObjectName::new("bench", format!("service-{number}")).into(),
        port_name: "http".into(),
        protocol: Protocol::Tcp,
        family,
        port: 80,
    };
    let backends = endpoints
        .into_iter()
        .map(|(address, port)| (BackendAddress { address, port }, Backend::active()));
    let desired = ServicePort {
        frontends: BTreeSet::from([Frontend::cluster_ip(address, 80)]),
        backends: backends.collect(),
        unused: BTreeMap::new(),
        affinity: None,
        source_ranges: None,
    };
    (key, desired)
}

/// Tuples of `count` different connections that take `route`.
pub fn connections(family: Family, route: Route, from: u32, count: u32) -> Vec<Tuple> {
    (0..count)
        .map(|i| {
            let (service, turn) = (i % SERVICES, i / SERVICES);
            let destination = match route {
                Route::RemoteService => SocketAddr::new(cluster_ip(family, service), 80),
                Route::LocalService => SocketAddr::new(cluster_ip(family, SERVICES + service), 80),
                Route::LocalPod => SocketAddr::new(pod(family, PLAIN_SERVER), 80 + service as u16),
                Route::RemotePod => SocketAddr::new(remote_pod(family, service), 80),
                Route::NodePort => SocketAddr::new(node(family), node_port(service)),
                Route::LoadBalancer => SocketAddr::new(load_balancer(family, service), 80),
                Route::Outside => {
                    let (server, turn) = (i % SERVERS, i / SERVERS);
                    let source = SocketAddr::new(pod(family, from), (FIRST_PORT + turn) as u16);
                    let destination = SocketAddr::new(outside(family, 1 + server), 443);
                    return Tuple {
                        source,
                        destination,
                    };
                }
            };
            let source = match route {
                Route::NodePort | Route::LoadBalancer => outside(family, 0),
                _ => pod(family, from),
            };
            Tuple {
                source: SocketAddr::new(source, (FIRST_PORT + turn) as u16),
                destination,
            }
        })
        .collect()
}

/// Fisher and Yates' with a plain linear congruential generator: the same in every run.
pub fn shuffle<T>(items: &mut [T]) {
    let mut state = 1u64;
    for i in (1..items.len()).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        items.swap(i, (state >> 33) as usize % (i + 1));
    }
}

/// Address of a pod of this node.
pub fn pod(family: Family, number: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(0x0af4_0100 + number).into(),
        Family::V6 => {
            Ipv6Addr::from_bits((0xfd00_0244_0000_0001 << 64) + u128::from(number)).into()
        }
    }
}

/// Address of a pod of the other node.
pub fn remote_pod(family: Family, number: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(0x0af4_0200 + number + 1).into(),
        Family::V6 => {
            Ipv6Addr::from_bits((0xfd00_0244_0000_0002 << 64) + u128::from(number) + 1).into()
        }
    }
}

/// Address of a Service.
pub fn cluster_ip(family: Family, number: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(0x0a60_0000 + number + 1).into(),
        Family::V6 => Ipv6Addr::from_bits((0xfd00_0096 << 96) + u128::from(number) + 1).into(),
    }
}

/// Address of this node.
fn node(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 168, 77, 11).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 11).into(),
    }
}

/// A host beyond the node's router: the client with number 0, servers with others.
fn outside(family: Family, number: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(0xc633_640a + number).into(),
        Family::V6 => {
            Ipv6Addr::from_bits((0x2001_0db8_0100_u128 << 80) + 0x10 + u128::from(number)).into()
        }
    }
}

/// Address of a Service at a load balancer.
fn load_balancer(family: Family, number: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(0xcb00_7100 + number + 1).into(),
        Family::V6 => {
            Ipv6Addr::from_bits((0x2001_0db8_0203_u128 << 80) + u128::from(number) + 1).into()
        }
    }
}

/// NodePort of a Service.
const fn node_port(number: u32) -> u16 {
    FIRST_NODE_PORT + number as u16
}

/// Gives the node's device addresses, a router and the right to forward: without those the kernel has no
/// route to tell a program.
fn wire_uplink(device: &str) -> Result<()> {
    let address = UPLINK_MAC.to_string();
    ip(&["link", "set", device, "address", &address, "up"])?;
    // Replaced, as another lab of this thread may have left one.
    for (flag, family, bits, router) in [
        ("-4", Family::V4, 24, "192.168.77.254"),
        ("-6", Family::V6, 64, "fd00:77::fe"),
    ] {
        let own = format!("{}/{bits}", node(family));
        let mut add = vec![flag, "address", "add", &own, "dev", device];
        if family == Family::V6 {
            add.push("nodad");
        }
        ip(&add)?;
        let to_router = ["via", router, "dev", device];
        ip(&[&[flag, "route", "replace", "default"][..], &to_router].concat())?;
    }
    for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        let path = Path::new("/proc/sys/net").join(setting);
        std::fs::write(&path, "1").with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// A veth pair in the namespace of the calling thread; gives the index of its first half.
fn make_device(name: &str) -> Result<u32> {
    let peer = format!("{name}-p");
    ip(&["link", "add", name, "type", "veth", "peer", "name", &peer])?;
    ip(&["link", "set", &peer, "up"])?;
    nix::net::if_::if_nametoindex(name).with_context(|| format!("index of {name}"))
}

fn ip(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(arguments);
    weir_tests::process::run(&mut command, b"", Duration::from_secs(20)).map(drop)
}
