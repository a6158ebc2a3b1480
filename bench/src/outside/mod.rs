//! Connections and datagrams from a client outside through one node to endpoints on another, with
//! source NAT, beside a node that only routes and beside kube-proxy's rules, all in one run.

mod bed;
mod processor;

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};

use self::{bed::Bed, processor::Busy};
use crate::{
    Effort,
    pods::traffic::udp_rate,
    report::{Section, Table},
    services::{
        bed::{Kind, is_installed},
        thousands,
        traffic::{connection_rate, probe},
    },
    statistics::Spread,
};

/// How much is measured.
struct Plan {
    counts: &'static [u32],
    rounds: usize,
    /// Of one measurement of connections.
    time: Duration,
    /// Of one measurement of datagrams.
    datagrams: Duration,
}

/// Connections per second that a client saw at one bed, by round.
#[derive(Debug, Default)]
struct Series {
    /// Through the Service.
    through: Vec<f64>,
    /// To the endpoints' own addresses, by the node that only routes.
    routed: Vec<f64>,
    /// The same by this node.
    own: Vec<f64>,
    /// Why nothing could be measured.
    failure: Option<String>,
}

/// What datagrams of one round cost.
#[derive(Clone, Copy, Debug)]
struct Forwarded {
    /// Received by the endpoint, per second.
    rate: f64,
    /// Processor time per datagram received, seconds: of soft interrupts, and all.
    softirq: f64,
    busy: f64,
}

/// A bed and what was measured there.
struct Contender {
    name: &'static str,
    bed: Bed,
    /// By count of Services: seconds of loading, or why it failed.
    loads: Vec<Result<f64, String>>,
    /// By count of Services.
    series: Vec<Series>,
    /// By round, with one Service.
    forwarded: Vec<Forwarded>,
}

/// The one that forwarding is compared with.
const IPTABLES: &str = "kube-proxy's rules, iptables (nft back end)";

/// Measures.
///
/// # Errors
///
/// A node does not come up, the endpoints cannot be reached at their own addresses, or packets did not take
/// the way they were meant to.
pub fn run(effort: Effort) -> Result<Section> {
    let plan = match effort {
        Effort::Quick => Plan {
            counts: &[1, 1000],
            rounds: 3,
            time: Duration::from_millis(50),
            datagrams: Duration::from_millis(200),
        },
        Effort::Full => Plan {
            counts: &[1, 1000, 10_000, 50_000],
            rounds: 9,
            time: Duration::from_millis(80),
            datagrams: Duration::from_millis(500),
        },
    };
    let mut section = Section::new("outside", "From outside")?;
    section.paragraph(&format!(
        "A client linked to a node, and two endpoints in pods of another node, in network namespaces of one machine; \
         client on one processor, server on another; IPv4. The node that is asked is the client's router, so that all \
         ways have the same links. Services are of type LoadBalancer with `externalTrafficPolicy: Cluster` and \
         without NodePorts; the measured one leads to the two endpoints, all others to two addresses that nobody has. \
         Endpoints see the node's address. {} rounds of {} ms for each path, one after the other, each through the Service in direct \
         succession with one to the endpoints' own addresses by a node that only routes, without a rule. \
         Connections are opened and reset one after another by one client. kube-proxy's rules stand on the node that is \
         asked alone, Weir on both. In iptables, where the place in the list matters, the measured Service stands in the middle.",
        plan.rounds,
        plan.time.as_millis()
    ));
    let plain = Bed::start(Kind::None)?;
    let mut contenders = contenders(&mut section)?;
    let mut routed = Vec::new();
    for (at, &count) in plan.counts.iter().enumerate() {
        load(&mut contenders, count);
        for round in 0..plan.rounds {
            eprintln!("outside: {count}, round {} of {}", round + 1, plan.rounds);
            // Each round begins with another, so that none is always the first.
            let first = round % contenders.len();
            contenders.rotate_left(first);
            for contender in &mut contenders {
                connections(contender, &plain, &plan, at, round)?;
            }
            if at == 0 {
                routed.push(forward(&plain, false, plan.datagrams)?);
                for contender in contenders.iter_mut().filter(|c| c.is_served(0)) {
                    datagrams(contender, plan.datagrams)
                        .with_context(|| format!("{}, datagrams", contender.name))?;
                }
            }
            contenders.rotate_right(first);
        }
    }
    connection_tables(&mut section, &plan, &contenders);
    section.table(&load_table(&plan, &contenders));
    section.paragraph(&format!(
        "Forwarding: datagrams of 64 bytes, one flow, one Service, {} ms each, as fast as the client can send; what the endpoint received \
         counts. The client sends on one processor; both nodes and the receiving endpoint share the other (receive packet steering), \
         so that rates differ by less than the cost of the node that is asked does. Processor time is that of the whole machine by `/proc/stat` \
         (clock ticks, so rough), divided by the datagrams received.",
        plan.datagrams.as_millis()
    ));
    section.table(&forward_table(&contenders, &routed));
    Ok(section)
}

