//! Calls to the agent, and its answers checked before anything is built on them.

use std::{fmt, net::IpAddr, path::Path, time::Duration};

use tonic::{Code, Status, transport::Channel};
use weir_api::{
    ConnectError,
    v1::{
        self, AllocateRequest, AllocateResponse, CommitRequest, ReleaseRequest,
        cni_client::CniClient,
    },
};

use crate::{
    environment::Environment,
    error::{CniError, code},
    port_mappings::PortMapping,
};

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Address and gateway of one family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Family {
    /// The pod's address.
    pub address: IpAddr,
    /// Its gateway, of the same family.
    pub gateway: IpAddr,
}

/// What the agent reserved.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Reservation {
    /// Name of the host side.
    pub host_ifname: String,
    /// Ethernet address of the host side.
    pub host_mac: Mac,
    /// Ethernet address of the pod side.
    pub pod_mac: Mac,
    /// MTU, bytes.
    pub mtu: u32,
    /// One or two, IPv4 first.
    pub families: Vec<Family>,
}

/// The agent behind its socket.
#[derive(Debug)]
pub struct Agent {
    client: CniClient<Channel>,
    socket: String,
    timeout: Duration,
}

/// Why there is no reservation.
#[derive(Debug)]
pub struct NotAllocated {
    /// For the runtime.
    pub error: CniError,
    /// The agent may have reserved something before the answer was lost or made no sense.
    pub may_be_reserved: bool,
}

impl Agent {
    /// Connects.
    ///
    /// # Errors
    ///
    /// Code 11, naming the socket, and the agent's process if it lives and does not serve the socket.
    pub async fn connect(socket: &Path, timeout: Duration) -> Result<Self, CniError> {
        // The time-out below covers a full backlog too; the channel's own is the same bound per call.
        let channel = tokio::time::timeout(timeout, weir_api::connect(socket, Some(timeout)))
            .await
            .map_err(|_| no_answer(&socket.display().to_string(), "connection", timeout))?
            .map_err(|error| not_connected(&error, socket))?;
        Ok(Self {
            client: CniClient::new(channel),
            socket: socket.display().to_string(),
            timeout,
        })
    }

    /// Asks for names and addresses.
    ///
    /// # Errors
    ///
    /// Codes 11, 100 and, for an answer that makes no sense, 102.
    pub async fn allocate(
        &mut self,
        environment: &Environment,
        port_mappings: &[PortMapping],
    ) -> Result<Reservation, NotAllocated> {
        let request = AllocateRequest {
            container_id: environment.container_id.clone(),
            ifname: environment.ifname.clone(),
            netns: environment.netns.clone(),
            pod_namespace: environment.pod_namespace.clone(),
            pod_name: environment.pod_name.clone(),
            pod_uid: environment.pod_uid.clone(),
            port_mappings: port_mappings.iter().map(in_request).collect(),
        };
        match bounded(self.timeout, self.client.allocate(request)).await {
            Ok(response) => reservation(response.into_inner()).map_err(|error| NotAllocated {
                error,
                may_be_reserved: true,
            }),
            Err(status) => Err(NotAllocated {
                // What a refused request names may belong to a pod that works.
                may_be_reserved: !matches!(
                    status.code(),
                    Code::InvalidArgument | Code::AlreadyExists
                ),
                error: self.refused("Allocate", status),
            }),
        }
    }

    /// Tells that the interface is wired; the agent answers when it is in the datapath.
    ///
    /// # Errors
    ///
    /// Codes 11 and 100.
    pub async fn commit(
        &mut self,
        environment: &Environment,
        host_ifindex: u32,
        netns_cookie: u64,
    ) -> Result<(), CniError> {
        let request = CommitRequest {
            container_id: environment.container_id.clone(),
            ifname: environment.ifname.clone(),
            host_ifindex,
            netns_cookie,
        };
        match bounded(self.timeout, self.client.commit(request)).await {
            Ok(_) => Ok(()),
            Err(status) => Err(self.refused("Commit", status)),
        }
    }

    /// Gives everything back.
    ///
    /// # Errors
    ///
    /// Codes 11 and 100.
    pub async fn release(&mut self, environment: &Environment) -> Result<(), CniError> {
        let request = ReleaseRequest {
            container_id: environment.container_id.clone(),
            ifname: environment.ifname.clone(),
        };
        match bounded(self.timeout, self.client.release(request)).await {
            Ok(_) => Ok(()),
            Err(status) => Err(self.refused("Release", status)),
        }
    }

    fn refused(&self, call: &str, status: Status) -> CniError {
        let socket = &self.socket;
        match status.code() {
            Code::DeadlineExceeded | Code::Cancelled => no_answer(socket, call, self.timeout),
            Code::Unavailable | Code::FailedPrecondition => CniError::with_details(
                code::TRY_AGAIN,
                format!("the Weir agent at {socket} is not ready for {call}"),
                status.message(),
            ),
            // A connection that breaks during a call: the agent went away.
            Code::Unknown => CniError::with_details(
                code::TRY_AGAIN,
                format!("the Weir agent at {socket} went away during {call}"),
                status.message(),
            ),
            _ => CniError::with_details(
                code::AGENT_REFUSED,
                format!("the Weir agent at {socket} refused {call}"),
                status.message(),
            ),
        }
    }
}

