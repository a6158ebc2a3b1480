//! Ages the flow table from user space, a bounded piece at a time, so that the memory of old
//! connections is free before the table is full. The programs age it themselves when it is full
//! or the agent is dead; nothing depends on this sweep.

use std::{io, time::Duration};

use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    flow::{self, ConnectionState, FlowEntry, FlowKey, TICKS_PER_SECOND, Timeouts},
    metrics::outcome,
    next_hop,
};

use super::{
    Counters,
    sys::{self, Cursor, RawMap},
    tables::endpoints::EndpointTable,
};

/// Entries read with one call. The kernel gives whole buckets of the hash, which hold few.
const BATCH: usize = 512;

/// What makes a connection useless.
pub struct Rules<'a> {
    /// Now, in ticks.
    pub now: u32,
    /// Idle times by state.
    pub timeouts: Timeouts,
    /// The pods of this node.
    pub endpoints: &'a EndpointTable,
}

impl Rules<'_> {
    /// Whether a pod of this node that the entry names is gone. No packet uses such an entry: the
    /// programs compare generations.
    fn is_orphaned<A>(&self, entry: &FlowEntry<A>) -> bool {
        let to_pod = next_hop::is_endpoint(entry.next_hop);
        self.endpoints
            .is_gone(entry.source_endpoint, entry.source_generation)
            || (to_pod
                && self
                    .endpoints
                    .is_gone(entry.next_hop, entry.next_hop_generation))
    }
}

/// What one call of [`FlowSweeper::sweep`] has done.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SweepReport {
    /// Entries looked at.
    pub visited: u32,
    /// Connections removed.
    pub removed: u32,
    /// Both families have been walked to the end since the last report that said so.
    pub finished: bool,
}

/// Walks `FLOWS_V4` and `FLOWS_V6`.
#[derive(Debug)]
pub struct FlowSweeper {
    v4: Walk,
    v6: Walk,
    /// The family the walk is in.
    in_v6: bool,
    /// Connections created when the walk under way began.
    created: u64,
    /// Both tables were empty at the end of the last walk.
    empty: bool,
}

#[derive(Debug)]
struct Walk {
    map: RawMap,
    cursor: Cursor,
    room: usize,
    seen: u32,
    /// Entries at the last complete walk.
    entries: u32,
}

impl FlowSweeper {
    pub(super) fn new(v4: RawMap, v6: RawMap) -> Self {
        Self {
            v4: Walk::new(v4),
            v6: Walk::new(v6),
            in_v6: false,
            created: u64::MAX,
            empty: false,
        }
    }

    /// Looks at about `budget` entries from where the last call ended, and removes connections that
    /// have no use any more by `rules`. While both tables are empty and no connection is created, a
    /// call reads four counters and nothing else.
    ///
    /// # Errors
    ///
    /// The kernel's; the next call begins anew.
    pub fn sweep(
        &mut self,
        budget: u32,
        rules: &Rules<'_>,
        counters: &Counters,
    ) -> io::Result<SweepReport> {
        let mut report = SweepReport::default();
        let at_start = !self.in_v6 && !self.v4.cursor.is_started();
        if at_start {
            let created = counters.outcome(outcome::FLOW_CREATED)?.packets;
            if self.empty && created == self.created {
                report.finished = true;
                return Ok(report);
            }
            self.created = created;
        }
        while report.visited < budget {
            let (visited, removed, done) = if self.in_v6 {
                self.v6.step::<Ipv6>(rules)?
            } else {
                self.v4.step::<Ipv4>(rules)?
            };
            report.visited += visited;
            report.removed += removed;
            if done {
                self.in_v6 = !self.in_v6;
                if !self.in_v6 {
                    self.empty = self.v4.entries == 0 && self.v6.entries == 0;
                    report.finished = true;
                    break;
                }
            }
        }
        Ok(report)
    }

    /// Entries of IPv4 and IPv6 at the end of the last complete walk, and the size of each map.
    #[must_use]
    pub fn fill(&self) -> (u32, u32, u32) {
        (self.v4.entries, self.v6.entries, self.v4.map.max_entries())
    }
}

impl Walk {
    fn new(map: RawMap) -> Self {
        Self {
            map,
            cursor: Cursor::default(),
            room: BATCH,
            seen: 0,
            entries: 0,
        }
    }

