//! The rivals: sketches of the same translation, each over a hash with the keys and values of Weir's.

use anyhow::{Context as _, Result};
use weir_agent::objects::Family;

use super::{
    Bench, Plan,
    frame::Kind,
    from_pod_frames, in_any_order,
    lab::{self, CLIENT, Route},
};
use crate::{report::Table, statistics::Spread};

/// A sketch, and the map that it keeps its connections in.
#[derive(Clone, Copy)]
pub(super) struct Sketch {
    pub program: &'static str,
    pub map: &'static str,
    pub title: &'static str,
}

/// Translates the destination.
pub(super) const SKETCH: Sketch = Sketch {
    program: "sketch_hash",
    map: "SKETCH_HASH",
    title: "sketch, plain hash",
};

/// Translates the source, too.
const SKETCH_NAT: Sketch = Sketch {
    program: "sketch_nat",
    map: "SKETCH_NAT",
    title: "sketch with source NAT, plain hash",
};

/// The sketch that does the same, if there is one.
pub(super) fn sketch_of(family: Family, route: Route) -> Option<Sketch> {
    match (family, route) {
        (Family::V4, Route::RemoteService) => Some(SKETCH),
        (Family::V4, Route::NodePort | Route::LoadBalancer) => Some(SKETCH_NAT),
        _ => None,
    }
}

impl Bench {
    /// The rival over another kind of hash.
    pub(super) fn sketch(
        &mut self,
        program: &str,
        map: &str,
        name: &str,
        table: &mut Table,
    ) -> Result<()> {
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
}
