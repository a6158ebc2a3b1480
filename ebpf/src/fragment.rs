//! Fragments in order: the first leaves its ports in a table, later ones read them there.
//!
//! Where a later one comes before its first and its ports matter, the whole datagram goes to a device
//! of ours, behind which the kernel puts it together and cuts it again, first fragment first. From
//! there it comes back to the device that it came in by, see [`crate::hooks::from_defrag`].

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_INGRESS, BPF_NOEXIST},
    helpers::bpf_redirect,
    programs::TcContext,
};
use weir_common::{
    DropReason, Port,
    config::HOST_DEVICE_MAC,
    flow::scope,
    lookup::Lookup,
    mark,
    metrics::{FragmentKey, FragmentPorts, Hook},
};

use crate::{
    access, decide,
    deliver::write_macs,
    family::Family,
    local, maps,
    packet::{Packet, fragment},
    scratch, switches,
    verdict::Verdict,
};

/// Results of [`resolve_ports`]; words, as it is a global function.
pub mod ports {
    /// They are in the packet.
    pub const KNOWN: u32 = 0;
    /// The first fragment has not been seen.
    pub const UNKNOWN: u32 = 1;
    /// An earlier fragment of the datagram has gone to be put together: this one must follow it.
    pub const ELSEWHERE: u32 = 2;
}

/// Value of a datagram that is being put together. Such ports are possible too: a datagram that has
/// them and is cut goes to be put together in any case, which is no harm.
const ELSEWHERE: FragmentPorts = FragmentPorts {
    source: Port([0xff; 2]),
    destination: Port([0xff; 2]),
};

/// Notes the ports of a first fragment, or fills in those of a later one. Returns one of [`ports`].
#[inline(always)]
pub fn resolve_ports<F: Family>(ctx: &TcContext, packet: &Packet<F::Address>) -> u32 {
    if packet.fragment == fragment::WHOLE {
        return ports::KNOWN;
    }
    F::resolve_ports(ctx)
}

/// The body of [`Family::resolve_ports`].
#[inline(always)]
pub fn resolve<F: Family>(ctx: &TcContext) -> u32 {
    let Ok(packet) = scratch::packet::<F>() else {
        return ports::UNKNOWN;
    };
    if has_come_back(ctx) {
        packet.has_come_back = 1;
        // Our bits mean nothing any more.
        ctx.skb
            .set_mark(access::mark(ctx) & !(0xf << switches::mark_shift()));
    }
    // What the stack sends is in order, and is never sent away.
    let is_sent_by_stack = packet.key.scope > scope::UNDERLAY;
    let may_go = packet.has_come_back == 0 && !is_sent_by_stack && device() != 0;
    let key = key_of(packet);
    maps::count_lookup(Lookup::Fragment);
    if packet.fragment == fragment::FIRST {
        let known = FragmentPorts {
            source: packet.key.source_port,
            destination: packet.key.destination_port,
        };
        let table = F::fragments();
        if table.insert(&key, &known, u64::from(BPF_NOEXIST)).is_ok() {
            return ports::KNOWN;
        }
        // SAFETY: the value is four bytes, copied at once.
        let present = unsafe { table.get(&key) }.copied();
        if may_go && present == Some(ELSEWHERE) {
            return ports::ELSEWHERE;
        }
        // LRU: an insertion finds room; should it fail, the later fragments are dropped with a
        // reason.
        let _ = table.insert(&key, &known, u64::from(BPF_ANY));
        return ports::KNOWN;
    }
    // SAFETY: as above.
    match unsafe { F::fragments().get(&key) }.copied() {
        Some(found) if may_go && found == ELSEWHERE => ports::ELSEWHERE,
        Some(found) => {
            packet.key.source_port = found.source;
            packet.key.destination_port = found.destination;
            ports::KNOWN
        }
        None => ports::UNKNOWN,
    }
}

/// Sends the fragment to be put together with the others of its datagram, and has those that follow
/// go the same way. Where that cannot be done the verdict is a drop, and the packet is as it was; what is
/// for the node (`endpoint` is [`decide::NODE`]) may be its own, and its stack gets it then.
///
/// Its source must have been checked: what comes back is taken for the same sender's.
#[inline(always)]
pub fn put_together<F: Family>(ctx: &TcContext, hook: Hook, endpoint: u32) -> Verdict {
    Verdict::from_word(access::forget_bounds(F::put_together(
        ctx,
        hook as u32,
        endpoint,
    )))
}

/// The body of [`Family::put_together`]: gives the word of the verdict.
#[inline(always)]
pub fn send_away<F: Family>(ctx: &TcContext, hook: u32, endpoint: u32) -> u32 {
    match try_send_away::<F>(ctx, hook) {
        Ok(verdict) => verdict.word(),
        Err(_) if endpoint == decide::NODE => Verdict::STACK.word(),
        Err(reason) => reason as u32,
    }
}

