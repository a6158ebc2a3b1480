//! Between the messages of the kernel and the types of [`super`]; no I/O.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
    link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
        RouteScope, RouteType, RouteVia,
    },
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use super::{
    Address, Change, Link, LinkLayer, ROUTE_PROTOCOL, Readiness, ResolvedRoute, Route, RouteTarget,
    SERVICE_METRIC, SERVICE_RULE, SERVICE_TABLE, connection::Request,
};
use crate::objects::Family;

/// The request that makes a change.
pub(super) fn request(change: &Change) -> Request {
    let (message, flags) = match *change {
        Change::ReplaceRoute(route) => (
            RouteNetlinkMessage::NewRoute(route_message(&route)),
            NLM_F_CREATE | NLM_F_REPLACE,
        ),
        Change::RemoveRoute(route) => (RouteNetlinkMessage::DelRoute(removal_message(&route)), 0),
        Change::ReplaceNeighbour {
            ifindex,
            address,
            mac,
        } => {
            let mut message = neighbour_message(ifindex, address);
            message.header.state = NeighbourState::Permanent;
            message
                .attributes
                .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
            message
                .attributes
                .push(NeighbourAttribute::Protocol(ROUTE_PROTOCOL.into()));
            (
                RouteNetlinkMessage::NewNeighbour(message),
                NLM_F_CREATE | NLM_F_REPLACE,
            )
        }
        Change::AddServiceRule(family) => (
            RouteNetlinkMessage::NewRule(rule_message(family)),
            NLM_F_CREATE | NLM_F_EXCL,
        ),
        Change::RemoveServiceRule(family) => {
            (RouteNetlinkMessage::DelRule(rule_message(family)), 0)
        }
        Change::RemoveNeighbour { ifindex, address } => (
            RouteNetlinkMessage::DelNeighbour(neighbour_message(ifindex, address)),
            0,
        ),
        Change::SetLinkUp(ifindex) => {
            let mut message = LinkMessage::default();
            message.header.index = ifindex;
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
            (RouteNetlinkMessage::SetLink(message), 0)
        }
        Change::SetLinkMtu { ifindex, mtu } => {
            let mut message = LinkMessage::default();
            message.header.index = ifindex;
            message.attributes.push(LinkAttribute::Mtu(mtu));
            (RouteNetlinkMessage::SetLink(message), 0)
        }
        Change::RemoveLink(ifindex) => {
            let mut message = LinkMessage::default();
            message.header.index = ifindex;
            (RouteNetlinkMessage::DelLink(message), 0)
        }
    };
    Request { message, flags }
}

/// Whether an error number means that what the change is for is the case already.
pub(super) fn is_done_already(change: &Change, errno: i32) -> bool {
    match change {
        Change::RemoveRoute(_) => matches!(errno, libc::ESRCH | libc::ENOENT | libc::ENODEV),
        Change::AddServiceRule(_) => errno == libc::EEXIST,
        Change::RemoveServiceRule(_) => matches!(errno, libc::ENOENT | libc::EAFNOSUPPORT),
        Change::RemoveNeighbour { .. } | Change::RemoveLink(_) => {
            matches!(errno, libc::ENOENT | libc::ENODEV | libc::ENXIO)
        }
        Change::ReplaceRoute(_)
        | Change::ReplaceNeighbour { .. }
        | Change::SetLinkUp(_)
        | Change::SetLinkMtu { .. } => false,
    }
}

/// The request for the way to an address.
pub(super) fn route_query(destination: IpAddr) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = family(destination);
    message.header.destination_prefix_length = IpNet::from(destination).prefix_len();
    message
        .attributes
        .push(RouteAttribute::Destination(destination.into()));
    Request {
        message: RouteNetlinkMessage::GetRoute(message),
        flags: 0,
    }
}

