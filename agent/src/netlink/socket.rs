//! [`Netlink`]: the verbs. Each runs on a blocking thread, because the kernel handles a request
//! inside the system call and may wait there for another process that configures the network.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::Arc,
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::AddressMessage,
    link::{LinkAttribute, LinkExtentMask, LinkMessage},
    route::{RouteHeader, RouteMessage},
};

use tokio::{
    sync::{Mutex, mpsc},
    task,
};

use super::{
    Address, Change, Link, NetlinkError, NetlinkEvent, ROUTE_PROTOCOL, Refusal, ResolvedRoute,
    Route, RouteFacts, SERVICE_TABLE,
    connection::{Connection, Reply},
    convert,
    defrag_device::{self, DEFRAG_DEVICE},
    host_device::{self, HOST_DEVICE, HostDevice, NET_DEVICE},
    watch,
};

/// Network configuration of one network namespace: that of the thread that called [`Netlink::new`].
///
/// A clone shares the sockets. A call that is dropped before it is ready is carried out all the
/// same.
#[derive(Clone)]
pub struct Netlink {
    requests: Arc<Mutex<Connection>>,
    /// Apart, because the removal of a device takes long.
    removals: Arc<Mutex<Connection>>,
    /// Port numbers of both sockets: changes made through them are no news.
    ports: [u32; 2],
}

impl std::fmt::Debug for Netlink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Netlink")
            .field("ports", &self.ports)
            .finish()
    }
}

impl Netlink {
    /// Opens the sockets in the network namespace of the calling thread.
    pub fn new() -> Result<Self, NetlinkError> {
        let requests = Connection::open()?;
        let removals = Connection::open()?;
        Ok(Self {
            ports: [requests.port(), removals.port()],
            requests: Arc::new(Mutex::new(requests)),
            removals: Arc::new(Mutex::new(removals)),
        })
    }

