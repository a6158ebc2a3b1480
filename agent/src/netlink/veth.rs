//! Requests for the veth pairs that are Weir's own on a node. Pods' pairs are made by the plugin.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
};
use weir_common::config::HOST_DEVICE_MAC;

use super::connection::Request;

/// One end, down. `mtu` in bytes. Both ends have one Ethernet address and ask for none, so that
/// whatever is sent to one is for the other.
pub(super) fn end(name: &str, mtu: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.flags = LinkFlags::Noarp;
    message.header.change_mask = message.header.flags;
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::Address(HOST_DEVICE_MAC.0.to_vec()),
    ];
    message
}

/// The request that makes a pair of two ends.
pub(super) fn creation(mut link: LinkMessage, peer: LinkMessage) -> Request {
    link.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    Request {
        message: RouteNetlinkMessage::NewLink(link),
        flags: NLM_F_CREATE | NLM_F_EXCL,
    }
}
