//! Random worlds of objects in the model, in the maps and under the programs at once: all three must
//! say what a plain reference computes from the objects alone. A case is one packet, or one reading
//! of all maps. Which packets are sent stands in `probes`, what they may do in `packets`, what maps
//! must hold in `maps`.

mod maps;
mod packets;
mod place;
mod probes;

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    net::IpAddr,
};

use weir_agent::{
    datapath::DatapathOptions,
    model::{BackendAddress, Model, ServicePort, ServicePortKey},
    objects::{Family, Object, Protocol, ServiceType, SlicePort},
    source::Change,
};
use weir_common::{flow::TICKS_PER_SECOND, metrics::outcome};

use self::{
    packets::{Open, Remembered},
    place::{Masquerade, Places},
    probes::Sender,
};
use crate::{
    bed::{Bed, CLIENT, OTHER, SERVER, with_bed},
    outside::add_device_of_both_families,
    support::FAMILIES,
    world::{
        Step, World,
        random::Random,
        reference::{self, Reference},
    },
};

/// Cases of one test; the four of them together make 160,000.
const CASES: usize = 40_000;
/// With `WEIR_LONG=1`.
const CASES_LONG: usize = 1_000_000;
const TESTS: u64 = 4;
/// Changes before the first look at a world, and looks.
const FIRST_CHANGES: usize = 60;
const LOOKS: usize = 20;

#[test]
fn random_worlds_1() {
    run(0);
}

#[test]
fn random_worlds_2() {
    run(1);
}

#[test]
fn random_worlds_3() {
    run(2);
}

#[test]
fn random_worlds_4() {
    run(3);
}

fn run(test: u64) {
    let seed = env::var("WEIR_SEED").map_or_else(|_| new_seed(), |seed| seed.parse().unwrap());
    let number = test + 1;
    let repeat = format!(
        "WEIR_SEED={seed} cargo nextest run -p weir-agent -E 'test(=differential::random_worlds_{number})'"
    );
    println!("{repeat} repeats this test");
    let result = std::panic::catch_unwind(|| walk(test, seed));
    if let Err(panic) = result {
        eprintln!("to repeat it: {repeat}");
        std::panic::resume_unwind(panic);
    }
}

/// Another one in each run, so that many runs see many worlds. Six digits are easily copied.
fn new_seed() -> u64 {
    let now = std::time::UNIX_EPOCH.elapsed().unwrap();
    (now.as_nanos() as u64 ^ u64::from(std::process::id())) % 1_000_000
}

fn walk(test: u64, seed: u64) {
    let cases = match env::var("WEIR_LONG") {
        Ok(long) if long == "1" => CASES_LONG,
        _ => CASES,
    };
    with_bed(Family::V4, small_tables, move |bed| {
        bed.family = Family::V6;
        bed.add_nodes();
        add_device_of_both_families(bed);
        let mut differential = Differential::new(bed, seed * TESTS + test);
        let mut worlds = 0;
        while differential.cases < cases {
            worlds += 1;
            println!("world {worlds}, after {} cases", differential.cases);
            differential.world();
        }
        println!("{} cases: {:#?}", differential.cases, differential.seen);
        probes::assert_complete(&differential.seen);
    });
}

/// Small enough that rows are used again soon.
fn small_tables(options: &mut DatapathOptions) {
    options.connections = 32_768;
    options.services_max = 128;
    options.backends_max = 512;
}

struct Differential<'b> {
    bed: &'b mut Bed,
    random: Random,
    world: World,
    model: Model,
    of_bed: Places,
    places: Places,
    /// What session affinity must know.
    remembered: BTreeMap<(Sender, ServicePortKey), Remembered>,
    /// Connections that go on from look to look.
    open: Vec<Open>,
    /// The next source port; no two connections of a world have the same.
    source_port: u16,
    /// Packets that must have been counted since the last look, by hook and outcome.
    counted: BTreeMap<(u32, u8), u64>,
    /// What the kernel had counted then.
    counters: BTreeMap<(u32, u8), u64>,
    cases: usize,
    /// How often what is worth seeing was seen.
    seen: BTreeMap<String, usize>,
}

impl<'b> Differential<'b> {
    fn new(bed: &'b mut Bed, seed: u64) -> Self {
        let of_bed = Places::of_bed(bed);
        of_bed.apply(bed, &of_bed);
        let world = World::random();
        Self {
            model: Model::new(world.options()),
            random: Random::new(seed),
            places: of_bed.clone(),
            of_bed,
            world,
            remembered: BTreeMap::new(),
            open: Vec::new(),
            source_port: probes::FIRST_SOURCE_PORT,
            counted: BTreeMap::new(),
            counters: BTreeMap::new(),
            cases: 0,
            seen: BTreeMap::new(),
            bed,
        }
    }

