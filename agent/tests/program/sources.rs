//! Who may claim to be whom.

use std::net::IpAddr;

use weir_agent::datapath::{HopRef, NodeConfig};
use weir_common::{
    DropReason, MacAddress, endpoint,
    ipcache::{class, flag},
    metrics::Hook,
};

use crate::{
    bed::{
        CLIENT, Case, ETH0, OTHER, SERVER, Verdict, delivered_macs, device, for_both_families,
        leaving_macs,
    },
    packet::{ACK, Icmp, L4, Macs, Packet, SYN, tcp, udp},
};

const SPOOFED: Verdict = Verdict::Dropped(DropReason::InvalidSource);

#[test]
fn a_pod_sends_from_its_own_address_only() {
    for_both_families(|bed| {
        bed.service(
            1,
            weir_agent::objects::Protocol::Tcp,
            80,
            &[(bed.pod(OTHER), 8080)],
        );
        for (name, source) in [
            ("another pod of this node", bed.pod(OTHER)),
            ("an unused address of the range", bed.pod(99)),
            ("a pod of another node", bed.remote_pod(9)),
            ("this node", bed.node()),
            ("another node", bed.remote_node()),
            ("a Service", bed.cluster_ip(1)),
            ("the outside", bed.outside()),
            ("the gateway", bed.gateway()),
            ("the source of hairpin traffic", bed.loopback()),
            ("loopback", loopback(bed.is_v4())),
            ("unspecified", unspecified(bed.is_v4())),
            ("multicast", multicast(bed.is_v4())),
        ] {
            for to in [
                bed.pod(SERVER),
                bed.remote_pod(1),
                bed.cluster_ip(1),
                bed.node(),
            ] {
                for l4 in [tcp(1, 80, SYN), tcp(1, 80, ACK), udp(1, 80)] {
                    let packet = bed.leaving(CLIENT, to, l4).from(source);
                    bed.check(Case::from_pod(name, CLIENT, &packet, SPOOFED));
                }
            }
        }
        assert_eq!(bed.flows().len(), 0);
    });
}

#[test]
fn nothing_outside_claims_to_be_inside() {
    for_both_families(|bed| {
        bed.service(
            1,
            weir_agent::objects::Protocol::Tcp,
            80,
            &[(bed.pod(OTHER), 8080)],
        );
        for (name, source) in [
            ("a pod of this node", bed.pod(OTHER)),
            ("the receiver itself", bed.pod(CLIENT)),
            ("an unused address of the range", bed.pod(99)),
            ("this node", bed.node()),
            ("a Service", bed.cluster_ip(1)),
            ("loopback", loopback(bed.is_v4())),
            ("multicast", multicast(bed.is_v4())),
        ] {
            for to in [bed.pod(CLIENT), bed.pod(99), bed.node(), bed.outside()] {
                for l4 in [tcp(1, 80, SYN), tcp(1, 80, ACK), udp(1, 80)] {
                    let packet = bed.incoming(source, to, l4);
                    bed.check(Case::from_netdev(name, &packet, SPOOFED));
                }
            }
        }
    });
}

/// A load balancer, or a host that has an external address, may send from it.
#[test]
fn external_addresses_of_services_are_sources_of_others() {
    for_both_families(|bed| {
        let source = bed.cluster_ip(2);
        for flags in [flag::FRONTENDS, flag::FRONTENDS | flag::REFUSE] {
            bed.datapath
                .set_ipcache(source.into(), class::SERVICE, flags, HopRef::None)
                .unwrap();
            let packet = bed.incoming(source, bed.pod(CLIENT), tcp(1, 80, SYN));
            let out = packet.clone().with_macs(delivered_macs(CLIENT)).forwarded();
            bed.check(Case::from_netdev("to a pod", &packet, Verdict::Local).out(&out));
            let packet = bed.incoming(source, bed.node(), tcp(1, 80, SYN));
            bed.check(Case::from_netdev("to the node", &packet, Verdict::Stack));
        }
    });
}

#[test]
fn nor_once_the_pod_has_connections() {
    for_both_families(|bed| {
        bed.service(
            1,
            weir_agent::objects::Protocol::Tcp,
            80,
            &[(bed.remote_pod(9), 8080)],
        );
        let packet = bed.leaving(CLIENT, bed.cluster_ip(1), tcp(40000, 80, SYN));
        assert_eq!(bed.pod_sends(CLIENT, &packet).verdict, Verdict::Remote);
        for source in [bed.pod(OTHER), bed.node(), bed.cluster_ip(1)] {
            let packet = bed.incoming(source, bed.pod(CLIENT), tcp(80, 40000, ACK));
            bed.check(Case::from_netdev("known tuple", &packet, SPOOFED));
            let error = L4::Icmp(Icmp {
                kind: if bed.is_v4() { 3 } else { 1 },
                code: 0,
                rest: [0; 4],
                payload: packet.datagram(),
            });
            let packet = bed.incoming(source, bed.pod(CLIENT), error);
            bed.check(Case::from_netdev("an ICMP error", &packet, SPOOFED));
        }
    });
}

