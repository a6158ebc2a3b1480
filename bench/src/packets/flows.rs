//! Packets of connections that stand in the flow table, those that open them, and their replies, beside the sketches
//! that do the same.

use anyhow::{Result, ensure};
use aya::programs::ProgramFd;
use weir_agent::objects::Family;
use weir_common::{
    MacAddress,
    endpoint::{host_mac, pod_mac},
    metrics::{Hook, outcome},
};

use super::{
    Bench, Plan, expect, family_name,
    frame::{Frame, Kind, Tuple},
    harness::Beside,
    in_any_order,
    lab::{self, CLIENT, LOCAL_SERVER, Route, UPLINK_MAC},
    sketches::{SKETCH, sketch_of},
};
use crate::report::Table;

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

/// Where packets come in: program, device, and the Ethernet addresses that they have there.
#[derive(Clone, Copy)]
struct Side {
    hook: Hook,
    device: u32,
    to: MacAddress,
    from: MacAddress,
}

impl Side {
    fn frames(&self, tuples: &[Tuple], kind: Kind) -> Vec<Frame> {
        tuples
            .iter()
            .map(|tuple| Frame::new(tuple, kind, self.to, self.from))
            .collect()
    }
}

impl Bench {
    pub(super) fn with_flows(
        &mut self,
        family: Family,
        route: Route,
        table: &mut Table,
        ratios: &mut Table,
    ) -> Result<()> {
        let (name, way) = match route {
            Route::RemoteService => ("Service, endpoint on other node", outcome::REMOTE),
            Route::NodePort => ("NodePort, endpoint on other node", outcome::REMOTE),
            Route::LoadBalancer => (
                "load balancer address, endpoint on other node",
                outcome::REMOTE,
            ),
            Route::Outside => ("pod to the outside", outcome::ROUTED),
            _ => ("Service, endpoint on this node", outcome::LOCAL),
        };
        let side = self.side(route);
        let tuples = lab::connections(family, route, CLIENT, self.plan.most());
        let known = self.known_flows(family, route, way, &tuples)?;
        let replies = match route {
            Route::LocalService => Some(self.local_replies(family, &tuples)?),
            // Once a connection is known, it is the same as one to a NodePort.
            Route::LoadBalancer => None,
            _ => Some(self.replies(family, route, &tuples)?),
        };
        let new = self.new_flows(family, route, &tuples, way)?;
        self.open(family, route, &tuples)?;
        let used =
            self.steady_beside(family, route, way, &tuples[..self.plan.flows[1] as usize])?;

        let family_name = family_name(family);
        let rival = sketch_of(family, route);
        let mut cells = Cells {
            own: vec![format!("`{}`, {name}, {family_name}", side.hook.name())],
            rival: vec![format!(
                "{}, {family_name}",
                rival.map_or("", |sketch| sketch.title)
            )],
            ratio: vec![match route {
                Route::RemoteService => String::new(),
                _ => name.to_owned(),
            }],
        };
        for figures in [&[new][..], &known, &[used]].concat() {
            cells.push(&figures);
        }
        table.row(cells.own);
        if let Some(replies) = replies {
            table.row(replies);
        }
        if rival.is_some() {
            table.row(cells.rival);
            ratios.row(cells.ratio);
        }
        Ok(())
    }

    /// Where the first packets of connections come in.
    fn side(&self, route: Route) -> Side {
        match route {
            Route::NodePort | Route::LoadBalancer => Side {
                hook: Hook::FromNetdev,
                device: self.lab.uplink(),
                to: UPLINK_MAC,
                from: host_mac(9),
            },
            _ => Side {
                hook: Hook::FromPod,
                device: self.lab.device(CLIENT),
                to: host_mac(CLIENT),
                from: pod_mac(CLIENT),
            },
        }
    }

    /// For each number of flows: opens that many and measures their packets.
    fn known_flows(
        &mut self,
        family: Family,
        route: Route,
        way: u8,
        tuples: &[Tuple],
    ) -> Result<Vec<Beside>> {
        let flows = self.plan.flows;
        flows
            .into_iter()
            .map(|flows| {
                let tuples = &tuples[..flows as usize];
                self.open(family, route, tuples)?;
                self.steady_beside(family, route, way, tuples)
            })
            .collect()
    }

