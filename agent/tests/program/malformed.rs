//! Packets that lie. Whatever comes in, a program drops it, passes it on as it is, or translates
//! exactly what a strict reading of its headers says is part of a known connection.

use std::net::IpAddr;

use weir_agent::objects::Protocol;
use weir_common::metrics::Hook;

use crate::{
    bed::{Bed, CLIENT, ETH0, SERVER, device, for_both_families, hex, on},
    packet::{ACK, Fragment, Icmp, L4, Packet, echo, sctp, sum, tcp, udp},
    reference::{self, Reading},
};

/// A valid packet to be spoilt.
struct Sample {
    name: &'static str,
    hook: Hook,
    ifindex: u32,
    frame: Vec<u8>,
}

/// Ports: the client's, the Service's, the endpoint's.
const CLIENT_PORT: u16 = 40000;
const SERVICE_PORT: u16 = 80;
const BACKEND_PORT: u16 = 8080;

fn samples(bed: &mut Bed) -> Vec<Sample> {
    let backend = (bed.remote_pod(9), BACKEND_PORT);
    bed.service(1, Protocol::Tcp, SERVICE_PORT, &[backend]);
    bed.service(2, Protocol::Udp, SERVICE_PORT, &[backend]);
    let to_tcp = bed.leaving(
        CLIENT,
        bed.cluster_ip(1),
        tcp(CLIENT_PORT, SERVICE_PORT, ACK),
    );
    let to_udp = bed.leaving(CLIENT, bed.cluster_ip(2), udp(CLIENT_PORT, SERVICE_PORT));
    let mut first = to_udp.clone();
    first.fragment = Some(Fragment {
        identification: 0x1234,
        offset: 0,
        more: true,
    });
    let mut later = first.clone();
    later.fragment = Some(Fragment {
        identification: 0x1234,
        offset: 1480,
        more: false,
    });
    later.l4 = L4::Raw {
        protocol: 17,
        bytes: vec![3; 40],
    };
    let mut long = to_tcp.clone();
    if bed.is_v4() {
        long.options = vec![1; 24];
    } else {
        long.extensions = vec![
            (0, vec![0, 1, 4, 0, 0, 0, 0]),
            (60, vec![1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (43, vec![0, 4, 0, 0, 0, 0, 0]),
            (51, [vec![4], vec![0; 22]].concat()),
        ];
    }
    let quoted = bed.leaving(
        CLIENT,
        bed.remote_pod(9),
        tcp(CLIENT_PORT, BACKEND_PORT, ACK),
    );
    let error = L4::Icmp(Icmp {
        kind: if bed.is_v4() { 3 } else { 1 },
        code: 1,
        rest: [0; 4],
        payload: quoted.datagram(),
    });
    let pod = |name, packet: &Packet| Sample {
        name,
        hook: Hook::FromPod,
        ifindex: device(CLIENT),
        frame: packet.frame(),
    };
    let wire = |name, l4| Sample {
        name,
        hook: Hook::FromNetdev,
        ifindex: ETH0,
        frame: bed.incoming(bed.remote_pod(9), bed.pod(CLIENT), l4).frame(),
    };
    let samples = vec![
        pod("TCP to a Service", &to_tcp),
        pod("UDP to a Service", &to_udp),
        pod("long headers to a Service", &long),
        pod("first fragment to a Service", &first),
        pod("later fragment to a Service", &later),
        pod(
            "SCTP to a pod",
            &bed.leaving(CLIENT, bed.pod(SERVER), sctp(1, 2)),
        ),
        pod(
            "echo to a pod",
            &bed.leaving(CLIENT, bed.pod(SERVER), echo(bed.is_v4(), 1)),
        ),
        pod(
            "TCP elsewhere",
            &bed.leaving(CLIENT, bed.remote_pod(1), tcp(1, 2, ACK)),
        ),
        wire("TCP reply", tcp(BACKEND_PORT, CLIENT_PORT, ACK)),
        wire("UDP reply", udp(BACKEND_PORT, CLIENT_PORT)),
        wire("ICMP error", error),
        Sample {
            name: "to a pod with connections",
            hook: Hook::ToPod,
            ifindex: device(CLIENT),
            frame: bed.host_sends(bed.node(), CLIENT, tcp(1, 2, ACK)).frame(),
        },
    ];
    // Connections, and the ports of the fragments.
    for sample in &samples {
        bed.run_raw(sample.hook, &sample.frame, on(sample.ifindex))
            .unwrap();
    }
    samples
}

const DROPPED: i32 = 2;

/// Runs a spoilt sample and judges what came out. Gives whether it was dropped.
fn try_one(bed: &mut Bed, sample: &Sample, frame: &[u8], what: &str) -> bool {
    let output = match bed.run_raw(sample.hook, frame, on(sample.ifindex)) {
        Ok(output) => output,
        // The kernel itself refuses to run a program on a frame without a whole IP header.
        Err(_) if frame.len() < 14 + 40 => return true,
        Err(error) => panic!("{}, {what}: {error}: {}", sample.name, hex(frame)),
    };
    if output.action == DROPPED {
        return true;
    }
    if let Err(why) = judge(bed, sample, frame, &output.frame) {
        panic!(
            "{}: {}, {what}: {why}\n in  {}\n out {}",
            bed.family.name(),
            sample.name,
            hex(frame),
            hex(&output.frame)
        );
    }
    false
}

fn judge(bed: &Bed, sample: &Sample, before: &[u8], after: &[u8]) -> Result<(), String> {
    if before == after || one_hop_further(bed, before) == neutral(after) {
        return Ok(());
    }
    if is_answer(bed, before, after) {
        return Ok(());
    }
    let Some(reading) = reference::read(before) else {
        return Err("changed although its headers contradict each other".into());
    };
    if matches!(reading.protocol, 1 | 58) {
        return judge_error(bed, &reading, before, after);
    }
    let (new_source, new_destination, new_ports) = translation(bed, sample, &reading)
        .ok_or_else(|| format!("changed although no connection has {reading:?}"))?;
    let Some(now) = reference::read(after) else {
        return Err("what came out contradicts itself".into());
    };
    let expected = Reading {
        source: new_source,
        destination: new_destination,
        ports: reading.ports.map(|_| new_ports),
        ..reading
    };
    if now != expected {
        return Err(format!("became {now:?}"));
    }
    let (old_sum, new_sum) = (l4_sum(before, &reading), l4_sum(after, &now));
    let unsummed =
        reading.protocol == 17 && before.get(reading.l4 + 6..reading.l4 + 8) == Some(&[0, 0]);
    if !reading.later && !unsummed && !same_sum(old_sum, new_sum) {
        return Err(format!("checksum: {old_sum:04x} became {new_sum:04x}"));
    }
    // Put back, it is what came in.
    let mut back = after.to_vec();
    let addresses = if bed.is_v4() { 26..34 } else { 22..54 };
    back[addresses.clone()].copy_from_slice(&before[addresses]);
    if !reading.later {
        let checksum = reading.l4 + if reading.protocol == 6 { 16 } else { 6 };
        for range in [reading.l4..reading.l4 + 4, checksum..checksum + 2] {
            back[range.clone()].copy_from_slice(&before[range]);
        }
    }
    if neutral(&back) == one_hop_further(bed, before) {
        Ok(())
    } else {
        Err("more was changed than addresses, ports and checksums".into())
    }
}

/// What a packet of a known connection becomes.
fn translation(
    bed: &Bed,
    sample: &Sample,
    reading: &Reading,
) -> Option<(IpAddr, IpAddr, (u16, u16))> {
    let vip = bed.cluster_ip(if reading.protocol == 6 { 1 } else { 2 });
    let (own, endpoint) = (bed.pod(CLIENT), bed.remote_pod(9));
    let ports = match reading.ports {
        Some(ports) => Some(ports),
        None if reading.later => None,
        None => return None,
    };
    if !matches!(reading.protocol, 6 | 17) {
        return None;
    }
    if sample.hook == Hook::FromPod
        && (reading.source, reading.destination) == (own, vip)
        && ports.is_none_or(|(_, destination)| destination == SERVICE_PORT)
    {
        let port = ports.map_or(0, |(source, _)| source);
        return Some((own, endpoint, (port, BACKEND_PORT)));
    }
    if sample.hook == Hook::FromNetdev
        && (reading.source, reading.destination) == (endpoint, own)
        && ports.is_none_or(|(source, _)| source == BACKEND_PORT)
    {
        let port = ports.map_or(0, |(_, destination)| destination);
        return Some((vip, own, (SERVICE_PORT, port)));
    }
    None
}

/// An error about the known connection: only the places of addresses, ports and checksums differ,
/// and the checksum is as right or wrong as it was.
fn judge_error(bed: &Bed, reading: &Reading, before: &[u8], after: &[u8]) -> Result<(), String> {
    let own = if bed.is_v4() { 1 } else { 58 };
    if reading.protocol != own || reading.later {
        return Err(format!("no error of this family: {reading:?}"));
    }
    let inner = reading.l4 + 8;
    let (addresses, header) = if bed.is_v4() { (12, 20) } else { (8, 40) };
    let size = if bed.is_v4() { 8 } else { 32 };
    let mut back = after.to_vec();
    let outer = if bed.is_v4() { 26..34 } else { 22..54 };
    let mut places = vec![
        outer,
        reading.l4 + 2..reading.l4 + 4,
        inner + addresses..inner + addresses + size,
        inner + header..inner + header + 4,
    ];
    if bed.is_v4() {
        places.push(inner + 10..inner + 12);
    }
    for range in places {
        if back.len() < range.end {
            return Err("changed although it quotes too little".into());
        }
        back[range.clone()].copy_from_slice(&before[range]);
    }
    if neutral(&back) != one_hop_further(bed, before) {
        return Err("more was changed than addresses, ports and checksums".into());
    }
    let now = reference::read(after).ok_or("contradicts itself")?;
    let (old_sum, new_sum) = (l4_sum(before, reading), l4_sum(after, &now));
    // A quoted header with a wrong checksum keeps it wrong; the sum over both stays.
    if same_sum(old_sum, new_sum) {
        Ok(())
    } else {
        Err(format!("checksum: {old_sum:04x} became {new_sum:04x}"))
    }
}

/// The sum over pseudo-header and layer 4: all ones if the checksum is right.
fn l4_sum(frame: &[u8], reading: &Reading) -> u16 {
    let l4 = &frame[reading.l4..reading.end];
    if reading.protocol == 1 {
        return sum(&[l4]);
    }
    let pseudo = match (reading.source, reading.destination) {
        (IpAddr::V4(a), IpAddr::V4(b)) => [a.octets(), b.octets()].concat(),
        (IpAddr::V6(a), IpAddr::V6(b)) => [a.octets(), b.octets()].concat(),
        _ => panic!("two families"),
    };
    sum(&[
        &pseudo,
        &(l4.len() as u32).to_be_bytes(),
        &[0, 0, 0, reading.protocol],
        l4,
    ])
}

/// Zero has two forms in one's complement.
fn same_sum(a: u16, b: u16) -> bool {
    a == b || (a.is_multiple_of(0xffff) && b.is_multiple_of(0xffff))
}

/// The frame without its Ethernet addresses and the checksum of its IPv4 header.
fn neutral(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..12].fill(0);
    if frame[12..14] == [8, 0] && frame.len() >= 26 {
        frame[24..26].fill(0);
    }
    frame
}

/// The same with one hop less to go; also as it is, which translation to the stack leaves.
fn one_hop_further(bed: &Bed, frame: &[u8]) -> Vec<u8> {
    let mut further = neutral(frame);
    let ttl = if bed.is_v4() { 22 } else { 21 };
    if let Some(ttl) = further.get_mut(ttl) {
        *ttl = ttl.wrapping_sub(1);
    }
    further
}

/// An ICMP error of this node's about the packet, with right checksums.
fn is_answer(bed: &Bed, before: &[u8], after: &[u8]) -> bool {
    let Some(now) = reference::read(after) else {
        return false;
    };
    if now.protocol == 6 {
        return is_reset(before, after, &now);
    }
    if !matches!(now.protocol, 1 | 58) || now.later {
        return false;
    }
    let quote = &after[now.l4 + 8..now.end];
    let Some(about) = reference::read(before) else {
        return false;
    };
    now.source == bed.node()
        && now.destination == about.source
        && matches!(after[now.l4], 1 | 2 | 3 | 11)
        && before[14..].starts_with(quote)
        && same_sum(l4_sum(after, &now), 0xffff)
}

/// A TCP reset to the sender, with a right checksum.
fn is_reset(before: &[u8], after: &[u8], now: &Reading) -> bool {
    reference::read(before).is_some_and(|about| {
        (now.source, now.destination) == (about.destination, about.source)
            && now.ports
                == about
                    .ports
                    .map(|(source, destination)| (destination, source))
            && now.end - now.l4 == 20
            && after[now.l4 + 13] & 0x04 != 0
            && same_sum(l4_sum(after, now), 0xffff)
    })
}

#[test]
fn samples_that_are_cut_short() {
    for_both_families(|bed| {
        for sample in samples(bed) {
            for length in 14..sample.frame.len() {
                let frame = &sample.frame[..length];
                let dropped = try_one(bed, &sample, frame, "cut short");
                assert!(dropped, "{}: {length} bytes pass", sample.name);
            }
            let mut padded = sample.frame.clone();
            padded.extend([0; 46]);
            try_one(bed, &sample, &padded, "padded");
        }
    });
}

#[test]
fn every_value_of_every_length() {
    for_both_families(|bed| {
        for sample in samples(bed) {
            let reading = reference::read(&sample.frame).unwrap();
            let mut words = vec![if bed.is_v4() { 16 } else { 18 }];
            if reading.protocol == 17 && !reading.later {
                words.push(reading.l4 + 4);
            }
            if bed.is_v4() {
                // Flags and offset of fragments.
                words.push(20);
            }
            for at in words {
                let mut frame = sample.frame.clone();
                for value in 0..=u16::MAX {
                    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
                    try_one(bed, &sample, &frame, &format!("{value} at {at}"));
                }
            }
        }
    });
}

#[test]
fn every_value_of_every_byte() {
    for_both_families(|bed| {
        for sample in samples(bed) {
            for at in 0..sample.frame.len() {
                let mut frame = sample.frame.clone();
                for value in 0..=u8::MAX {
                    frame[at] = value;
                    try_one(bed, &sample, &frame, &format!("{value} at {at}"));
                }
            }
        }
    });
}

#[test]
fn chains_of_extension_headers() {
    for_both_families(|bed| {
        if bed.is_v4() {
            return;
        }
        let samples = samples(bed);
        let sample = &samples[0];
        let plain = bed.leaving(
            CLIENT,
            bed.cluster_ip(1),
            tcp(CLIENT_PORT, SERVICE_PORT, ACK),
        );
        let small = |next: u8| (next, vec![0, 1, 4, 0, 0, 0, 0]);
        for kind in [0, 43, 51, 60, 135] {
            for count in 1..=20 {
                let mut packet = plain.clone();
                packet.extensions = vec![small(kind); count];
                let dropped = try_one(bed, sample, &packet.frame(), &format!("{count} of {kind}"));
                // Seven are followed, the eighth header is the last.
                assert_eq!(dropped, count > 7, "{count} of {kind}");
            }
            // Lengths that lie: into the ports, beyond the packet, beyond what is followed.
            for size in 0..=255u8 {
                for payload in [0, 100, 1000, 2900] {
                    let mut packet = plain.clone().with_payload(vec![0; payload]);
                    packet.extensions = vec![small(kind), (kind, vec![size, 1, 4, 0, 0, 0, 0])];
                    let what = format!("length {size} of {kind}");
                    try_one(bed, sample, &packet.frame(), &what);
                }
            }
        }
        for next in 0..=255u8 {
            let mut frame = plain.frame();
            frame[20] = next;
            try_one(bed, sample, &frame, &format!("next header {next}"));
        }
        // Two fragment headers, and one behind which the chain goes on.
        let piece = |place: u16| {
            let [a, b] = place.to_be_bytes();
            (44, vec![0, a, b, 0, 0, 0, 9])
        };
        for places in [[0, 0], [1, 1], [1, 0x100], [0x100, 1], [0, 1]] {
            let mut packet = plain.clone();
            packet.extensions = places.map(piece).to_vec();
            try_one(
                bed,
                sample,
                &packet.frame(),
                &format!("fragments {places:?}"),
            );
        }
    });
}

/// Numbers from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

#[test]
fn random_bytes_in_random_places() {
    let seed = std::env::var("WEIR_SEED").map_or(0x5765_6972, |seed| seed.parse().unwrap());
    println!("WEIR_SEED={seed}");
    for_both_families(|bed| {
        let seed = std::env::var("WEIR_SEED").map_or(0x5765_6972, |seed| seed.parse().unwrap());
        let mut random = Random(seed);
        let rounds = match std::env::var("WEIR_LONG") {
            Ok(long) if long == "1" => 2_000_000,
            _ => 20_000,
        };
        for sample in samples(bed) {
            for round in 0..rounds {
                let mut frame = sample.frame.clone();
                for _ in 0..1 + random.below(4) {
                    // Headers, mostly.
                    let limit = if random.below(8) == 0 {
                        frame.len()
                    } else {
                        frame.len().min(80)
                    };
                    frame[random.below(limit)] = random.next() as u8;
                }
                if random.below(8) == 0 {
                    frame.truncate(14 + random.below(frame.len() - 14));
                }
                try_one(bed, &sample, &frame, &format!("round {round}"));
            }
        }
    });
}
