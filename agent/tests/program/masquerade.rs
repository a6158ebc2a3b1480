//! What pods send to the outside: with an address of the node, and back; and what must not leave with a pod's.

use std::os::fd::AsFd as _;

use aya::{EbpfLoader, programs::SchedClassifier};
use weir_agent::{
    datapath::object::{OBJECT, shapes, sizes},
    objects::Protocol,
};
use weir_common::{
    DropReason,
    config::{NAT_PORT_COUNT, NAT_PORT_FIRST},
    mark,
    metrics::Hook,
};

use crate::{
    bed::{
        Bed, CLIENT, Case, ESTABLISHED, ETH0, OTHER, TC_ACT_REDIRECT, TC_ACT_SHOT, Verdict,
        delivered_macs, device, for_both_families, on, tool,
    },
    errors::{error, put_back},
    outside::{NODE_PORT, ROUTED, add_device, add_routes, node_port, port_of},
    packet::{ACK, Icmp, L4, Packet, SYN, echo, sctp, tcp, udp},
    run::{self, Output},
};

const PORT: u16 = 40000;

/// Name, what a pod sends first and later, and what it gets, by its source port.
type Kind = (
    &'static str,
    fn(bool, u16) -> L4,
    fn(bool, u16) -> L4,
    fn(bool, u16) -> L4,
);

const KINDS: [Kind; 4] = [
    (
        "TCP",
        |_, p| tcp(p, 443, SYN),
        |_, p| tcp(p, 443, ACK),
        |_, p| tcp(443, p, ACK),
    ),
    (
        "UDP",
        |_, p| udp(p, 443),
        |_, p| udp(p, 443),
        |_, p| udp(443, p),
    ),
    (
        "SCTP",
        |_, p| sctp(p, 443),
        |_, p| sctp(p, 443),
        |_, p| sctp(443, p),
    ),
    ("echo", echo, echo, echo_reply),
];

fn echo_reply(v4: bool, identifier: u16) -> L4 {
    let L4::Icmp(request) = echo(v4, identifier) else {
        panic!()
    };
    L4::Icmp(Icmp {
        kind: if v4 { 0 } else { 129 },
        ..request
    })
}

#[test]
fn pods_talk_to_the_outside_as_the_node() {
    for_both_families(|bed| {
        add_device(bed);
        let v4 = bed.is_v4();
        for (name, first, later, answer) in KINDS {
            let opening = bed.leaving(CLIENT, bed.outside(), first(v4, PORT));
            let seen = bed.pod_sends(CLIENT, &opening);
            assert_eq!(seen.verdict, Verdict::Routed, "{name}");
            let at = if name == "echo" { 4 } else { 0 };
            let port = port_of(bed, &seen.output.frame, at);
            let range = NAT_PORT_FIRST..NAT_PORT_FIRST + NAT_PORT_COUNT;
            assert_eq!(range.contains(&port), name != "SCTP", "{name}: {port}");
            let with = |l4| {
                bed.leaving(CLIENT, bed.outside(), l4)
                    .from(bed.node())
                    .forwarded()
            };
            assert_eq!(seen.output.frame, with(first(v4, port)).frame(), "{name}");
            let row = |case: Case| {
                if name == "SCTP" {
                    case.sum_may_change()
                } else {
                    case
                }
            };
            let request = bed.leaving(CLIENT, bed.outside(), later(v4, PORT));
            let sent = with(later(v4, port));
            let case = Case::from_pod(name, CLIENT, &request, Verdict::Routed).out(&sent);
            bed.check(row(case.lookups(ROUTED)));

            let reply = bed.incoming(bed.outside(), bed.node(), answer(v4, port));
            let out = bed.incoming(bed.outside(), bed.pod(CLIENT), answer(v4, PORT));
            let out = out.with_macs(delivered_macs(CLIENT)).forwarded();
            let what = format!("{name}: answer");
            let case = Case::from_netdev(&what, &reply, Verdict::Local).out(&out);
            bed.check(row(case.lookups(ESTABLISHED)));

            // An error about it, of a router.
            let quote = match name {
                "SCTP" => continue,
                "echo" => quoted_echo(&request, &sent),
                _ => put_back(&request, &sent),
            };
            let router = bed.remote_node();
            let about = bed.incoming(router, bed.node(), error(v4, sent.datagram()));
            let told = bed.incoming(router, bed.pod(CLIENT), error(v4, quote));
            let told = told.with_macs(delivered_macs(CLIENT)).forwarded();
            let what = format!("{name}: error");
            bed.check(Case::from_netdev(&what, &about, Verdict::Local).out(&told));
        }
    });
}

