//! Ages the flow table from user space, a bounded piece at a time, so that the memory of old
//! connections is free before the table is full. The programs age it themselves when it is full
//! or the agent is dead; nothing depends on this sweep.

use std::{io, net::IpAddr, time::Duration};

use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    flow::{self, ConnectionState, FlowEntry, FlowKey, TICKS_PER_SECOND, Timeouts},
    metrics::outcome,
    next_hop, protocol,
};

use super::{
    Counters, NodeSources,
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
    /// The addresses of this node.
    pub sources: &'a mut NodeSources,
}

impl Rules<'_> {
    /// Whether the node has lost the address that a connection is translated to.
    fn has_lost_source<A: Address>(&mut self, key: &FlowKey<A>, entry: &FlowEntry<A>) -> bool {
        translated_source(key, entry)
            .is_some_and(|source| self.sources.is_lost(source, key.protocol, self.now))
    }

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
    /// Those of them that were translated to an address which the node has lost.
    pub without_source: u32,
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
    nat_ports_seen: u32,
    /// Entries at the last complete walk.
    entries: u32,
    /// Connections that held a port of the NAT range at the last complete walk.
    nat_ports: u32,
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
        rules: &mut Rules<'_>,
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
            let (removed, done) = if self.in_v6 {
                self.v6.step::<Ipv6>(rules, &mut report)?
            } else {
                self.v4.step::<Ipv4>(rules, &mut report)?
            };
            report.removed += removed;
            if done {
                self.in_v6 = !self.in_v6;
                if !self.in_v6 {
                    rules.sources.end_walk();
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

    /// Connections of IPv4 and IPv6 that held a port of the NAT range at the end of the last complete walk. Those to
    /// different destinations may hold the same one.
    #[must_use]
    pub fn nat_ports(&self) -> (u32, u32) {
        (self.v4.nat_ports, self.v6.nat_ports)
    }
}

impl Walk {
    fn new(map: RawMap) -> Self {
        Self {
            map,
            cursor: Cursor::default(),
            room: BATCH,
            seen: 0,
            nat_ports_seen: 0,
            entries: 0,
            nat_ports: 0,
        }
    }

    /// One batch: connections removed, and whether the walk is at its end.
    fn step<A>(
        &mut self,
        rules: &mut Rules<'_>,
        report: &mut SweepReport,
    ) -> io::Result<(u32, bool)>
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
                return Ok((0, false));
            }
            Err(error) => {
                self.cursor = Cursor::default();
                (self.seen, self.nat_ports_seen) = (0, 0);
                return Err(error);
            }
        };
        let mut removed = 0;
        for (key, value) in keys
            .chunks_exact(self.map.key_size())
            .zip(values.chunks_exact(self.map.value_size()))
            .take(batch.count)
        {
            let (key, entry) = (sys::from_bytes(key), sys::from_bytes(value));
            let has_lost_source = rules.has_lost_source::<A>(&key, &entry);
            if self.expire::<A>(key, entry, rules, has_lost_source)? {
                removed += 1;
                report.without_source += u32::from(has_lost_source);
            } else if holds_nat_port(key.protocol, entry.flags) {
                self.nat_ports_seen += 1;
            }
        }
        self.seen += batch.count as u32;
        if batch.done {
            self.entries = self.seen.saturating_sub(2 * removed);
            // Both entries of one that was counted may have been removed since.
            self.nat_ports = self.nat_ports_seen.min(self.entries);
            (self.seen, self.nat_ports_seen) = (0, 0);
        } else {
            self.seen = self.seen.saturating_sub(2 * removed);
        }
        report.visited += batch.count as u32;
        Ok((removed, batch.done))
    }

    /// Removes both entries of a connection if the newer of both times is older than allowed, or a pod
    /// of this node that it began or ended at is gone, or the node's address that it has.
    fn expire<A>(
        &self,
        key: FlowKey<A>,
        entry: FlowEntry<A>,
        rules: &Rules<'_>,
        has_lost_source: bool,
    ) -> io::Result<bool>
    where
        A: Address,
        FlowKey<A>: aya::Pod,
        FlowEntry<A>: aya::Pod,
    {
        let idle = flow::age(rules.now, entry.last_seen);
        let orphaned = has_lost_source || rules.is_orphaned(&entry);
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
            .filter(|partner| partner.has_partner(&key));
        let idle = partner.map_or(idle, |p| idle.min(flow::age(rules.now, p.last_seen)));
        if !orphaned && limit(&key, &entry, partner.as_ref(), &rules.timeouts) >= idle {
            return Ok(false);
        }
        // The forward entry first: without it a packet makes a new connection, and finds the
        // reply entry of this one gone or replaces it.
        let partner = partner.map(|partner| (partner_key, partner));
        let both = if entry.flags & flow::flag::REPLY != 0 {
            [partner, Some((key, entry))]
        } else {
            [Some((key, entry)), partner]
        };
        // Neither half is removed alone: both are looked at before.
        for (key, entry) in both.iter().flatten() {
            if self.has_changed(key, entry, orphaned, &mut bytes)? {
                return Ok(false);
            }
        }
        let mut removed = false;
        for (key, _) in both.iter().flatten() {
            // Both are gone if they came in one batch and the other has been looked at before.
            removed |= self.map.delete(sys::bytes_of(key))?;
        }
        Ok(removed)
    }

    /// Whether an entry is there, and not as it was when it was read: since then the tuple may have become that of
    /// another connection, or a packet have passed, which an `orphaned` one may.
    fn has_changed<A>(
        &self,
        key: &FlowKey<A>,
        seen: &FlowEntry<A>,
        orphaned: bool,
        room: &mut [u8],
    ) -> io::Result<bool>
    where
        A: Address,
        FlowKey<A>: aya::Pod,
        FlowEntry<A>: aya::Pod,
    {
        if !self.map.lookup(sys::bytes_of(key), room)? {
            return Ok(false);
        }
        let now = sys::from_bytes::<FlowEntry<A>>(room);
        let is_same = now.created == seen.created
            && (orphaned || now.last_seen == seen.last_seen)
            && now.partner_key(key.protocol) == seen.partner_key(key.protocol);
        Ok(!is_same)
    }
}

