//! ICMP errors about connections of the node itself to Services, in each direction.

use weir_agent::objects::Protocol;

use crate::{
    bed::{Bed, Case, ESTABLISHED, Lookups, Verdict, for_both_families},
    errors::put_back,
    host::{LOOPBACK, NET_DEVICE, Place, TARGET, node_sends, own_device},
    packet::{ACK, Icmp, L4, Packet, tcp, udp},
};

/// Errors that quote something: what is too big, and what cannot be reached.
fn errors(v4: bool, quote: &[u8]) -> [(&'static str, L4); 2] {
    let error = |kind, code, rest: u32| {
        L4::Icmp(Icmp {
            kind,
            code,
            rest: rest.to_be_bytes(),
            payload: quote.to_vec(),
        })
    };
    if v4 {
        [
            ("too big", error(3, 4, 1280)),
            ("unreachable", error(3, 3, 0)),
        ]
    } else {
        [
            ("too big", error(2, 0, 1280)),
            ("unreachable", error(1, 4, 0)),
        ]
    }
}

/// Runs `test` for each place of an endpoint, TCP and UDP, with the number of a Service and the
/// node's own port, after the first packet of the connection.
fn for_each(bed: &mut Bed, test: fn(&mut Bed, &str, Place, u32, &Packet)) {
    own_device(bed, true);
    let mut index = 0;
    for place in Place::ALL {
        for (kind, protocol) in [("TCP", Protocol::Tcp), ("UDP", Protocol::Udp)] {
            index += 1;
            let own = 40000 + index as u16;
            let l4 = match protocol {
                Protocol::Tcp => tcp(own, 80, ACK),
                _ => udp(own, 80),
            };
            bed.service(index, protocol, 80, &[(place.address(bed), TARGET)]);
            let request = node_sends(bed, NET_DEVICE, bed.cluster_ip(index), l4);
            let name = format!("{place:?}, {kind}");
            let (out, verdict) = place.request(bed, &request, TARGET);
            bed.check(Case::from_host(&name, NET_DEVICE, &request, verdict).out(&out));
            test(bed, &name, place, index, &request);
        }
    }
}

/// Nothing by the tuple of the error itself, then the connection by that of the quote.
const QUOTED: Lookups = Lookups {
    flow: 2,
    ..ESTABLISHED
};

#[test]
fn about_what_the_node_has_sent() {
    for_both_families(|bed| {
        for_each(bed, |bed, name, place, index, request| {
            let vip = bed.cluster_ip(index);
            let mut sent = request
                .clone()
                .to(place.address(bed))
                .destination_port(TARGET);
            if place != Place::ThisNode {
                sent = sent.forwarded();
            }
            let back = put_back(request, &sent);
            for ((what, error), (_, expected)) in errors(bed.is_v4(), &sent.datagram())
                .into_iter()
                .zip(errors(bed.is_v4(), &back))
            {
                let packet = place.answer(bed, error);
                let out = Packet {
                    l4: expected.clone(),
                    ..packet.clone().from(vip)
                };
                let (out, verdict) = place.reply(out, true);
                let case = place.case(&format!("{name}: {what}"), &packet, verdict);
                let seen = bed.check(case.out(&out));
                assert_eq!(seen.lookups.flow, QUOTED.flow, "{name}: {what}");
                if place != Place::Elsewhere {
                    continue;
                }
                // A router stays what it is.
                let packet = packet.from(bed.outside());
                let out = Packet {
                    l4: expected,
                    ..packet.clone()
                };
                let (out, verdict) = place.reply(out, true);
                let name = format!("{name}: {what} from a router");
                bed.check(Case::from_netdev(&name, &packet, verdict).out(&out));
            }
        });
    });
}

#[test]
fn about_what_the_node_has_got() {
    for_both_families(|bed| {
        for_each(bed, |bed, name, place, index, request| {
            let vip = bed.cluster_ip(index);
            let own = 40000 + index as u16;
            let l4 = match request.l4 {
                L4::Tcp(_) => tcp(TARGET, own, ACK),
                _ => udp(TARGET, own),
            };
            let reply = place.answer(bed, l4);
            let got = reply.clone().from(vip).source_port(80);
            let (got, verdict) = place.reply(got, true);
            bed.check(place.case(name, &reply, verdict).out(&got));
            let back = put_back(&reply, &got);
            for ((what, error), (_, expected)) in errors(bed.is_v4(), &got.datagram())
                .into_iter()
                .zip(errors(bed.is_v4(), &back))
            {
                let packet = node_sends(bed, NET_DEVICE, vip, error);
                let out = Packet {
                    l4: expected,
                    ..packet.clone().to(place.address(bed))
                };
                let name = format!("{name}: {what}");
                let case = Case::from_host(&name, NET_DEVICE, &packet, Verdict::Stack);
                bed.check(case.out(&out).lookups(QUOTED));
            }
        });
    });
}

#[test]
fn errors_about_nothing_known_pass() {
    for_both_families(|bed| {
        own_device(bed, true);
        bed.service(1, Protocol::Udp, 80, &[(bed.remote_pod(9), TARGET)]);
        let request = node_sends(bed, NET_DEVICE, bed.cluster_ip(1), udp(40000, 80));
        let (out, verdict) = Place::Elsewhere.request(bed, &request, TARGET);
        bed.check(Case::from_host("request", NET_DEVICE, &request, verdict).out(&out));
        let other = node_sends(bed, LOOPBACK, bed.outside(), udp(40000, TARGET));
        for (what, error) in errors(bed.is_v4(), &other.datagram()) {
            for place in Place::ALL {
                let packet = place.answer(bed, error.clone());
                bed.check(place.case(&format!("{what}, {place:?}"), &packet, Verdict::Stack));
            }
        }
    });
}
