//! Copies what old maps hold into new ones, for maps whose content goes on to mean the same.

use std::io;

use weir_common::{
    Ipv4, Ipv6,
    address::Address,
    flow::{self, FlowEntry, FlowKey, TICKS_PER_SECOND, flag},
};

use super::super::{
    flows,
    sys::{self, Cursor, RawMap},
};

/// Copies what fits; rows of an array beyond the size of the new one are left out.
pub(super) fn copy_entries(old: &RawMap, new: &RawMap) -> io::Result<()> {
    let mut value = vec![0; old.value_size()];
    for key in old.keys()? {
        if old.lookup(&key, &mut value)?
            && let Err(error) = new.update(&key, &value)
            && error.raw_os_error() != Some(libc::E2BIG)
        {
            return Err(error);
        }
    }
    Ok(())
}

/// What the programs of an earlier agent still write, open as long as some of them are attached: their maps have lost
/// their pins by the time that the last of them is replaced.
#[derive(Debug, Default)]
pub(super) struct Carrying {
    pub v4: Option<Flows>,
    pub v6: Option<Flows>,
    /// `ENDPOINT_FLOWS`, old and new, if it was made anew.
    pub has_flows: Option<(RawMap, RawMap)>,
}

impl Carrying {
    /// Whether there are connections to carry over.
    pub fn has_flows(&self) -> bool {
        self.v4.is_some() || self.v6.is_some()
    }

    /// Brings the new maps up to date; see [`Flows::catch_up`].
    pub fn catch_up(&mut self, in_use: bool) -> io::Result<Caught> {
        // Who has entries is known before there are any.
        if let Some((old, new)) = &self.has_flows {
            add_rows(old, new)?;
        }
        let mut caught = Caught::default();
        if let Some(flows) = &mut self.v4 {
            flows.catch_up::<Ipv4>(in_use, &mut caught)?;
        }
        if let Some(flows) = &mut self.v6 {
            flows.catch_up::<Ipv6>(in_use, &mut caught)?;
        }
        Ok(caught)
    }
}

/// What [`Carrying::catch_up`] has done.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Caught {
    /// Connections added.
    pub added: u32,
    /// Entries that had been used since.
    pub refreshed: u32,
    /// Entries of connections that are over.
    pub removed: u32,
    /// Connections for which there was no room, or whose tuple belongs to another by now.
    pub lost: u32,
}

/// The flow tables of one family, old and new.
#[derive(Debug)]
pub(super) struct Flows {
    old: RawMap,
    old_ring: RawMap,
    new: RawMap,
    /// `None`: the new table has the ring of the old one, and connections keep their places.
    new_ring: Option<RawMap>,
    /// When the last pass began, in ticks; `None`: that was the first, which does not see every entry.
    since: Option<u32>,
    /// The place to look at next for one that is free. The hand of the ring is half a round away when it is set, so
    /// that programs do not come for the same one.
    place: u32,
}

impl Flows {
    /// Nothing has been carried over yet.
    pub fn new(old: RawMap, old_ring: RawMap, new: RawMap, new_ring: Option<RawMap>) -> Self {
        Self {
            old,
            old_ring,
            new,
            new_ring,
            since: None,
            place: 0,
        }
    }

    /// The first pass: gives connections carried over, and those for which there was no room. With a ring of its own
    /// each gets a new place, in the order of their old ones: the hand is to stand behind them.
    pub fn begin<A>(&mut self) -> io::Result<(u32, u32)>
    where
        A: Address,
        FlowKey<A>: aya::Pod,
        FlowEntry<A>: aya::Pod,
    {
        let Some(new_ring) = &self.new_ring else {
            return self.copy_in_place::<A>();
        };
        let (mut kept, mut lost) = (0, 0);
        let mut key_bytes = vec![0; self.old_ring.value_size()];
        let mut bytes = vec![0; self.old.value_size()];
        for place in 0..self.old_ring.max_entries() {
            self.old_ring.lookup(&place.to_ne_bytes(), &mut key_bytes)?;
            let key: FlowKey<A> = sys::from_bytes(&key_bytes);
            if key == FlowKey::default() || !self.old.lookup(&key_bytes, &mut bytes)? {
                continue;
            }
            let mut entry: FlowEntry<A> = sys::from_bytes(&bytes);
            if entry.ring != place {
                continue;
            }
            if kept == new_ring.max_entries() {
                lost += 1;
                continue;
            }
            let partner_key = entry.partner_key(key.protocol);
            if self.old.lookup(sys::bytes_of(&partner_key), &mut bytes)? {
                let mut partner: FlowEntry<A> = sys::from_bytes(&bytes);
                partner.ring = kept;
                self.new
                    .update(sys::bytes_of(&partner_key), sys::bytes_of(&partner))?;
            }
            entry.ring = kept;
            self.new.update(&key_bytes, sys::bytes_of(&entry))?;
            new_ring.update(&kept.to_ne_bytes(), &key_bytes)?;
            kept += 1;
        }
        let places = new_ring.max_entries();
        self.place = (kept + places / 2) % places;
        Ok((kept, lost))
    }

