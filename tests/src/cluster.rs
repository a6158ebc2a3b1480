//! A cluster: nodes on one link, an agent on each, pods on the nodes, and the objects that describe them.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{
    Node,
    agent::Agent,
    cgroup,
    cni::Call,
    netns::NetNs,
    objects::{self, Objects},
    pod::{Pod, container},
    reaper,
};

/// Clusters that this process made.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Address families of a cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Families {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}

impl Families {
    const fn v4(self) -> bool {
        matches!(self, Self::V4 | Self::Dual)
    }

    const fn v6(self) -> bool {
        matches!(self, Self::V6 | Self::Dual)
    }
}

/// Where TCP connections to Services are translated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// At the socket, the agent's default.
    BySocket,
    /// Packet by packet, as UDP always is.
    ByPacket,
}

impl Way {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::BySocket, Self::ByPacket];

    const fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::BySocket => &[],
            Self::ByPacket => &["--socket-translation", "false"],
        }
    }

    /// What [`Cluster::translated_at_sockets`] must say after that many connections.
    #[must_use]
    pub const fn translated(self, connections: u64) -> u64 {
        match self {
            Self::BySocket => connections,
            Self::ByPacket => 0,
        }
    }
}

/// What a cluster shall be like.
#[derive(Clone, Debug)]
pub struct ClusterBuilder {
    name: String,
    nodes: usize,
    families: Families,
    mtu: u32,
    arguments: Vec<String>,
}

impl ClusterBuilder {
    /// Number of nodes, 1 to 9; 2 if not set. They are called node1, node2 …
    #[must_use]
    pub const fn nodes(mut self, nodes: usize) -> Self {
        self.nodes = nodes;
        self
    }

    /// Address families; both if not set.
    #[must_use]
    pub const fn families(mut self, families: Families) -> Self {
        self.families = families;
        self
    }

    /// MTU of the underlay, bytes; 1500 if not set.
    #[must_use]
    pub const fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Where the agents have TCP connections translated; at the socket if not set.
    #[must_use]
    pub fn translation(self, way: Way) -> Self {
        self.agent_arguments(way.arguments())
    }

    /// More arguments for every agent.
    #[must_use]
    pub fn agent_arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments
            .extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// Makes the nodes, starts the agents, and waits until they have applied the Node objects.
    ///
    /// # Errors
    ///
    /// When anything of that fails.
    pub fn start(self) -> Result<Cluster> {
        let cluster = self.wire()?;
        cluster.start_agents()?;
        Ok(cluster)
    }

    /// Makes the nodes and their objects without starting agents.
    ///
    /// # Errors
    ///
    /// When anything of that fails.
    pub fn wire(self) -> Result<Cluster> {
        reaper::remove_on_signal();
        reaper::remove_dead();
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}-{number}", std::process::id());
        reaper::claim(&id).context("claim the cluster's state directory; are you root?")?;
        let mut cluster = Cluster {
            name: self.name,
            objects: Objects::new(&reaper::state_directory(&id).join("objects"))?,
            fabric: None,
            nodes: Vec::new(),
            id,
            keep: false,
        };
        // From here on a failure drops `cluster`, which removes what is there.
        let outside = cgroup::claim(&cluster.id)?;
        let fabric = NetNs::create(&reaper::namespace_name(&cluster.id, "fabric"))?
            .in_cgroup(Arc::new(outside));
        fabric.ip(&format!(
            "link add br0 mtu {} type bridge stp_state 0 mcast_snooping 0\nlink set br0 up\n",
            self.mtu
        ))?;
        for (address, length) in self.families.addresses(FABRIC_HOST) {
            fabric.ip(&format!(
                "address add {address}/{length} dev br0{}",
                nodad(address)
            ))?;
        }
        cluster.fabric = Some(fabric);
        let mut arguments = self.arguments;
        if !arguments.iter().any(|argument| argument == "--log") {
            arguments.extend(["--log", "debug"].map(str::to_owned));
        }
        for number in 1..=self.nodes {
            let node = cluster.wire_node(number, self.families, self.mtu, &arguments)?;
            cluster.nodes.push(node);
        }
        Ok(cluster)
    }
}

/// Number of the fabric's own address on the underlay: what is outside of the cluster.
const FABRIC_HOST: u8 = 1;

impl Families {
    /// Addresses of a host on the underlay, with their prefix lengths.
    fn addresses(self, host: u8) -> Vec<(IpAddr, u8)> {
        let v4: IpAddr = Ipv4Addr::new(192, 168, 77, host).into();
        let v6: IpAddr = Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, host.into()).into();
        let mut all = Vec::new();
        if self.v4() {
            all.push((v4, 24));
        }
        if self.v6() {
            all.push((v6, 64));
        }
        all
    }

    fn pod_cidrs(self, node: usize) -> Vec<String> {
        let mut all = Vec::new();
        if self.v4() {
            all.push(format!("10.244.{node}.0/24"));
        }
        if self.v6() {
            all.push(format!("fd00:244:0:{node}::/64"));
        }
        all
    }
}

