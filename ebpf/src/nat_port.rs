//! Source ports of connections that are translated to the node, or whose own port is taken. They come out of a
//! range that nobody else uses, and one port serves any number of connections to different
//! destinations: what is claimed is the whole tuple of the reply.
//!
//! The search begins at a random place, and a few tries find a port as long as the range is not nearly
//! full. Then it goes on through all of it, so that the last free port is found too; how much time
//! searches in vain take is limited.

use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_loop};
use weir_common::{
    Port,
    address::Address,
    flow::TICKS_PER_SECOND,
    hash,
    limits::{NAT_PORT_PROBES, NAT_SEARCH_ROWS},
    metrics::{Hook, outcome},
    protocol,
};

use crate::{
    access, family::Family, flow, icmp, local, maps, packet::Packet, ring, scratch, verdict,
};

/// Searches of the whole range for one destination may take this share of the time: one part in so many.
const SEARCH_SHARE: u64 = 16;
/// All searches together may take this share.
const SEARCH_SHARE_OF_ALL: u64 = 4;

/// Ticks after which a connection that nobody has answered may be taken for given up although a free port has not
/// been looked for everywhere: who is still trying has sent again by then (RFC 6298 section 2).
const GIVEN_UP: u32 = TICKS_PER_SECOND;

/// Whether a connection of this packet can have another source port, or identifier of an echo.
#[inline(always)]
pub fn is_changeable<A: Address>(packet: &Packet<A>) -> bool {
    matches!(packet.key.protocol, protocol::TCP | protocol::UDP) || icmp::is_echo_request(packet)
}

/// Port number `index` of the range, counted on from its beginning when it is beyond the end.
#[inline(always)]
fn port(first: u16, count: u16, index: u32) -> Port {
    let offset = if count == 0 {
        0
    } else {
        index % u32::from(count)
    };
    Port::new(first.wrapping_add(offset as u16))
}

/// A search under way. It stands in the scratch room, of which the verifier knows nothing: it then follows
/// one step of it, not each.
#[repr(C)]
pub struct Search {
    /// Where in the range it goes on.
    next: u32,
    /// 1: a free port was found and claimed.
    claimed: u32,
    /// The port whose connection would make way, 0 if there is none.
    candidate: u32,
    /// What speaks for that connection, see [`ring::merit`].
    merit: u32,
    /// How long it has been idle, in ticks.
    idle: u32,
    /// Which it is, see [`Glance::identity`](flow::Glance::identity).
    identity: u32,
    /// The same of the connection that was looked at last.
    tenant: u32,
    /// When the search of the whole range began, nanoseconds.
    began: u64,
    /// Number of the hook that it is for.
    hook: u32,
}

/// Claims the reply tuple of the connection in the scratch room with a source port of the range. Returns 0, or 1 if
/// there is none. (The body of [`Family::claim_nat_port`].)
#[inline(always)]
pub fn claim<F: Family>(hook: u32) -> u32 {
    let (Ok(work), Ok(config)) = (scratch::decision::<F>(), local::config()) else {
        return 1;
    };
    // SAFETY: no preconditions.
    work.search.next = unsafe { bpf_get_prandom_u32() } & 0xffff;
    work.search.hook = hook;
    work.search.claimed = 0;
    work.search.candidate = 0;
    work.search.merit = u32::MAX;
    if try_ports::<F>(NAT_PORT_PROBES) == 0 {
        return 0;
    }
    search_all::<F>(u32::from(config.nat_port_count))
}

/// Tries every port, if there is time for it; then that of a connection which is over or has never come about, the
/// longest idle first: a flood of half-open ones keeps nobody out. Returns 0, or 1 if there is none.
#[inline(always)]
fn search_all<F: Family>(count: u32) -> u32 {
    if may_search::<F>() != 0 {
        if try_ports::<F>(count) == 0 {
            note::<F>(outcome::NAT_PORT_SEARCH);
            return 0;
        }
        note_search::<F>();
        note::<F>(outcome::NAT_PORT_SEARCH);
        return take_over::<F>(0);
    }
    take_over::<F>(GIVEN_UP)
}

/// The two words that say when the next search may begin: of all, and of those for this destination.
#[inline(always)]
fn next_searches<F: Family>() -> Option<[*mut u64; 2]> {
    let work = scratch::decision::<F>().ok()?;
    let port = u32::from(work.forward.new_destination_port.word());
    let row = 1 + hash::mix([work.forward.new_destination.fold(), port]) % NAT_SEARCH_ROWS;
    Some([
        maps::NAT_SEARCH.get_ptr_mut(0)?,
        maps::NAT_SEARCH.get_ptr_mut(row)?,
    ])
}

/// Whether there is time for a search of the whole range: 1, and notes when it begins, or 0.
#[inline(never)]
fn may_search<F: Family>() -> u32 {
    let (Ok(work), Some([all, own])) = (scratch::decision::<F>(), next_searches::<F>()) else {
        return 0;
    };
    // SAFETY: no preconditions; aligned words of an array. Two processors may search at once.
    let (now, next, next_own) = unsafe { (bpf_ktime_get_ns(), *all, *own) };
    work.search.began = now;
    u32::from(now >= next && now >= next_own)
}

/// Notes that a search was in vain, and took time.
#[inline(never)]
fn note_search<F: Family>() {
    let (Ok(work), Some([all, own])) = (scratch::decision::<F>(), next_searches::<F>()) else {
        return;
    };
    let began = work.search.began;
    // SAFETY: as above.
    unsafe {
        let took = bpf_ktime_get_ns() - began;
        *all = began + took * SEARCH_SHARE_OF_ALL;
        *own = began + took * SEARCH_SHARE;
    }
}

