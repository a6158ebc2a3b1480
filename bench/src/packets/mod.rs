//! Nanoseconds per packet in the programs, by `BPF_PROG_TEST_RUN`.

mod flows;
mod frame;
mod harness;
mod lab;
mod plain;
mod sketches;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use aya::programs::ProgramFd;
use weir_agent::objects::Family;
use weir_common::{
    endpoint::{host_mac, pod_mac},
    limits::CONNECTIONS_DEFAULT,
    metrics::{Hook, outcome},
};

use self::{
    frame::{Frame, Kind, Tuple},
    harness::Harness,
    lab::{CLIENT, Lab, Route},
};
use crate::{
    Effort,
    report::{Section, Table},
    statistics::Spread,
};

pub use self::lab::isolate;

/// Connections of the small table that is overfilled.
const FULL: u32 = 16_384;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// Numbers of established flows.
    flows: [u32; 3],
    /// Pairs of runs for established flows.
    pairs: u32,
    /// Packets of a run.
    repeat: u32,
    /// Rounds for new flows.
    rounds: u32,
}

impl Plan {
    const fn of(effort: Effort) -> Self {
        let (pairs, repeat, rounds) = match effort {
            Effort::Quick => (7, 100_000, 3),
            Effort::Full => (15, 150_000, 5),
        };
        Self {
            flows: [1, 8_000, 100_000],
            pairs,
            repeat,
            rounds,
        }
    }

    /// The largest number of flows.
    const fn most(&self) -> u32 {
        self.flows[2]
    }
}

/// Measures on a thread with namespaces of its own.
///
/// # Errors
///
/// The kernel's, or packets that did not take the way they were meant to.
pub fn run(effort: Effort) -> Result<Section> {
    std::thread::spawn(move || measure(Plan::of(effort)))
        .join()
        .map_err(|_| anyhow::anyhow!("the measurement panicked"))?
}

fn measure(plan: Plan) -> Result<Section> {
    isolate()?;
    let mut section = Section::new("packets", "Nanoseconds per packet")?;
    section.paragraph(&format!(
        "Time in the program for a TCP packet of 64 bytes (IPv6: 80), `BPF_PROG_TEST_RUN`. A wrapper restores the \
         packet before each repetition and calls the program; the same wrapper around an empty program is \
         subtracted. Median of {} pairs of runs of {} packets (new flows: {} rounds of {}). Packets come in an order \
         that has nothing to do with that in which their connections were opened; connections go to {} Services. \
         Each row begins with a new table; for the last column every connection has been removed and opened again \
         several times, so that neighbours in time are no longer neighbours in memory. The rival is a sketch in the \
         same run: one hash with the same keys and values, IPv4 and TCP only, without source check, policy, MTU, \
         counters or next hops. What comes from outside is beside a sketch that also gives each connection a random \
         port of the node, and asks no route.",
        plan.pairs,
        plan.repeat,
        plan.rounds,
        plan.most(),
        lab::SERVICES
    ));
    let mut table = Table::new("With an entry in the flow table", &COLUMNS);
    let mut ratios = Table::new(
        "`from_pod`, Service, endpoint on the other node, IPv4: times the sketch's",
        &COLUMNS,
    );
    for (at, family) in (0..).zip([Family::V4, Family::V6]) {
        for (route, name) in [(Route::RemoteService, "r"), (Route::LocalService, "l")] {
            let mut bench = Bench::new(&format!("{name}{at}"), CONNECTIONS_DEFAULT, plan)?;
            bench.with_flows(family, route, &mut table, &mut ratios)?;
        }
    }
    let mut bench = Bench::new("main", CONNECTIONS_DEFAULT, plan)?;
    for (program, map, name) in [
        (
            "sketch_on_demand",
            "SKETCH_ON_DEMAND",
            "plain hash, not preallocated",
        ),
        ("sketch_lru", "SKETCH_LRU", "LRU hash"),
    ] {
        bench.sketch(program, map, name, &mut table)?;
    }
    section.table(&table);
    section.table(&ratios);

    let mut table = Table::new(
        "From outside and to the outside, with source NAT to the node",
        &COLUMNS,
    );
    let mut ratios = Table::new(
        "`from_netdev`, from outside, endpoint on the other node, IPv4: times the sketch's",
        &COLUMNS,
    );
    for (at, family) in (0..).zip([Family::V4, Family::V6]) {
        for (route, name) in [
            (Route::NodePort, "n"),
            (Route::LoadBalancer, "b"),
            (Route::Outside, "o"),
        ] {
            let mut bench = Bench::new(&format!("{name}{at}"), CONNECTIONS_DEFAULT, plan)?;
            bench.with_flows(family, route, &mut table, &mut ratios)?;
        }
    }
    section.table(&table);
    section.table(&ratios);

    let mut table = Table::new("Without", &["", "1 flow", "8,000 flows"]);
    for family in [Family::V4, Family::V6] {
        bench.without_flows(family, &mut table)?;
    }
    section.table(&table);

    let mut bench = Bench::new("full", FULL, plan)?;
    let mut table = Table::new(
        &format!("New flows while the table of {FULL} connections is full of live ones"),
        &["", "new flow"],
    );
    for family in [Family::V4, Family::V6] {
        bench.full_table(family, &mut table)?;
    }
    section.table(&table);
    Ok(section)
}

