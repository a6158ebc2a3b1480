//! What in a Service or a host port cannot be served, in words for people.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;

use super::super::{
    FrontendKind, Owner, ServicePort, ServicePortKey,
    occupied::{Occupant, Purpose},
};
use super::claims::{Age, Claimant, Wish};
use crate::objects::{Family, Protocol};

/// Something that cannot be served as it stands.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Problem {
    /// Whose it is.
    pub owner: Owner,
    /// What is wrong, and what to do about it.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.owner, self.text)
    }
}

/// What to change so that a frontend gets a place of its own.
const fn another_place(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "another clusterIP",
        FrontendKind::NodePort => "another nodePort",
        FrontendKind::ExternalIp => "another address in externalIPs",
        FrontendKind::LoadBalancer => "another load balancer address",
        FrontendKind::HostPort => "another hostPort or hostIP",
    }
}

impl Problem {
    fn new(wish: &Wish, text: String) -> Self {
        Self {
            owner: wish.claimant.owner.clone(),
            text,
        }
    }

    /// The address is a node's or a pod's.
    pub(super) fn occupied(wish: &Wish, range: IpNet, occupant: &Occupant) -> Self {
        let node = &occupant.node;
        let whose = match occupant.purpose {
            Purpose::Address => format!("is an address of node {node}"),
            Purpose::Pods => format!("lies in {range}, the pod range of node {node}"),
        };
        let object = match wish.claimant.owner {
            Owner::Service(_) => "Service",
            Owner::HostPort(_) => "pod",
        };
        let text = format!(
            "{} is not served: it {whose}, whose traffic it would take. Give the {object} {}, or \
             correct the Node",
            wish.claim,
            another_place(wish.claimant.kind)
        );
        Self::new(wish, text)
    }

    /// The `hostIP` is not an address of this node, which is called `node`.
    pub(super) fn not_here(wish: &Wish, node: &str) -> Self {
        let text = format!(
            "{} is not served: hostIP {} is no loopback address and none that the Node {node} has, \
             so it would take traffic that is for others. Give the pod an address of the Node as \
             hostIP, or none for all of them",
            wish.claim, wish.claim.address
        );
        Self::new(wish, text)
    }

    /// Another one has it. `port_name` is that of the Service port.
    pub(super) fn taken(wish: &Wish, port_name: &str, winner: &Claimant) -> Self {
        let (claim, claimant) = (wish.claim, &wish.claimant);
        let text = if winner.owner == claimant.owner {
            let port = if claim.address.is_unspecified() {
                ""
            } else {
                "port "
            };
            format!(
                "{port}{claim} (named {port_name:?}) stands twice in it; the first is served. \
                 Remove one"
            )
        } else {
            let because = match (winner.age, claimant.age) {
                (Age::HostPort(_), _) => "had it first",
                (_, Age::HostPort(_)) => "comes before host ports",
                (Age::Unknown, _) => "comes first by name: neither has a creationTimestamp",
                (age, other) if age == other => "comes first by name: both are equally old",
                (_, Age::Unknown) => "has a creationTimestamp, and this Service has none",
                _ => "is older by its creationTimestamp",
            };
            format!(
                "{claim} belongs to {}, which {because}. Give one of them {}",
                winner.owner,
                another_place(claimant.kind)
            )
        };
        Self::new(wish, text)
    }

    /// An address of a family that the Service is not in.
    pub(super) fn other_family(owner: &Owner, address: IpAddr) -> Self {
        let family = Family::of(address).name();
        let text = format!(
            "{address} is not served: the Service has no {family} clusterIP, and so no {family} \
             endpoints. Make it dual stack (ipFamilyPolicy), or remove the address"
        );
        Self {
            owner: owner.clone(),
            text,
        }
    }

    /// A range of clients that is none.
    pub(super) fn source_range(owner: &Owner, range: &str) -> Self {
        Self {
            owner: owner.clone(),
            text: format!(
                "{range:?} in loadBalancerSourceRanges is not a CIDR and lets nobody in; a family that has no \
                 other range is closed. Give a range as 192.0.2.0/24 or 2001:db8::/32"
            ),
        }
    }

    /// Ranges of clients, all of the family that the load balancer has no address of. `range` is one of them.
    pub(super) fn ranges_of_other_family(owner: &Owner, range: IpNet) -> Self {
        let ranges = Family::of(range.addr());
        let served = match ranges {
            Family::V4 => Family::V6.name(),
            Family::V6 => Family::V4.name(),
        };
        Self {
            owner: owner.clone(),
            text: format!(
                "loadBalancerSourceRanges keeps nobody out: its ranges are of {} ({range}), its load balancer \
                 addresses of {served}. Give ranges of {served}",
                ranges.name()
            ),
        }
    }

    /// SCTP with a port that would have to be changed: its checksum covers the whole packet. One
    /// for each port number of the frontends.
    pub(super) fn changed_sctp_ports(key: &ServicePortKey, port: &ServicePort) -> Vec<Self> {
        if key.protocol != Protocol::Sctp {
            return Vec::new();
        }
        let mut numbers: Vec<(u16, FrontendKind)> = Vec::new();
        for frontend in &port.frontends {
            if !numbers.iter().any(|(number, _)| *number == frontend.port) {
                numbers.push((frontend.port, frontend.kind));
            }
        }
        let problem = |(number, kind): (u16, FrontendKind)| {
            let target = port.backends.keys().find(|b| b.port != number)?.port;
            let (what, remedy) = match kind {
                FrontendKind::NodePort => {
                    let same = "use one number for nodePort and targetPort";
                    ("nodePort", same.to_owned())
                }
                FrontendKind::HostPort => ("hostPort", format!("use a containerPort of {number}")),
                _ => ("port", format!("use a targetPort of {number}")),
            };
            let family = key.family.name();
            Some(Self {
                owner: key.owner.clone(),
                text: format!(
                    "{what} {number} SCTP ({family}) does not work: an endpoint listens on port \
                     {target}, and ports of SCTP cannot be translated; {remedy}"
                ),
            })
        };
        numbers.into_iter().filter_map(problem).collect()
    }
}