    /// A world from its beginning to its end.
    fn world(&mut self) {
        for _ in 0..FIRST_CHANGES {
            self.change();
        }
        for _ in 0..LOOKS {
            for _ in 0..1 + self.random.below(6) {
                self.change();
            }
            let reference = self.apply();
            self.send_packets(&reference);
            self.compare_counters();
        }
        for key in self.world.objects.keys().cloned().collect::<Vec<_>>() {
            self.follow(Step::Object(Change::Delete(key)));
        }
        for (interface, _) in self.world.host_ports.clone() {
            self.follow(Step::HostPorts(interface, None));
        }
        let reference = self.apply();
        assert_eq!(reference.services, BTreeMap::new());
        self.close();
    }

    fn change(&mut self) {
        let step = self.random.step(&self.world);
        let step = self.fuller(step);
        let step = self.relocated(step);
        self.follow(step);
    }

    /// Most random Services ask for little and have no endpoint; packets want more to go to.
    fn fuller(&mut self, step: Step) -> Step {
        let Step::Object(Change::Upsert(mut object)) = step else {
            return step;
        };
        let random = &mut self.random;
        match &mut object {
            Object::Service(service) if !random.one_in(3) => {
                if service.service_type == ServiceType::ExternalName {
                    service.service_type = ServiceType::LoadBalancer;
                }
                for addresses in [
                    &mut service.cluster_ips,
                    &mut service.external_ips,
                    &mut service.load_balancer_ips,
                ] {
                    if addresses.is_empty() {
                        addresses.push(random.address());
                    }
                }
                for port in &mut service.ports {
                    port.name = "web".to_owned();
                }
            }
            Object::EndpointSlice(slice) if !random.one_in(3) => {
                // More slices than the generator has names for.
                slice.name.name += random.pick(&["", "-more", "-most"]);
                for endpoint in &mut slice.endpoints {
                    endpoint.ready |= random.one_in(2);
                }
                if slice.service.is_empty() {
                    slice.service = random.pick(&["a", "b"]).to_owned();
                }
                // The port unchanged and changed; a name stands for one of each protocol.
                slice.ports = [
                    (Protocol::Tcp, 8080),
                    (Protocol::Udp, 53),
                    (Protocol::Sctp, 80),
                ]
                .map(|(protocol, port)| SlicePort {
                    name: "web".to_owned(),
                    protocol,
                    port,
                })
                .into();
            }
            _ => {}
        }
        Step::Object(Change::Upsert(object))
    }

    fn follow(&mut self, step: Step) {
        self.world.follow(&step);
        match step {
            Step::Object(change) => self.model.apply(change),
            Step::HostPorts(interface, ports) => self.model.set_host_ports(interface, ports),
        }
    }

    /// Puts endpoints where there is something: in pods here and there, on nodes, outside. A few
    /// stay where Services and nodes may have the same address.
    fn relocated(&mut self, step: Step) -> Step {
        match step {
            Step::Object(Change::Upsert(Object::EndpointSlice(mut slice))) => {
                for endpoint in &mut slice.endpoints {
                    if let Some(address) = &mut endpoint.address
                        && !self.random.one_in(8)
                    {
                        *address = self.real_address(*address);
                    }
                }
                Step::Object(Change::Upsert(Object::EndpointSlice(slice)))
            }
            Step::Object(Change::Upsert(Object::Node(mut node))) => {
                // It is the bed's own.
                let own = self.places.own_range();
                node.pod_cidrs.retain(|range| *range != own);
                Step::Object(Change::Upsert(Object::Node(node)))
            }
            Step::HostPorts(interface, Some(mut ports)) => {
                for address in ports.iter_mut().flat_map(|port| &mut port.addresses) {
                    self.bed.family = Family::of(*address);
                    *address = self.bed.pod(OTHER);
                }
                Step::HostPorts(interface, Some(ports))
            }
            other => other,
        }
    }

    fn real_address(&mut self, address: IpAddr) -> IpAddr {
        let last = match address {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(v6) => v6.octets()[15],
        };
        self.bed.family = Family::of(address);
        match last {
            1 => self.bed.pod(SERVER),
            2 => self.bed.pod(CLIENT),
            3 => self.bed.remote_pod(9),
            4 => self.bed.node(),
            _ => self.bed.outside(),
        }
    }