    /// All devices, by interface index.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let messages = self
            .dump("devices", RouteNetlinkMessage::GetLink(message))
            .await?;
        let mut links: Vec<Link> = messages
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewLink(message) => Some(convert::link(message)),
                _ => None,
            })
            .collect();
        links.sort_by_key(|link| link.ifindex);
        Ok(links)
    }

    /// All addresses of all devices.
    pub async fn addresses(&self) -> Result<Vec<Address>, NetlinkError> {
        let message = AddressMessage::default();
        let messages = self
            .dump("addresses", RouteNetlinkMessage::GetAddress(message))
            .await?;
        Ok(messages
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewAddress(message) => convert::address(message),
                _ => None,
            })
            .collect())
    }

    /// All routes of [`ROUTE_PROTOCOL`] in the main table and in that of Services, both families.
    pub async fn own_routes(&self) -> Result<Vec<Route>, NetlinkError> {
        let main = RouteHeader::RT_TABLE_MAIN;
        let mut messages = self.routes(main, Some(ROUTE_PROTOCOL)).await?;
        messages.extend(self.routes(SERVICE_TABLE, Some(ROUTE_PROTOCOL)).await?);
        Ok(messages
            .iter()
            // Kernels before 4.20 do not filter.
            .filter(|message| u8::from(message.header.protocol) == ROUTE_PROTOCOL)
            .filter_map(convert::route)
            .collect())
    }

    /// What the node's routes say that concerns all of its traffic.
    pub async fn route_facts(&self) -> Result<RouteFacts, NetlinkError> {
        let messages = self.routes(RouteHeader::RT_TABLE_UNSPEC, None).await?;
        let is_default = |message: &&RouteMessage| {
            message.header.table == RouteHeader::RT_TABLE_MAIN
                && message.header.destination_prefix_length == 0
        };
        Ok(RouteFacts {
            default_devices: messages
                .iter()
                .filter(is_default)
                .flat_map(convert::route_devices)
                .collect(),
            ipv6_has_sources: messages.iter().any(convert::has_ipv6_source),
        })
    }

    /// How the kernel would send to an address.
    pub async fn route_get(&self, destination: IpAddr) -> Result<ResolvedRoute, NetlinkError> {
        self.route_get_all([destination].into())
            .await?
            .remove(&destination)
            .unwrap_or_else(|| Err("the kernel did not answer".to_owned()))
            .map_err(|cause| NetlinkError::NoRoute { destination, cause })
    }

    /// How the kernel would send to each of many addresses, or why it would not.
    pub async fn route_get_all(
        &self,
        destinations: BTreeSet<IpAddr>,
    ) -> Result<BTreeMap<IpAddr, Result<ResolvedRoute, String>>, NetlinkError> {
        let answers = blocking(&self.requests, move |connection| {
            let requests = destinations
                .iter()
                .copied()
                .map(convert::route_query)
                .collect();
            let replies = connection.exchange(requests)?;
            Ok(destinations
                .into_iter()
                .zip(replies.into_iter().map(resolved))
                .collect())
        });
        Ok(answers.await?)
    }

    /// Whether the node takes packets for each of many addresses, by its routes; `None`: the kernel does not tell.
    pub async fn are_local(
        &self,
        addresses: BTreeSet<IpAddr>,
    ) -> Result<BTreeMap<IpAddr, Option<bool>>, NetlinkError> {
        let answers = blocking(&self.requests, move |connection| {
            let requests = addresses.iter().copied().map(convert::route_query);
            let replies = connection.exchange(requests.collect())?;
            Ok(addresses
                .into_iter()
                .zip(replies.into_iter().map(is_local))
                .collect())
        });
        Ok(answers.await?)
    }

    /// Applies changes in their order with as few system calls as possible. A change that fails
    /// does not stop those behind it; the errors of all are returned, none if all is well.
    pub async fn apply(&self, changes: Vec<Change>) -> Vec<NetlinkError> {
        if changes.is_empty() {
            return Vec::new();
        }
        let slow = changes.iter().any(|c| matches!(c, Change::RemoveLink(_)));
        let connection = if slow { &self.removals } else { &self.requests };
        let outcome = blocking(connection, move |connection| {
            let replies = connection.exchange(changes.iter().map(convert::request).collect())?;
            Ok(changes.into_iter().zip(replies).collect::<Vec<_>>())
        });
        match outcome.await {
            Ok(outcome) => outcome
                .into_iter()
                .filter_map(|(change, reply)| failure(change, reply))
                .collect(),
            Err(error) => vec![error.into()],
        }
    }

    /// Makes the node's own device, both ends down, in place of one that is not as it should be. `mtu`
    /// in bytes.
    pub async fn make_host_device(&self, mtu: u32) -> Result<HostDevice, NetlinkError> {
        for link in self.links().await? {
            if link.name == HOST_DEVICE || link.name == NET_DEVICE {
                self.remove_link(link.ifindex).await?;
            }
        }
        let reply = blocking(&self.requests, move |connection| {
            connection.exchange(vec![host_device::creation(mtu)])
        });
        if let Some(Err(refusal)) = reply.await?.pop() {
            return Err(NetlinkError::HostDevice(refusal.to_string()));
        }
        host_device::find(&self.links().await?).ok_or_else(|| {
            NetlinkError::HostDevice("it is not there although it was made".to_owned())
        })
    }

    /// Makes the device behind which datagrams are put together, the node's end down, in place of one
    /// that is not as it should be. `attach` is called in the namespace of the other end, and must leave
    /// behind what keeps it alive. Gives the interface index of the node's end.
    pub async fn make_defrag_device(
        &self,
        attach: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<u32, NetlinkError> {
        for link in self.links().await? {
            if link.name == DEFRAG_DEVICE {
                self.remove_link(link.ifindex).await?;
            }
        }
        let made = task::spawn_blocking(move || defrag_device::make(attach)).await;
        made.unwrap_or_else(|panic| Err(io::Error::other(panic).into()))?;
        defrag_device::find(&self.links().await?).ok_or_else(|| {
            NetlinkError::DefragDevice("it is not there although it was made".to_owned())
        })
    }

    /// Enters a route, or replaces the one with its destination and metric.
    pub async fn replace_route(&self, route: Route) -> Result<(), NetlinkError> {
        self.apply_one(Change::ReplaceRoute(route)).await
    }

    /// Removes a route of ours if it is there.
    pub async fn remove_route(&self, route: Route) -> Result<(), NetlinkError> {
        self.apply_one(Change::RemoveRoute(route)).await
    }

    /// Removes a device if it is there.
    pub async fn remove_link(&self, ifindex: u32) -> Result<(), NetlinkError> {
        self.apply_one(Change::RemoveLink(ifindex)).await
    }

    /// Sets a device up.
    pub async fn set_link_up(&self, ifindex: u32) -> Result<(), NetlinkError> {
        self.apply_one(Change::SetLinkUp(ifindex)).await
    }

    /// Starts a task that reports what others change: removed devices one by one, everything else
    /// about links, addresses and routes as [`NetlinkEvent::Changed`], at most one per 20 ms. What
    /// this `Netlink` or a clone of it changes, and what concerns pods' devices only, is not
    /// reported (but their removal is). The task ends when the receiver is dropped.
    pub async fn watch(&self) -> Result<mpsc::Receiver<NetlinkEvent>, NetlinkError> {
        watch::start(self.clone()).await
    }

    /// Whether a port number that stands in a notification is one of ours.
    pub(super) fn is_own_port(&self, port: u32) -> bool {
        self.ports.contains(&port)
    }

    async fn apply_one(&self, change: Change) -> Result<(), NetlinkError> {
        match self.apply(vec![change]).await.pop() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    async fn routes(
        &self,
        table: u8,
        protocol: Option<u8>,
    ) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let filter = convert::route_filter(family, table, protocol);
            let listed = self
                .dump("routes", RouteNetlinkMessage::GetRoute(filter))
                .await;
            match listed {
                Ok(messages) => routes.extend(messages.into_iter().filter_map(|m| match m {
                    RouteNetlinkMessage::NewRoute(message) => Some(message),
                    _ => None,
                })),
                // The table does not exist before its first route, nor without the family.
                Err(NetlinkError::List { refusal, .. })
                    if matches!(
                        refusal.errno,
                        libc::ENOENT | libc::EOPNOTSUPP | libc::EAFNOSUPPORT
                    ) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(routes)
    }

    async fn dump(
        &self,
        what: &'static str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        blocking(&self.requests, move |connection| connection.dump(&message))
            .await?
            .map_err(|refusal| NetlinkError::List { what, refusal })
    }
}

fn resolved(reply: Reply) -> Result<ResolvedRoute, String> {
    match reply {
        Ok(messages) => messages
            .iter()
            .find_map(|message| match message {
                RouteNetlinkMessage::NewRoute(message) => Some(convert::resolved(message)),
                _ => None,
            })
            .unwrap_or_else(|| Err("the kernel's answer is empty".to_owned())),
        Err(refusal) => Err(refusal.to_string()),
    }
}

/// A refusal tells that there is no way, or only one that ends here, by these numbers alone: the kernel has one for each
/// of no route and the types `unreachable`, `prohibit` and `blackhole` (`fib_props` in net/ipv4/fib_semantics.c,
/// `fib6_null_entry` and its like in net/ipv6/route.c).
fn is_local(reply: Reply) -> Option<bool> {
    const NO_WAY: [i32; 4] = [
        libc::ENETUNREACH,
        libc::EHOSTUNREACH,
        libc::EACCES,
        libc::EINVAL,
    ];
    match reply {
        Err(refusal) => NO_WAY.contains(&refusal.errno).then_some(false),
        Ok(messages) if messages.is_empty() => None,
        reply => Some(resolved(reply).is_ok_and(|way| way.local)),
    }
}

fn failure(change: Change, reply: Reply) -> Option<NetlinkError> {
    let refusal: Refusal = reply.err()?;
    (!convert::is_done_already(&change, refusal.errno))
        .then_some(NetlinkError::Change { change, refusal })
}

/// Runs `work` with the connection on a blocking thread, one piece of work at a time.
async fn blocking<T: Send + 'static>(
    connection: &Arc<Mutex<Connection>>,
    work: impl FnOnce(&mut Connection) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let mut connection = Arc::clone(connection).lock_owned().await;
    task::spawn_blocking(move || work(&mut connection))
        .await
        .unwrap_or_else(|panic| Err(io::Error::other(panic)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_lack_of_a_way_says_that_an_address_is_not_the_node_s() {
        for (errno, said) in [
            (libc::ENETUNREACH, Some(false)),
            (libc::EHOSTUNREACH, Some(false)),
            (libc::EACCES, Some(false)),
            (libc::EINVAL, Some(false)),
            (libc::ENOBUFS, None),
            (libc::ENOMEM, None),
            (libc::EPERM, None),
        ] {
            let refusal = Refusal {
                errno,
                explanation: None,
            };
            assert_eq!(is_local(Err(refusal)), said, "{errno}");
        }
        assert_eq!(is_local(Ok(Vec::new())), None);
    }
}
