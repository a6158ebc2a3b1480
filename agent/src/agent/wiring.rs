//! The kernel's side of an endpoint, out of the datapath and netlink.

use std::{collections::BTreeSet, io, net::IpAddr};

use ipnet::IpNet;
use nix::net::if_::if_nametoindex;

use super::{Agent, Late, socket_translation::SocketTranslations};
use crate::{
    datapath::{Datapath, EndpointRow, NodeConfig},
    endpoint::{EndpointManager, EndpointSpec, Wiring, WiringError},
    netlink::{
        Netlink,
        pod::{self, HostSide},
    },
};

/// See the module.
pub(super) struct NodeWiring<'a> {
    datapath: &'a mut Datapath,
    config: &'a mut NodeConfig,
    late: &'a mut Late,
    netlink: &'a Netlink,
    translations: &'a SocketTranslations,
    /// The source is complete: what `translations` does not know was not said.
    synced: bool,
}

impl Agent {
    /// The endpoint manager and the kernel's side that its calls need.
    pub(super) fn endpoints_and_wiring(&mut self) -> (&mut EndpointManager, NodeWiring<'_>) {
        let wiring = NodeWiring {
            datapath: &mut self.datapath,
            config: &mut self.config,
            late: &mut self.late,
            netlink: &self.netlink,
            translations: &self.translations,
            synced: self.source_state.synced,
        };
        (&mut self.endpoints, wiring)
    }
}

impl Wiring for NodeWiring<'_> {
    async fn install(&mut self, endpoint: &EndpointSpec) -> Result<(), WiringError> {
        self.cover(&endpoint.ranges)?;
        // The programs first: from here on nothing passes that they do not see.
        self.attach(endpoint)?;
        let ipv4 = endpoint.addresses.iter().find_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        });
        let ipv6 = endpoint.addresses.iter().find_map(|address| match address {
            IpAddr::V6(address) => Some(*address),
            IpAddr::V4(_) => None,
        });
        let row = EndpointRow {
            number: endpoint.number,
            ipv4,
            ipv6,
            ifindex: endpoint.host_ifindex,
            mtu: endpoint.mtu,
            netns_cookie: endpoint.netns_cookie,
            flags: self.flags(endpoint),
        };
        self.datapath.insert_endpoint(&row)?;
        let host_side = HostSide {
            ifindex: endpoint.host_ifindex,
            name: endpoint.host_ifname.clone(),
            addresses: endpoint.addresses.clone(),
            pod_mac: endpoint.pod_mac().0,
        };
        pod::install(self.netlink, &host_side).await?;
        Ok(())
    }

    async fn remove(&mut self, endpoint: &EndpointSpec) -> Result<(), WiringError> {
        let mut first_error: Option<WiringError> = None;
        let mut keep = |error: WiringError| {
            first_error.get_or_insert(error);
        };
        // The index in the table is the one that was attached to, even when the device is gone.
        let attached = self.attached_ifindex(endpoint.number);
        let indices: BTreeSet<u32> = [endpoint.host_ifindex, attached]
            .into_iter()
            .filter(|ifindex| *ifindex != 0)
            .collect();
        for &ifindex in &indices {
            for error in pod::remove(self.netlink, ifindex, &endpoint.addresses).await {
                keep(error.into());
            }
        }
        if let Err(error) = self.datapath.remove_endpoint(endpoint.number) {
            keep(error.into());
        }
        for &ifindex in &indices {
            self.late.pods.remove(&ifindex);
            if let Err(error) = self.datapath.detach(ifindex) {
                keep(error.into());
            }
        }
        if let Err(error) = self.remove_device(endpoint).await {
            keep(error);
        }
        first_error.map_or(Ok(()), Err)
    }
}

impl NodeWiring<'_> {
    fn attach(&mut self, endpoint: &EndpointSpec) -> Result<(), WiringError> {
        let (ifindex, name) = (endpoint.host_ifindex, &endpoint.host_ifname);
        if self.late.waiting {
            let attachments = self.datapath.attachments()?;
            if attachments
                .iter()
                .any(|attachment| attachment.ifindex == ifindex)
            {
                self.late.pods.insert(ifindex, name.clone());
                return Ok(());
            }
        }
        Ok(self.datapath.attach_endpoint(ifindex, name)?)
    }

    /// Until the source has said everything, a pod of an earlier agent keeps the flags that it has.
    fn flags(&self, endpoint: &EndpointSpec) -> u16 {
        let row = self.datapath.endpoints().get(endpoint.number);
        let same = row.filter(|row| row.ifindex == endpoint.host_ifindex);
        match same {
            Some(row) if !self.synced => row.flags,
            _ => self
                .translations
                .flags(&endpoint.pod_namespace, &endpoint.pod_name),
        }
    }

    /// The device that the endpoint has in the kernel's table, 0 if it has none.
    fn attached_ifindex(&self, number: u32) -> u32 {
        let row = self.datapath.endpoints().get(number);
        row.map_or(0, |row| row.ifindex)
    }

    /// The endpoint's ranges must be configured before the endpoint is entered: they are not yet
    /// when the tables are new and the pod is not.
    fn cover(&mut self, ranges: &[IpNet]) -> Result<(), WiringError> {
        let missing: Vec<_> = ranges
            .iter()
            .filter(|range| self.datapath.config().local_index(range.addr()).is_none())
            .copied()
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        for range in missing {
            if !self.config.pod_ranges.contains(&range) {
                self.config.pod_ranges.push(range);
            }
        }
        Ok(self.datapath.config_mut().apply(self.config)?)
    }

    /// Removes the pod's device if it still exists, and nothing that only has its number or name.
    async fn remove_device(&self, endpoint: &EndpointSpec) -> Result<(), WiringError> {
        let ifindex = match if_nametoindex(endpoint.host_ifname.as_str()) {
            Ok(ifindex) => ifindex,
            Err(nix::errno::Errno::ENODEV) => return Ok(()),
            Err(errno) => return Err(io::Error::from(errno).into()),
        };
        if ifindex != endpoint.host_ifindex {
            let links = self.netlink.links().await?;
            let is_ours = links
                .iter()
                .any(|link| link.ifindex == ifindex && link.mac == Some(endpoint.host_mac().0));
            if !is_ours {
                return Ok(());
            }
        }
        Ok(self.netlink.remove_link(ifindex).await?)
    }
}
