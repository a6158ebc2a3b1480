//! The veth pair between host and pod: made, configured, found again, deleted. Host routes, host
//! neighbours and host sysctls are the agent's.

use std::{net::IpAddr, path::Path};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{
        AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute,
        LinkFlags, LinkInfo, LinkMessage,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
};

use crate::{
    agent::{Family, Mac, Reservation},
    error::{CniError, code},
    netlink::{Netlink, NetlinkError, Request},
    netns::Netns,
};

/// `lo` is the first device of every network namespace.
const LOOPBACK_IFINDEX: u32 = 1;
/// Below this MTU a device has no IPv6 (RFC 8200, 5).
const IPV6_MTU_MIN: u32 = 1280;

/// What Ethernet addresses of Weir begin with, on the host's side and on the pod's.
const WEIR_MACS: [[u8; 2]; 2] = [[0x0a, 0x57], [0x0e, 0x57]];

/// Marks the host side of a pair: `ip link` shows whose it is, and DEL finds it without the agent.
pub fn alias(container_id: &str, ifname: &str) -> String {
    // IFALIASZ, the final zero included.
    const ALIAS_BYTES_MAX: usize = 255;
    let mut alias = format!("weir:{container_id}/{ifname}");
    alias.truncate(ALIAS_BYTES_MAX);
    alias
}

/// A link as far as it matters here.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Link {
    index: u32,
    kind: String,
    mac: Vec<u8>,
    alias: String,
    /// Index of the other side of a pair, in the namespace of that side.
    peer: u32,
}

/// Makes the pair, or finds the one that an earlier ADD made. Returns the index of the host side.
///
/// # Errors
///
/// Code 101 if a device of either name is not ours, 5 for what the kernel refuses. Then nothing is left.
pub fn create(reservation: &Reservation, ifname: &str, netns: &Netns) -> Result<u32, CniError> {
    let mut host = open()?;
    match create_pair(&mut host, reservation, ifname, netns) {
        Err(error) if error.is(libc::EEXIST) => {
            let existing = find(&mut host, &reservation.host_ifname)?;
            if let Some(index) = adopt(existing.as_ref(), reservation, ifname, netns)? {
                return Ok(index);
            }
            // A pair whose other side went astray.
            if let Some(link) = existing {
                delete_by_index(&mut host, link.index)?;
            }
            create_pair(&mut host, reservation, ifname, netns).map_err(refused)
        }
        result => result.map_err(refused),
    }
}

/// Configures the pod's side: addresses, routes, permanent neighbours. May be repeated. Returns the
/// cookie of the namespace.
///
/// # Errors
///
/// Code 5, naming what the kernel refuses.
pub fn configure_pod(
    reservation: &Reservation,
    ifname: &str,
    netns: &Netns,
) -> Result<u64, CniError> {
    netns.within(|| {
        let mut pod = open()?;
        let cookie = pod.netns_cookie();
        let answers = pod
            .batch(vec![set_up("lo", LOOPBACK_IFINDEX), get_by_name(ifname)])
            .map_err(refused)?;
        let index = answers
            .iter()
            .flatten()
            .find_map(link_of)
            .map(|link| link.index)
            .ok_or_else(|| CniError::io(format!("cannot find {ifname}"), "the kernel is silent"))?;
        write_sysctls(reservation, ifname)?;
        let mut requests = vec![set_up(ifname, index)];
        for family in &reservation.families {
            requests.extend(configure_family(
                family,
                reservation.host_mac,
                ifname,
                index,
            ));
        }
        pod.batch(requests).map_err(refused)?;
        Ok(cookie)
    })
}

/// Marks the host's side, keeps IPv6 from giving it an address, sets it up. May be repeated.
///
/// # Errors
///
/// Code 5, naming what the kernel refuses.
pub fn configure_host(
    reservation: &Reservation,
    index: u32,
    alias: String,
) -> Result<(), CniError> {
    let mut link = link_up(index);
    link.attributes.push(LinkAttribute::IfAlias(alias));
    if reservation.mtu >= IPV6_MTU_MIN && Path::new("/proc/sys/net/ipv6").exists() {
        link.attributes
            .push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
                vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
            )]));
    }
    let what = format!("set {} up", reservation.host_ifname);
    let request = Request::new(what, 0, RouteNetlinkMessage::SetLink(link));
    open()?.batch(vec![request]).map_err(refused)?;
    Ok(())
}

/// Deletes a link of the host by index. One that is gone already is fine.
///
/// # Errors
///
/// Code 5.
pub fn delete(index: u32) -> Result<(), CniError> {
    delete_by_index(&mut open()?, index)
}

