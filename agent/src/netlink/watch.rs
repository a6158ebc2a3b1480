//! The task behind [`Netlink::watch`]: reads the kernel's notifications, leaves out what is of no
//! use to anyone, merges the rest. It holds the devices it has told of, so that it can tell which
//! are gone after notifications were lost.

use std::{collections::BTreeMap, io, time::Duration};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkFlags, LinkMessage},
    route::RouteFlags,
};
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, TokioSocket, protocols::NETLINK_ROUTE};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};

use super::{Link, Netlink, NetlinkError, NetlinkEvent, connection::for_each_message, convert};

/// Changes within this time are one event.
const MERGE: Duration = Duration::from_millis(20);
/// Pause before a socket that failed is opened anew.
const REOPEN: Duration = Duration::from_millis(200);
/// Room for notifications, bytes: some thousand devices or routes that come at once.
const RECEIVE_BUFFER: usize = 4 * 1024 * 1024;
/// Events the receiver may be behind; then notifications wait in the socket.
const EVENTS: usize = 64;
/// Bytes of one datagram from the kernel.
const DATAGRAM_BYTES: usize = 64 * 1024;

const GROUPS: [u32; 5] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_ROUTE,
];

/// Subscribes, lists the devices and starts the task.
pub(super) async fn start(netlink: Netlink) -> Result<mpsc::Receiver<NetlinkEvent>, NetlinkError> {
    // Subscribed before the devices are listed: nothing falls between.
    let socket = subscribe()?;
    let links = list(&netlink).await?;
    let (sender, receiver) = mpsc::channel(EVENTS);
    let watcher = Watcher {
        netlink,
        socket,
        links,
        sender,
        changed: None,
    };
    tokio::spawn(watcher.run());
    Ok(receiver)
}

fn subscribe() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    socket.socket_mut().bind_auto()?;
    if let Err(error) = setsockopt(socket.socket_ref(), RcvBufForce, &RECEIVE_BUFFER) {
        tracing::debug!(%error, "the buffer for netlink notifications keeps its size");
    }
    for group in GROUPS {
        socket.socket_ref().add_membership(group)?;
    }
    Ok(socket)
}

async fn list(netlink: &Netlink) -> Result<BTreeMap<u32, Known>, NetlinkError> {
    let links = netlink.links().await?;
    Ok(links
        .into_iter()
        .map(|link| {
            (
                link.ifindex,
                Known {
                    link,
                    carrier: None,
                },
            )
        })
        .collect())
}

/// A device as it was told of.
#[derive(Eq, PartialEq)]
struct Known {
    link: Link,
    /// Carrier, once a notification has told.
    carrier: Option<bool>,
}

impl Known {
    fn from_message(message: &LinkMessage) -> Self {
        let carrier = message.header.flags.contains(LinkFlags::Running);
        Self {
            link: convert::link(message),
            carrier: Some(carrier),
        }
    }
}

struct Watcher {
    netlink: Netlink,
    socket: TokioSocket,
    links: BTreeMap<u32, Known>,
    sender: mpsc::Sender<NetlinkEvent>,
    /// When the change that was seen is told of.
    changed: Option<Instant>,
}

/// The receiver is gone.
struct Abandoned;

impl Watcher {
    async fn run(mut self) {
        let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
        loop {
            datagram.clear();
            let due = self.changed;
            let outcome = tokio::select! {
                () = self.sender.closed() => return,
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.changed = None;
                    self.send(NetlinkEvent::Changed).await
                }
                received = self.socket.recv(&mut datagram) => match received {
                    Ok(()) => self.read(&datagram).await,
                    Err(error) => self.recover(&error).await,
                },
            };
            if outcome.is_err() {
                return;
            }
        }
    }

    async fn read(&mut self, datagram: &[u8]) -> Result<(), Abandoned> {
        let mut removed = Vec::new();
        let mut changed = false;
        for_each_message(datagram, |message| match self.judge(message) {
            News::None => {}
            News::Changed => changed = true,
            News::Removed(known) => {
                changed |= !known.link.is_pod_device();
                removed.push(known.link.ifindex);
            }
        });
        for ifindex in removed {
            self.send(NetlinkEvent::LinkRemoved(ifindex)).await?;
        }
        if changed {
            self.mark_changed();
        }
        Ok(())
    }

    fn judge(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) -> News {
        let (header, payload) = message.into_parts();
        let NetlinkPayload::InnerMessage(message) = payload else {
            return News::None;
        };
        let own = self.netlink.is_own_port(header.port_number);
        match message {
            // Bridges tell of their ports with the same messages in their own family.
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link)
                if link.header.interface_family != AddressFamily::Unspec =>
            {
                News::None
            }
            RouteNetlinkMessage::DelLink(link) => match self.links.remove(&link.header.index) {
                Some(known) => News::Removed(known),
                None => News::None,
            },
            RouteNetlinkMessage::NewLink(link) => {
                let now = Known::from_message(&link);
                let is_pod_device = now.link.is_pod_device();
                let news = match self.links.get(&now.link.ifindex) {
                    Some(before) => *before != now,
                    None => true,
                };
                self.links.insert(now.link.ifindex, now);
                News::changed_if(news && !own && !is_pod_device)
            }
            RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
                News::changed_if(!own && !self.is_pod_device(address.header.index))
            }
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
                let devices = convert::devices(&route);
                let pods_only =
                    !devices.is_empty() && devices.iter().all(|device| self.is_pod_device(*device));
                let cached = route.header.flags.contains(RouteFlags::Cloned);
                News::changed_if(!own && !pods_only && !cached)
            }
            _ => News::None,
        }
    }

    fn is_pod_device(&self, ifindex: u32) -> bool {
        self.links
            .get(&ifindex)
            .is_some_and(|known| known.link.is_pod_device())
    }

    /// After lost notifications: whatever may have changed has changed.
    async fn recover(&mut self, error: &io::Error) -> Result<(), Abandoned> {
        if error.raw_os_error() != Some(libc::ENOBUFS) {
            tracing::warn!(%error, "the socket for netlink notifications failed and is opened anew");
            loop {
                sleep(REOPEN).await;
                match subscribe() {
                    Ok(socket) => break self.socket = socket,
                    Err(error) => {
                        tracing::warn!(%error, "cannot subscribe to netlink notifications; retrying");
                    }
                }
                if self.sender.is_closed() {
                    return Err(Abandoned);
                }
            }
        }
        self.mark_changed();
        match list(&self.netlink).await {
            Ok(links) => {
                let before = std::mem::replace(&mut self.links, links);
                for ifindex in before.into_keys() {
                    if !self.links.contains_key(&ifindex) {
                        self.send(NetlinkEvent::LinkRemoved(ifindex)).await?;
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "removed devices may go unnoticed"),
        }
        Ok(())
    }

    fn mark_changed(&mut self) {
        self.changed.get_or_insert_with(|| Instant::now() + MERGE);
    }

    async fn send(&self, event: NetlinkEvent) -> Result<(), Abandoned> {
        self.sender.send(event).await.map_err(|_| Abandoned)
    }
}

enum News {
    None,
    Changed,
    Removed(Known),
}

impl News {
    fn changed_if(changed: bool) -> Self {
        if changed { Self::Changed } else { Self::None }
    }
}
