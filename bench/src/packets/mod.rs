//! Nanoseconds per packet in the programs, by `BPF_PROG_TEST_RUN`.

mod frame;
mod harness;
mod lab;

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
    lab::{CLIENT, LOCAL_SERVER, Lab, PLAIN_CLIENT, Route},
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
            Effort::Full => (31, 200_000, 9),
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
    let mut harness = Harness::load()?;
    let mut section = Section::new("packets", "Nanoseconds per packet");
    section.paragraph(&format!(
        "Time in the program for a TCP packet of 64 bytes (IPv6: 80), `BPF_PROG_TEST_RUN`. A wrapper restores the \
         packet before each repetition and calls the program; the same wrapper around an empty program is \
         subtracted. Median of {} pairs of runs of {} packets (new flows: {} rounds of {}), quartiles in parentheses. \
         Flows come in random order, over {} Services. The rival is a sketch in the same run: one hash with the same \
         keys and values, IPv4 and TCP only, without source check, policy, MTU, counters or next hops.",
        plan.pairs,
        plan.repeat,
        plan.rounds,
        plan.most(),
        lab::SERVICES
    ));
    let mut bench = Bench {
        lab: Lab::new("main", CONNECTIONS_DEFAULT)?,
        harness: &mut harness,
        plan,
    };
    let mut table = Table::new(
        "With an entry in the flow table",
        &["", "new flow", "1 flow", "8,000 flows", "100,000 flows"],
    );
    for family in [Family::V4, Family::V6] {
        bench.with_flows(family, &mut table)?;
    }
    bench.sketches(&mut table)?;
    section.table(&table);

    let mut table = Table::new("Without", &["", "1 flow", "8,000 flows"]);
    for family in [Family::V4, Family::V6] {
        bench.without_flows(family, &mut table)?;
    }
    section.table(&table);
    drop(bench);

    let mut bench = Bench {
        lab: Lab::new("full", FULL)?,
        harness: &mut harness,
        plan,
    };
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

struct Bench<'a> {
    lab: Lab,
    harness: &'a mut Harness,
    plan: Plan,
}

