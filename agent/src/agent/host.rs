//! What serves the node's own processes: the programs of sockets, the node's own device with the
//! routes that lead to it, and the program on the loopback device.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::{Agent, Row};
use crate::{
    datapath::NodeConfig,
    netlink::{
        Change, NetlinkEvent, Route,
        host_device::{self, HostDevice},
    },
    objects::Family,
};

/// Interface index of the loopback device, in every network namespace.
pub(super) const LOOPBACK: u32 = 1;
const LOOPBACK_NAME: &str = "lo";
/// MTU of the node's own device before that of the node's devices is known.
const MTU: u32 = 1500;

/// What is known of the node's own device.
#[derive(Debug, Default)]
pub(super) struct Host {
    device: Option<HostDevice>,
    /// Routes to addresses of Services in the kernel; `None`: to be listed.
    routes: Option<BTreeMap<IpAddr, Route>>,
    /// Addresses whose routes are to be looked at.
    dirty: BTreeSet<IpAddr>,
    /// Families whose rule has been entered.
    rules: BTreeSet<Family>,
    /// Source addresses of the routes: the node's, as its object has them.
    sources: Vec<IpAddr>,
    /// Those of them that no device has; the kernel refuses routes with such a source.
    foreign: BTreeSet<IpAddr>,
    /// Families of addresses of Services for which the node has no address: they have no routes.
    without_source: BTreeSet<Family>,
}

impl Host {
    /// Devices that have `from_host`.
    pub(super) fn programs(&self) -> impl Iterator<Item = u32> + use<> {
        let net = self.device.map(|device| device.net);
        net.into_iter().chain([LOOPBACK])
    }

    /// All routes are to be looked at.
    pub(super) fn forget_routes(&mut self) {
        self.routes = None;
    }

    /// Whether the routes need other source addresses than they have.
    pub(super) fn node_addresses_are_new(&mut self, config: &NodeConfig) -> bool {
        let v4 = config.node_v4.map(IpAddr::V4);
        let v6 = config.node_v6.map(IpAddr::V6);
        let sources: Vec<IpAddr> = v4.into_iter().chain(v6).collect();
        let new = sources != self.sources;
        if new {
            self.sources = sources;
            self.routes = None;
        }
        new
    }

    /// The route that an address of Services should have; `None` while there is nothing to lead to.
    fn route(&self, address: IpAddr) -> Option<Route> {
        // Host ports may be there, for the node alone: the program at the loopback device serves them.
        if address.is_loopback() {
            return None;
        }
        let device = self.device?;
        let source = self.source(Family::of(address))?;
        let source = Some(source).filter(|source| !self.foreign.contains(source));
        Some(Route::to_service(address, device.host, source))
    }

    fn source(&self, family: Family) -> Option<IpAddr> {
        let mut sources = self.sources.iter().copied();
        sources.find(|source| Family::of(*source) == family)
    }

    /// Notes which of the sources no device has.
    fn note_local(&mut self, local: &BTreeSet<IpAddr>) {
        let foreign = self.sources.iter().filter(|source| !local.contains(source));
        self.foreign = foreign.copied().collect();
    }

    /// Notes for which families of these addresses the node has no address.
    fn note_families(&mut self, services: impl Iterator<Item = IpAddr>) {
        let families: BTreeSet<Family> = services
            .filter(|address| !address.is_loopback())
            .map(Family::of)
            .collect();
        let lacks = families.into_iter();
        self.without_source = lacks
            .filter(|family| self.source(*family).is_none())
            .collect();
    }

    /// For people: what the Node object `node` says of its addresses and cannot be followed.
    pub(super) fn problems(&self, node: &str) -> impl Iterator<Item = String> {
        let foreign = self.foreign.iter().map(move |address| {
            format!(
                "Node {node}: status.addresses has {address}, which no device of this node has: what its processes \
                 send to Services by {} gets the source that the kernel chooses; correct it, or give a \
                 device the address",
                Family::of(*address).name()
            )
        });
        let without = self.without_source.iter().map(move |family| {
            let family = family.name();
            format!(
                "Node {node}: status.addresses has no {family} address, and Services have: processes of this node \
                 reach them only where they are translated at the socket; give the node an {family} address"
            )
        });
        foreign.chain(without)
    }
}

/// The cookie of the network namespace of the calling thread (`SO_NETNS_COOKIE`, kernel 5.14).
///
/// # Errors
///
/// The kernel's.
pub(super) fn netns_cookie() -> std::io::Result<u64> {
    use std::os::fd::AsRawFd as _;
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option writes eight bytes at most, and `cookie` has them.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(std::io::Error::last_os_error())
    }
}

impl Agent {
    /// The node's own device is there and has its program, and so has the loopback device.
    pub(super) async fn apply_host(&mut self) -> anyhow::Result<()> {
        let mtu = (self.plan.mtu != 0).then_some(self.plan.mtu);
        let mut links = self.netlink.links().await?;
        let device = match host_device::find(&links) {
            Some(device) => device,
            None => {
                let device = self.netlink.make_host_device(mtu.unwrap_or(MTU)).await?;
                links = self.netlink.links().await?;
                device
            }
        };
        host_device::set_switches()?;
        let mut changes = Vec::new();
        for ifindex in [device.host, device.net] {
            let link = links.iter().find(|link| link.ifindex == ifindex);
            if let Some(mtu) = mtu.filter(|mtu| link.is_some_and(|link| link.mtu != *mtu)) {
                changes.push(Change::SetLinkMtu { ifindex, mtu });
            }
            if link.is_none_or(|link| !link.up) {
                changes.push(Change::SetLinkUp(ifindex));
            }
        }
        if let Some(error) = self.netlink.apply(changes).await.into_iter().next() {
            return Err(error.into());
        }
        // Programs that an earlier agent has attached hand replies to the device by this number.
        if self.config.host_ifindex != device.host {
            self.config.host_ifindex = device.host;
            self.datapath.config_mut().apply(&self.config)?;
        }
        if self.late.host {
            // What serves the node until now goes on, and routes of an earlier agent.
            return Ok(());
        }
        self.datapath
            .attach_host(device.net, host_device::NET_DEVICE)?;
        self.datapath.attach_host(LOOPBACK, LOOPBACK_NAME)?;
        // Only now is there something to lead to.
        if self.host.device != Some(device) {
            if let Some(gone) = self.host.device.filter(|gone| gone.net != device.net) {
                self.datapath.detach(gone.net)?;
            }
            self.host.device = Some(device);
            self.host.forget_routes();
            self.mark(Row::ServiceRoutes);
        }
        Ok(())
    }

