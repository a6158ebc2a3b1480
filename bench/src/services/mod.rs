//! Connections through a ClusterIP, by the number of Services, beside connections to the
//! endpoints' own addresses and beside kube-proxy's rules, all in one run.

pub mod bed;
pub mod rules;
pub mod traffic;

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};

use self::{
    bed::{Bed, Kind},
    traffic::{connection_rate, latency, probe},
};
use crate::{
    Effort,
    report::{Section, Table},
    statistics::Spread,
};

/// From where connections are made, as [`Bed::clients`] has them.
const CLIENTS: [&str; 2] = ["a process of the node", "a pod"];

/// How much is measured.
struct Plan {
    counts: &'static [u32],
    rounds: usize,
    /// Of one measurement.
    time: Duration,
}

/// What one measurement of a path gives.
#[derive(Clone, Copy, Debug)]
struct Figures {
    /// Connections per second.
    rate: f64,
    /// Connect and one byte there and back, seconds.
    p50: f64,
    p99: f64,
}

/// What a client saw at one bed, by round.
#[derive(Debug, Default)]
struct Series {
    /// Through the Service.
    through: Vec<Figures>,
    /// To the endpoints' own addresses, which that is compared with.
    base: Vec<Figures>,
    /// Connections per second to the endpoints' own addresses on the same node.
    own: Vec<f64>,
    /// Connections per second through the Service, times that on the node with one Service.
    of_one: Vec<f64>,
    /// Why nothing could be measured.
    failure: Option<String>,
}

/// A bed and what was measured there.
struct Contender {
    name: &'static str,
    bed: Bed,
    /// The same with one Service all the time; Weir only. Differences of a few percent can be
    /// seen only side by side, not between one minute and the next.
    one_service: Option<Bed>,
    /// By count of Services: seconds of loading, or why it failed.
    loads: Vec<Result<f64, String>>,
    /// By count of Services, then client.
    series: Vec<[Series; CLIENTS.len()]>,
}

/// Measures.
///
/// # Errors
///
/// A node does not come up, or the endpoints cannot be reached at their own addresses.
pub fn run(effort: Effort) -> Result<Section> {
    let plan = match effort {
        Effort::Quick => Plan {
            counts: &[1, 1000],
            rounds: 3,
            time: Duration::from_millis(50),
        },
        Effort::Full => Plan {
            counts: &[1, 1000, 10_000, 50_000],
            rounds: 7,
            time: Duration::from_millis(80),
        },
    };
    let mut section = Section::new("services", "Services by number")?;
    section.paragraph(&format!(
        "A node with a client and two endpoints in pods, in network namespaces of one machine; client on one \
         processor, server on another; IPv4. The measured Service has both endpoints, all others lead to two addresses \
         that nobody has. {} rounds of {} ms for each path, one after the other, every pair (the Service, the \
         endpoints' own addresses) in direct succession. Connections are opened and reset one after another by one \
         client. Weir is compared with its own node; kube-proxy's rules with a node that routes without any rule, \
         because every connection there has to pass the rules, through a Service or not. Whether Weir's rate depends on the \
         number of Services is told by a second node with one Service, measured beside it in each round. In iptables, where the place \
         in the list matters, the measured Service stands in the middle.",
        plan.rounds,
        plan.time.as_millis()
    ));
    let plain = Bed::start(Kind::None)?;
    let mut contenders = contenders(&mut section)?;
    for (at, &count) in plan.counts.iter().enumerate() {
        load(&mut contenders, count);
        for round in 0..plan.rounds {
            eprintln!("services: {count}, round {} of {}", round + 1, plan.rounds);
            // Each round begins with another, so that none is always the first.
            let first = round % contenders.len();
            contenders.rotate_left(first);
            for contender in &mut contenders {
                measure(contender, &plain, &plan, at, round)?;
            }
            contenders.rotate_right(first);
        }
    }
    for (number, client) in CLIENTS.iter().enumerate() {
        tables(&mut section, &plan, &contenders, number, client)?;
    }
    section.table(&load_table(&plan, &contenders));
    section.paragraph(
        "Of nftables' times, those for more than 5,000 Services are without the unnamed map that kube-proxy makes for \
         the endpoints of each: with them the kernel's work grows with the square of their number (minutes for 10,000). \
         The measured Service has its map always. Weir's time begins when the first object is written and ends when \
         `weir wait --applied` returns; Services that were there before are not loaded again.",
    );
    Ok(section)
}