fn in_request(mapping: &PortMapping) -> v1::PortMapping {
    v1::PortMapping {
        host_port: mapping.host_port.into(),
        container_port: mapping.container_port.into(),
        protocol: mapping.protocol.to_owned(),
        host_ip: mapping
            .host_ip
            .map(|address| address.to_string())
            .unwrap_or_default(),
    }
}

/// The channel's time-out does not cover waiting for a connection that is accepted and never served.
async fn bounded<T>(
    timeout: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    tokio::time::timeout(timeout, call)
        .await
        .unwrap_or_else(|_| Err(Status::deadline_exceeded("")))
}

/// Nobody serves the socket. What the runtime does about it stands in the details: it is true of ADD only.
fn not_connected(error: &ConnectError, socket: &Path) -> CniError {
    match error.starting() {
        Some(pid) => CniError::with_details(
            code::TRY_AGAIN,
            format!(
                "the Weir agent (pid {pid}) is still starting, or ending: nobody serves its socket {}, as it loads \
                 the data path first",
                socket.display()
            ),
            "the runtime will try again; see the agent's log if that lasts",
        ),
        None => CniError::new(code::TRY_AGAIN, error.to_string()),
    }
}

fn no_answer(socket: &str, call: &str, timeout: Duration) -> CniError {
    CniError::new(
        code::TRY_AGAIN,
        format!(
            "the Weir agent at {socket} did not answer {call} within {} s; see its log",
            timeout.as_secs()
        ),
    )
}

fn reservation(response: AllocateResponse) -> Result<Reservation, CniError> {
    let wrong = |field: &str, value: &dyn fmt::Debug| {
        CniError::new(
            code::AGENT_ANSWER,
            format!(
                "the Weir agent answered Allocate with {field} {value:?}, which cannot be; do agent \
                 and weir-cni have the same version?"
            ),
        )
    };
    if response.host_ifname.is_empty() || response.host_ifname.len() > 15 {
        return Err(wrong("host_ifname", &response.host_ifname));
    }
    let mac = |field, text: &str| parse_mac(text).ok_or_else(|| wrong(field, &text));
    let host_mac = mac("host_mac", &response.host_mac)?;
    let pod_mac = mac("pod_mac", &response.pod_mac)?;
    if response.addresses.is_empty() || response.addresses.len() != response.gateways.len() {
        return Err(wrong("addresses", &response.addresses));
    }
    let mut families = Vec::with_capacity(2);
    for (address, gateway) in response.addresses.iter().zip(&response.gateways) {
        let family = Family {
            address: address.parse().map_err(|_| wrong("address", address))?,
            gateway: gateway.parse().map_err(|_| wrong("gateway", gateway))?,
        };
        if family.address.is_ipv4() != family.gateway.is_ipv4() {
            return Err(wrong("gateway", gateway));
        }
        families.push(family);
    }
    // What IPv6 asks of a link (RFC 8200, 5), and IPv4 (RFC 791, 3.2).
    let has_v6 = families.iter().any(|family| family.address.is_ipv6());
    let smallest = if has_v6 { 1280 } else { 68 };
    if !(smallest..=65535).contains(&response.mtu) {
        return Err(wrong("mtu", &response.mtu));
    }
    Ok(Reservation {
        host_ifname: response.host_ifname,
        host_mac,
        pod_mac,
        mtu: response.mtu,
        families,
    })
}

fn parse_mac(text: &str) -> Option<Mac> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    // A group bit would make it no address of a device.
    (parts.next().is_none() && bytes[0] & 1 == 0).then_some(Mac(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> AllocateResponse {
        AllocateResponse {
            endpoint: 7,
            host_ifname: "weir0".into(),
            host_mac: "0a:57:00:00:00:07".into(),
            pod_mac: "0e:57:00:00:00:07".into(),
            addresses: vec!["10.0.0.7".into(), "fd00::7".into()],
            gateways: vec!["169.254.1.1".into(), "fe80::1".into()],
            mtu: 1500,
        }
    }

    #[test]
    fn believes_a_good_answer() {
        let reservation = reservation(good()).unwrap();
        assert_eq!(reservation.pod_mac.to_string(), "0e:57:00:00:00:07");
        assert_eq!(reservation.families.len(), 2);
    }

    #[test]
    fn refuses_nonsense_by_field() {
        type Spoil = fn(&mut AllocateResponse);
        let cases: [(&str, Spoil); 10] = [
            ("host_ifname", |r| r.host_ifname.clear()),
            ("host_ifname", |r| r.host_ifname = "weir0123456789ab".into()),
            ("mtu 0", |r| r.mtu = 0),
            ("mtu 1279", |r| r.mtu = 1279),
            ("host_mac", |r| r.host_mac = "0a:57:00:00:00".into()),
            ("pod_mac", |r| r.pod_mac = "01:57:00:00:00:07".into()),
            ("addresses", |r| r.addresses.clear()),
            ("addresses", |r| r.gateways.truncate(1)),
            ("address \"x\"", |r| r.addresses[0] = "x".into()),
            ("gateway", |r| r.gateways.reverse()),
        ];
        for (expected, spoil) in cases {
            let mut response = good();
            spoil(&mut response);
            let error = reservation(response).unwrap_err();
            assert_eq!(error.code, code::AGENT_ANSWER);
            assert!(error.message.contains(expected), "{}", error.message);
        }
    }
}