/// All that can be measured on this machine.
fn contenders(section: &mut Section) -> Result<Vec<Contender>> {
    let (nft_back_end, legacy) = ("iptables-nft-restore", "iptables-legacy-restore");
    let wanted = [
        ("Weir", Kind::WeirSocket, None),
        (IPTABLES, Kind::Iptables(nft_back_end), Some(nft_back_end)),
        (
            "kube-proxy's rules, iptables legacy",
            Kind::Iptables(legacy),
            Some(legacy),
        ),
        ("kube-proxy's rules, nftables", Kind::Nftables, Some("nft")),
    ];
    let mut found = Vec::new();
    for (name, kind, program) in wanted {
        if let Some(program) = program
            && !is_installed(program)?
        {
            section.paragraph(&format!(
                "{name}: not measured, {program} is not installed."
            ));
            continue;
        }
        let bed = Bed::start(kind).with_context(|| format!("start the nodes of {name}"))?;
        found.push(Contender {
            name,
            bed,
            loads: Vec::new(),
            series: Vec::new(),
            forwarded: Vec::new(),
        });
    }
    Ok(found)
}

/// One after the other, so that the times can be compared. What cannot be loaded is said in the
/// table and left out.
fn load(contenders: &mut [Contender], count: u32) {
    for contender in contenders {
        eprintln!("outside: load {count}, {}", contender.name);
        let loaded = contender.bed.load(count).map(|time| time.as_secs_f64());
        if let Err(error) = &loaded {
            eprintln!("outside: {}: {error:#}", contender.name);
        }
        let loaded = loaded.map_err(|error| format!("{error:#}"));
        contender.loads.push(loaded);
        contender.series.push(Series::default());
    }
}

/// A pair of measurements: through the Service, and by routing alone; and how fast this node routes.
fn connections(
    contender: &mut Contender,
    plain: &Bed,
    plan: &Plan,
    at: usize,
    round: usize,
) -> Result<()> {
    if !contender.is_served(at) {
        return Ok(());
    }
    let (bed, series) = (&contender.bed, &mut contender.series[at]);
    let context = |what: &str| {
        let count = plan.counts[at];
        format!("{}, {count} Services: {what}", contender.name)
    };
    if round == 0 {
        if let Err(error) = probe(&bed.client, bed.frontend()) {
            eprintln!("outside: {}: {error:#}", context("not served"));
            series.failure = Some(format!("{error:#}"));
            return Ok(());
        }
        bed.check_source().with_context(|| context("source NAT"))?;
    }
    let rate = |bed: &Bed, to: &[SocketAddr]| {
        connection_rate(&bed.client, &bed.server, to, plan.time).with_context(|| context("rate"))
    };
    let through = [bed.frontend()];
    // Neither is always the first.
    if round.is_multiple_of(2) {
        series.through.push(rate(bed, &through)?);
        series.routed.push(rate(plain, &plain.own)?);
    } else {
        series.routed.push(rate(plain, &plain.own)?);
        series.through.push(rate(bed, &through)?);
    }
    series.own.push(rate(bed, &bed.own)?);
    Ok(())
}

/// Datagrams through the Service; where there are programs, these must have sent them on.
fn datagrams(contender: &mut Contender, time: Duration) -> Result<()> {
    let bed = &contender.bed;
    let before = bed.forwarded()?;
    let figures = forward(bed, true, time)?;
    if let (Some([before, _]), Some([after, _])) = (before, bed.forwarded()?) {
        let received = figures.rate * time.as_secs_f64();
        ensure!(
            (after - before) as f64 >= received,
            "{received:.0} datagrams were received, but the programs sent only {} on",
            after - before
        );
    }
    contender.forwarded.push(figures);
    Ok(())
}