/// As [`put_back`], whose checksum stands elsewhere in an echo.
fn quoted_echo(original: &Packet, translated: &Packet) -> Vec<u8> {
    let mut quote = original.clone().with_ttl(translated.ttl).datagram();
    let at = if original.source.is_ipv4() { 22 } else { 42 };
    quote[at..at + 2].copy_from_slice(&translated.datagram()[at..at + 2]);
    quote
}

fn leaves(bed: &mut Bed, what: &str, packet: &Packet, verdict: Verdict) {
    bed.check(Case::new(
        what,
        Hook::ToNetdev,
        ETH0,
        packet.frame(),
        verdict,
    ));
}

#[test]
fn nothing_leaves_with_the_address_of_a_pod_that_should_have_another() {
    for_both_families(|bed| {
        add_device(bed);
        let forged = Verdict::Dropped(DropReason::InvalidSource);
        let sends = |bed: &Bed, to, l4| bed.incoming(bed.pod(OTHER), to, l4);
        let packet = sends(bed, bed.outside(), tcp(80, PORT, ACK));
        leaves(bed, "to the outside", &packet, forged);
        let packet = sends(bed, bed.remote_pod(9), tcp(80, PORT, ACK));
        leaves(bed, "to a pod elsewhere", &packet, Verdict::Stack);
        // Somebody outside asks the pod itself: only what answers that passes.
        let question = bed.incoming(bed.outside(), bed.pod(OTHER), tcp(PORT, 80, SYN));
        assert_eq!(bed.wire_brings(&question).verdict, Verdict::Local);
        let answer = sends(bed, bed.outside(), tcp(80, PORT, ACK));
        leaves(bed, "an answer", &answer, Verdict::Stack);
        let other = sends(bed, bed.outside(), tcp(81, PORT, ACK));
        leaves(bed, "no answer", &other, forged);
        // What is to be translated does not pass by another way.
        let request = bed.leaving(OTHER, bed.outside(), udp(PORT, 53));
        assert_eq!(bed.pod_sends(OTHER, &request).verdict, Verdict::Routed);
        let request = sends(bed, bed.outside(), udp(PORT, 53));
        leaves(bed, "what should be translated", &request, forged);

        let mut config = bed.node_config();
        config.non_masquerade_cidrs = vec![bed.outside().into()];
        bed.datapath.config_mut().apply(&config).unwrap();
        leaves(bed, "where pods keep it", &other, Verdict::Stack);
        let packet = bed.leaving(CLIENT, bed.outside(), tcp(PORT, 443, SYN));
        bed.check(Case::from_pod("kept", CLIENT, &packet, Verdict::Stack));
        let config = bed.node_config();
        bed.datapath.config_mut().apply(&config).unwrap();
        leaves(bed, "no more", &other, forged);
        bed.without_masquerade();
        leaves(bed, "no masquerade", &other, Verdict::Stack);
    });
}