/// Finds the host side of the pair that carries `alias`, through the pod's namespace if there is one, by
/// looking at every link otherwise. An interface in the pod that is not ours is left alone.
///
/// # Errors
///
/// Code 5.
pub fn find_host_side(
    alias: &str,
    ifname: &str,
    netns: Option<&Netns>,
    look_at_all: bool,
) -> Result<Option<u32>, CniError> {
    let mut host = open()?;
    if let Some(netns) = netns
        && let Some(inside) = netns.within(|| find(&mut open()?, ifname))?
        && inside.peer != 0
    {
        let mut request = LinkMessage::default();
        request.header.index = inside.peer;
        let found = query(&mut host, format!("read link {}", inside.peer), request)?;
        if let Some(outside) = found.filter(|link| link.alias == alias) {
            return Ok(Some(outside.index));
        }
    }
    if !look_at_all {
        return Ok(None);
    }
    let all = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let links = host.dump("list links", all).map_err(refused)?;
    let found = links
        .iter()
        .filter_map(link_of)
        .find(|link| link.kind == "veth" && link.alias == alias);
    Ok(found.map(|link| link.index))
}

fn create_pair(
    host: &mut Netlink,
    reservation: &Reservation,
    ifname: &str,
    netns: &Netns,
) -> Result<u32, NetlinkError> {
    let mtu = reservation.mtu;
    let side = |name: &str, mac: Mac| {
        vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(mac.0.to_vec()),
            LinkAttribute::Mtu(mtu),
        ]
    };
    let mut peer = LinkMessage::default();
    peer.attributes = side(ifname, reservation.pod_mac);
    peer.attributes
        .push(LinkAttribute::NetNsFd(netns.descriptor()));
    let mut link = LinkMessage::default();
    link.attributes = side(&reservation.host_ifname, reservation.host_mac);
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    let answers = host.batch(vec![
        Request::new(
            format!(
                "create veth {} with peer {ifname} in {}",
                reservation.host_ifname,
                netns.path()
            ),
            NLM_F_CREATE | NLM_F_EXCL,
            RouteNetlinkMessage::NewLink(link),
        ),
        get_by_name(&reservation.host_ifname),
    ])?;
    let link = answers.iter().flatten().find_map(link_of);
    Ok(link.unwrap_or_default().index)
}

/// Decides about devices that are in the way: the index of ours, `None` if ours is to be made anew, or
/// an error that names the stranger.
fn adopt(
    outside: Option<&Link>,
    reservation: &Reservation,
    ifname: &str,
    netns: &Netns,
) -> Result<Option<u32>, CniError> {
    let inside = netns.within(|| find(&mut open()?, ifname))?;
    let is_host_side = |link: &Link| link.kind == "veth" && link.mac == reservation.host_mac.0;
    match (outside, inside) {
        (Some(outside), Some(inside))
            if is_host_side(outside)
                && outside.peer == inside.index
                && inside.peer == outside.index =>
        {
            Ok(Some(outside.index))
        }
        (_, Some(inside)) => Err(stranger(ifname, netns.path(), &inside)),
        (Some(outside), None) if !is_host_side(outside) => Err(stranger(
            &reservation.host_ifname,
            "the host's namespace",
            outside,
        )),
        _ => Ok(None),
    }
}

/// A device of this name that another has made, or Weir for another container.
fn stranger(name: &str, place: &str, link: &Link) -> CniError {
    let address = hex(&link.mac);
    let message = if is_weirs(link) {
        let whose = match link.alias.as_str() {
            "" => String::new(),
            alias => format!(", alias {alias}"),
        };
        format!(
            "interface {name} exists in {place} and is Weir's, but of another container or another \
             ADD (address {address}{whose}); DEL of that one removes it; or choose another name"
        )
    } else {
        format!(
            "interface {name} exists in {place} and is not Weir's (kind {:?}, address {address}); \
             remove it, or choose another name",
            link.kind
        )
    };
    CniError::new(code::INTERFACE_EXISTS, message)
}

/// Whether the Ethernet address is one that the agent gives to either side of a pair.
fn is_weirs(link: &Link) -> bool {
    link.kind == "veth" && WEIR_MACS.iter().any(|prefix| link.mac.starts_with(prefix))
}

fn configure_family(family: &Family, host_mac: Mac, ifname: &str, index: u32) -> Vec<Request> {
    let Family { address, gateway } = *family;
    let (family, length) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    let replace = NLM_F_CREATE | NLM_F_REPLACE;

    let mut assign = AddressMessage::default();
    assign.header.family = family;
    assign.header.prefix_len = length;
    assign.header.index = index;
    assign.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
        // Without them an IPv6 address stays tentative for two seconds.
        AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute),
    ];

    let route = |scope: RouteScope, attributes: Vec<RouteAttribute>, length: u8| {
        let mut route = RouteMessage::default();
        route.header = RouteHeader {
            address_family: family,
            destination_prefix_length: length,
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Static,
            scope,
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        route.attributes = attributes;
        route.attributes.push(RouteAttribute::Oif(index));
        RouteNetlinkMessage::NewRoute(route)
    };
    let to_gateway = vec![RouteAttribute::Destination(RouteAddress::from(gateway))];
    let by_gateway = vec![RouteAttribute::Gateway(RouteAddress::from(gateway))];

    let mut neighbour = NeighbourMessage::default();
    neighbour.header.family = family;
    neighbour.header.ifindex = index;
    neighbour.header.state = NeighbourState::Permanent;
    neighbour.attributes = vec![
        NeighbourAttribute::Destination(match gateway {
            IpAddr::V4(gateway) => NeighbourAddress::Inet(gateway),
            IpAddr::V6(gateway) => NeighbourAddress::Inet6(gateway),
        }),
        NeighbourAttribute::LinkLayerAddress(host_mac.0.to_vec()),
    ];

    vec![
        Request::new(
            format!("add address {address}/{length} to {ifname}"),
            replace,
            RouteNetlinkMessage::NewAddress(assign),
        ),
        Request::new(
            format!("add neighbour {gateway} ({host_mac}) on {ifname}"),
            replace,
            RouteNetlinkMessage::NewNeighbour(neighbour),
        ),
        Request::new(
            format!("add route {gateway}/{length} on {ifname}"),
            replace,
            route(RouteScope::Link, to_gateway, length),
        ),
        Request::new(
            format!("add default route via {gateway} on {ifname}"),
            replace,
            route(RouteScope::Universe, by_gateway, 0),
        ),
    ]
}