    /// The programs of sockets are attached to the cgroup, or to none.
    pub(super) fn apply_sockets(&mut self) -> anyhow::Result<()> {
        if !self.settings.socket_translation {
            self.datapath.detach_sockets()?;
        } else if !self.late.host {
            self.datapath.attach_sockets(&self.settings.cgroup_root)?;
        }
        Ok(())
    }

    /// A Service has changed: its addresses may need routes, or need them no more.
    pub(super) fn note_service_addresses(&mut self) {
        let addresses = self.datapath.take_service_addresses();
        if self.datapath.ipcache().is_lenient() {
            self.mark(Row::Refusals);
        }
        if !addresses.is_empty() {
            self.host.dirty.extend(addresses);
            self.mark(Row::ServiceRoutes);
        }
    }

    /// Enters and removes routes to addresses of Services.
    pub(super) async fn apply_service_routes(&mut self) -> anyhow::Result<()> {
        let mut dirty = std::mem::take(&mut self.host.dirty);
        let is_first = self.host.routes.is_none();
        if is_first {
            let own = self.netlink.own_routes().await?;
            let local = self.netlink.addresses().await?;
            self.host
                .note_local(&local.iter().map(|local| local.address.addr()).collect());
            let present: BTreeMap<IpAddr, Route> = own
                .into_iter()
                .filter(Route::is_to_service)
                .map(|route| (route.destination.addr(), route))
                .collect();
            dirty.extend(self.datapath.ipcache().service_addresses());
            // What an earlier agent has left goes once every Service is known.
            if self.swept {
                dirty.extend(present.keys());
            }
            self.host.routes = Some(present);
        }
        if is_first || !dirty.is_empty() {
            let services = self.datapath.ipcache().service_addresses();
            self.host.note_families(services.into_iter());
        }
        let mut changes = Vec::new();
        let mut after = self.host.routes.take().unwrap_or_default();
        for address in dirty {
            let is_service = self.datapath.ipcache().is_service_address(address);
            let wanted = self.host.route(address).filter(|_| is_service);
            match (wanted, after.get(&address).copied()) {
                (Some(wanted), Some(present)) if wanted == present => {}
                (Some(wanted), _) => {
                    after.insert(address, wanted);
                    changes.push(Change::ReplaceRoute(wanted));
                }
                // Leads to what an earlier agent has attached, until this one knows everything.
                (None, Some(_)) if is_service && !self.swept => {}
                (None, Some(present)) => {
                    after.remove(&address);
                    changes.push(Change::RemoveRoute(present));
                }
                (None, None) => {}
            }
        }
        for family in [Family::V4, Family::V6] {
            let is_needed = after.keys().any(|address| Family::of(*address) == family);
            if is_needed && (is_first || !self.host.rules.contains(&family)) {
                changes.push(Change::AddServiceRule(family));
                self.host.rules.insert(family);
            } else if !is_needed
                // An earlier agent may have left it.
                && (self.host.rules.remove(&family) || (is_first && self.swept))
            {
                changes.push(Change::RemoveServiceRule(family));
            }
        }
        let failures = self.netlink.apply(changes).await;
        if let Some(first) = failures.first() {
            // What stands there now is asked at the next attempt.
            self.host.rules.clear();
            anyhow::bail!("{} routes failed, the first: {first}", failures.len());
        }
        self.host.routes = Some(after);
        Ok(())
    }

    /// The node's own device, when it is gone.
    pub(super) fn host_changed(&mut self, event: &NetlinkEvent) {
        if let (NetlinkEvent::LinkRemoved(gone), Some(device)) = (event, self.host.device)
            && (device.host == *gone || device.net == *gone)
        {
            self.mark(Row::Host);
        }
    }

    /// Marks what somebody has taken away. `with_routes` has the routes, the rules and the state of the
    /// device looked at again, which is worth it after a change of the network only. Gives the number
    /// of things missing.
    pub(super) fn find_host_drift(&mut self, with_routes: bool) -> usize {
        let mut missing = 0;
        if self.late.host {
            return missing;
        }
        let detached = self
            .host
            .programs()
            .any(|ifindex| !self.datapath.is_host_attached(ifindex));
        if detached && !self.rows.is_known(&Row::Host) {
            tracing::warn!("programs of the node's own device were detached; attaching them again");
            self.mark(Row::Host);
            missing += 1;
        }
        if self.settings.socket_translation
            && !self.datapath.are_sockets_attached()
            && !self.rows.is_known(&Row::Sockets)
        {
            tracing::warn!("programs of sockets were detached; attaching them again");
            self.mark(Row::Sockets);
            missing += 1;
        }
        if with_routes {
            self.host.forget_routes();
            self.mark(Row::Host);
            self.mark(Row::ServiceRoutes);
        }
        missing
    }
}