/// The kernel's answer to [`route_query`], or why there is no way.
pub(super) fn resolved(message: &RouteMessage) -> Result<ResolvedRoute, String> {
    let local = match message.header.kind {
        RouteType::Unicast => false,
        RouteType::Local | RouteType::Anycast | RouteType::Broadcast => true,
        RouteType::Unreachable => return Err("the route says unreachable".to_owned()),
        RouteType::BlackHole => return Err("the route says blackhole".to_owned()),
        RouteType::Prohibit => return Err("the route says prohibit".to_owned()),
        kind => return Err(format!("the route is of the kind {kind:?}")),
    };
    let hop = next_hop(&message.attributes);
    let mtu = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Metrics(metrics) => metrics.iter().find_map(|m| match m {
            RouteMetric::Mtu(mtu) => Some(*mtu),
            _ => None,
        }),
        _ => None,
    });
    Ok(ResolvedRoute {
        ifindex: hop.ifindex.ok_or("the route has no device")?,
        gateway: hop.gateway,
        mtu,
        local,
        source: message.attributes.iter().find_map(|a| match a {
            RouteAttribute::PrefSource(address) => ip(address),
            _ => None,
        }),
    })
}

/// A device.
pub(super) fn link(message: &LinkMessage) -> Link {
    let mut link = Link {
        ifindex: message.header.index,
        name: String::new(),
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        mac: None,
        kind: String::new(),
        link_layer: link_layer(message.header.link_layer_type),
        master: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Controller(ifindex) => link.master = Some(*ifindex),
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok(),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        link.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    link
}

/// An address of a device.
pub(super) fn address(message: &AddressMessage) -> Option<Address> {
    // On a point-to-point link `Address` is the peer and `Local` our own.
    let mut own = None;
    let mut other = None;
    // The header has room for the first eight flags only.
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => own = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let address = IpNet::new(own.or(other)?, message.header.prefix_len).ok()?;
    let readiness = if flags.contains(AddressFlags::Dadfailed) {
        Readiness::Taken
    } else if flags.contains(AddressFlags::Tentative) && !flags.contains(AddressFlags::Optimistic) {
        Readiness::Tentative
    } else {
        Readiness::Ready
    };
    // `Secondary` is the flag of temporary addresses too (`IFA_F_TEMPORARY`).
    let is_second_choice = flags.intersects(AddressFlags::Secondary | AddressFlags::Deprecated);
    let is_source = message.header.scope == AddressScope::Universe && readiness == Readiness::Ready;
    Some(Address {
        ifindex: message.header.index,
        address,
        preferred: is_source && !is_second_choice,
        second_choice: is_source && is_second_choice,
        readiness,
    })
}

/// A route of the main table.
pub(super) fn route(message: &RouteMessage) -> Option<Route> {
    let destination = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut destination = destination;
    let mut metric = 0;
    let mut source = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => destination = ip(to)?,
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::PrefSource(address) => source = ip(address),
            _ => {}
        }
    }
    let hop = next_hop(&message.attributes);
    let target = match (message.header.kind, hop) {
        (RouteType::Unreachable, _) => RouteTarget::Unreachable,
        (
            RouteType::Unicast,
            NextHop {
                ifindex: Some(ifindex),
                gateway,
            },
        ) => match (gateway, source) {
            (Some(gateway), _) => RouteTarget::Via { ifindex, gateway },
            (None, source) if metric == SERVICE_METRIC => RouteTarget::Service { ifindex, source },
            (None, Some(source)) => RouteTarget::Service {
                ifindex,
                source: Some(source),
            },
            (None, None) => RouteTarget::Link { ifindex },
        },
        _ => RouteTarget::Foreign,
    };
    Some(Route {
        destination: IpNet::new(destination, message.header.destination_prefix_length).ok()?,
        metric,
        target,
    })
}

/// The devices that a unicast route leads to; empty for routes of another kind.
pub(super) fn route_devices(message: &RouteMessage) -> Vec<u32> {
    match message.header.kind {
        RouteType::Unicast => devices(message),
        _ => Vec::new(),
    }
}

/// Whether it is an IPv6 route of others that says which address to send from.
pub(super) fn has_ipv6_source(message: &RouteMessage) -> bool {
    message.header.address_family == AddressFamily::Inet6
        && message.header.kind == RouteType::Unicast
        && u8::from(message.header.protocol) != ROUTE_PROTOCOL
        && message
            .attributes
            .iter()
            .any(|attribute| matches!(attribute, RouteAttribute::PrefSource(_)))
}

