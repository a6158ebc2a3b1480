//! The last step: a packet whose next hop is known is measured, rewritten and sent there.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1},
    helpers::{bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer},
    programs::TcContext,
};
use weir_common::{
    DropReason, MacAddress,
    address::Address,
    config::HOST_DEVICE_MAC,
    endpoint::Endpoint,
    flow::{flag, scope},
    mark,
    metrics::Hook,
    next_hop::{self, NextHop},
};

use crate::{
    access,
    family::Family,
    icmp, local, maps,
    packet::Packet,
    route::{self, way},
    switches,
    verdict::Verdict,
};

/// A next hop, looked up: a pod of this node, a neighbour on a device, or neither, the node's own
/// stack.
///
/// Two pointers instead of an enum. The compiler keeps the variant of an enum apart from its pointer and
/// asks for the variant later, which the verifier of kernel 6.1 has forgotten by then, so that it follows
/// either way with either row. Of a pointer it remembers whether it is null.
#[derive(Clone, Copy)]
pub struct Hop {
    endpoint: Option<&'static Endpoint>,
    neighbour: Option<&'static NextHop>,
}

impl Hop {
    /// Looks up a next hop by its number.
    #[inline(always)]
    pub fn find(number: u32) -> Result<Self, DropReason> {
        if next_hop::is_endpoint(number) {
            let local = local::by_number(number).ok_or(DropReason::StaleEndpoint)?;
            return Ok(Self::new(Some(local.row), None));
        }
        if number == next_hop::HOST {
            return Ok(Self::new(None, None));
        }
        let row = maps::NEXT_HOPS
            .get(number.wrapping_sub(next_hop::FIRST_ROW))
            .ok_or(DropReason::NoNextHop)?;
        match row.kind {
            next_hop::kind::NEIGHBOUR | next_hop::kind::ROUTED => Ok(Self::new(None, Some(row))),
            next_hop::kind::HOST => Ok(Self::new(None, None)),
            _ => Err(DropReason::NoNextHop),
        }
    }

    /// A pod of this node.
    #[inline(always)]
    pub fn of_endpoint(row: &'static Endpoint) -> Self {
        Self::new(Some(row), None)
    }

    #[inline(always)]
    fn new(endpoint: Option<&'static Endpoint>, neighbour: Option<&'static NextHop>) -> Self {
        Self {
            endpoint: opaque(endpoint),
            neighbour: opaque(neighbour),
        }
    }

    /// Generation of the row, by which a flow recognises that it means another now.
    #[inline(always)]
    pub fn generation(&self) -> u32 {
        match (self.endpoint, self.neighbour) {
            (Some(row), _) => row.generation,
            (None, Some(row)) => row.generation,
            (None, None) => 0,
        }
    }

    /// Policy set that judges what goes there.
    #[inline(always)]
    pub fn ingress_set(&self) -> u32 {
        self.endpoint.map_or(0, |row| row.ingress_set)
    }
}

/// A reference, or null, of which the compiler does not know where it came from.
#[expect(
    clippy::pointers_in_nomem_asm_block,
    reason = "the address itself passes, nothing is read through it"
)]
#[inline(always)]
fn opaque<T>(row: Option<&'static T>) -> Option<&'static T> {
    let mut address = row.map_or(core::ptr::null(), core::ptr::from_ref::<T>);
    // SAFETY: a move of a register to itself; the address is that of a row, or null.
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) address, options(nomem, nostack, preserves_flags));
        address.as_ref()
    }
}

/// Sends the packet to `hop`, translated as its `rewrite` says.
#[inline(always)]
pub fn deliver<F: Family>(
    ctx: &TcContext,
    hook: Hook,
    packet: &Packet<F::Address>,
    hop: Hop,
) -> Result<Verdict, DropReason> {
    // Only what comes from pods and from outside has clients there.
    let may_be_routed = matches!(hook, Hook::FromPod | Hook::FromNetdev);
    let mtu = match (hop.endpoint, hop.neighbour) {
        (Some(row), _) => u32::from(row.mtu),
        (None, Some(row)) if may_be_routed && row.kind == next_hop::kind::ROUTED => {
            match F::find_route(ctx) {
                way::STACK => return to_stack::<F>(ctx, hook, packet),
                way::NOWHERE => return nowhere(packet),
                mtu => mtu,
            }
        }
        (None, Some(row)) => u32::from(row.mtu),
        (None, None) => return to_stack::<F>(ctx, hook, packet),
    };
    let on_loopback = matches!(hook, Hook::FromHost) && access::ifindex(ctx) == LOOPBACK;
    if on_loopback && hop.endpoint.is_none() {
        // The route that it carries would take it back from a neighbour who is still to be found.
        return to_stack::<F>(ctx, hook, packet);
    }
    if packet.wire_length(ctx) > mtu {
        if packet.dont_fragment == 0 || (on_loopback && F::NUMBER == 4) {
            // The stack cuts it and routes the pieces the same way.
            return to_stack::<F>(ctx, hook, packet);
        }
        return icmp::answer_too_big::<F>(ctx, hook, packet, mtu);
    }
    if packet.ttl <= 1 {
        return icmp::answer_time_exceeded::<F>(ctx, hook, packet);
    }
    let rewrite = packet.rewrite.is_needed();
    if rewrite {
        packet.rewrite.write::<F>(ctx, packet)?;
    }
    F::decrement_ttl(ctx)?;
    if let Some(row) = hop.endpoint {
        write_macs(ctx, [row.pod_mac, row.host_mac])?;
    }
    if rewrite {
        packet.rewrite.fix_checksum::<F>(ctx, packet)?;
    }
    Ok(match (hop.endpoint, hop.neighbour) {
        (Some(row), _) => {
            // SAFETY: no preconditions; a device that is gone makes the helper drop the packet.
            Verdict::local(unsafe {
                if on_loopback {
                    // The packet carries the host's route to itself, which only the way through
                    // the device takes off.
                    bpf_redirect(row.ifindex, 0)
                } else {
                    bpf_redirect_peer(row.ifindex, 0)
                }
            } as i32)
        }
        (None, Some(row)) => {
            ctx.set_mark(access::mark(ctx) | mark::DONE << switches::mark_shift());
            if may_be_routed && row.kind == next_hop::kind::ROUTED {
                Verdict::routed(route::redirect())
            } else {
                Verdict::remote(redirect_to_neighbour(row))
            }
        }
        (None, None) => Verdict::STACK,
    })
}