#[test]
fn a_device_of_which_nothing_is_known_sends_nothing_of_pods() {
    for_both_families(|bed| {
        add_routes(bed);
        for l4 in [tcp(PORT, 443, SYN), udp(PORT, 443), echo(bed.is_v4(), 7)] {
            let packet = bed.leaving(CLIENT, bed.outside(), l4);
            let verdict = Verdict::Dropped(DropReason::NoSourceAddress);
            bed.check(Case::from_pod("no row", CLIENT, &packet, verdict));
        }
        assert_eq!(bed.flows().len(), 0);
        // Pods of this node and of others need none.
        bed.service(1, Protocol::Tcp, 80, &[(bed.remote_pod(9), 8080)]);
        let packet = bed.leaving(CLIENT, bed.cluster_ip(1), tcp(PORT, 80, SYN));
        assert_eq!(bed.pod_sends(CLIENT, &packet).verdict, Verdict::Remote);
    });
}

/// The programs as a kernel gets them whose `bpf_fib_lookup` knows neither `BPF_FIB_LOOKUP_SRC` (6.7) nor
/// `BPF_FIB_LOOKUP_SKIP_NEIGH` (6.3), over the maps of a bed.
struct OldKernel(aya::Ebpf);

impl OldKernel {
    fn new(bed: &Bed) -> Self {
        let options = bed.fs.options();
        let maps = options.bpf_root.join("maps");
        let shapes = shapes(OBJECT, &options).unwrap();
        let mut loader = EbpfLoader::new();
        loader
            .btf(None)
            .override_global("MARK_SHIFT", &options.mark_shift, true)
            .override_global("FIB_SOURCE_FLAG", &0u32, true)
            .override_global("FIB_NEIGHBOUR_FLAG", &0u32, true);
        for shape in &shapes {
            loader.map_pin_path(shape.name.as_str(), maps.join(&shape.name));
        }
        for (name, entries) in sizes(&options) {
            loader.map_max_entries(name, entries);
        }
        let mut ebpf = loader.load(OBJECT).unwrap();
        for name in ["from_pod", "from_netdev"] {
            Self::program(&mut ebpf, name).load().unwrap();
        }
        Self(ebpf)
    }

    fn program<'a>(ebpf: &'a mut aya::Ebpf, name: &str) -> &'a mut SchedClassifier {
        ebpf.program_mut(name).unwrap().try_into().unwrap()
    }

    fn run(&mut self, name: &str, packet: &Packet, device: u32) -> Output {
        let program = Self::program(&mut self.0, name).fd().unwrap().as_fd();
        run::run(program, &packet.frame(), on(device)).unwrap()
    }

    /// A packet that is sent on past the stack, by the neighbour that the routes name.
    fn sends_on(&mut self, name: &str, packet: &Packet, device: u32) -> Vec<u8> {
        let output = self.run(name, packet, device);
        assert_eq!(output.action, TC_ACT_REDIRECT, "{name}");
        assert_eq!(output.mark, mark::DONE << 20, "{name}");
        output.frame
    }
}

/// An address of the node that its routes prefer to that of the device: a kernel that tells it is known by it.
fn prefer_another_source(bed: &Bed) {
    let (family, bits, any, nodad) = if bed.is_v4() {
        ("-4", 32, "0.0.0.0/0", "")
    } else {
        ("-6", 128, "::/0", " nodad")
    };
    let preferred = preferred(bed);
    tool(&format!("ip addr add {preferred}/{bits} dev eth0{nodad}"));
    let gateway = bed.remote_node();
    tool(&format!(
        "ip {family} route replace {any} via {gateway} dev eth0 src {preferred}"
    ));
}

fn preferred(bed: &Bed) -> std::net::IpAddr {
    let text = if bed.is_v4() {
        "192.168.7.99"
    } else {
        "fd77::99"
    };
    text.parse().unwrap()
}