fn loopback(v4: bool) -> IpAddr {
    if v4 { "127.0.0.1" } else { "::1" }.parse().unwrap()
}

fn unspecified(v4: bool) -> IpAddr {
    if v4 { "0.0.0.0" } else { "::" }.parse().unwrap()
}

fn multicast(v4: bool) -> IpAddr {
    if v4 { "224.0.0.5" } else { "ff02::5" }.parse().unwrap()
}

#[test]
fn what_a_pod_says_on_its_own_link_passes() {
    for_both_families(|bed| {
        let v4 = bed.is_v4();
        let parse = |text: &str| -> IpAddr { text.parse().unwrap() };
        let rows: Vec<(&str, IpAddr, IpAddr)> = if v4 {
            vec![
                ("DHCP", unspecified(true), parse("255.255.255.255")),
                ("multicast", bed.pod(CLIENT), parse("224.0.0.251")),
                ("broadcast", bed.pod(CLIENT), parse("255.255.255.255")),
            ]
        } else {
            vec![
                ("router solicitation", parse("fe80::5"), parse("ff02::2")),
                (
                    "duplicate address detection",
                    unspecified(false),
                    parse("ff02::1:ff00:5"),
                ),
                ("listener report", parse("fe80::5"), parse("ff02::16")),
                (
                    "to a link-local address",
                    parse("fe80::5"),
                    parse("fe80::77"),
                ),
                ("multicast", bed.pod(CLIENT), parse("ff02::fb")),
            ]
        };
        for (name, source, destination) in rows {
            let packet = bed.leaving(CLIENT, destination, udp(68, 67)).from(source);
            bed.check(Case::from_pod(name, CLIENT, &packet, Verdict::Stack));
        }
        // A link-local source goes nowhere else.
        let source = if v4 {
            unspecified(true)
        } else {
            parse("fe80::5")
        };
        let packet = bed.leaving(CLIENT, bed.pod(SERVER), udp(1, 2)).from(source);
        bed.check(Case::from_pod("beyond the link", CLIENT, &packet, SPOOFED));

        if !v4 {
            let packet = bed.incoming(parse("fe80::9"), parse("ff02::1"), udp(1, 2));
            bed.check(Case::from_netdev(
                "link-local from outside",
                &packet,
                Verdict::Stack,
            ));
        }
    });
}

/// An ARP packet; hardware and protocol types and lengths as for Ethernet and IPv4.
fn arp(
    operation: u16,
    macs: Macs,
    sender: (MacAddress, IpAddr),
    target: (MacAddress, IpAddr),
) -> Vec<u8> {
    let v4 = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(_) => panic!("IPv6 has no ARP"),
    };
    let mut frame = [macs.destination.0, macs.source.0].concat();
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(sender.0.0);
    frame.extend(v4(sender.1));
    frame.extend(target.0.0);
    frame.extend(v4(target.1));
    frame
}

#[test]
fn arp_for_the_gateway_is_answered() {
    for_both_families(|bed| {
        if !bed.is_v4() {
            return;
        }
        let pod = endpoint::pod_mac(CLIENT);
        let host = endpoint::host_mac(CLIENT);
        // A virtual machine in the pod has an address of its own.
        let guest = MacAddress([0x52, 0x54, 0, 1, 2, 3]);
        let nobody = MacAddress::default();
        let broadcast = MacAddress([0xff; 6]);
        let reason = |reason| Verdict::Dropped(reason);
        for asker in [pod, guest] {
            let macs = Macs {
                destination: broadcast,
                source: asker,
            };
            let ask = |from: IpAddr, whom: IpAddr| arp(1, macs, (asker, from), (nobody, whom));
            let answer = |to: IpAddr| {
                let macs = Macs {
                    destination: asker,
                    source: host,
                };
                arp(2, macs, (host, bed.gateway()), (asker, to))
            };
            let mut odd = ask(bed.pod(CLIENT), bed.gateway());
            odd[14] = 9;
            let mut cut = ask(bed.pod(CLIENT), bed.gateway());
            cut.truncate(40);
            let rows = vec![
                (
                    "asked",
                    ask(bed.pod(CLIENT), bed.gateway()),
                    Verdict::Answered,
                    Some(answer(bed.pod(CLIENT))),
                ),
                (
                    "probed (RFC 5227)",
                    ask(unspecified(true), bed.gateway()),
                    Verdict::Answered,
                    Some(answer(unspecified(true))),
                ),
                (
                    "for another pod",
                    ask(bed.pod(CLIENT), bed.pod(SERVER)),
                    Verdict::Stack,
                    None,
                ),
                (
                    "announced",
                    ask(bed.pod(CLIENT), bed.pod(CLIENT)),
                    Verdict::Stack,
                    None,
                ),
                (
                    "in another's name",
                    ask(bed.pod(OTHER), bed.gateway()),
                    reason(DropReason::InvalidSource),
                    None,
                ),
                (
                    "in the gateway's name",
                    ask(bed.gateway(), bed.pod(OTHER)),
                    reason(DropReason::InvalidSource),
                    None,
                ),
                (
                    "of another hardware",
                    odd,
                    reason(DropReason::Neighbour),
                    None,
                ),
                ("cut short", cut, reason(DropReason::Neighbour), None),
            ];
            for (name, frame, verdict, out) in rows {
                let mut case =
                    Case::new(name, Hook::FromPod, device(CLIENT), frame, verdict).sum_may_change();
                if let Some(out) = out {
                    case = case.out_frame(out);
                }
                bed.check(case);
            }
        }
        let macs = Macs {
            destination: broadcast,
            source: pod,
        };
        let frame = arp(1, macs, (pod, bed.outside()), (nobody, bed.node()));
        bed.check(Case::new(
            "from outside",
            Hook::FromNetdev,
            ETH0,
            frame,
            Verdict::Stack,
        ));
    });
}