/// All that can be measured on this machine.
fn contenders(section: &mut Section) -> Result<Vec<Contender>> {
    let mut wanted: Vec<(&'static str, Kind, Option<&'static str>)> = Vec::new();
    if bed::socket_translation_exists() {
        wanted.push(("Weir", Kind::WeirSocket, None));
    }
    wanted.push(("Weir, tc alone", Kind::WeirTc, None));
    let (nft_back_end, legacy) = ("iptables-nft-restore", "iptables-legacy-restore");
    wanted.extend([
        (
            "kube-proxy's rules, iptables (nft back end)",
            Kind::Iptables(nft_back_end),
            Some(nft_back_end),
        ),
        (
            "kube-proxy's rules, iptables legacy",
            Kind::Iptables(legacy),
            Some(legacy),
        ),
        ("kube-proxy's rules, nftables", Kind::Nftables, Some("nft")),
    ]);
    let mut found = Vec::new();
    for (name, kind, program) in wanted {
        if let Some(program) = program
            && !bed::is_installed(program)?
        {
            section.paragraph(&format!(
                "{name}: not measured, {program} is not installed."
            ));
            continue;
        }
        let start = || Bed::start(kind).with_context(|| format!("start the node of {name}"));
        let bed = start()?;
        let one_service = if bed.is_weir() {
            let mut bed = start()?;
            bed.load(1)?;
            Some(bed)
        } else {
            None
        };
        found.push(Contender {
            name,
            bed,
            one_service,
            loads: Vec::new(),
            series: Vec::new(),
        });
    }
    Ok(found)
}

/// One after the other, so that the times can be compared. What cannot be loaded is said in the
/// table and left out.
fn load(contenders: &mut [Contender], count: u32) {
    for contender in contenders {
        eprintln!("services: load {count}, {}", contender.name);
        let loaded = contender.bed.load(count);
        let loaded = loaded.map(|time| time.as_secs_f64());
        if let Err(error) = &loaded {
            eprintln!("services: {}: {error:#}", contender.name);
        }
        contender
            .loads
            .push(loaded.map_err(|error| format!("{error:#}")));
        contender.series.push(Default::default());
    }
}

fn measure(
    contender: &mut Contender,
    plain: &Bed,
    plan: &Plan,
    at: usize,
    round: usize,
) -> Result<()> {
    if contender.loads[at].is_err() {
        return Ok(());
    }
    let bed = &contender.bed;
    let weir = bed.is_weir();
    let through = [bed.frontend()];
    for (client, from) in CLIENTS.iter().enumerate() {
        let series = &mut contender.series[at][client];
        if series.failure.is_some() {
            continue;
        }
        let context = |what: &str| {
            format!(
                "{}, {} Services, {}: {what}",
                contender.name, plan.counts[at], from
            )
        };
        if round == 0
            && let Err(error) = probe(&bed.clients[client], bed.frontend())
        {
            series.failure = Some(format!("{error:#}"));
            eprintln!("services: {}: {error:#}", context("not served"));
            continue;
        }
        let own = || {
            connection_rate(&bed.clients[client], &bed.server, &bed.own, plan.time)
                .with_context(|| context("own addresses"))
        };
        let service = || {
            figures(bed, client, &through, plan.time).with_context(|| context("through Service"))
        };
        let base = || {
            let bed = if weir { bed } else { plain };
            figures(bed, client, &bed.own, plan.time).with_context(|| context("own addresses"))
        };
        // Neither is always the first.
        let (service, base) = if round.is_multiple_of(2) {
            let service = service()?;
            (service, base()?)
        } else {
            let base = base()?;
            (service()?, base)
        };
        series.own.push(if weir { base.rate } else { own()? });
        series.through.push(service);
        series.base.push(base);
        if let Some(one) = &contender.one_service {
            let ratio = ratio_to(one, bed, client, plan.time);
            series
                .of_one
                .push(ratio.with_context(|| context("one Service"))?);
        }
    }
    // Once is enough, before the table is large.
    if (at, round) == (0, 0) && contender.series[at].iter().any(|s| s.failure.is_none()) {
        contender.bed.check_way().with_context(|| contender.name)?;
    }
    Ok(())
}

/// Connections per second through the Service at `bed`, times that at `one`.
fn ratio_to(one: &Bed, bed: &Bed, client: usize, time: Duration) -> Result<f64> {
    let rate = |bed: &Bed| -> Result<f64> {
        connection_rate(&bed.clients[client], &bed.server, &[bed.frontend()], time)
    };
    Ok(rate(bed)? / rate(one)?)
}

fn figures(bed: &Bed, client: usize, to: &[SocketAddr], time: Duration) -> Result<Figures> {
    let client = &bed.clients[client];
    let rate = connection_rate(client, &bed.server, to, time)?;
    let times = latency(client, &bed.server, to, time)?;
    Ok(Figures {
        rate,
        p50: times.p50,
        p99: times.p99,
    })
}

/// How one figure is shown.
struct Show {
    title: &'static str,
    value: fn(&Figures) -> f64,
}

const SHOWN: [Show; 3] = [
    Show {
        title: "New TCP connections a second",
        value: |figures| figures.rate,
    },
    Show {
        title: "Connect and one byte there and back, p50",
        value: |figures| figures.p50,
    },
    Show {
        title: "Connect and one byte there and back, p99",
        value: |figures| figures.p99,
    },
];