pub(crate) const fn nodad(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "",
        IpAddr::V6(_) => " nodad",
    }
}

/// A running cluster. Everything of it goes when it is dropped.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    id: String,
    objects: Objects,
    fabric: Option<NetNs>,
    nodes: Vec<Node>,
    keep: bool,
}

impl Cluster {
    /// Starts to describe a cluster; `name` is shown with its logs.
    #[must_use]
    pub fn builder(name: &str) -> ClusterBuilder {
        ClusterBuilder {
            name: name.to_owned(),
            nodes: 2,
            families: Families::Dual,
            mtu: 1500,
            arguments: Vec::new(),
        }
    }

    fn wire_node(
        &self,
        number: usize,
        families: Families,
        mtu: u32,
        arguments: &[String],
    ) -> Result<Node> {
        ensure!((1..10).contains(&number), "a cluster has 1 to 9 nodes");
        let name = format!("node{number}");
        let cgroup = Arc::new(cgroup::create(&self.id, &name)?);
        let netns =
            NetNs::create(&reaper::namespace_name(&self.id, &name))?.in_cgroup(cgroup.clone());
        self.fabric().ip(&format!(
            "link add {name} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}\n\
             link set {name} master br0 up\n",
            netns.name()
        ))?;
        let host = u8::try_from(10 + number)?;
        let mut addresses = Vec::new();
        // A link-local address that is being checked cannot ask for neighbours; the first packet of a new
        // cluster would wait a second.
        netns.run(|| fs::write("/proc/sys/net/ipv6/conf/eth0/accept_dad", "0"))?;
        netns.ip("link set eth0 up")?;
        for ((address, length), (gateway, _)) in families
            .addresses(host)
            .into_iter()
            .zip(families.addresses(FABRIC_HOST))
        {
            netns.ip(&format!(
                "address add {address}/{length} dev eth0{}\nroute add default via {gateway}\n",
                nodad(address)
            ))?;
            addresses.push(address);
        }
        let pod_cidrs = families.pod_cidrs(number);
        self.objects
            .apply(&objects::node(&name, &addresses, &pod_cidrs))?;
        let state = reaper::state_directory(&self.id);
        let run_dir = state.join(&name);
        let bpf_root = reaper::bpf_directory(&self.id).join(&name);
        let agent = Agent::new(
            &name,
            self.objects.directory(),
            &run_dir,
            &bpf_root,
            cgroup.path(),
            &state,
            arguments,
        )?;
        Ok(Node {
            name,
            netns: Arc::new(netns),
            cgroup,
            addresses,
            pod_cidrs,
            run_dir,
            bpf_root,
            agent: Mutex::new(agent),
        })
    }

    /// Starts the agents of a cluster that was only wired, and waits until they have applied all objects.
    ///
    /// # Errors
    ///
    /// When one runs already or does not start.
    pub fn start_agents(&self) -> Result<()> {
        for node in &self.nodes {
            node.agent().start(&node.netns)?;
        }
        for node in &self.nodes {
            node.agent().wait_ready()?;
        }
        self.wait_applied()
    }

    /// Its id: process and number.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Lets the cluster outlive this value and this process.
    ///
    /// # Errors
    ///
    /// When the mark for that cannot be written.
    pub fn keep(mut self) -> Result<()> {
        reaper::keep(&self.id)?;
        self.keep = true;
        // Agents are killed when dropped.
        for node in std::mem::take(&mut self.nodes) {
            std::mem::forget(node);
        }
        Ok(())
    }

    /// The directory of objects.
    #[must_use]
    pub const fn objects(&self) -> &Objects {
        &self.objects
    }

    /// The namespace of the underlay, where a client outside of the cluster is.
    ///
    /// # Panics
    ///
    /// Never: a cluster without one is not given out.
    #[must_use]
    pub fn fabric(&self) -> &NetNs {
        self.fabric
            .as_ref()
            .unwrap_or_else(|| unreachable!("a cluster is made with its fabric"))
    }

    /// Every node.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node by name.
    ///
    /// # Panics
    ///
    /// When there is none of that name.
    #[must_use]
    #[track_caller]
    pub fn node(&self, name: &str) -> &Node {
        match self.nodes.iter().find(|node| node.name == name) {
            Some(node) => node,
            None => panic!("there is no node {name}"),
        }
    }

