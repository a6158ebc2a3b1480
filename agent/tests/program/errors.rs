//! ICMP errors about connections that are translated: the quoted packet is put back as its sender
//! sent it, and the error goes where the connection goes.

use std::net::IpAddr;

use weir_agent::objects::Protocol;

use crate::{
    bed::{Bed, CLIENT, Case, SERVER, Verdict, delivered_macs, for_both_families},
    packet::{ACK, Icmp, L4, Packet, tcp, udp},
};

/// An error that quotes `quote`.
pub fn error(v4: bool, quote: Vec<u8>) -> L4 {
    L4::Icmp(Icmp {
        kind: if v4 { 3 } else { 2 },
        code: if v4 { 4 } else { 0 },
        rest: 1280u32.to_be_bytes(),
        payload: quote,
    })
}

/// The quoted packet `translated` with the addresses and ports of `original`: all is put back but
/// the checksum of layer 4, at which no receiver of an error looks.
pub fn put_back(original: &Packet, translated: &Packet) -> Vec<u8> {
    let mut quote = original.clone().with_ttl(translated.ttl).datagram();
    let from = translated.datagram();
    let l4 = if original.source.is_ipv4() { 20 } else { 40 };
    let checksum = match original.l4 {
        L4::Tcp(_) => l4 + 16,
        _ => l4 + 6,
    };
    quote[checksum..checksum + 2].copy_from_slice(&from[checksum..checksum + 2]);
    quote
}

/// A request of `CLIENT` to Service `index`, as it leaves and as the backend gets it.
fn request(
    bed: &mut Bed,
    index: u32,
    l4: &L4,
    backend: IpAddr,
    verdict: Verdict,
) -> (Packet, Packet) {
    let protocol = match l4 {
        L4::Tcp(_) => Protocol::Tcp,
        _ => Protocol::Udp,
    };
    bed.service(index, protocol, 80, &[(backend, 8080)]);
    let original = bed.leaving(CLIENT, bed.cluster_ip(index), l4.clone());
    assert_eq!(bed.pod_sends(CLIENT, &original).verdict, verdict);
    let translated = original
        .clone()
        .to(backend)
        .destination_port(8080)
        .forwarded();
    (original, translated)
}

const KINDS: fn() -> [(&'static str, u32, L4); 2] =
    || [("TCP", 1, tcp(40000, 80, ACK)), ("UDP", 2, udp(40000, 80))];

#[test]
fn from_outside_about_what_a_pod_has_sent() {
    for_both_families(|bed| {
        for (name, index, l4) in KINDS() {
            let backend = bed.remote_pod(9);
            let (original, translated) = request(bed, index, &l4, backend, Verdict::Remote);
            let router = bed.outside();
            for (who, source, shown) in [
                ("router", router, router),
                ("endpoint", backend, bed.cluster_ip(index)),
            ] {
                let quote = error(bed.is_v4(), translated.datagram());
                let packet = bed.incoming(source, bed.pod(CLIENT), quote);
                let back = error(bed.is_v4(), put_back(&original, &translated));
                let out = bed
                    .incoming(shown, bed.pod(CLIENT), back)
                    .with_macs(delivered_macs(CLIENT))
                    .forwarded();
                let case = Case::from_netdev(&format!("{name}, {who}"), &packet, Verdict::Local);
                bed.check(case.out(&out));
            }
            // Linux' own quote is complete; eight bytes of layer 4 are the least there is.
            let least = if bed.is_v4() { 28 } else { 48 };
            let mut quote = translated.datagram();
            quote.truncate(least);
            let mut back = put_back(&original, &translated);
            back.truncate(least);
            let packet = bed.incoming(router, bed.pod(CLIENT), error(bed.is_v4(), quote));
            let out = bed
                .incoming(router, bed.pod(CLIENT), error(bed.is_v4(), back))
                .with_macs(delivered_macs(CLIENT))
                .forwarded();
            let case = Case::from_netdev(&format!("{name}, least"), &packet, Verdict::Local);
            bed.check(case.out(&out));
        }
    });
}

#[test]
fn from_an_endpoint_on_this_node() {
    for_both_families(|bed| {
        for (name, index, l4) in KINDS() {
            let backend = bed.pod(SERVER);
            let (original, translated) = request(bed, index, &l4, backend, Verdict::Local);
            let quote = error(bed.is_v4(), translated.datagram());
            let packet = bed.leaving(SERVER, bed.pod(CLIENT), quote);
            let back = error(bed.is_v4(), put_back(&original, &translated));
            let out = packet
                .clone()
                .from(bed.cluster_ip(index))
                .with_macs(delivered_macs(CLIENT))
                .forwarded();
            let out = Packet { l4: back, ..out };
            bed.check(Case::from_pod(name, SERVER, &packet, Verdict::Local).out(&out));
        }
    });
}

#[test]
fn from_an_endpoint_that_is_this_node() {
    for_both_families(|bed| {
        for (name, index, l4) in KINDS() {
            let backend = bed.node();
            let (original, mut translated) = request(bed, index, &l4, backend, Verdict::Stack);
            translated.ttl = original.ttl;
            let quote = error(bed.is_v4(), translated.datagram());
            let packet = bed.host_sends(backend, CLIENT, quote);
            let back = error(bed.is_v4(), put_back(&original, &translated));
            let out = bed.host_sends(bed.cluster_ip(index), CLIENT, back);
            bed.check(Case::to_pod(name, CLIENT, &packet, Verdict::Stack).out(&out));
        }
    });
}

#[test]
fn from_the_client_about_a_reply() {
    for_both_families(|bed| {
        for (name, index, l4) in KINDS() {
            let backend = bed.remote_pod(9);
            request(bed, index, &l4, backend, Verdict::Remote);
            let l4 = match l4 {
                L4::Tcp(_) => tcp(8080, 40000, ACK),
                _ => udp(8080, 40000),
            };
            let original = bed.incoming(backend, bed.pod(CLIENT), l4);
            let translated = original
                .clone()
                .from(bed.cluster_ip(index))
                .source_port(80)
                .forwarded();
            let quote = error(bed.is_v4(), translated.datagram());
            let packet = bed.leaving(CLIENT, bed.cluster_ip(index), quote);
            let back = error(bed.is_v4(), put_back(&original, &translated));
            let out = packet.clone().to(backend).forwarded();
            let out = Packet { l4: back, ..out };
            bed.check(Case::from_pod(name, CLIENT, &packet, Verdict::Remote).out(&out));
        }
    });
}

#[test]
fn from_a_pod_about_itself() {
    for_both_families(|bed| {
        let (name, index, l4) = ("UDP", 1, udp(40000, 80));
        let own = bed.pod(CLIENT);
        let (original, translated) = request(bed, index, &l4, own, Verdict::Local);
        let translated = translated.from(bed.loopback());
        let quote = error(bed.is_v4(), translated.datagram());
        let packet = bed.leaving(CLIENT, bed.loopback(), quote);
        let back = error(bed.is_v4(), put_back(&original, &translated));
        let out = packet
            .clone()
            .from(bed.cluster_ip(index))
            .to(own)
            .with_macs(delivered_macs(CLIENT))
            .forwarded();
        let out = Packet { l4: back, ..out };
        bed.check(Case::from_pod(name, CLIENT, &packet, Verdict::Local).out(&out));
    });
}
