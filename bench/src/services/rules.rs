//! kube-proxy's rules for a number of Services: the text that `iptables-restore` and `nft -f` load.
//! Chains, their order and their rules are those that Kubernetes documents (the virtual IP
//! reference, KEP-3866 for nftables) and that are seen on its nodes; only ClusterIPs
//! and addresses of load balancers are here, each with two endpoints.

use std::{
    fmt::{Display, Write as _},
    net::{Ipv4Addr, SocketAddrV4},
};

/// Mark bit that asks for masquerade: `iptables.masqueradeBit` 14, the default.
const MASQUERADE: &str = "0x4000";
/// Endpoints beyond which kube-proxy leaves comments out of iptables.
const COMMENTS_MAX: usize = 1000;

/// A Service with its endpoints.
#[derive(Clone, Copy, Debug)]
pub struct Service {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// ClusterIP and port.
    pub frontend: SocketAddrV4,
    /// Address of a load balancer, with the same port and `externalTrafficPolicy: Cluster`.
    pub load_balancer: Option<Ipv4Addr>,
    /// Address and port of each endpoint.
    pub endpoints: [SocketAddrV4; 2],
}

/// Input of `iptables-restore`, for the tables `filter` and `nat`. Clients outside of `pods` are
/// masqueraded.
///
/// Every packet of a new connection is compared with one Service after the other: the place of a
/// Service among `services` is its place there.
pub fn iptables(services: &[Service], pods: &str) -> String {
    let comments = services.len() * 2 <= COMMENTS_MAX;
    let comment = |text: &dyn Display| {
        if comments {
            format!(" -m comment --comment \"{text}\"")
        } else {
            String::new()
        }
    };
    let mut text = String::from(
        "*filter\n\
         :KUBE-SERVICES - [0:0]\n:KUBE-EXTERNAL-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n\
         :KUBE-FORWARD - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n\
         -A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
         -A INPUT -j KUBE-NODEPORTS\n\
         -A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
         -A FORWARD -j KUBE-FORWARD\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES\n\
         -A OUTPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
         -A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n",
    );
    line(
        &mut text,
        format_args!("-A KUBE-FORWARD -m mark --mark {MASQUERADE}/{MASQUERADE} -j ACCEPT"),
    );
    text.push_str(
        "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n*nat\n\
         :KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-POSTROUTING - [0:0]\n\
         :KUBE-MARK-MASQ - [0:0]\n",
    );
    for (number, service) in services.iter().enumerate() {
        line(
            &mut text,
            format_args!(":{} - [0:0]", service_chain(number)),
        );
        for endpoint in 0..2 {
            line(
                &mut text,
                format_args!(":{} - [0:0]", endpoint_chain(number, endpoint)),
            );
        }
        if service.load_balancer.is_some() {
            line(
                &mut text,
                format_args!(":{} - [0:0]", external_chain(number)),
            );
        }
    }
    let portals = comment(&"kubernetes service portals");
    for hook in ["PREROUTING", "OUTPUT"] {
        line(
            &mut text,
            format_args!("-A {hook}{portals} -j KUBE-SERVICES"),
        );
    }
    line(
        &mut text,
        format_args!(
            "-A POSTROUTING{} -j KUBE-POSTROUTING\n\
             -A KUBE-POSTROUTING -m mark ! --mark {MASQUERADE}/{MASQUERADE} -j RETURN\n\
             -A KUBE-POSTROUTING -j MARK --xor-mark {MASQUERADE}\n\
             -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n\
             -A KUBE-MARK-MASQ -j MARK --or-mark {MASQUERADE}",
            comment(&"kubernetes postrouting rules")
        ),
    );
    for (number, service) in services.iter().enumerate() {
        let (chain, to) = (service_chain(number), service.frontend);
        let name = comment(&format_args!("default/service-{number}:http cluster IP"));
        let protocol = service.protocol;
        let matches = format!(
            "-d {}/32 -p {protocol}{name} -m {protocol} --dport {}",
            to.ip(),
            to.port()
        );
        if let Some(address) = service.load_balancer {
            let external = external_chain(number);
            let name = comment(&format_args!(
                "default/service-{number}:http loadbalancer IP"
            ));
            let masquerade = comment(&format_args!(
                "masquerade traffic for default/service-{number}:http external destinations"
            ));
            line(
                &mut text,
                format_args!(
                    "-A KUBE-SERVICES -d {address}/32 -p {protocol}{name} -m {protocol} --dport {} -j {external}\n\
                     -A {external}{masquerade} -j KUBE-MARK-MASQ\n\
                     -A {external} -j {chain}",
                    to.port()
                ),
            );
        }
        let (first, second) = (endpoint_chain(number, 0), endpoint_chain(number, 1));
        line(
            &mut text,
            format_args!(
                "-A KUBE-SERVICES {matches} -j {chain}\n\
                 -A {chain} ! -s {pods} {matches} -j KUBE-MARK-MASQ\n\
                 -A {chain} -m statistic --mode random --probability 0.50000000000 -j {first}\n\
                 -A {chain} -j {second}"
            ),
        );
        for (endpoint, to) in service.endpoints.iter().enumerate() {
            let chain = endpoint_chain(number, endpoint);
            line(
                &mut text,
                format_args!(
                    "-A {chain} -s {}/32 -j KUBE-MARK-MASQ\n\
                     -A {chain} -p {protocol} -m {protocol} -j DNAT --to-destination {to}",
                    to.ip()
                ),
            );
        }
    }
    line(
        &mut text,
        format_args!(
            "-A KUBE-SERVICES{} -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT",
            comment(
                &"kubernetes service nodeports; NOTE: this must be the last rule in this chain"
            )
        ),
    );
    text
}