const COLUMNS: [&str; 6] = [
    "",
    "new flow",
    "1 flow",
    "8,000 flows",
    "100,000 flows",
    "8,000 flows, table used before",
];

struct Bench {
    lab: Lab,
    harness: Harness,
    plan: Plan,
}

impl Bench {
    fn new(name: &str, connections: u32, plan: Plan) -> Result<Self> {
        Ok(Self {
            lab: Lab::new(name, connections)?,
            harness: Harness::load()?,
            plan,
        })
    }

    /// The table is smaller than the number of connections: for each new one another gives way.
    fn full_table(&mut self, family: Family, table: &mut Table) -> Result<()> {
        let tuples = lab::connections(family, Route::RemoteService, CLIENT, self.plan.most());
        let (first, others) = tuples.split_at(2 * FULL as usize);
        let from_pod = self.program(Hook::FromPod)?;
        let device = self.lab.device(CLIENT);
        let v6 = family == Family::V6;
        let mut values = Vec::new();
        for _ in 0..self.plan.rounds {
            for (tuples, counts) in [(first, false), (others, true)] {
                let count = u32::try_from(tuples.len())?;
                self.harness
                    .set_frames(&from_pod_frames(tuples, Kind::Syn), v6)?;
                let before = self.counters(Hook::FromPod)?;
                let value = self.harness.pair(&from_pod, device, count)?;
                let after = self.counters(Hook::FromPod)?;
                expect(&before, &after, outcome::FLOW_CREATED, count)?;
                if counts {
                    expect(&before, &after, outcome::FLOW_EVICTED, count)?;
                    values.push(value);
                }
            }
        }
        let spread = Spread::of(values).context("no rounds")?;
        table.row([
            format!("`from_pod`, Service, {}", family_name(family)),
            spread.to_string(),
        ]);
        Ok(())
    }

    /// Packets of connections that are known, or need not be.
    fn steady(
        &mut self,
        program: &ProgramFd,
        hook: Hook,
        way: u8,
        family: Family,
        device: u32,
        frames: &[Frame],
    ) -> Result<Spread> {
        let Plan { pairs, repeat, .. } = self.plan;
        let frames = in_any_order(frames.to_vec());
        self.harness.set_frames(&frames, family == Family::V6)?;
        let before = self.counters(hook)?;
        let spread = self.harness.pairs(program, device, repeat, pairs)?;
        let after = self.counters(hook)?;
        expect(&before, &after, way, repeat * (pairs + 1))?;
        expect(&before, &after, outcome::FLOW_CREATED, 0)?;
        expect(&before, &after, outcome::FLOW_STALE, 0)?;
        Ok(spread)
    }

    fn program(&mut self, hook: Hook) -> Result<ProgramFd> {
        Ok(self.lab.datapath.program(hook)?.fd()?.try_clone()?)
    }

    /// Packets by outcome.
    fn counters(&self, hook: Hook) -> Result<BTreeMap<u8, u64>> {
        let all = self.lab.datapath.counters().all()?;
        Ok(all
            .into_iter()
            .filter(|counter| counter.hook == hook)
            .map(|counter| (counter.outcome, counter.counter.packets))
            .collect())
    }
}

/// Packets that did something else than what is measured must not be counted in silence.
fn expect(
    before: &BTreeMap<u8, u64>,
    after: &BTreeMap<u8, u64>,
    outcome: u8,
    expected: u32,
) -> Result<()> {
    let of = |counters: &BTreeMap<u8, u64>| counters.get(&outcome).copied().unwrap_or_default();
    let packets = of(after) - of(before);
    ensure!(
        packets == u64::from(expected),
        "outcome {outcome} was counted {packets} times instead of {expected}: before {before:?}, after {after:?}"
    );
    Ok(())
}

/// Another order than that in which the connections are opened.
fn in_any_order(mut frames: Vec<Frame>) -> Vec<Frame> {
    lab::shuffle(&mut frames);
    frames
}

fn from_pod_frames(tuples: &[Tuple], kind: Kind) -> Vec<Frame> {
    tuples
        .iter()
        .map(|tuple| Frame::new(tuple, kind, host_mac(CLIENT), pod_mac(CLIENT)))
        .collect()
}

const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}