/// The address of the node that a connection is translated to, if it is.
fn translated_source<A: Address>(key: &FlowKey<A>, entry: &FlowEntry<A>) -> Option<IpAddr> {
    if entry.flags & flow::flag::SOURCE_NAT == 0 {
        return None;
    }
    let is_reply = entry.flags & flow::flag::REPLY != 0;
    let source = if is_reply {
        key.destination
    } else {
        entry.new_source
    };
    Some(source.to_ip())
}

/// Whether an entry stands for a connection with a port, or identifier of an echo, of the NAT range. Each has one such
/// entry, the forward one; other protocols keep their port.
fn holds_nat_port(protocol: u8, flags: u16) -> bool {
    let direction = flags & (flow::flag::SOURCE_NAT | flow::flag::REPLY);
    let has_port_of_range = matches!(
        protocol,
        protocol::TCP | protocol::UDP | protocol::ICMP | protocol::ICMPV6
    );
    direction == flow::flag::SOURCE_NAT && has_port_of_range
}

/// Ticks that a connection may be idle.
fn limit<A: Address>(
    key: &FlowKey<A>,
    entry: &FlowEntry<A>,
    partner: Option<&FlowEntry<A>>,
    timeouts: &Timeouts,
) -> u32 {
    let (flags, packets, partner_seen) = partner.map_or((0, 0, entry.last_seen), |p| {
        (p.tcp_flags, p.packets, p.last_seen)
    });
    let replied = if entry.flags & flow::flag::REPLY != 0 {
        entry.packets > 0
    } else {
        packets > 0
    };
    let lasted = flow::lasted(entry.created, entry.last_seen, partner_seen);
    let state = ConnectionState::new(key.protocol, entry.tcp_flags, flags, replied, lasted);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_translated_connection_holds_one_port() {
        use flow::flag::{HAIRPIN, REPLY, REWRITE_SOURCE, SOURCE_NAT};
        for (protocol, flags, holds) in [
            (protocol::TCP, SOURCE_NAT, true),
            (protocol::UDP, SOURCE_NAT | REWRITE_SOURCE, true),
            (protocol::ICMP, SOURCE_NAT, true),
            (protocol::ICMPV6, SOURCE_NAT, true),
            (protocol::SCTP, SOURCE_NAT, false),
            (protocol::TCP, SOURCE_NAT | REPLY, false),
            (protocol::TCP, REWRITE_SOURCE | HAIRPIN, false),
            (protocol::TCP, 0, false),
        ] {
            assert_eq!(
                holds_nat_port(protocol, flags),
                holds,
                "{protocol} {flags:#x}"
            );
        }
    }
}
