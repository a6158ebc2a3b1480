//! Random changes: the incremental model says what the reference computes from scratch, and its
//! deltas lead there.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
};

use weir_agent::{
    model::{BackendAddress, Model, Scope},
    objects::{Family, Protocol},
    source::Change,
};

use crate::{
    Mirror,
    world::{
        Step, World,
        random::{ADDRESSES, Random},
        reference::{self, Packet, Reference},
    },
};

const SEEDS: u64 = 200;
/// With `WEIR_LONG=1`. `WEIR_MODEL_SEEDS` asks for any other number.
const SEEDS_LONG: u64 = 5000;
const CHANGES: usize = 150;

#[test]
fn the_incremental_model_equals_the_reference() {
    let seeds = match (env::var("WEIR_MODEL_SEEDS"), env::var("WEIR_LONG")) {
        (Ok(text), _) => text.parse().unwrap(),
        (_, Ok(long)) if long == "1" => SEEDS_LONG,
        _ => SEEDS,
    };
    let mut seen = Seen::default();
    for seed in 1..=seeds {
        let result = std::panic::catch_unwind(|| run(seed));
        assert!(result.is_ok(), "seed {seed} of {seeds}");
        seen.add(result.unwrap());
    }
    seen.assert_complete();
}

/// What the random worlds have shown; a test that never meets a case says nothing about it.
#[derive(Clone, Debug, Default)]
struct Seen {
    frontends: BTreeMap<String, usize>,
    endpoints: BTreeMap<String, usize>,
}

impl Seen {
    fn add(&mut self, other: Self) {
        for (all, new) in [
            (&mut self.frontends, other.frontends),
            (&mut self.endpoints, other.endpoints),
        ] {
            for (what, count) in new {
                *all.entry(what).or_default() += count;
            }
        }
    }

    fn look(&mut self, mirror: &Mirror) {
        for port in mirror.services.values() {
            for frontend in &port.frontends {
                let (kind, scope, set) = (frontend.kind.name(), frontend.scope, frontend.set);
                let place = if frontend.address.is_some() {
                    "at one address"
                } else {
                    "at every address"
                };
                let what = format!("{kind} {place} {scope:?} {set:?}");
                *self.frontends.entry(what).or_default() += 1;
            }
            for backend in port.backends.values() {
                let what = format!("{:?} {} {}", backend.state, backend.cluster, backend.local);
                *self.endpoints.entry(what).or_default() += 1;
            }
            for unused in port.unused.values() {
                *self.endpoints.entry(unused.reason.to_owned()).or_default() += 1;
            }
        }
    }

    /// Every kind of frontend with every policy that it can have, every condition and reason.
    fn assert_complete(&self) {
        assert_eq!(self.frontends.len(), 2 + 3 * 3 + 2 * 2, "{self:?}");
        assert_eq!(self.endpoints.len(), 2 * 3 + 6, "{self:?}");
    }
}

fn run(seed: u64) -> Seen {
    let mut random = Random::new(seed);
    let mut world = World::random();
    let mut model = Model::new(world.options());
    let mut mirror = Mirror::default();
    let mut seen = Seen::default();
    for step in 0..CHANGES {
        let change = random.step(&world);
        world.follow(&change);
        take(&mut model, change);
        if random.one_in(3) || step + 1 == CHANGES {
            mirror.follow(model.take_delta());
            let reference = compare(&model, &mirror, &world);
            send_packets(&mut random, &mirror, &reference);
            seen.look(&mirror);
        }
    }
    for key in world.objects.keys().cloned().collect::<Vec<_>>() {
        model.apply(Change::Delete(key));
    }
    for (interface, _) in std::mem::take(&mut world.host_ports) {
        model.set_host_ports(interface, None);
    }
    world.objects.clear();
    mirror.follow(model.take_delta());
    compare(&model, &mirror, &world);
    assert_eq!(mirror, Mirror::default());
    assert!(model.object_counts().values().all(|count| *count == 0));
    seen
}

fn take(model: &mut Model, step: Step) {
    match step {
        Step::Object(change) => model.apply(change),
        Step::HostPorts(interface, ports) => model.set_host_ports(interface, ports),
    }
}

fn compare(model: &Model, mirror: &Mirror, world: &World) -> Reference {
    let expected = reference::compute(world);
    assert_eq!(mirror.services, expected.services);
    assert_eq!(*mirror, Mirror::of(model));
    let problems: Vec<_> = model.problems().collect();
    assert_eq!(problems.len(), expected.problems, "{problems:#?}");
    for address in ADDRESSES {
        let address = address.parse().unwrap();
        assert_eq!(
            model.name_of(address).map(ToString::to_string),
            reference::owners(world, address).into_iter().next(),
            "{address}"
        );
    }
    let counts = world
        .objects
        .keys()
        .fold(BTreeMap::new(), |mut counts, key| {
            *counts.entry(key.kind).or_insert(0) += 1;
            counts
        });
    for (kind, count) in model.object_counts() {
        assert_eq!(counts.get(&kind).copied().unwrap_or(0), count, "{kind}");
    }
    expected
}

/// What a client addresses, of every family and protocol.
type FrontendKey = (Option<std::net::IpAddr>, Family, u16, Protocol, Scope);

/// Looks frontends up as the programs do: by address, then by no address at addresses of the node.
fn send_packets(random: &mut Random, mirror: &Mirror, reference: &Reference) {
    let mut frontends: BTreeMap<FrontendKey, BTreeSet<BackendAddress>> = BTreeMap::new();
    for (key, port) in &mirror.services {
        for f in &port.frontends {
            let members = port.backends.iter().filter(|(_, b)| b.is_in(f.set));
            let members = members.map(|(address, _)| *address).collect();
            let place = (f.address, key.family, f.port, key.protocol, f.scope);
            let before = frontends.insert(place, members);
            assert_eq!(before, None, "two ports have {place:?}");
        }
    }
    for _ in 0..8 {
        let address = random.address();
        let packet = Packet {
            scope: random.pick(&[Scope::Inside, Scope::Outside]),
            address,
            port: random.pick(&[53, 80, 8080, 30_000, 30_001, 30_002]),
            protocol: random.pick(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp]),
            is_node_address: random.one_in(2),
        };
        let key = |address| {
            let family = Family::of(packet.address);
            (address, family, packet.port, packet.protocol, packet.scope)
        };
        let exact = frontends.get(&key(Some(address)));
        let found = exact.or_else(|| frontends.get(&key(None)).filter(|_| packet.is_node_address));
        assert_eq!(
            found,
            reference.endpoints_of(&packet).as_ref(),
            "{packet:?}"
        );
    }
}