/// As long as kube-proxy's, which end in a hash.
fn service_chain(number: usize) -> String {
    format!("KUBE-SVC-{number:016X}")
}

/// See [`service_chain`].
fn external_chain(number: usize) -> String {
    format!("KUBE-EXT-{number:016X}")
}

/// See [`service_chain`].
fn endpoint_chain(service: usize, endpoint: usize) -> String {
    format!("KUBE-SEP-{:016X}", service * 2 + endpoint)
}

/// Input of `nft -f`: the table `kube-proxy`, which replaces an earlier one.
///
/// Services other than `measured` (its index) have their two endpoints in two rules instead of one
/// with a map when `short` is set: the kernel needs time with the square of the number of unnamed
/// maps to load them, and no packet of the measured Service sees the difference.
pub fn nftables(services: &[Service], pods: &str, measured: usize, short: bool) -> String {
    let mut text = String::from(
        "add table ip kube-proxy\ndelete table ip kube-proxy\ntable ip kube-proxy {\n\
         comment \"rules for kube-proxy\"\n\
         set cluster-ips { type ipv4_addr; }\n\
         set nodeport-ips { type ipv4_addr; }\n\
         map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }\n\
         map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }\n\
         map firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; }\n\
         map service-nodeports { type inet_proto . inet_service : verdict; }\n",
    );
    line(
        &mut text,
        format_args!("chain mark-for-masquerade {{\nmeta mark set meta mark or {MASQUERADE}\n}}"),
    );
    for (number, service) in services.iter().enumerate() {
        nftables_service(
            &mut text,
            number,
            service,
            pods,
            short && number != measured,
        );
    }
    text.push_str(
        "map service-ips {\ntype ipv4_addr . inet_proto . inet_service : verdict\nelements = {\n",
    );
    for (number, service) in services.iter().enumerate() {
        let to = service.frontend;
        line(
            &mut text,
            format_args!(
                "{} . {} . {} : goto {},",
                to.ip(),
                service.protocol,
                to.port(),
                nftables_name("service", number)
            ),
        );
        if let Some(address) = service.load_balancer {
            line(
                &mut text,
                format_args!(
                    "{address} . {} . {} : goto {},",
                    service.protocol,
                    to.port(),
                    nftables_name("external", number)
                ),
            );
        }
    }
    text.push_str(NFTABLES_CHAINS);
    text
}

fn nftables_service(text: &mut String, number: usize, service: &Service, pods: &str, short: bool) {
    let endpoint = |endpoint: usize| nftables_name("endpoint", number * 2 + endpoint);
    for (at, to) in service.endpoints.iter().enumerate() {
        line(
            text,
            format_args!(
                "chain {} {{\nip saddr {} jump mark-for-masquerade\n\
                 meta l4proto {} dnat to {to}\n}}",
                endpoint(at),
                to.ip(),
                service.protocol
            ),
        );
    }
    let (name, to) = (nftables_name("service", number), service.frontend);
    line(
        text,
        format_args!(
            "chain {name} {{\nip daddr {} {} dport {} ip saddr != {pods} jump mark-for-masquerade",
            to.ip(),
            service.protocol,
            to.port()
        ),
    );
    let (first, second) = (endpoint(0), endpoint(1));
    if short {
        line(
            text,
            format_args!("numgen random mod 2 0 goto {first}\ngoto {second}\n}}"),
        );
    } else {
        line(
            text,
            format_args!("numgen random mod 2 vmap {{ 0 : goto {first}, 1 : goto {second} }}\n}}"),
        );
    }
    if service.load_balancer.is_some() {
        line(
            text,
            format_args!(
                "chain {} {{\njump mark-for-masquerade\ngoto {name}\n}}",
                nftables_name("external", number)
            ),
        );
    }
}