    /// Enters connections in Weir's table and in the sketch's.
    fn open(&mut self, family: Family, route: Route, tuples: &[Tuple]) -> Result<()> {
        let side = self.side(route);
        let frames = side.frames(tuples, Kind::Syn);
        self.harness.set_frames(&frames, family == Family::V6)?;
        let count = u32::try_from(tuples.len())?;
        for program in [Some(self.program(side.hook)?), self.rival(family, route)?]
            .iter()
            .flatten()
        {
            self.harness.pair(program, side.device, count)?;
        }
        Ok(())
    }

    /// The sketch; it knows IPv4 only.
    fn rival(&mut self, family: Family, route: Route) -> Result<Option<ProgramFd>> {
        sketch_of(family, route)
            .map(|sketch| self.harness.own(sketch.program))
            .transpose()
    }

    /// Packets of known connections, and the rival's time for the same.
    fn steady_beside(
        &mut self,
        family: Family,
        route: Route,
        way: u8,
        tuples: &[Tuple],
    ) -> Result<Beside> {
        let Plan { pairs, repeat, .. } = self.plan;
        let side = self.side(route);
        let frames = in_any_order(side.frames(tuples, Kind::Ack));
        let program = self.program(side.hook)?;
        let rival = self.rival(family, route)?;
        self.harness.set_frames(&frames, family == Family::V6)?;
        let before = self.counters(side.hook)?;
        let figures = match rival {
            Some(rival) => self
                .harness
                .beside(&program, &rival, side.device, repeat, pairs)?,
            None => Beside::alone(self.harness.pairs(&program, side.device, repeat, pairs)?),
        };
        let after = self.counters(side.hook)?;
        expect(&before, &after, way, repeat * (pairs + 1))?;
        expect(&before, &after, outcome::FLOW_CREATED, 0)?;
        expect(&before, &after, outcome::FLOW_STALE, 0)?;
        Ok(figures)
    }

    /// Replies that come in by the node's device: to a pod of this node, or to a client outside.
    fn replies(&mut self, family: Family, route: Route, tuples: &[Tuple]) -> Result<Vec<String>> {
        let from_netdev = self.program(Hook::FromNetdev)?;
        let device = self.lab.uplink();
        let replies = self.lab.replies(family, route.scope(), tuples)?;
        let (name, way) = match route {
            Route::NodePort => (
                "reply from the other node to the client outside",
                outcome::ROUTED,
            ),
            Route::Outside => ("reply from outside to the pod", outcome::LOCAL),
            _ => ("reply from the other node", outcome::LOCAL),
        };
        let mut row = vec![
            format!("`from_netdev`, {name}, {}", family_name(family)),
            String::new(),
        ];
        for flows in self.plan.flows {
            let frames: Vec<Frame> = replies[..flows as usize]
                .iter()
                .map(|tuple| Frame::new(tuple, Kind::Ack, UPLINK_MAC, host_mac(9)))
                .collect();
            let ns = self.steady(&from_netdev, Hook::FromNetdev, way, family, device, &frames)?;
            row.push(ns.to_string());
        }
        Ok(row)
    }

    fn local_replies(&mut self, family: Family, tuples: &[Tuple]) -> Result<Vec<String>> {
        let from_pod = self.program(Hook::FromPod)?;
        let device = self.lab.device(LOCAL_SERVER);
        let replies = self
            .lab
            .replies(family, Route::LocalService.scope(), tuples)?;
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

    /// Every packet opens a connection; none is known before a round.
    fn new_flows(
        &mut self,
        family: Family,
        route: Route,
        tuples: &[Tuple],
        way: u8,
    ) -> Result<Beside> {
        let side = self.side(route);
        let frames = side.frames(tuples, Kind::Syn);
        self.harness.set_frames(&frames, family == Family::V6)?;
        let program = self.program(side.hook)?;
        let rival = self.rival(family, route)?;
        let rival_map = self
            .harness
            .own_map(sketch_of(family, route).map_or(SKETCH.map, |sketch| sketch.map))?;
        let count = u32::try_from(tuples.len())?;
        let mut pairs = Vec::new();
        for _ in 0..self.plan.rounds {
            self.lab.clear_flows(family)?;
            lab::clear(&rival_map)?;
            let before = self.counters(side.hook)?;
            let own = self.harness.pair(&program, side.device, count)?;
            let after = self.counters(side.hook)?;
            expect(&before, &after, way, count)?;
            expect(&before, &after, outcome::FLOW_CREATED, count)?;
            let other = match &rival {
                Some(rival) => {
                    let value = self.harness.pair(rival, side.device, count)?;
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
}
