//! From the programs' events to events for people, with names of pods, Services, nodes and devices.

use std::{collections::HashMap, net::IpAddr};

use nix::time::{ClockId, clock_gettime};
use weir_api::v1::MonitorEvent;
use weir_common::{
    DropReason, Ipv4, Ipv6, Port,
    address::Address as _,
    event::{self, Event},
    metrics::HOOKS,
    protocol::{self, tcp_flag},
};

use crate::{
    api::events::kind,
    model::{AddressOwner, Model},
};

/// What names are taken from.
#[derive(Debug)]
pub struct Names<'a> {
    /// Nodes, pods and Services of the source.
    pub model: &'a Model,
    /// Pods of this node by address: known before the source tells of them.
    pub pods: &'a HashMap<IpAddr, String>,
}

impl Names<'_> {
    fn of(&self, address: IpAddr, port: u16) -> String {
        if let Some(pod) = self.pods.get(&address) {
            return pod.clone();
        }
        match self.model.name_of(address) {
            None => String::new(),
            Some(owner @ AddressOwner::Service(_)) if port != 0 => format!("{owner}:{port}"),
            Some(owner) => owner.to_string(),
        }
    }

    /// The event for people. `device` is the name of its device.
    pub fn describe(&self, event: &Event, device: String, clock: Clock) -> MonitorEvent {
        let is_drop = event.kind == event::kind::DROP;
        let reason = DropReason::from_number(event.reason);
        let hook = HOOKS.get(usize::from(event.hook));
        let side = |address: Ipv6, port: Port| {
            let Some(address) = address_of(event.family, address) else {
                return (String::new(), String::new());
            };
            let port = port.get();
            (with_port(address, port), self.of(address, port))
        };
        let (source, source_name) = side(event.source, event.source_port);
        let (destination, destination_name) = side(event.destination, event.destination_port);
        let (backend, backend_name) = if event.backend_address.is_zero() {
            Default::default()
        } else {
            side(event.backend_address, event.backend_port)
        };
        MonitorEvent {
            time: clock.real_time(event.time),
            kind: if is_drop { kind::DROP } else { kind::NEW_FLOW }.to_owned(),
            reason: if is_drop { reason.name() } else { "" }.to_owned(),
            description: if is_drop { reason.description() } else { "" }.to_owned(),
            hook: hook.map_or("", |hook| hook.name()).to_owned(),
            device,
            protocol: protocol_name(event),
            source,
            source_name,
            destination,
            destination_name,
            backend,
            backend_name,
            length: event.length,
            tcp_flags: if event.protocol == protocol::TCP {
                tcp_flags(event.tcp_flags)
            } else {
                String::new()
            },
            lost: 0,
        }
    }
}

/// Distance between the clock of the programs and that of people.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    offset: i64,
}

impl Clock {
    /// As of now: the distance changes when someone sets the clock.
    pub fn now() -> Self {
        let monotonic = clock_gettime(ClockId::CLOCK_MONOTONIC)
            .ok()
            .and_then(|time| i64::try_from(std::time::Duration::from(time).as_nanos()).ok())
            .unwrap_or_default();
        Self {
            offset: crate::api::events::now() - monotonic,
        }
    }

    /// Nanoseconds since the epoch of a time of `CLOCK_MONOTONIC`.
    fn real_time(self, monotonic: u64) -> i64 {
        self.offset.saturating_add_unsigned(monotonic)
    }
}

fn address_of(family: u8, address: Ipv6) -> Option<IpAddr> {
    match family {
        4 => Some(Ipv4::from_shared(address).to_ip()),
        6 => Some(address.to_ip()),
        _ => None,
    }
}

fn with_port(address: IpAddr, port: u16) -> String {
    if port == 0 {
        address.to_string()
    } else {
        std::net::SocketAddr::new(address, port).to_string()
    }
}

/// TCP …, the number of a nameless protocol, or the EtherType of what is no IP.
fn protocol_name(event: &Event) -> String {
    use protocol::ether_type;
    match (event.family, event.ether_type) {
        (4 | 6, _) => match protocol::name(event.protocol) {
            Some(name) => name.to_owned(),
            None => event.protocol.to_string(),
        },
        (_, ether_type::ARP) => "ARP".to_owned(),
        (_, ether_type::IPV4) => "IPv4".to_owned(),
        (_, ether_type::IPV6) => "IPv6".to_owned(),
        (_, other) => format!("{other:#06x}"),
    }
}

fn tcp_flags(flags: u8) -> String {
    let named = [
        (tcp_flag::SYN, "SYN"),
        (tcp_flag::ACK, "ACK"),
        (tcp_flag::FIN, "FIN"),
        (tcp_flag::RST, "RST"),
    ];
    let set = named.iter().filter(|(bit, _)| flags & bit != 0);
    set.map(|(_, name)| *name).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use weir_common::metrics::Hook;

    use super::*;
    use crate::{
        objects::{Object, ObjectName, Service},
        source::Change,
    };

    fn model_with_service(address: &str) -> Model {
        let mut model = Model::default();
        model.apply(Change::Upsert(Object::Service(Service {
            name: ObjectName::new("default", "web"),
            cluster_ips: vec![address.parse().unwrap()],
            ..Service::default()
        })));
        model
    }

    #[test]
    fn a_drop_has_names_on_both_sides_in_both_families() {
        for (family, pod, service) in [(4, "10.0.0.7", "10.96.0.1"), (6, "fd00::7", "fd00:96::1")] {
            let model = model_with_service(service);
            let pod: IpAddr = pod.parse().unwrap();
            let pods = HashMap::from([(pod, "default/client".to_owned())]);
            let names = Names {
                model: &model,
                pods: &pods,
            };
            let event = Event {
                time: 5,
                kind: event::kind::DROP,
                reason: DropReason::NoBackend as u8,
                hook: Hook::FromPod as u8,
                family,
                protocol: protocol::TCP,
                tcp_flags: tcp_flag::SYN | tcp_flag::ACK,
                source: Ipv6::from_ip(pod),
                source_port: Port::new(4000),
                destination: Ipv6::from_ip(service.parse().unwrap()),
                destination_port: Port::new(80),
                ..Event::default()
            };
            let told = names.describe(&event, "weir7".to_owned(), Clock { offset: 1000 });
            assert_eq!(told.time, 1005);
            assert_eq!(told.kind, "drop");
            assert_eq!(told.hook, "from_pod");
            assert_eq!(told.reason, "SERVICE_BACKEND_NOT_FOUND");
            assert_eq!(told.source, with_port(pod, 4000));
            assert_eq!(told.source_name, "default/client");
            assert_eq!(told.destination_name, "default/web:80");
            assert_eq!(told.tcp_flags, "SYN,ACK");
            assert_eq!(told.backend, "");
        }
    }

    #[test]
    fn what_is_no_ip_has_its_ether_type() {
        let model = Model::default();
        let names = Names {
            model: &model,
            pods: &HashMap::new(),
        };
        for (ether_type, name) in [(0x0806, "ARP"), (0x88cc, "0x88cc")] {
            let event = Event {
                kind: event::kind::DROP,
                reason: 250,
                hook: 9,
                ether_type,
                ..Event::default()
            };
            let told = names.describe(&event, String::new(), Clock { offset: 0 });
            assert_eq!((told.protocol.as_str(), told.source.as_str()), (name, ""));
            assert_eq!((told.reason.as_str(), told.hook.as_str()), ("UNKNOWN", ""));
        }
    }
}