#[test]
fn kernels_that_tell_no_source_address_masquerade_too() {
    for_both_families(|bed| {
        add_device(bed);
        prefer_another_source(bed);
        let v4 = bed.is_v4();
        // With the gateway's Ethernet address known and unknown: without the flag the kernel looks for it, and says so.
        for is_known in [true, false] {
            if !is_known {
                let gateway = bed.remote_node();
                tool(&format!("ip neigh del {gateway} dev eth0"));
            }
            let mut old = OldKernel::new(bed);
            for (at, (name, first, later, answer)) in (0..).zip(KINDS) {
                let own = PORT + 10 * u16::from(is_known) + at;
                let opening = bed.leaving(CLIENT, bed.outside(), first(v4, own));
                let sent = old.sends_on("from_pod", &opening, device(CLIENT));
                let field = if name == "echo" { 4 } else { 0 };
                let port = port_of(bed, &sent, field);
                let range = NAT_PORT_FIRST..NAT_PORT_FIRST + NAT_PORT_COUNT;
                assert_eq!(range.contains(&port), name != "SCTP", "{name}: {port}");
                let with = |l4| {
                    let packet = bed.leaving(CLIENT, bed.outside(), l4);
                    packet.from(bed.node()).forwarded().frame()
                };
                assert_eq!(sent, with(first(v4, port)), "{name}");
                let request = bed.leaving(CLIENT, bed.outside(), later(v4, own));
                let sent = old.sends_on("from_pod", &request, device(CLIENT));
                assert_eq!(sent, with(later(v4, port)), "{name}: known");
                let reply = bed.incoming(bed.outside(), bed.node(), answer(v4, port));
                let output = old.run("from_netdev", &reply, ETH0);
                let out = bed.incoming(bed.outside(), bed.pod(CLIENT), answer(v4, own));
                let out = out.with_macs(delivered_macs(CLIENT)).forwarded();
                assert_eq!(output.action, TC_ACT_REDIRECT, "{name}: answer");
                assert_eq!(output.frame, out.frame(), "{name}: answer");
            }
        }
        // The same on this kernel, if it tells the address that the route prefers.
        let packet = bed.leaving(CLIENT, bed.outside(), udp(PORT + 99, 443));
        let seen = bed.pod_sends(CLIENT, &packet);
        assert_eq!(seen.verdict, Verdict::Routed);
        let at = if v4 { 26..30 } else { 22..38 };
        let chosen = &seen.output.frame[at];
        let octets = |address: std::net::IpAddr| match address {
            std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
            std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let allowed = [preferred(bed), bed.node()].map(octets);
        assert!(
            allowed.iter().any(|address| address == chosen),
            "{chosen:?}"
        );
    });
}

#[test]
fn kernels_that_tell_no_source_address_serve_node_ports_too() {
    for_both_families(|bed| {
        add_device(bed);
        prefer_another_source(bed);
        let mut old = OldKernel::new(bed);
        let beyond: std::net::IpAddr = if bed.is_v4() {
            "198.51.100.7"
        } else {
            "2001:db8:7::7"
        }
        .parse()
        .unwrap();
        // The source towards the other node is known; towards an endpoint beyond the cluster the routes are asked.
        for (number, backend) in (0..).zip([bed.remote_pod(9), beyond]) {
            node_port(bed, Protocol::Udp, (backend, 8080));
            let own = PORT + number;
            let request = bed.incoming(bed.outside(), bed.node(), udp(own, NODE_PORT));
            let sent = old.sends_on("from_netdev", &request, ETH0);
            let port = port_of(bed, &sent, 0);
            let out = request.from(bed.node()).to(backend);
            let out = out.source_port(port).destination_port(8080).forwarded();
            assert_eq!(sent, out.frame(), "{backend}");
            let answer = bed.incoming(backend, bed.node(), udp(8080, port));
            let out = answer.clone().from(bed.node()).to(bed.outside());
            let out = out.source_port(NODE_PORT).destination_port(own).forwarded();
            assert_eq!(old.sends_on("from_netdev", &answer, ETH0), out.frame());
        }
    });
}

#[test]
fn kernels_that_tell_no_source_address_send_nothing_by_an_unknown_device() {
    for_both_families(|bed| {
        add_routes(bed);
        let mut old = OldKernel::new(bed);
        let packet = bed.leaving(CLIENT, bed.outside(), udp(PORT, 443));
        let output = old.run("from_pod", &packet, device(CLIENT));
        assert_eq!(output.action, TC_ACT_SHOT);
    });
}