    /// Brings the world into the kernel, and compares model and maps with the reference.
    fn apply(&mut self) -> Reference {
        let mut places = self.of_bed.with(&self.world);
        places.masquerade = match self.random.one_in(3) {
            true => Masquerade::random(&mut self.random),
            false => self.places.masquerade.clone(),
        };
        let places_first = self.random.one_in(2);
        if places_first {
            places.apply(self.bed, &self.places);
        }
        let delta = self.model.take_delta();
        // As the agent does it: a frontend that moves goes to its new owner first.
        let (mut gone, mut changed): (Vec<_>, Vec<_>) = delta
            .services
            .into_iter()
            .partition(|(_, port)| port.is_none());
        self.shuffle(&mut changed);
        self.shuffle(&mut gone);
        for (key, port) in changed.into_iter().chain(gone) {
            let applied = self.bed.datapath.apply_service(&key, port.as_ref());
            applied.unwrap();
            self.forget(&key, port.as_ref());
        }
        if !places_first {
            places.apply(self.bed, &self.places);
        }
        self.places = places;

        let reference = reference::compute(&self.world);
        let desired: BTreeMap<_, _> = self.model.services().collect();
        assert_eq!(desired, reference.services.iter().collect(), "the model");
        let is_swept = self.random.one_in(2);
        if is_swept {
            self.bed.datapath.sweep_affinity(u32::MAX).unwrap();
        }
        maps::compare(&self.bed.fs, &reference, &self.places, is_swept);
        self.cases += 1;
        reference
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.random.below(last + 1));
        }
    }

    /// A Service port has changed: what clients have been told of it holds as far as its endpoints
    /// are still the same.
    fn forget(&mut self, key: &ServicePortKey, port: Option<&ServicePort>) {
        let is_kept =
            |backend: &BackendAddress| port.is_some_and(|port| port.backends.contains_key(backend));
        let has_affinity = port.is_some_and(|port| port.affinity.is_some());
        self.remembered
            .retain(|(_, k), known| k != key || (has_affinity && is_kept(&known.backend)));
        for open in self.open.iter_mut().filter(|open| open.key == *key) {
            open.is_alive &= is_kept(&open.backend);
        }
    }

    /// Every packet is counted once, under its hook and what became of it.
    fn compare_counters(&mut self) {
        let of_packets = |outcome: u8| {
            outcome == outcome::REFUSED
                || (outcome != outcome::EVENT_LOST
                    && !(outcome::FLOW_CREATED..=outcome::NAT_PORT_SEARCH).contains(&outcome))
        };
        let all = self.bed.datapath.counters().all().unwrap();
        let now: BTreeMap<(u32, u8), u64> = all
            .into_iter()
            .filter(|counter| of_packets(counter.outcome))
            .map(|c| ((c.hook as u32, c.outcome), c.counter.packets))
            .collect();
        let risen: BTreeMap<(u32, u8), u64> = now
            .iter()
            .map(|(at, count)| (*at, count - self.counters.get(at).copied().unwrap_or(0)))
            .filter(|(_, risen)| *risen != 0)
            .collect();
        assert_eq!(risen, std::mem::take(&mut self.counted), "METRICS");
        self.counters = now;
    }

    /// Ends all connections, so that the next world can have their ports.
    fn close(&mut self) {
        const LATER: u32 = 10 * 86_400 * TICKS_PER_SECOND;
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
        let nanoseconds = std::time::Duration::from(now).as_nanos() as u64;
        let later = weir_common::flow::now_from_nanoseconds(nanoseconds).wrapping_add(LATER);
        let datapath = &mut self.bed.datapath;
        while !datapath.sweep_flows_at(later, 4096).unwrap().finished {}
        for family in FAMILIES {
            self.bed.family = family;
            assert_eq!(self.bed.flows().len(), 0);
        }
        self.open.clear();
        self.source_port = probes::FIRST_SOURCE_PORT;
        assert_eq!(self.remembered.len(), 0);
    }

    fn note(&mut self, what: impl Into<String>) {
        *self.seen.entry(what.into()).or_default() += 1;
    }

    /// Addresses of this node of one family.
    fn own_addresses(&self, family: Family) -> Vec<IpAddr> {
        let all: BTreeSet<IpAddr> = self.places.this_node();
        all.into_iter()
            .filter(|a| Family::of(*a) == family)
            .collect()
    }
}