/// In the pod: no address or route from router advertisements, a link-local address without
/// probation, and IPv6 at all where the runtime's defaults have it off.
fn write_sysctls(reservation: &Reservation, ifname: &str) -> Result<(), CniError> {
    let has_v6 = reservation.families.iter().any(|f| f.address.is_ipv6());
    let directory = Path::new("/proc/sys/net/ipv6/conf").join(ifname);
    if !directory.exists() && !has_v6 {
        return Ok(());
    }
    for (name, value, needed) in [
        ("accept_ra", "0", true),
        ("accept_dad", "0", true),
        ("disable_ipv6", "0", has_v6),
    ] {
        let path = directory.join(name);
        if needed {
            std::fs::write(&path, value).map_err(|cause| {
                CniError::io(
                    format!("cannot write {value} to {} of the pod", path.display()),
                    cause,
                )
            })?;
        }
    }
    Ok(())
}

fn find(netlink: &mut Netlink, name: &str) -> Result<Option<Link>, CniError> {
    let mut message = LinkMessage::default();
    message
        .attributes
        .push(LinkAttribute::IfName(name.to_owned()));
    query(netlink, format!("read link {name}"), message)
}

fn query(
    netlink: &mut Netlink,
    what: String,
    message: LinkMessage,
) -> Result<Option<Link>, CniError> {
    let request = Request::new(what, 0, RouteNetlinkMessage::GetLink(message));
    match netlink.batch(vec![request]) {
        Ok(answers) => Ok(answers.iter().flatten().find_map(link_of)),
        Err(error) if error.is(libc::ENODEV) => Ok(None),
        Err(error) => Err(refused(error)),
    }
}

fn get_by_name(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message
        .attributes
        .push(LinkAttribute::IfName(name.to_owned()));
    Request::new(
        format!("read link {name}"),
        0,
        RouteNetlinkMessage::GetLink(message),
    )
}

fn set_up(name: &str, index: u32) -> Request {
    Request::new(
        format!("set {name} up"),
        0,
        RouteNetlinkMessage::SetLink(link_up(index)),
    )
}

fn link_up(index: u32) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link
}

fn delete_by_index(netlink: &mut Netlink, index: u32) -> Result<(), CniError> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    let what = format!("delete link {index}");
    let request = Request::new(what, 0, RouteNetlinkMessage::DelLink(link));
    match netlink.batch(vec![request]) {
        Err(error) if !error.is(libc::ENODEV) => Err(refused(error)),
        _ => Ok(()),
    }
}

fn link_of(message: &RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let mut link = Link {
        index: message.header.index,
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(mac) => link.mac.clone_from(mac),
            LinkAttribute::IfAlias(alias) => link.alias.clone_from(alias),
            LinkAttribute::Link(peer) => link.peer = *peer,
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
    Some(link)
}

fn open() -> Result<Netlink, CniError> {
    Netlink::open().map_err(refused)
}

fn refused(error: NetlinkError) -> CniError {
    CniError::new(code::IO_FAILURE, error.to_string())
}

fn hex(bytes: &[u8]) -> String {
    let parts: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    parts.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_in_the_way_is_told_by_its_owner() {
        let link = |kind: &str, mac: [u8; 6]| Link {
            kind: kind.to_owned(),
            mac: mac.to_vec(),
            ..Link::default()
        };
        for (kind, first, wanted) in [
            ("veth", 0x0e, "is Weir's, but of another container"),
            ("veth", 0x0a, "is Weir's, but of another container"),
            ("veth", 0x02, "is not Weir's (kind \"veth\""),
            ("dummy", 0x0e, "is not Weir's (kind \"dummy\""),
        ] {
            let link = link(kind, [first, 0x57, 0, 0, 0, 7]);
            let error = stranger("eth0", "/run/netns/x", &link);
            assert_eq!(error.code, code::INTERFACE_EXISTS);
            assert!(error.message.contains(wanted), "{}", error.message);
            assert!(
                error.message.contains(":57:00:00:00:07"),
                "{}",
                error.message
            );
        }
    }
}