    /// Adds a pod to a node by the CNI plugin, and its Pod object.
    ///
    /// # Errors
    ///
    /// When the plugin fails.
    pub fn pod(&self, node: &str, name: &str) -> Result<Pod> {
        self.pod_with_host_ports(node, name, &json!([]))
    }

    /// As [`Cluster::pod`], with ports of the node that lead to it: an array as
    /// [`Call::set_port_mappings`] takes it.
    ///
    /// # Errors
    ///
    /// When the plugin fails.
    pub fn pod_with_host_ports(&self, node: &str, name: &str, mappings: &Value) -> Result<Pod> {
        let host = self.node(node).host(&self.objects);
        Pod::add(host, &self.id, name, mappings.clone())
    }

    /// Creates or replaces an object.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn apply(&self, object: &Value) -> Result<()> {
        self.objects.apply(object)
    }

    /// Creates or replaces a Service with TCP and UDP on port 80, and the EndpointSlices that send to port
    /// `target` of the given endpoints. Waits until it is applied everywhere.
    ///
    /// # Errors
    ///
    /// When files cannot be written or agents do not apply them.
    pub fn service(
        &self,
        name: &str,
        cluster_ips: &[IpAddr],
        target: u16,
        endpoints: &[objects::Endpoint],
    ) -> Result<()> {
        let ports = objects::Port::both(80, target);
        self.apply(&objects::service(name, cluster_ips, &ports))?;
        self.endpoints(name, target, endpoints)?;
        self.wait_applied()
    }

    /// The DEL with which a runtime cleans up after an ADD that has failed.
    #[must_use]
    pub fn del_after_failed_add(&self, node: &str, pod: &str) -> Call {
        let socket = self.node(node).run_dir.join("agent.sock");
        let mut call = Call::new(
            "DEL",
            &socket.to_string_lossy(),
            &container(&self.id, pod),
            "",
        );
        call.unset("CNI_NETNS");
        call
    }

    /// Replaces the EndpointSlices of a Service, without waiting.
    ///
    /// # Errors
    ///
    /// When files cannot be written.
    pub fn endpoints(
        &self,
        service: &str,
        target: u16,
        endpoints: &[objects::Endpoint],
    ) -> Result<()> {
        let ports = objects::Port::both(80, target);
        for v6 in [false, true] {
            let family: Vec<_> = endpoints
                .iter()
                .filter(|endpoint| endpoint.address.is_ipv6() == v6)
                .cloned()
                .collect();
            self.apply(&objects::endpoint_slice(service, v6, &family, &ports))?;
        }
        Ok(())
    }

    /// As [`Cluster::service`], with pods as endpoints.
    ///
    /// # Errors
    ///
    /// As [`Cluster::service`].
    pub fn service_of_pods(
        &self,
        name: &str,
        cluster_ips: &[IpAddr],
        target: u16,
        pods: &[&Pod],
    ) -> Result<()> {
        let endpoints: Vec<_> = pods.iter().flat_map(|pod| pod.endpoints()).collect();
        self.service(name, cluster_ips, target, &endpoints)
    }

    /// Waits until every running agent has all objects in the kernel.
    ///
    /// # Errors
    ///
    /// With what `weir wait --applied` says.
    pub fn wait_applied(&self) -> Result<()> {
        self.nodes.iter().try_for_each(Node::wait_applied)
    }

    /// Connections that were translated at the sockets of any node and its pods since the cluster began.
    ///
    /// # Errors
    ///
    /// When `weir bpf metrics list` fails.
    pub fn translated_at_sockets(&self) -> Result<u64> {
        let nodes = self.nodes.iter();
        nodes
            .map(|node| node.outcomes("socket", "TRANSLATED"))
            .sum()
    }

    /// Turns checksum and segmentation offloads on or off on every device of the underlay and of the nodes.
    ///
    /// # Errors
    ///
    /// When `ethtool` fails.
    pub fn set_offloads(&self, on: bool) -> Result<()> {
        self.fabric().set_offloads(on)?;
        for node in &self.nodes {
            node.netns.set_offloads(on)?;
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if std::thread::panicking() {
            for node in &self.nodes {
                // Locked once: the guard lives as long as the statement.
                let agent = node.agent();
                eprintln!(
                    "--- {}: agent of {}\n{}\n{}",
                    self.name,
                    node.name,
                    agent.log_tail(60),
                    agent.last_status()
                );
            }
        }
        self.nodes.clear();
        reaper::remove(&self.id);
    }
}

/// The ClusterIPs with a number, IPv4 first.
#[must_use]
pub fn cluster_ips(number: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 96, 0, number).into(),
        Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number.into()).into(),
    ]
}