/// What follows the elements of `service-ips`: the base chains and those that they share.
const NFTABLES_CHAINS: &str = "}\n}
chain services {
ip daddr . meta l4proto . th dport vmap @service-ips
ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
}
chain masquerading {
meta mark and 0x4000 == 0 return
meta mark set meta mark xor 0x4000
masquerade fully-random
}
chain cluster-ips-check {
ip daddr @cluster-ips reject
}
chain service-endpoints-check {
ip daddr . meta l4proto . th dport vmap @no-endpoint-services
}
chain nodeport-endpoints-check {
ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
}
chain firewall-check {
ip daddr . meta l4proto . th dport vmap @firewall-ips
}
chain filter-prerouting {
type filter hook prerouting priority -110;
ct state new jump firewall-check
}
chain filter-input {
type filter hook input priority -110;
ct state new jump nodeport-endpoints-check
ct state new jump service-endpoints-check
}
chain filter-forward {
type filter hook forward priority -110;
ct state new jump service-endpoints-check
ct state new jump cluster-ips-check
}
chain filter-output {
type filter hook output priority -110;
ct state new jump service-endpoints-check
ct state new jump firewall-check
}
chain filter-output-post-dnat {
type filter hook output priority -90;
ct state new jump cluster-ips-check
}
chain nat-prerouting {
type nat hook prerouting priority -100;
jump services
}
chain nat-output {
type nat hook output priority -100;
jump services
}
chain nat-postrouting {
type nat hook postrouting priority 100;
jump masquerading
}
}
";

/// As long as kube-proxy's, which hold a hash and the Service's name.
fn nftables_name(kind: &str, number: usize) -> String {
    format!("{kind}-{number:08X}-default/service/tcp/http")
}

fn line(text: &mut String, line: impl Display) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}");
}

/// Services beside the one that is measured: ClusterIPs and endpoints that nobody has.
pub fn other(number: u32) -> Service {
    Service {
        protocol: "tcp",
        frontend: SocketAddrV4::new(Ipv4Addr::from_bits(0x0a60_1000 + number), 80),
        load_balancer: None,
        endpoints: [0, 1].map(|endpoint| {
            SocketAddrV4::new(
                Ipv4Addr::from_bits(0x0b00_0000 + number * 2 + endpoint),
                8081,
            )
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_load_balancers_ask_for_masquerade_first() {
        let address = Ipv4Addr::new(198, 18, 0, 1);
        let service = Service {
            protocol: "udp",
            load_balancer: Some(address),
            ..other(0)
        };
        let text = iptables(&[service], "10.244.0.0/16");
        for rule in [
            format!("-A KUBE-SERVICES -d {address}/32 -p udp"),
            format!("-A {} -m comment", external_chain(0)),
            format!("-A {} -j {}", external_chain(0), service_chain(0)),
        ] {
            assert!(text.contains(&rule), "{rule}");
        }
        assert!(!text.contains("tcp --dport"));
        let text = nftables(&[service], "10.244.0.0/16", 0, false);
        assert!(text.contains(&format!("{address} . udp . 80 : goto external-")));
        assert!(text.contains("{\njump mark-for-masquerade\ngoto service-"));
    }

    #[test]
    fn every_service_has_its_rules_and_comments_end_at_a_thousand_endpoints() {
        for count in [1, 500, 501] {
            let services: Vec<Service> = (0..count).map(other).collect();
            let text = iptables(&services, "10.244.0.0/16");
            let count = services.len();
            assert_eq!(text.matches("-A KUBE-SERVICES -d ").count(), count);
            assert_eq!(text.matches("-j DNAT --to-destination ").count(), 2 * count);
            assert_eq!(text.contains("--comment"), count <= 500);
            for (short, maps) in [(false, count), (true, 1)] {
                let text = nftables(&services, "10.244.0.0/16", 0, short);
                assert_eq!(text.matches(" . tcp . 80 : goto service-").count(), count);
                assert_eq!(text.matches("dnat to ").count(), 2 * count);
                assert_eq!(text.matches("mod 2 vmap").count(), maps);
            }
        }
    }
}
