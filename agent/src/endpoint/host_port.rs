//! Host ports: ports of the node that lead to a pod on it, as the CNI plugin hands them on from the
//! pod's `hostPort`s. Which of two pods a packet is for must never depend on luck, so a port that
//! another pod of the node has is refused.

use std::{fmt, net::IpAddr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use weir_api::v1;

use super::error::{EndpointError, ErrorKind};
use crate::objects::Protocol;

/// A port of the node that leads to a port of the pod.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct HostPort {
    /// Address of the node; `None`: every one. The unspecified address is every one of its family.
    pub host_ip: Option<IpAddr>,
    /// Port of the node, not 0.
    pub host_port: u16,
    /// Port of the pod, not 0.
    pub container_port: u16,
    /// Protocol of both.
    #[serde(serialize_with = "write_protocol", deserialize_with = "read_protocol")]
    pub protocol: Protocol,
}

impl fmt::Display for HostPort {
    /// The node's side: `8080/TCP`, `192.0.2.1:53/UDP`, `[::]:53/UDP`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            None => write!(f, "{}", self.host_port)?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:{}", self.host_port)?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:{}", self.host_port)?,
        }
        write!(f, "/{}", self.protocol.name())
    }
}

impl HostPort {
    /// Whether a packet to the node could be for both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.host_port == other.host_port
            && self.protocol == other.protocol
            && match (self.host_ip, other.host_ip) {
                (Some(one), Some(another)) if one.is_ipv4() == another.is_ipv4() => {
                    one == another || one.is_unspecified() || another.is_unspecified()
                }
                (Some(_), Some(_)) => false,
                (None, _) | (_, None) => true,
            }
    }

    /// What a file may hold wrongly although it parses.
    pub(super) fn validate(&self) -> Result<(), String> {
        if self.host_port == 0 || self.container_port == 0 {
            return Err(format!(
                "host port {self} to container port {}: a port is 0",
                self.container_port
            ));
        }
        Ok(())
    }
}

/// The host ports of a request, each once.
///
/// # Errors
///
/// `Invalid`, naming field, value and remedy; also for two that overlap and lead to different ports
/// of the pod.
pub(super) fn of_request(mappings: &[v1::PortMapping]) -> Result<Vec<HostPort>, EndpointError> {
    let mut host_ports: Vec<HostPort> = Vec::with_capacity(mappings.len());
    for (index, mapping) in mappings.iter().enumerate() {
        let host_port =
            one(mapping).map_err(|why| invalid(format!("port_mappings[{index}].{why}")))?;
        if host_ports.contains(&host_port) {
            continue;
        }
        let overlaps = |other: &&HostPort| {
            other.overlaps(&host_port) && other.container_port != host_port.container_port
        };
        if let Some(other) = host_ports.iter().find(overlaps) {
            return Err(invalid(format!(
                "port_mappings[{index}]: host port {host_port} leads to container port {}, and {other} \
                 of the same pod to {}; give one of them another hostPort",
                host_port.container_port, other.container_port
            )));
        }
        host_ports.push(host_port);
    }
    Ok(host_ports)
}

fn one(mapping: &v1::PortMapping) -> Result<HostPort, String> {
    let port = |field: &str, number: u32| {
        u16::try_from(number)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| format!("{field} {number} is no port; give 1 to 65535"))
    };
    let host_ip = match mapping.host_ip.as_str() {
        "" => None,
        text => {
            let address: IpAddr = text.parse().map_err(|_| {
                format!("host_ip {text:?} is no IP address; leave it empty for every address")
            })?;
            // A socket bound to ::ffff:192.0.2.1 serves 192.0.2.1.
            Some(address.to_canonical())
        }
    };
    Ok(HostPort {
        host_ip,
        host_port: port("host_port", mapping.host_port)?,
        container_port: port("container_port", mapping.container_port)?,
        protocol: parse_protocol(&mapping.protocol).map_err(|why| format!("protocol {why}"))?,
    })
}

fn parse_protocol(text: &str) -> Result<Protocol, String> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
        .into_iter()
        .find(|protocol| protocol.name().eq_ignore_ascii_case(text))
        .ok_or_else(|| format!("{text:?} is unknown; give TCP, UDP or SCTP"))
}

