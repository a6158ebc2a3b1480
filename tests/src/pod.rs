//! A pod: a network namespace that the CNI plugin wired to its node.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    cgroup::Cgroup,
    cni::Call,
    netns::{self, NetNs},
    objects::{self, Endpoint, Objects},
    sctp,
    traffic::Server,
};

/// A pod of a cluster. Goes with the cluster; [`Pod::delete`] takes it down earlier, as kubelet would.
#[derive(Debug)]
pub struct Pod {
    /// Name; its Kubernetes namespace is `default`.
    pub name: String,
    /// Node that it runs on.
    pub node: String,
    /// Container id of its sandbox.
    pub container: String,
    /// Its network namespace.
    pub netns: NetNs,
    /// Its addresses as the plugin's result gave them, IPv4 first.
    pub addresses: Vec<IpAddr>,
    node_netns: Arc<NetNs>,
    socket: PathBuf,
    objects: Objects,
    port_mappings: Value,
}

/// What a pod needs of its node.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub node: String,
    pub netns: Arc<NetNs>,
    pub cgroup: Arc<Cgroup>,
    pub socket: PathBuf,
    pub objects: Objects,
}

/// Id of the sandbox of a pod of the cluster `id`.
pub(crate) fn container(id: &str, name: &str) -> String {
    format!("{}-{name}", id.replace('-', "x"))
}

impl Pod {
    /// Makes the namespace, calls ADD, and creates the Pod object.
    pub(crate) fn add(host: Host, id: &str, name: &str, port_mappings: Value) -> Result<Self> {
        let netns = NetNs::create(&crate::reaper::namespace_name(id, &format!("p-{name}")))?
            .in_cgroup(host.cgroup);
        let mut pod = Self {
            name: name.to_owned(),
            node: host.node,
            container: container(id, name),
            netns,
            addresses: Vec::new(),
            node_netns: host.netns,
            socket: host.socket,
            objects: host.objects,
            port_mappings,
        };
        pod.wire().with_context(|| format!("add pod {name}"))?;
        Ok(pod)
    }

    fn wire(&mut self) -> Result<()> {
        let result = self.call("ADD").result(&self.node_netns)?;
        self.addresses = result["ips"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|ip| {
                let text = ip["address"].as_str().unwrap_or_default();
                let (address, _length) = text.split_once('/').unwrap_or((text, ""));
                address
                    .parse()
                    .with_context(|| format!("address {text:?} in the result of ADD"))
            })
            .collect::<Result<_>>()?;
        self.objects.apply(&objects::pod(
            &self.name,
            &self.uid(),
            &self.node,
            &self.addresses,
        ))
    }

    /// A call of the plugin for this pod.
    #[must_use]
    pub fn call(&self, command: &str) -> Call {
        let mut call = Call::new(
            command,
            &self.socket.to_string_lossy(),
            &self.container,
            &self.netns.path().to_string_lossy(),
        );
        call.set_pod("default", &self.name, &self.uid());
        call.set_port_mappings(&self.port_mappings);
        call
    }

    fn uid(&self) -> String {
        format!("uid-{}", self.container)
    }

    /// Deletes the Pod object, calls DEL, and removes the namespace.
    ///
    /// # Errors
    ///
    /// When DEL fails.
    pub fn delete(self) -> Result<()> {
        let object = objects::pod(&self.name, "", &self.node, &[]);
        self.objects.delete(&object)?;
        self.call("DEL")
            .result(&self.node_netns)
            .with_context(|| format!("delete pod {}", self.name))?;
        netns::remove(self.netns.name());
        Ok(())
    }

    /// Removes the namespace and the Pod object without DEL, as a crash of the runtime does.
    ///
    /// # Errors
    ///
    /// When there is no Pod object.
    pub fn vanish(self) -> Result<()> {
        netns::remove(self.netns.name());
        self.objects
            .delete(&objects::pod(&self.name, "", &self.node, &[]))
    }

    /// Its address of a family.
    ///
    /// # Errors
    ///
    /// When it has none.
    pub fn address(&self, v6: bool) -> Result<IpAddr> {
        self.addresses
            .iter()
            .copied()
            .find(|address| address.is_ipv6() == v6)
            .with_context(|| {
                let family = if v6 { "IPv6" } else { "IPv4" };
                format!("pod {} has no {family} address", self.name)
            })
    }

    /// The pod as ready endpoints of a Service, one per address.
    #[must_use]
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.addresses
            .iter()
            .map(|address| Endpoint::ready(*address, &self.node, &self.name))
            .collect()
    }

    /// Runs a closure on a thread in the pod.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.netns.run(f)
    }

    /// Starts a server on `port` of each of the pod's addresses, named after the pod.
    ///
    /// # Errors
    ///
    /// When the port is taken.
    pub fn serve(&self, port: u16) -> Result<Vec<Server>> {
        self.addresses
            .iter()
            .map(|address| Server::start(&self.netns, SocketAddr::new(*address, port), &self.name))
            .collect()
    }

    /// As [`Pod::serve`], over SCTP.
    ///
    /// # Errors
    ///
    /// When the pod lost an address.
    pub fn serve_sctp(&self, port: u16) -> Result<Vec<sctp::Server>> {
        let addresses = self.addresses.iter();
        addresses
            .map(|address| {
                let address = SocketAddr::new(*address, port);
                sctp::Server::start(&self.netns, address, &self.name)
            })
            .collect()
    }
}