    /// One batch: entries looked at, connections removed, and whether the walk is at its end.
    fn step<A>(&mut self, rules: &Rules<'_>) -> io::Result<(u32, u32, bool)>
    where
        A: Address,
        FlowKey<A>: aya::Pod,
        FlowEntry<A>: aya::Pod,
    {
        let mut keys = vec![0; self.room * self.map.key_size()];
        let mut values = vec![0; self.room * self.map.value_size()];
        let batch = match self
            .map
            .lookup_batch(&mut self.cursor, &mut keys, &mut values)
        {
            Ok(batch) => batch,
            // A bucket that holds more than fits.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                self.room *= 2;
                return Ok((0, 0, false));
            }
            Err(error) => {
                (self.cursor, self.seen) = (Cursor::default(), 0);
                return Err(error);
            }
        };
        let mut removed = 0;
        for (key, value) in keys
            .chunks_exact(self.map.key_size())
            .zip(values.chunks_exact(self.map.value_size()))
            .take(batch.count)
        {
            if self.expire::<A>(sys::from_bytes(key), sys::from_bytes(value), rules)? {
                removed += 1;
            }
        }
        self.seen += batch.count as u32;
        if batch.done {
            self.entries = self.seen.saturating_sub(2 * removed);
            self.seen = 0;
        } else {
            self.seen = self.seen.saturating_sub(2 * removed);
        }
        Ok((batch.count as u32, removed, batch.done))
    }

    /// Removes both entries of a connection if the newer of both times is older than allowed, or a pod
    /// of this node that it began or ended at is gone.
    fn expire<A>(&self, key: FlowKey<A>, entry: FlowEntry<A>, rules: &Rules<'_>) -> io::Result<bool>
    where
        A: Address,
        FlowKey<A>: aya::Pod,
        FlowEntry<A>: aya::Pod,
    {
        let idle = flow::age(rules.now, entry.last_seen);
        let orphaned = rules.is_orphaned(&entry);
        // No state has a shorter time-out than this: most entries need no second lookup.
        if !orphaned && idle <= ticks(rules.timeouts.shortest()) {
            return Ok(false);
        }
        let partner_key = entry.partner_key(key.protocol);
        let mut bytes = vec![0; self.map.value_size()];
        let partner = self
            .map
            .lookup(sys::bytes_of(&partner_key), &mut bytes)?
            .then(|| sys::from_bytes::<FlowEntry<A>>(&bytes))
            .filter(|partner| partner.ring == entry.ring);
        let idle = partner.map_or(idle, |p| idle.min(flow::age(rules.now, p.last_seen)));
        if !orphaned && limit(&key, &entry, partner.as_ref(), &rules.timeouts) >= idle {
            return Ok(false);
        }
        // The forward entry first: without it a packet makes a new connection, and finds the
        // reply entry of this one gone or replaces it.
        let is_reply = entry.flags & flow::flag::REPLY != 0;
        let (first, second) = if is_reply {
            (partner.map(|_| partner_key), Some(key))
        } else {
            (Some(key), partner.map(|_| partner_key))
        };
        let mut removed = false;
        for key in [first, second].into_iter().flatten() {
            // Both are gone if they came in one batch and the other has been looked at before.
            removed |= self.map.delete(sys::bytes_of(&key))?;
        }
        Ok(removed)
    }
}

/// Ticks that a connection may be idle.
fn limit<A: Address>(
    key: &FlowKey<A>,
    entry: &FlowEntry<A>,
    partner: Option<&FlowEntry<A>>,
    timeouts: &Timeouts,
) -> u32 {
    let (flags, packets) = partner.map_or((0, 0), |p| (p.tcp_flags, p.packets));
    let replied = if entry.flags & flow::flag::REPLY != 0 {
        entry.packets > 0
    } else {
        packets > 0
    };
    let state = ConnectionState::new(key.protocol, entry.tcp_flags, flags, replied);
    ticks(timeouts.of(state))
}

fn ticks(seconds: u32) -> u32 {
    seconds.saturating_mul(TICKS_PER_SECOND)
}

/// Now, in the ticks of flow times.
///
/// # Errors
///
/// The kernel has no such clock.
pub fn now() -> io::Result<u32> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC_COARSE)?;
    let nanoseconds = Duration::from(time).as_nanos() as u64;
    Ok(flow::now_from_nanoseconds(nanoseconds))
}