    fn copy_in_place<A>(&self) -> io::Result<(u32, u32)>
    where
        A: Address,
        FlowEntry<A>: aya::Pod,
    {
        let (mut kept, mut lost) = (0, 0);
        walk(&self.old, |key, bytes| {
            let entry: FlowEntry<A> = sys::from_bytes(bytes);
            let is_reply = entry.flags & flag::REPLY != 0;
            match self.new.update(key, bytes) {
                Ok(()) => kept += u32::from(!is_reply),
                Err(error) if is_full(&error) => lost += u32::from(!is_reply),
                Err(error) => return Err(error),
            }
            Ok(())
        })?;
        Ok((kept, lost))
    }

    /// Adds the connections that have begun in the old table since the last pass, and takes over what entries have
    /// come to say since. `in_use`: programs use the new table by now. What they have entered stays as it is, and what
    /// they have removed stays away; as long as there are none, what the old table no longer has goes.
    fn catch_up<A>(&mut self, in_use: bool, caught: &mut Caught) -> io::Result<()>
    where
        A: Address,
        FlowKey<A>: aya::Pod,
        FlowEntry<A>: aya::Pod,
    {
        let now = flows::now()?;
        // The clock of the programs is coarse, and is read before an entry is written.
        let since = self.since.map(|last| last.wrapping_sub(TICKS_PER_SECOND));
        if !in_use {
            caught.removed += self.remove_gone::<A>()?;
        }
        let mut free = FreePlaces {
            next: self.place,
            looks: self.new_ring.as_ref().map_or(0, RawMap::max_entries),
        };
        walk(&self.old, |key, bytes| {
            let entry: FlowEntry<A> = sys::from_bytes(bytes);
            if !is_since(entry.last_seen, since) {
                return Ok(());
            }
            match find::<A>(&self.new, key)? {
                Some(current) if is_same(&current, &entry) => {
                    caught.refreshed += u32::from(self.refresh(key, &current, &entry)?);
                }
                // It comes with the forward entry.
                _ if entry.flags & flag::REPLY != 0 => {}
                Some(_) => caught.lost += u32::from(is_since(entry.created, since)),
                None if in_use && !is_since(entry.created, since) => {}
                None => match self.add::<A>(&sys::from_bytes(key), entry, &mut free)? {
                    Added::Yes => caught.added += 1,
                    Added::NoRoom => caught.lost += 1,
                    Added::Over => {}
                },
            }
            Ok(())
        })?;
        self.place = free.next;
        self.since = Some(now);
        Ok(())
    }

    /// Removes entries of connections that the old table no longer has.
    fn remove_gone<A>(&self) -> io::Result<u32>
    where
        A: Address,
        FlowEntry<A>: aya::Pod,
    {
        let mut removed = 0;
        walk(&self.new, |key, bytes| {
            let entry: FlowEntry<A> = sys::from_bytes(bytes);
            let is_there = find::<A>(&self.old, key)?.is_some_and(|old| is_same(&old, &entry));
            if !is_there {
                removed += u32::from(self.new.delete(key)?);
            }
            Ok(())
        })?;
        Ok(removed)
    }

    /// Takes over what packets have left in the old entry; gives whether there was anything.
    fn refresh<A>(&self, key: &[u8], current: &FlowEntry<A>, old: &FlowEntry<A>) -> io::Result<bool>
    where
        A: Address,
        FlowEntry<A>: aya::Pod,
    {
        let is_newer = flow::age(old.last_seen, current.last_seen) > 0;
        let mut entry = *current;
        entry.tcp_flags |= old.tcp_flags;
        if is_newer {
            entry.last_seen = old.last_seen;
            entry.packets = entry.packets.max(old.packets);
            entry.bytes = entry.bytes.max(old.bytes);
        }
        // One that a program has removed meanwhile stays away.
        Ok(entry != *current && self.new.replace(key, sys::bytes_of(&entry))?)
    }