fn invalid(message: String) -> EndpointError {
    EndpointError::new(ErrorKind::Invalid, message)
}

impl From<&HostPort> for v1::PortMapping {
    fn from(host_port: &HostPort) -> Self {
        Self {
            host_port: host_port.host_port.into(),
            container_port: host_port.container_port.into(),
            protocol: host_port.protocol.name().to_owned(),
            host_ip: host_port
                .host_ip
                .map(|address| address.to_string())
                .unwrap_or_default(),
        }
    }
}

fn write_protocol<S: Serializer>(protocol: &Protocol, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(protocol.name())
}

fn read_protocol<'de, D: Deserializer<'de>>(from: D) -> Result<Protocol, D::Error> {
    let text = String::deserialize(from)?;
    parse_protocol(&text).map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(
        host_ip: &str,
        host_port: u32,
        container_port: u32,
        protocol: &str,
    ) -> v1::PortMapping {
        v1::PortMapping {
            host_port,
            container_port,
            protocol: protocol.to_owned(),
            host_ip: host_ip.to_owned(),
        }
    }

    fn host_port(host_ip: &str, port: u32, protocol: &str) -> HostPort {
        one(&mapping(host_ip, port, 80, protocol)).unwrap()
    }

    #[test]
    fn a_packet_that_could_be_for_two_is_an_overlap() {
        for (one, another, expected) in [
            ("", "", true),
            ("", "192.0.2.1", true),
            ("", "fd00::1", true),
            ("", "0.0.0.0", true),
            ("0.0.0.0", "192.0.2.1", true),
            ("0.0.0.0", "fd00::1", false),
            ("0.0.0.0", "::", false),
            ("::", "fd00::1", true),
            ("::", "192.0.2.1", false),
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "::ffff:192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
            ("127.0.0.1", "192.0.2.1", false),
        ] {
            let (a, b) = (host_port(one, 8080, "tcp"), host_port(another, 8080, "TCP"));
            assert_eq!(a.overlaps(&b), expected, "{a} and {b}");
            assert_eq!(b.overlaps(&a), expected, "{b} and {a}");
            assert!(!a.overlaps(&host_port(another, 8080, "udp")));
            assert!(!a.overlaps(&host_port(another, 8081, "tcp")));
        }
    }

    #[test]
    fn a_request_is_checked_by_field() {
        for (mappings, expected) in [
            (
                vec![mapping("", 0, 80, "TCP")],
                "port_mappings[0].host_port 0",
            ),
            (vec![mapping("", 65536, 80, "TCP")], "host_port 65536"),
            (vec![mapping("", 1, 0, "TCP")], "container_port 0"),
            (vec![mapping("", 1, 70000, "TCP")], "container_port 70000"),
            (vec![mapping("", 1, 1, "ICMP")], "protocol \"ICMP\""),
            (
                vec![mapping("", 1, 1, "TCP"), mapping("10.0.0.300", 2, 1, "TCP")],
                "port_mappings[1].host_ip \"10.0.0.300\"",
            ),
            (
                vec![mapping("", 1, 1, "TCP"), mapping("192.0.2.1", 1, 2, "TCP")],
                "port_mappings[1]: host port 192.0.2.1:1/TCP leads to container port 2, and 1/TCP of",
            ),
        ] {
            let error = of_request(&mappings).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Invalid);
            assert!(error.message.contains(expected), "{error}");
        }
    }

    #[test]
    fn what_is_said_twice_counts_once() {
        let twice = [
            mapping("", 53, 5353, "UDP"),
            mapping("", 53, 5353, "udp"),
            mapping("", 53, 5353, "TCP"),
            mapping("::1", 53, 5353, "UDP"),
        ];
        let host_ports = of_request(&twice).unwrap();
        let shown: Vec<_> = host_ports.iter().map(HostPort::to_string).collect();
        assert_eq!(shown, ["53/UDP", "53/TCP", "[::1]:53/UDP"]);
        let back: Vec<v1::PortMapping> = host_ports.iter().map(Into::into).collect();
        assert_eq!(of_request(&back).unwrap(), host_ports);
    }
}