fn tables(
    section: &mut Section,
    plan: &Plan,
    contenders: &[Contender],
    client: usize,
    from: &str,
) -> Result<()> {
    for show in &SHOWN {
        let title = format!(
            "{}, from {from} through a ClusterIP: times that to the endpoints' own addresses",
            show.title
        );
        let mut table = table(plan, &title, Some("most of fewest Services"));
        for contender in contenders {
            let ratios: Vec<Result<Spread, String>> = contender
                .shown(client)
                .map(|series| {
                    let series = series?;
                    let pairs = series.through.iter().zip(&series.base);
                    spread(pairs.map(|(own, base)| (show.value)(own) / (show.value)(base)))
                })
                .collect();
            let flat = match (ratios.first(), ratios.last()) {
                (Some(Ok(first)), Some(Ok(last))) => format!("{:.2}", last.median / first.median),
                _ => String::new(),
            };
            let cells = ratios.iter().map(|ratio| cell(ratio, 1.0, 2));
            let cells: Vec<String> = cells.chain([flat]).collect();
            table.row([contender.name.to_owned()].into_iter().chain(cells));
        }
        section.table(&table);
    }
    let mut flat = table(
        plan,
        &format!(
            "New TCP connections a second, from {from} through a ClusterIP: times that on another node with one Service"
        ),
        None,
    );
    let mut absolute = table(
        plan,
        &format!("New TCP connections from {from} through a ClusterIP, thousand a second"),
        None,
    );
    let mut latency = table(
        plan,
        &format!("Connect and one byte there and back, from {from} through a ClusterIP, p50, µs"),
        None,
    );
    let mut own = table(
        plan,
        &format!(
            "New TCP connections from {from} to the endpoints' own addresses on the same node, thousand a second"
        ),
        None,
    );
    for contender in contenders {
        let row = |value: &dyn Fn(&Series) -> Vec<f64>, scale: f64| -> Vec<String> {
            let series = contender.shown(client);
            let cells = series.map(|series| cell(&series.and_then(|s| spread(value(s))), scale, 1));
            [contender.name.to_owned()]
                .into_iter()
                .chain(cells)
                .collect()
        };
        let through = |value: fn(&Figures) -> f64| {
            move |series: &Series| series.through.iter().map(value).collect::<Vec<_>>()
        };
        if contender.one_service.is_some() {
            let series = contender.shown(client);
            let cells = series.map(|series| {
                let spread = series.and_then(|series| spread(series.of_one.iter().copied()));
                cell(&spread, 1.0, 2)
            });
            let cells: Vec<String> = [contender.name.to_owned()]
                .into_iter()
                .chain(cells)
                .collect();
            flat.row(cells);
        }
        absolute.row(row(&through(|figures| figures.rate), 1e-3));
        latency.row(row(&through(|figures| figures.p50), 1e6));
        own.row(row(&|series| series.own.clone(), 1e-3));
    }
    for table in [flat, absolute, latency, own] {
        section.table(&table);
    }
    Ok(())
}

impl Contender {
    /// What a client saw, by count of Services; or why it saw nothing.
    fn shown(&self, client: usize) -> impl Iterator<Item = Result<&Series, String>> {
        self.loads.iter().zip(&self.series).map(move |(load, by)| {
            if load.is_err() {
                return Err("not loaded".to_owned());
            }
            match &by[client].failure {
                Some(_) => Err("no connection".to_owned()),
                None => Ok(&by[client]),
            }
        })
    }
}

fn spread(values: impl IntoIterator<Item = f64>) -> Result<Spread, String> {
    Spread::of(values).ok_or_else(|| "no rounds".to_owned())
}

fn cell(spread: &Result<Spread, String>, scale: f64, decimals: usize) -> String {
    match spread {
        Ok(spread) => format!("{:.decimals$}", spread.scaled(scale)),
        Err(why) => why.clone(),
    }
}

/// With a column for each count of Services.
fn table(plan: &Plan, title: &str, last: Option<&'static str>) -> Table {
    let counts: Vec<String> = plan.counts.iter().map(|count| thousands(*count)).collect();
    let mut header = vec![""];
    header.extend(counts.iter().map(String::as_str));
    header.extend(last);
    Table::new(title, &header)
}

fn load_table(plan: &Plan, contenders: &[Contender]) -> Table {
    let mut table = table(plan, "Loading that many Services, seconds", None);
    for contender in contenders {
        let cells = contender.loads.iter().map(|load| match load {
            Ok(seconds) => format!("{seconds:.2}"),
            Err(_) => "failed".to_owned(),
        });
        let cells: Vec<String> = [contender.name.to_owned()]
            .into_iter()
            .chain(cells)
            .collect();
        table.row(cells);
    }
    table
}

/// 50,000.
pub fn thousands(number: u32) -> String {
    match number {
        0..1000 => number.to_string(),
        _ => format!("{},{:03}", thousands(number / 1000), number % 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_numbers_have_a_mark_at_each_thousand() {
        assert_eq!(thousands(1), "1");
        assert_eq!(thousands(1000), "1,000");
        assert_eq!(thousands(1_050_007), "1,050,007");
    }
}