/// Tries so many ports. Returns 0, or 1 if none was free.
#[inline(always)]
fn try_ports<F: Family>(count: u32) -> u32 {
    // SAFETY: the function has the type that the helper expects, and needs no context.
    unsafe {
        bpf_loop(
            count,
            try_port::<F> as *const () as *mut _,
            core::ptr::null_mut(),
            0,
        );
    }
    let Ok(work) = scratch::decision::<F>() else {
        return 1;
    };
    // SAFETY: an element of the scratch room. The function has written it through a pointer of its own.
    1 - (unsafe { access::read_last(&raw const work.search.claimed) } & 1)
}

/// Counts an outcome at the hook that the search is for.
#[inline(always)]
fn note<F: Family>(outcome: u8) {
    if let Ok(work) = scratch::decision::<F>() {
        verdict::count(Hook::of_kernel(work.search.hook), outcome, 0);
    }
}

/// One step: returns 1 when the search is over.
unsafe extern "C" fn try_port<F: Family>(_index: u32, _context: *mut ()) -> i64 {
    let (Ok(work), Ok(config)) = (scratch::decision::<F>(), local::config()) else {
        return 1;
    };
    note::<F>(outcome::NAT_PORT_TRIED);
    let search = &mut work.search;
    let port = port(config.nat_port_first, config.nat_port_count, search.next);
    search.next = search.next.wrapping_add(1);
    work.forward.new_source_port = port;
    if F::claim_reply_tuple() == 0 {
        search.claimed = 1;
        return 1;
    }
    match F::examine_tenant() {
        tenant::GONE => {}
        tenant::EXPIRED if forget_tenant::<F>() != 0 => note::<F>(outcome::FLOW_EXPIRED),
        _ => return 0,
    }
    // The verifier wants to see that it is 0 or 1.
    let taken = access::forget_bounds(F::claim_reply_tuple());
    search.claimed = u32::from(taken == 0);
    i64::from(search.claimed)
}

/// What a connection is that has a port.
mod tenant {
    /// It is not there any more.
    pub const GONE: u32 = 0;
    /// It was idle for too long.
    pub const EXPIRED: u32 = 1;
    /// It has its port by right.
    pub const ALIVE: u32 = 2;
    /// It would make way.
    pub const CANDIDATE: u32 = 3;
}

/// Looks at the connection that has the reply tuple in the scratch room. Returns one of [`tenant`]. One that is alive
/// becomes the candidate to make way if it matters no more than the one so far, and nobody is served by it. (The body
/// of [`Family::examine_tenant`].)
#[inline(always)]
pub fn examine_tenant<F: Family>() -> u32 {
    let (Ok(work), Ok(config)) = (scratch::decision::<F>(), local::config()) else {
        return tenant::ALIVE;
    };
    let Some(found) = flow::look_at::<F>(&work.reply_key) else {
        return tenant::GONE;
    };
    work.search.tenant = found.identity();
    let timeout = config.timeouts.of(found.state);
    let idle = found.idle(flow::now());
    if idle > timeout.saturating_mul(TICKS_PER_SECOND) {
        return tenant::EXPIRED;
    }
    let merit = ring::merit(found.state, idle);
    if found.state.eviction_rank() <= NEVER_ANSWERED && merit <= work.search.merit {
        work.search.merit = merit;
        work.search.idle = idle;
        work.search.identity = work.search.tenant;
        work.search.candidate = u32::from(work.forward.new_source_port.get());
        return tenant::CANDIDATE;
    }
    tenant::ALIVE
}

/// [`ConnectionState::eviction_rank`](weir_common::flow::ConnectionState::eviction_rank) up to which nobody is served by a
/// connection.
const NEVER_ANSWERED: u32 = 1;

/// Takes the port of the connection that makes way, if it has been idle for so many ticks. Other processors may want
/// it too, or somebody may be served by it by now: it is looked at once more. Returns 0, or 1 if there is none.
#[inline(always)]
fn take_over<F: Family>(idle: u32) -> u32 {
    let (Ok(packet), Ok(work)) = (scratch::packet::<F>(), scratch::decision::<F>()) else {
        return 1;
    };
    // SAFETY: as in `try_ports`.
    let port = unsafe { access::read_last(&raw const work.search.candidate) };
    if port == 0 || (work.search.idle < idle && work.search.merit >= ring::LEAST_MERIT_UNANSWERED) {
        return 1;
    }
    let expected = work.search.identity;
    work.forward.new_source_port = Port::new(port as u16);
    flow::write_reply_key::<F>(work, packet.key.protocol);
    match F::examine_tenant() {
        tenant::GONE => {}
        tenant::EXPIRED | tenant::CANDIDATE if is_tenant::<F>(expected) => {
            if forget_tenant::<F>() == 0 {
                return 1;
            }
            note::<F>(outcome::FLOW_EVICTED);
        }
        _ => return 1,
    }
    F::claim_reply_tuple()
}

/// Whether the connection that was looked at last is this one.
#[inline(always)]
fn is_tenant<F: Family>(expected: u32) -> bool {
    scratch::decision::<F>().is_ok_and(|work| {
        // SAFETY: an element of the scratch room, which a global function has written.
        unsafe { access::read_last(&raw const work.search.tenant) == expected }
    })
}

/// Removes the connection that has the reply tuple in the scratch room and was looked at last. Returns 1, or 0 if
/// another processor was faster.
#[inline(never)]
fn forget_tenant<F: Family>() -> u32 {
    match scratch::decision::<F>() {
        Ok(work) => flow::forget::<F>(&work.reply_key, work.search.tenant),
        Err(_) => 0,
    }
}