fn forward(bed: &Bed, through_service: bool, time: Duration) -> Result<Forwarded> {
    bed.steer(true)?;
    let before = Busy::now()?;
    let rate = udp_rate(&bed.datagrams(through_service), time)?;
    let used = Busy::now()?.since(&before);
    bed.steer(false)?;
    let datagrams = rate * used.elapsed;
    Ok(Forwarded {
        rate,
        softirq: used.softirq / datagrams,
        busy: used.busy / datagrams,
    })
}

impl Contender {
    /// Whether so many Services could be loaded and reached.
    fn is_served(&self, at: usize) -> bool {
        self.loads[at].is_ok() && self.series[at].failure.is_none()
    }

    fn row(&self, value: impl Fn(&Series) -> Vec<f64>, scale: f64, decimals: usize) -> Vec<String> {
        let cells = self.loads.iter().zip(&self.series).map(|(load, series)| {
            if load.is_err() {
                return "not loaded".to_owned();
            }
            if series.failure.is_some() {
                return "no connection".to_owned();
            }
            spread(value(series), scale, decimals)
        });
        [self.name.to_owned()].into_iter().chain(cells).collect()
    }
}

fn connection_tables(section: &mut Section, plan: &Plan, contenders: &[Contender]) {
    let ratios = |own: &[f64], base: &[f64]| own.iter().zip(base).map(|(o, b)| o / b).collect();
    let mut routed = table(
        plan,
        "New TCP connections a second from outside: times those to the endpoints' own addresses by a node that only routes",
    );
    let mut own = table(
        plan,
        "New TCP connections a second from outside: times those to the endpoints' own addresses by the same node",
    );
    let mut absolute = table(
        plan,
        "New TCP connections from outside through the Service, thousand a second",
    );
    for contender in contenders {
        routed.row(contender.row(|s| ratios(&s.through, &s.routed), 1.0, 2));
        own.row(contender.row(|s| ratios(&s.through, &s.own), 1.0, 2));
        absolute.row(contender.row(|s| s.through.clone(), 1e-3, 1));
    }
    for table in [routed, own, absolute] {
        section.table(&table);
    }
}

fn load_table(plan: &Plan, contenders: &[Contender]) -> Table {
    let mut table = table(plan, "Loading that many Services, seconds");
    for contender in contenders {
        let cells = contender.loads.iter().map(|load| match load {
            Ok(seconds) => format!("{seconds:.2}"),
            Err(_) => "failed".to_owned(),
        });
        let name = [contender.name.to_owned()].into_iter();
        table.row(name.chain(cells).collect::<Vec<_>>());
    }
    table
}

fn forward_table(contenders: &[Contender], routed: &[Forwarded]) -> Table {
    let mut table = Table::new(
        "Datagrams from outside to an endpoint on another node",
        &[
            "",
            "thousand a second",
            "times iptables (nft back end)",
            "soft interrupts, µs each",
            "processors, µs each",
        ],
    );
    let base = contenders.iter().find(|c| c.name == IPTABLES);
    let mut row = |name: &str, series: &[Forwarded]| {
        let of = |value: fn(&Forwarded) -> f64| series.iter().map(value).collect::<Vec<_>>();
        let ratio = base.map(|base| {
            let pairs = series.iter().zip(&base.forwarded);
            spread(pairs.map(|(own, base)| own.rate / base.rate), 1.0, 2)
        });
        table.row([
            name.to_owned(),
            spread(of(|f| f.rate), 1e-3, 0),
            ratio.unwrap_or_default(),
            spread(of(|f| f.softirq), 1e6, 2),
            spread(of(|f| f.busy), 1e6, 2),
        ]);
    };
    row("routing alone, to its own address", routed);
    for contender in contenders {
        row(contender.name, &contender.forwarded);
    }
    table
}

fn spread(values: impl IntoIterator<Item = f64>, scale: f64, decimals: usize) -> String {
    Spread::of(values).map_or_else(
        || "not measured".to_owned(),
        |spread| format!("{:.decimals$}", spread.scaled(scale)),
    )
}

/// With a column for each count of Services.
fn table(plan: &Plan, title: &str) -> Table {
    let counts: Vec<String> = plan.counts.iter().map(|count| thousands(*count)).collect();
    let mut header = vec![""];
    header.extend(counts.iter().map(String::as_str));
    Table::new(title, &header)
}