/// The devices that stand in a route of any kind.
pub(super) fn devices(message: &RouteMessage) -> Vec<u32> {
    let mut devices = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => devices.push(*ifindex),
            RouteAttribute::MultiPath(hops) => {
                devices.extend(hops.iter().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    devices
}

/// What the kernel is to filter a listing of routes by.
pub(super) fn route_filter(family: AddressFamily, table: u8, protocol: Option<u8>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.table = table;
    message.header.protocol = protocol.map_or(RouteProtocol::Unspec, RouteProtocol::from);
    message
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = route_base(route);
    message.header.protocol = ROUTE_PROTOCOL.into();
    message.header.kind = RouteType::Unicast;
    message.header.scope = RouteScope::Universe;
    match route.target {
        RouteTarget::Link { ifindex } => {
            message.header.scope = RouteScope::Link;
            message.attributes.push(RouteAttribute::Oif(ifindex));
        }
        RouteTarget::Service { ifindex, source } => {
            message.header.scope = RouteScope::Link;
            message.attributes.push(RouteAttribute::Oif(ifindex));
            let source = source.map(|source| RouteAttribute::PrefSource(source.into()));
            message.attributes.extend(source);
        }
        RouteTarget::Via { ifindex, gateway } => {
            message.attributes.push(RouteAttribute::Oif(ifindex));
            message.attributes.push(match (route.destination, gateway) {
                (IpNet::V4(_), IpAddr::V6(gateway)) => {
                    RouteAttribute::Via(RouteVia::Inet6(gateway))
                }
                _ => RouteAttribute::Gateway(gateway.into()),
            });
        }
        RouteTarget::Unreachable | RouteTarget::Foreign => {
            message.header.kind = RouteType::Unreachable;
        }
    }
    message
}

/// Names the route by protocol, destination and metric, and leaves all else open.
fn removal_message(route: &Route) -> RouteMessage {
    let mut message = route_base(route);
    message.header.protocol = ROUTE_PROTOCOL.into();
    message.header.scope = RouteScope::NoWhere;
    if let RouteTarget::Link { ifindex } = route.target {
        message.attributes.push(RouteAttribute::Oif(ifindex));
    }
    message
}

fn route_base(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.destination.addr());
    message.header.destination_prefix_length = route.destination.prefix_len();
    message.header.table = if route.is_to_service() {
        SERVICE_TABLE
    } else {
        RouteHeader::RT_TABLE_MAIN
    };
    message
        .attributes
        .push(RouteAttribute::Destination(route.destination.addr().into()));
    message
        .attributes
        .push(RouteAttribute::Priority(route.metric));
    message
}

/// What this node's own processes send (whose input device is the loopback device) asks the table of
/// Services first.
fn rule_message(family: Family) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    message.header.table = SERVICE_TABLE;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(SERVICE_RULE),
        RuleAttribute::Iifname("lo".to_owned()),
        RuleAttribute::Protocol(ROUTE_PROTOCOL.into()),
    ];
    message
}

fn neighbour_message(ifindex: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = ifindex;
    message
        .attributes
        .push(NeighbourAttribute::Destination(match address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        }));
    message
}

struct NextHop {
    ifindex: Option<u32>,
    gateway: Option<IpAddr>,
}

fn next_hop(attributes: &[RouteAttribute]) -> NextHop {
    let mut hop = NextHop {
        ifindex: None,
        gateway: None,
    };
    for attribute in attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => hop.ifindex = Some(*ifindex),
            RouteAttribute::Gateway(gateway) => hop.gateway = ip(gateway),
            RouteAttribute::Via(RouteVia::Inet(gateway)) => hop.gateway = Some((*gateway).into()),
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => hop.gateway = Some((*gateway).into()),
            _ => {}
        }
    }
    hop
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// The same list as the kernel's (`dev_is_mac_header_xmit`, include/linux/if_arp.h).
fn link_layer(kind: LinkLayerType) -> LinkLayer {
    match kind {
        LinkLayerType::Ether => LinkLayer::Ethernet,
        LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit
        | LinkLayerType::Ipgre
        | LinkLayerType::Ip6gre
        | LinkLayerType::Void
        | LinkLayerType::None
        | LinkLayerType::Rawip
        | LinkLayerType::Ppp => LinkLayer::None,
        _ => LinkLayer::Other,
    }
}