#[test]
fn solicitations_for_the_gateway_are_answered() {
    for_both_families(|bed| {
        if bed.is_v4() {
            return;
        }
        let guest = MacAddress([0x52, 0x54, 0, 1, 2, 3]);
        let host = endpoint::host_mac(CLIENT);
        let octets = |address: IpAddr| match address {
            IpAddr::V6(v6) => v6.octets(),
            IpAddr::V4(_) => panic!("IPv6 only"),
        };
        let message = |kind: u8, flags: u8, target: IpAddr, option: u8, mac: MacAddress| {
            let mut payload = octets(target).to_vec();
            payload.extend([option, 1]);
            payload.extend(mac.0);
            L4::Icmp(Icmp {
                kind,
                code: 0,
                rest: [flags, 0, 0, 0],
                payload,
            })
        };
        let group: IpAddr = "ff02::1:ff00:1".parse().unwrap();
        let own: IpAddr = "fe80::5".parse().unwrap();
        let macs = Macs {
            destination: MacAddress([0x33, 0x33, 0xff, 0, 0, 1]),
            source: guest,
        };
        let ask = |source: IpAddr, target: IpAddr| {
            let l4 = message(135, 0, target, 1, guest);
            Packet::new(macs, source, group, l4).with_ttl(255)
        };
        for source in [own, bed.pod(CLIENT)] {
            let question = ask(source, bed.gateway());
            let l4 = message(136, 0xe0, bed.gateway(), 2, host);
            let macs = Macs {
                destination: guest,
                source: host,
            };
            let answer = Packet::new(macs, bed.gateway(), source, l4).with_ttl(255);
            let mut answer = answer.frame();
            // Traffic class and flow label of the question stay.
            answer[14..18].copy_from_slice(&question.frame()[14..18]);
            bed.check(
                Case::from_pod("asked", CLIENT, &question, Verdict::Answered)
                    .out_frame(answer)
                    .sum_may_change(),
            );
        }
        for (name, packet) in [
            ("for another", ask(own, bed.pod(SERVER))),
            ("from far away", ask(own, bed.gateway()).with_ttl(254)),
        ] {
            bed.check(Case::from_pod(name, CLIENT, &packet, Verdict::Stack));
        }
        let mut plain = bed.leaving(CLIENT, bed.gateway(), udp(1, 2));
        plain.macs = leaving_macs(CLIENT);
        bed.check(Case::from_pod(
            "to the gateway",
            CLIENT,
            &plain,
            Verdict::Stack,
        ));
    });
}

/// Pods get addresses of the first 16,384 only; those beyond are inside all the same.
#[test]
fn all_of_a_large_pod_range_is_inside() {
    for_both_families(|bed| {
        let mut config = NodeConfig {
            pod_ranges: ["10.1.0.0/24", "fd01::/64", "10.8.0.0/16", "fd08::/48"]
                .map(|range| range.parse().unwrap())
                .into(),
            ..NodeConfig::default()
        };
        bed.datapath.config_mut().apply(&config).unwrap();
        let (sources, range) = if bed.is_v4() {
            (
                ["10.8.0.9", "10.8.63.255", "10.8.64.0", "10.8.255.254"],
                "10.8.0.0/16",
            )
        } else {
            (
                ["fd08::9", "fd08::3fff", "fd08::4000", "fd08:0:0:1::1:9"],
                "fd08::/48",
            )
        };
        for source in sources {
            let packet = bed.incoming(source.parse().unwrap(), bed.pod(CLIENT), udp(1, 80));
            bed.check(Case::from_netdev(source, &packet, SPOOFED));
            // For a pod they are addresses that nobody has: the stack's route answers.
            let packet = bed.leaving(CLIENT, source.parse().unwrap(), udp(1, 80));
            bed.check(Case::from_pod(source, CLIENT, &packet, Verdict::Stack));
        }
        config.pod_ranges.truncate(2);
        bed.datapath.config_mut().apply(&config).unwrap();
        let range: ipnet::IpNet = range.parse().unwrap();
        assert!(!bed.datapath.ipcache().entries().contains_key(&range));
    });
}