#[inline(always)]
fn try_send_away<F: Family>(ctx: &TcContext, hook: u32) -> Result<Verdict, DropReason> {
    let packet = scratch::packet::<F>()?;
    let ifindex = device();
    let destination = packet.key.destination;
    // On its way it loses one of its time to live, which it gets back; and what is for one link
    // only, or for many receivers, would not come back.
    let stays = F::is_multicast(destination)
        || F::is_link_local(packet.key.source)
        || (F::is_link_local(destination) && destination != F::loopback(local::config()?));
    if ifindex == 0 || packet.has_come_back != 0 || packet.ttl <= 1 || stays {
        return Err(DropReason::FragmentNotFound);
    }
    let mut key = key_of(packet);
    let table = F::fragments();
    if table
        .insert(&key, &ELSEWHERE, u64::from(BPF_NOEXIST))
        .is_err()
    {
        // SAFETY: the value is four bytes, copied at once.
        let present = unsafe { table.get(&key) }.copied();
        if present != Some(ELSEWHERE) {
            // Its first came by on another processor a moment ago, and went its way.
            return Err(DropReason::FragmentNotFound);
        }
    }
    if hook == Hook::FromNetdev as u32 {
        // IPv6 gets another identification when it is cut again.
        key.identification = 0;
        key.scope = scope::DEFRAG;
        let came_by = access::ifindex(ctx).to_ne_bytes();
        let value = FragmentPorts {
            source: Port([came_by[0], came_by[1]]),
            destination: Port([came_by[2], came_by[3]]),
        };
        if table.insert(&key, &value, u64::from(BPF_ANY)).is_err() {
            return Err(DropReason::FragmentNotFound);
        }
    }
    write_macs(ctx, [HOST_DEVICE_MAC; 2])?;
    // SAFETY: no preconditions; a device that is gone makes the helper drop the packet.
    let action = unsafe { bpf_redirect(ifindex, 0) };
    Ok(Verdict::defragmented(action as i32))
}

/// Sends a fragment that was put together and cut again to where it came from.
#[inline(always)]
pub fn hand_back<F: Family>(ctx: &TcContext) -> Result<Verdict, DropReason> {
    let packet = scratch::packet::<F>()?;
    F::parse(ctx, scope::DEFRAG, packet)?;
    if packet.fragment == fragment::WHOLE {
        // The kernel's own talk beyond the device; nobody listens to it here.
        return Ok(Verdict::STACK);
    }
    let (ifindex, macs) = match local::by_address::<F>(local::config()?, packet.key.source) {
        Some(sender) => (
            sender.row.ifindex,
            [sender.row.host_mac, sender.row.pod_mac],
        ),
        None => {
            packet.identification = 0;
            maps::count_lookup(Lookup::Fragment);
            // SAFETY: the value is four bytes, copied at once.
            let came_by = unsafe { F::fragments().get(&key_of(packet)) }.copied();
            let FragmentPorts {
                source: Port([a, b]),
                destination: Port([c, d]),
            } = came_by.ok_or(DropReason::FragmentNotFound)?;
            (u32::from_ne_bytes([a, b, c, d]), [HOST_DEVICE_MAC; 2])
        }
    };
    F::increment_ttl(ctx)?;
    write_macs(ctx, macs)?;
    ctx.skb
        .set_mark(access::mark(ctx) | mark::DONE << switches::mark_shift());
    // SAFETY: no preconditions; a device that is gone makes the helper drop the packet.
    let action = unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) };
    Ok(Verdict::defragmented(action as i32))
}

/// Whether the packet was handed back by [`hand_back`].
#[inline(always)]
pub fn has_come_back(ctx: &TcContext) -> bool {
    access::mark(ctx) & mark::DONE << switches::mark_shift() != 0
}

/// Whether the packet was handed back by [`hand_back`] to a device of the node, whose Ethernet address it
/// has not got any more. It is the node's all the same.
#[inline(always)]
pub fn is_ours_again(ctx: &TcContext) -> bool {
    /// `PACKET_HOST` (include/uapi/linux/if_packet.h).
    const HOST: u32 = 0;
    has_come_back(ctx) && ctx.change_type(HOST).is_ok()
}

/// Whether there is somebody who puts datagrams together.
#[inline(always)]
pub fn is_put_together() -> bool {
    device() != 0
}

/// The device behind which datagrams are put together; 0 if there is none.
#[inline(always)]
fn device() -> u32 {
    maps::DEFRAG.get(0).copied().unwrap_or(0)
}

#[inline(always)]
fn key_of<A: Copy>(packet: &Packet<A>) -> FragmentKey<A> {
    FragmentKey {
        source: packet.key.source,
        destination: packet.key.destination,
        identification: packet.identification,
        protocol: packet.key.protocol,
        scope: packet.key.scope,
        reserved: 0,
    }
}