impl Bench<'_> {
    fn with_flows(&mut self, family: Family, table: &mut Table) -> Result<()> {
        for (route, name, way) in [
            (Route::RemoteService, "other node", outcome::REMOTE),
            (Route::LocalService, "this node", outcome::LOCAL),
        ] {
            let tuples = lab::connections(family, route, CLIENT, self.plan.most());
            let device = self.lab.device(CLIENT);
            let from_pod = self.program(Hook::FromPod)?;
            let new = self.new_flows(family, &tuples, &from_pod, way)?;
            let mut row = vec![format!(
                "`from_pod`, Service, endpoint on {name}, {}",
                family_name(family)
            )];
            row.push(new.to_string());
            for flows in self.plan.flows {
                let frames = from_pod_frames(&tuples[..flows as usize], Kind::Ack);
                let ns = self.steady(&from_pod, Hook::FromPod, way, family, device, &frames)?;
                row.push(ns.to_string());
            }
            table.row(row);
            if route == Route::RemoteService {
                self.replies(family, &tuples, table)?;
            } else {
                self.local_replies(family, &tuples, table)?;
            }
            self.lab.clear_flows(family)?;
        }
        Ok(())
    }

    fn replies(&mut self, family: Family, tuples: &[Tuple], table: &mut Table) -> Result<()> {
        let from_netdev = self.program(Hook::FromNetdev)?;
        let device = self.lab.uplink();
        let replies = self.lab.replies(family, tuples)?;
        let mut row = vec![
            format!(
                "`from_netdev`, reply from the other node, {}",
                family_name(family)
            ),
            String::new(),
        ];
        for flows in self.plan.flows {
            let frames: Vec<Frame> = replies[..flows as usize]
                .iter()
                .map(|tuple| Frame::new(tuple, Kind::Ack, pod_mac(9), host_mac(9)))
                .collect();
            let way = outcome::LOCAL;
            let ns = self.steady(&from_netdev, Hook::FromNetdev, way, family, device, &frames)?;
            row.push(ns.to_string());
        }
        table.row(row);
        Ok(())
    }

    fn local_replies(&mut self, family: Family, tuples: &[Tuple], table: &mut Table) -> Result<()> {
        let from_pod = self.program(Hook::FromPod)?;
        let device = self.lab.device(LOCAL_SERVER);
        let replies = self.lab.replies(family, tuples)?;
        let mut row = vec![
            format!("`from_pod`, reply from this node, {}", family_name(family)),
            String::new(),
        ];
        for flows in self.plan.flows {
            let frames: Vec<Frame> = replies[..flows as usize]
                .iter()
                .map(|tuple| {
                    let (to, from) = (host_mac(LOCAL_SERVER), pod_mac(LOCAL_SERVER));
                    Frame::new(tuple, Kind::Ack, to, from)
                })
                .collect();
            let way = outcome::LOCAL;
            let ns = self.steady(&from_pod, Hook::FromPod, way, family, device, &frames)?;
            row.push(ns.to_string());
        }
        table.row(row);
        Ok(())
    }

    /// Packets of pods that have no entry: only addresses decide.
    fn without_flows(&mut self, family: Family, table: &mut Table) -> Result<()> {
        let from_pod = self.program(Hook::FromPod)?;
        for (client, who) in [
            (PLAIN_CLIENT, "pod without Services"),
            (CLIENT, "pod that uses Services"),
        ] {
            for (route, to, way) in [
                (Route::LocalPod, "pod of this node", outcome::LOCAL),
                (Route::RemotePod, "pod of the other node", outcome::REMOTE),
            ] {
                if client == CLIENT {
                    self.make_client_stateful(family)?;
                }
                let device = self.lab.device(client);
                let mut row = vec![format!(
                    "`from_pod`, {who} to {to}, {}",
                    family_name(family)
                )];
                for flows in [self.plan.flows[0], self.plan.flows[1]] {
                    let tuples = lab::connections(family, route, client, flows);
                    let frames: Vec<Frame> = tuples
                        .iter()
                        .map(|tuple| {
                            Frame::new(tuple, Kind::Ack, host_mac(client), pod_mac(client))
                        })
                        .collect();
                    let ns = self.steady(&from_pod, Hook::FromPod, way, family, device, &frames)?;
                    row.push(ns.to_string());
                }
                table.row(row);
            }
        }
        self.arrivals(family, table)
    }

    fn arrivals(&mut self, family: Family, table: &mut Table) -> Result<()> {
        let from_netdev = self.program(Hook::FromNetdev)?;
        let mut row = vec![format!(
            "`from_netdev`, other node to a pod without Services, {}",
            family_name(family)
        )];
        for flows in [self.plan.flows[0], self.plan.flows[1]] {
            let frames: Vec<Frame> =
                lab::connections(family, Route::RemotePod, PLAIN_CLIENT, flows)
                    .iter()
                    .map(|tuple| {
                        let back = Tuple {
                            source: tuple.destination,
                            destination: tuple.source,
                        };
                        Frame::new(&back, Kind::Ack, pod_mac(9), host_mac(9))
                    })
                    .collect();
            let (way, device) = (outcome::LOCAL, self.lab.uplink());
            let ns = self.steady(&from_netdev, Hook::FromNetdev, way, family, device, &frames)?;
            row.push(ns.to_string());
        }
        table.row(row);
        Ok(())
    }

    /// One connection through a Service, so that the client's other packets ask the flow table.
    fn make_client_stateful(&mut self, family: Family) -> Result<()> {
        let tuples = lab::connections(family, Route::RemoteService, CLIENT, 1);
        let frames = from_pod_frames(&tuples, Kind::Syn);
        self.harness.set_frames(&frames, family == Family::V6)?;
        let from_pod = self.program(Hook::FromPod)?;
        let device = self.lab.device(CLIENT);
        self.harness.pair(&from_pod, device, 1)?;
        Ok(())
    }

    /// Every packet opens a connection; none is known before a round.
    fn new_flows(
        &mut self,
        family: Family,
        tuples: &[Tuple],
        program: &ProgramFd,
        way: u8,
    ) -> Result<Spread> {
        let frames = from_pod_frames(tuples, Kind::Syn);
        self.harness.set_frames(&frames, family == Family::V6)?;
        let device = self.lab.device(CLIENT);
        let count = u32::try_from(tuples.len())?;
        let mut values = Vec::new();
        for round in 0..=self.plan.rounds {
            self.lab.clear_flows(family)?;
            let before = self.counters(Hook::FromPod)?;
            let value = self.harness.pair(program, device, count)?;
            let after = self.counters(Hook::FromPod)?;
            expect(&before, &after, way, count)?;
            expect(&before, &after, outcome::FLOW_CREATED, count)?;
            // The first touches memory that nobody has touched before.
            if round > 0 {
                values.push(value);
            }
        }
        Spread::of(values).context("no rounds")
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
        self.harness.set_frames(frames, family == Family::V6)?;
        let before = self.counters(hook)?;
        let spread = self.harness.pairs(program, device, repeat, pairs)?;
        let after = self.counters(hook)?;
        expect(&before, &after, way, repeat * (pairs + 1))?;
        expect(&before, &after, outcome::FLOW_CREATED, 0)?;
        expect(&before, &after, outcome::FLOW_STALE, 0)?;
        Ok(spread)
    }

    /// The rival, over each kind of hash.
    fn sketches(&mut self, table: &mut Table) -> Result<()> {
        let tuples = lab::connections(Family::V4, Route::RemoteService, CLIENT, self.plan.most());
        for (program, map, name) in [
            ("sketch_hash", "SKETCH_HASH", "plain hash"),
            (
                "sketch_on_demand",
                "SKETCH_ON_DEMAND",
                "plain hash, not preallocated",
            ),
            ("sketch_lru", "SKETCH_LRU", "LRU hash"),
        ] {
            let target = self.harness.own(program)?;
            let map = self.harness.own_map(map)?;
            let device = self.lab.device(CLIENT);
            let frames = from_pod_frames(&tuples, Kind::Syn);
            self.harness.set_frames(&frames, false)?;
            let mut values = Vec::new();
            for round in 0..=self.plan.rounds {
                for key in map.keys()? {
                    map.delete(&key)?;
                }
                let value = self.harness.pair(&target, device, self.plan.most())?;
                if round > 0 {
                    values.push(value);
                }
            }
            let new = Spread::of(values).context("no rounds")?;
            let mut row = vec![format!("sketch, {name}, IPv4"), new.to_string()];
            for flows in self.plan.flows {
                let frames = from_pod_frames(&tuples[..flows as usize], Kind::Ack);
                self.harness.set_frames(&frames, false)?;
                let Plan { repeat, pairs, .. } = self.plan;
                let ns = self.harness.pairs(&target, device, repeat, pairs)?;
                row.push(ns.to_string());
            }
            table.row(row);
        }
        Ok(())
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