/// What has no way to the outside: the stack tells the sender, who must know the packet for its own; else it is
/// dropped.
#[inline(always)]
fn nowhere<A: Address>(packet: &Packet<A>) -> Result<Verdict, DropReason> {
    if packet.rewrite.flags & (flag::REPLY | flag::REWRITE_DESTINATION) == 0 {
        Ok(Verdict::STACK)
    } else {
        Err(DropReason::NoNextHop)
    }
}

/// Bytes of a packet that every way takes: the smallest MTU of IPv6 (RFC 8200 section 5).
const SMALL: u32 = 1280;

/// Interface index of the loopback device, in every network namespace.
pub const LOOPBACK: u32 = 1;

/// Translates the packet in place and leaves it to the stack.
///
/// A reply that now comes from a Service is handed over as received by the node's own device, to which
/// the routes of Services lead: elsewhere the stack may take its source for forged (RFC 3704). So is what
/// the node sent to its own address and what goes elsewhere now, for which the stack looks up a route.
#[inline(always)]
pub fn to_stack<F: Family>(
    ctx: &TcContext,
    hook: Hook,
    packet: &Packet<F::Address>,
) -> Result<Verdict, DropReason> {
    if !packet.rewrite.is_needed() {
        return Ok(Verdict::STACK);
    }
    packet.rewrite.write::<F>(ctx, packet)?;
    packet.rewrite.fix_checksum::<F>(ctx, packet)?;
    let flags = packet.rewrite.flags;
    let is_reply = flags & flag::REPLY != 0;
    let reply_scope = (flags & flag::PARTNER_SCOPE_MASK) >> flag::PARTNER_SCOPE_SHIFT;
    let leaves_node = !is_reply && reply_scope != u16::from(scope::NODE);
    // With an address of the node as its source it would be taken for forged elsewhere.
    let is_from_node = flags & flag::SOURCE_NAT != 0;
    match hook {
        Hook::FromPod | Hook::FromNetdev if is_reply || is_from_node => as_received_by_host(ctx),
        // It carries the host's route to itself, by which it would come to nobody else.
        Hook::FromHost if access::ifindex(ctx) == LOOPBACK && leaves_node => {
            if packet.wire_length(ctx) > SMALL {
                // The node has seen the MTU of its loopback device, and would not learn of another one.
                F::permit_fragments(ctx)?;
            }
            as_received_by_host(ctx)
        }
        _ => Ok(Verdict::STACK),
    }
}

/// Hands the packet to the stack as received by the node's own device: there neither its source is taken for
/// forged nor a route that it carries for its own.
#[inline(always)]
pub fn as_received_by_host(ctx: &TcContext) -> Result<Verdict, DropReason> {
    let ifindex = local::config()?.host_ifindex;
    if ifindex == 0 {
        return Ok(Verdict::STACK);
    }
    write_macs(ctx, [HOST_DEVICE_MAC; 2])?;
    // SAFETY: no preconditions; a device that is gone makes the helper drop the packet.
    let action = unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) };
    Ok(Verdict::to_stack_by(action as i32))
}

/// Gives the frame Ethernet addresses, destination first: those that the host would have given it, as
/// packet sockets in the pod and guests of virtual machines look at them.
#[inline(always)]
pub fn write_macs(ctx: &TcContext, addresses: [MacAddress; 2]) -> Result<(), DropReason> {
    // SAFETY: plain bytes.
    let macs = unsafe { access::at::<[MacAddress; 2]>(ctx, 0) }.ok_or(DropReason::Malformed)?;
    // SAFETY: checked by `at`; nobody else holds a reference into the packet.
    unsafe { *macs = addresses };
    Ok(())
}

#[inline(always)]
fn redirect_to_neighbour(row: &NextHop) -> i32 {
    const AF_INET: u32 = 2;
    const AF_INET6: u32 = 10;
    let mut parameters = bpf_redir_neigh {
        nh_family: if row.gateway_family == 4 {
            AF_INET
        } else {
            AF_INET6
        },
        __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 {
            ipv6_nh: row.gateway.words(),
        },
    };
    let size = size_of::<bpf_redir_neigh>() as i32;
    // SAFETY: the parameters are initialised and of the size given.
    unsafe { bpf_redirect_neigh(row.ifindex, &mut parameters, size, 0) as i32 }
}
