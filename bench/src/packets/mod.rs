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
    harness::{Beside, Harness},
    lab::{CLIENT, LOCAL_SERVER, Lab, PLAIN_CLIENT, Route, UPLINK_MAC},
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
         counters or next hops.",
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

/// Figures of a program and, where it has one, of its rival.
struct Cells {
    own: Vec<String>,
    rival: Vec<String>,
    ratio: Vec<String>,
}

impl Cells {
    fn push(&mut self, figures: &Beside) {
        self.own.push(figures.own.to_string());
        self.rival.push(figures.rival.to_string());
        self.ratio.push(format!("{:.2}", figures.ratio));
    }
}

impl Bench {
    fn new(name: &str, connections: u32, plan: Plan) -> Result<Self> {
        Ok(Self {
            lab: Lab::new(name, connections)?,
            harness: Harness::load()?,
            plan,
        })
    }

    fn with_flows(
        &mut self,
        family: Family,
        route: Route,
        table: &mut Table,
        ratios: &mut Table,
    ) -> Result<()> {
        let (name, way) = match route {
            Route::RemoteService => ("other node", outcome::REMOTE),
            _ => ("this node", outcome::LOCAL),
        };
        let tuples = lab::connections(family, route, CLIENT, self.plan.most());
        let known = self.known_flows(family, way, &tuples)?;
        let replies = match route {
            Route::RemoteService => self.replies(family, &tuples)?,
            _ => self.local_replies(family, &tuples)?,
        };
        let new = self.new_flows(family, &tuples, way)?;
        self.open(family, &tuples)?;
        let used = self.steady_beside(family, way, &tuples[..self.plan.flows[1] as usize])?;

        let mut cells = Cells {
            own: vec![format!(
                "`from_pod`, Service, endpoint on {name}, {}",
                family_name(family)
            )],
            rival: vec!["sketch, plain hash, IPv4".to_owned()],
            ratio: vec![String::new()],
        };
        for figures in [&[new][..], &known, &[used]].concat() {
            cells.push(&figures);
        }
        table.row(cells.own);
        table.row(replies);
        if has_rival(family, route) {
            table.row(cells.rival);
            ratios.row(cells.ratio);
        }
        Ok(())
    }

    /// For each number of flows: opens that many and measures their packets.
    fn known_flows(&mut self, family: Family, way: u8, tuples: &[Tuple]) -> Result<Vec<Beside>> {
        let flows = self.plan.flows;
        flows
            .into_iter()
            .map(|flows| {
                let tuples = &tuples[..flows as usize];
                self.open(family, tuples)?;
                self.steady_beside(family, way, tuples)
            })
            .collect()
    }

    /// Enters connections in Weir's table and in the sketch's.
    fn open(&mut self, family: Family, tuples: &[Tuple]) -> Result<()> {
        let frames = from_pod_frames(tuples, Kind::Syn);
        self.harness.set_frames(&frames, family == Family::V6)?;
        let count = u32::try_from(tuples.len())?;
        let device = self.lab.device(CLIENT);
        for program in [Some(self.program(Hook::FromPod)?), self.rival(family)?]
            .iter()
            .flatten()
        {
            self.harness.pair(program, device, count)?;
        }
        Ok(())
    }

    /// The sketch; it knows IPv4 only.
    fn rival(&mut self, family: Family) -> Result<Option<ProgramFd>> {
        match family {
            Family::V4 => self.harness.own("sketch_hash").map(Some),
            Family::V6 => Ok(None),
        }
    }

    /// Packets of known connections, and the rival's time for the same.
    fn steady_beside(&mut self, family: Family, way: u8, tuples: &[Tuple]) -> Result<Beside> {
        let Plan { pairs, repeat, .. } = self.plan;
        let frames = in_any_order(from_pod_frames(tuples, Kind::Ack));
        let device = self.lab.device(CLIENT);
        let from_pod = self.program(Hook::FromPod)?;
        let rival = self.rival(family)?;
        self.harness.set_frames(&frames, family == Family::V6)?;
        let before = self.counters(Hook::FromPod)?;
        let figures = match rival {
            Some(rival) => self
                .harness
                .beside(&from_pod, &rival, device, repeat, pairs)?,
            None => Beside::alone(self.harness.pairs(&from_pod, device, repeat, pairs)?),
        };
        let after = self.counters(Hook::FromPod)?;
        expect(&before, &after, way, repeat * (pairs + 1))?;
        expect(&before, &after, outcome::FLOW_CREATED, 0)?;
        expect(&before, &after, outcome::FLOW_STALE, 0)?;
        Ok(figures)
    }