    /// Enters a connection of the old table: the reply entry first, which claims its tuple, as the programs do.
    fn add<A>(
        &self,
        key: &FlowKey<A>,
        mut entry: FlowEntry<A>,
        free: &mut FreePlaces,
    ) -> io::Result<Added>
    where
        A: Address,
        FlowKey<A>: aya::Pod,
        FlowEntry<A>: aya::Pod,
    {
        let mut tenant = vec![0; self.old_ring.value_size()];
        // With another number of connections set, the earlier programs give places beyond the end of their ring.
        let has_place = entry.ring >= self.old_ring.max_entries()
            || (self
                .old_ring
                .lookup(&entry.ring.to_ne_bytes(), &mut tenant)?
                && tenant == sys::bytes_of(key));
        let partner_key = entry.partner_key(key.protocol);
        let partner = find::<A>(&self.old, sys::bytes_of(&partner_key))?;
        let Some(mut partner) = partner.filter(|partner| partner.has_partner(key)) else {
            return Ok(Added::Over);
        };
        if !has_place {
            return Ok(Added::Over);
        }
        if let Some(ring) = &self.new_ring {
            let Some(place) = free.take::<A>(ring, &self.new)? else {
                return Ok(Added::NoRoom);
            };
            (entry.ring, partner.ring) = (place, place);
        }
        let enter = |key: &FlowKey<A>, entry: &FlowEntry<A>| match self
            .new
            .insert(sys::bytes_of(key), sys::bytes_of(entry))
        {
            Err(error) if is_full(&error) => Ok(false),
            other => other,
        };
        if !enter(&partner_key, &partner)? {
            return Ok(Added::NoRoom);
        }
        if !enter(key, &entry)? {
            self.new.delete(sys::bytes_of(&partner_key))?;
            return Ok(Added::NoRoom);
        }
        if let Some(ring) = &self.new_ring {
            ring.update(&entry.ring.to_ne_bytes(), sys::bytes_of(key))?;
        }
        Ok(Added::Yes)
    }
}

/// What has become of a connection that the new table did not have.
enum Added {
    Yes,
    /// There is no place for it, or its tuple is taken.
    NoRoom,
    /// It has been removed, or lost its place, meanwhile.
    Over,
}

/// The search for places of a ring that nobody has; each is looked at once.
struct FreePlaces {
    next: u32,
    looks: u32,
}

impl FreePlaces {
    fn take<A>(&mut self, ring: &RawMap, table: &RawMap) -> io::Result<Option<u32>>
    where
        A: Address,
        FlowKey<A>: aya::Pod,
        FlowEntry<A>: aya::Pod,
    {
        let mut key = vec![0; ring.value_size()];
        while self.looks > 0 {
            let place = self.next;
            self.looks -= 1;
            self.next = (place + 1) % ring.max_entries();
            ring.lookup(&place.to_ne_bytes(), &mut key)?;
            let is_nobodys = sys::from_bytes::<FlowKey<A>>(&key) == FlowKey::default();
            let is_taken =
                !is_nobodys && find::<A>(table, &key)?.is_some_and(|entry| entry.ring == place);
            if !is_taken {
                return Ok(Some(place));
            }
        }
        Ok(None)
    }
}

fn find<A>(table: &RawMap, key: &[u8]) -> io::Result<Option<FlowEntry<A>>>
where
    A: Address,
    FlowEntry<A>: aya::Pod,
{
    let mut bytes = vec![0; table.value_size()];
    let found = table.lookup(key, &mut bytes)?;
    Ok(found.then(|| sys::from_bytes(&bytes)))
}

/// Whether two entries with the same key are of one connection.
fn is_same<A: Address>(one: &FlowEntry<A>, other: &FlowEntry<A>) -> bool {
    let identity = |entry: &FlowEntry<A>| {
        (
            entry.created,
            (entry.new_source, entry.new_source_port),
            (entry.new_destination, entry.new_destination_port),
        )
    };
    identity(one) == identity(other)
}

/// Whether a time in ticks is not before another, if there is one.
fn is_since(time: u32, since: Option<u32>) -> bool {
    since.is_none_or(|since| time.wrapping_sub(since) <= u32::MAX / 2)
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOMEM))
}

/// Gives every entry of a hash map to `each`, which may change this and other maps.
fn walk(map: &RawMap, mut each: impl FnMut(&[u8], &[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut room = 512;
    let mut cursor = Cursor::default();
    loop {
        let mut keys = vec![0; room * map.key_size()];
        let mut values = vec![0; room * map.value_size()];
        let batch = match map.lookup_batch(&mut cursor, &mut keys, &mut values) {
            // A bucket that holds more than fits.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            other => other?,
        };
        let entries = keys
            .chunks_exact(map.key_size())
            .zip(values.chunks_exact(map.value_size()));
        for (key, value) in entries.take(batch.count) {
            each(key, value)?;
        }
        if batch.done {
            return Ok(());
        }
    }
}

/// Says of whoever has entries by the old rows that he has some.
fn add_rows(old: &RawMap, new: &RawMap) -> io::Result<()> {
    let mut row = vec![0; old.value_size()];
    for number in 0..old.max_entries().min(new.max_entries()) {
        let key = number.to_ne_bytes();
        if old.lookup(&key, &mut row)? && row.iter().any(|byte| *byte != 0) {
            new.update(&key, &row)?;
        }
    }
    Ok(())
}

/// Says of every endpoint that it has entries in the flow table: where that is not known, a lookup too many does
/// no harm, and one too few would miss a connection.
pub(super) fn note_flows_everywhere(has_flows: &RawMap) -> io::Result<()> {
    for row in 0..has_flows.max_entries() {
        has_flows.update(&row.to_ne_bytes(), &1u32.to_ne_bytes())?;
    }
    Ok(())
}