    fn replies(&mut self, family: Family, tuples: &[Tuple]) -> Result<Vec<String>> {
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
                .map(|tuple| Frame::new(tuple, Kind::Ack, UPLINK_MAC, host_mac(9)))
                .collect();
            let way = outcome::LOCAL;
            let ns = self.steady(&from_netdev, Hook::FromNetdev, way, family, device, &frames)?;
            row.push(ns.to_string());
        }
        Ok(row)
    }

    fn local_replies(&mut self, family: Family, tuples: &[Tuple]) -> Result<Vec<String>> {
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
        Ok(row)
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
                        Frame::new(&back, Kind::Ack, UPLINK_MAC, host_mac(9))
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
    fn new_flows(&mut self, family: Family, tuples: &[Tuple], way: u8) -> Result<Beside> {
        let frames = from_pod_frames(tuples, Kind::Syn);
        self.harness.set_frames(&frames, family == Family::V6)?;
        let from_pod = self.program(Hook::FromPod)?;
        let rival = self.rival(family)?;
        let rival_map = self.harness.own_map("SKETCH_HASH")?;
        let device = self.lab.device(CLIENT);
        let count = u32::try_from(tuples.len())?;
        let mut pairs = Vec::new();
        for _ in 0..self.plan.rounds {
            self.lab.clear_flows(family)?;
            lab::clear(&rival_map)?;
            let before = self.counters(Hook::FromPod)?;
            let own = self.harness.pair(&from_pod, device, count)?;
            let after = self.counters(Hook::FromPod)?;
            expect(&before, &after, way, count)?;
            expect(&before, &after, outcome::FLOW_CREATED, count)?;
            let other = match &rival {
                Some(rival) => {
                    let value = self.harness.pair(rival, device, count)?;
                    let entries = rival_map.keys()?.len();
                    ensure!(
                        entries == 2 * tuples.len(),
                        "the sketch has entered {entries} entries for {count} connections"
                    );
                    value
                }
                None => own,
            };
            pairs.push((own, other));
        }
        Beside::of(&pairs)
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

    /// The rival over another kind of hash.
    fn sketch(&mut self, program: &str, map: &str, name: &str, table: &mut Table) -> Result<()> {
        let Plan {
            repeat,
            pairs,
            rounds,
            flows,
        } = self.plan;
        let tuples = lab::connections(Family::V4, Route::RemoteService, CLIENT, self.plan.most());
        let target = self.harness.own(program)?;
        let map = self.harness.own_map(map)?;
        let device = self.lab.device(CLIENT);
        let mut known = Vec::new();
        for flows in flows {
            let tuples = &tuples[..flows as usize];
            self.harness
                .set_frames(&from_pod_frames(tuples, Kind::Syn), false)?;
            self.harness.pair(&target, device, flows)?;
            let frames = in_any_order(from_pod_frames(tuples, Kind::Ack));
            self.harness.set_frames(&frames, false)?;
            known.push(self.harness.pairs(&target, device, repeat, pairs)?);
        }
        self.harness
            .set_frames(&from_pod_frames(&tuples, Kind::Syn), false)?;
        let mut values = Vec::new();
        for _ in 0..rounds {
            lab::clear(&map)?;
            values.push(self.harness.pair(&target, device, self.plan.most())?);
        }
        let new = Spread::of(values).context("no rounds")?;
        let frames = from_pod_frames(&tuples[..flows[1] as usize], Kind::Ack);
        self.harness.set_frames(&in_any_order(frames), false)?;
        let used = self.harness.pairs(&target, device, repeat, pairs)?;
        let mut row = vec![format!("sketch, {name}, IPv4")];
        row.extend(
            [&[new][..], &known, &[used]]
                .concat()
                .iter()
                .map(Spread::to_string),
        );
        table.row(row);
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

/// Whether the sketch does the same.
fn has_rival(family: Family, route: Route) -> bool {
    (family, route) == (Family::V4, Route::RemoteService)
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
