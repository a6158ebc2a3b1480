//! Translation at the socket: TCP `connect()` to a Service goes to one of its endpoints, so that no
//! packet needs translating; `getpeername()` still says what was asked for. UDP is left to tc, which
//! balances every flow anew, except for NodePorts of the loopback addresses, which tc cannot serve.
//! `bind()` of the node's processes to a NodePort is refused.
//!
//! At a socket there is no packet and no source address yet: the client is known by the cookie of
//! its network namespace. What is left alone here keeps its virtual address, and tc translates it.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_set_retval},
    programs::SockAddrContext,
};
use weir_common::{
    DropReason, Ipv4, Ipv6, Port,
    address::Address as _,
    endpoint::flag as endpoint_flag,
    event::{Event, kind},
    ipcache::flag as address_flag,
    metrics::{Hook, outcome},
    protocol,
    service::{frontend, scope, service_port_of_row},
    socket::Translation,
};

use crate::{
    affinity,
    decide::NODE,
    family::{Family, V4, V6},
    local, maps,
    service::{self, Chosen},
    verdict,
};

/// What the programs return: go on, or fail with the error set before (kernel 5.18).
const ALLOW: i32 = 1;
const DENY: i32 = 0;
/// <asm-generic/errno.h>.
const EADDRINUSE: i32 = 98;
const ECONNREFUSED: i32 = 111;

/// The call that a program sees.
#[derive(Clone, Copy, Eq, PartialEq)]
pub enum Call {
    /// `connect()`.
    Connect,
    /// `sendto()` and `sendmsg()` with an address.
    Send,
}

/// Who calls, if it is neither the node ([`NODE`]) nor an endpoint.
const FOREIGN: u32 = u32::MAX;

/// `connect()` and `sendmsg()` of an IPv4 socket.
#[inline(always)]
pub fn to_v4(ctx: &SockAddrContext, call: Call) -> i32 {
    translate::<V4>(ctx, call, address_v4(ctx), write_v4)
}

/// `connect()` and `sendmsg()` of an IPv6 socket, perhaps to an IPv4 address in IPv6 form.
#[inline(always)]
pub fn to_v6(ctx: &SockAddrContext, call: Call) -> i32 {
    let address = address_v6(ctx);
    match mapped_v4(address) {
        Some(address) => translate::<V4>(ctx, call, address, write_mapped_v4),
        None => translate::<V6>(ctx, call, address, write_v6),
    }
}

/// `getpeername()` and `recvmsg()` of an IPv4 socket: the peer as the process knows it.
#[inline(always)]
pub fn from_v4(ctx: &SockAddrContext) -> i32 {
    if let Some((address, port)) = frontend_of(ctx, address_v4(ctx).to_shared()) {
        write_v4(ctx, Ipv4::from_shared(address));
        write_port(ctx, port);
    }
    ALLOW
}

/// The same of an IPv6 socket.
#[inline(always)]
pub fn from_v6(ctx: &SockAddrContext) -> i32 {
    let peer = address_v6(ctx);
    let mapped = mapped_v4(peer);
    let shared = match mapped {
        Some(address) => address.to_shared(),
        None => peer,
    };
    if let Some((address, port)) = frontend_of(ctx, shared) {
        if mapped.is_some() {
            write_mapped_v4(ctx, Ipv4::from_shared(address));
        } else {
            write_v6(ctx, address);
        }
        write_port(ctx, port);
    }
    ALLOW
}

/// `bind()` of an IPv4 socket.
#[inline(always)]
pub fn bind_v4(ctx: &SockAddrContext) -> i32 {
    refuse_node_port(ctx, is_node_port::<V4>)
}

/// `bind()` of an IPv6 socket, which may take the port for IPv4 too.
#[inline(always)]
pub fn bind_v6(ctx: &SockAddrContext) -> i32 {
    refuse_node_port(ctx, |port, protocol| {
        is_node_port::<V6>(port, protocol) || is_node_port::<V4>(port, protocol)
    })
}

#[inline(always)]
fn refuse_node_port(ctx: &SockAddrContext, taken: impl Fn(Port, u8) -> bool) -> i32 {
    let (port, protocol) = (port(ctx), protocol_of(ctx));
    if port.word() == 0 || client_of(ctx) != NODE {
        return ALLOW;
    }
    if is_nat_port(port, protocol) || taken(port, protocol) {
        fail(EADDRINUSE)
    } else {
        ALLOW
    }
}

/// Whether a port of every node address leads to a Service.
#[inline(always)]
fn is_node_port<F: Family>(port: Port, protocol: u8) -> bool {
    let any = F::Address::default();
    service::find_frontend::<F>(any, port, protocol, scope::INSIDE, EVERY_ADDRESS)
        != service::NO_ROW
}

/// Ports that are served at every address of the node.
const EVERY_ADDRESS: u8 = address_flag::NODE_PORTS | address_flag::HOST_PORTS;

/// Whether a port belongs to the range for translated sources: replies to them are not the process's.
#[inline(always)]
fn is_nat_port(port: Port, protocol: u8) -> bool {
    let Some(config) = maps::CONFIG.get(0) else {
        return false;
    };
    let offset = port.get().wrapping_sub(config.nat_port_first);
    matches!(protocol, protocol::TCP | protocol::UDP) && offset < config.nat_port_count
}

#[inline(always)]
fn translate<F: Family>(
    ctx: &SockAddrContext,
    call: Call,
    address: F::Address,
    write: impl Fn(&SockAddrContext, F::Address),
) -> i32 {
    let port = port(ctx);
    let mut chosen = Chosen::default();
    let reason = match choose::<F>(ctx, address, port, &mut chosen) {
        NOT_TRANSLATED => {
            if call == Call::Connect {
                forget(ctx);
            }
            return ALLOW;
        }
        TRANSLATED => {
            write(ctx, chosen.address);
            write_port(ctx, chosen.port);
            remember(
                ctx,
                &Translation {
                    frontend: address.to_shared(),
                    backend: chosen.address.to_shared(),
                    frontend_port: port,
                    backend_port: chosen.port,
                },
            );
            verdict::count(Hook::Socket, outcome::TRANSLATED, 0);
            return ALLOW;
        }
        reason => reason as u8,
    };
    report(ctx, reason, address.to_shared(), port, F::NUMBER);
    verdict::count(Hook::Socket, reason, 0);
    fail(ECONNREFUSED)
}

/// It is no Service's, or not for the socket to translate.
const NOT_TRANSLATED: u32 = 0;
/// An endpoint was chosen.
const TRANSLATED: u32 = 1;

/// Finds the endpoint that a socket is to talk to. Returns [`TRANSLATED`], [`NOT_TRANSLATED`], or
/// the number of the reason for which it is to be refused. (An enum would be spilled with parts that
/// were never written, which the verifier does not take.)
#[inline(always)]
fn choose<F: Family>(
    ctx: &SockAddrContext,
    address: F::Address,
    port: Port,
    chosen: &mut Chosen<F::Address>,
) -> u32 {
    let protocol = protocol_of(ctx);
    let loopback = F::is_loopback(address) || address == F::Address::default();
    if protocol != protocol::TCP && !(loopback && protocol == protocol::UDP) {
        return NOT_TRANSLATED;
    }
    let client = client_of(ctx);
    if client == FOREIGN || (loopback && client != NODE) {
        return NOT_TRANSLATED;
    }
    let mut source = Ipv6::default();
    if client != NODE {
        let Some(pod) = local::by_number(client) else {
            return NOT_TRANSLATED;
        };
        if pod.row.flags & endpoint_flag::NO_SOCKET_TRANSLATION != 0 {
            return NOT_TRANSLATED;
        }
        source = F::endpoint_address(pod.row).to_shared();
        if source.is_zero() {
            // It has no address of this family, and so no way to an endpoint; zero is the node.
            return NOT_TRANSLATED;
        }
    }
    let flags = if loopback {
        EVERY_ADDRESS | address_flag::FRONTENDS
    } else if is_bound(ctx) {
        // The connection may need another port than the one it has: only tc can give it one.
        return NOT_TRANSLATED;
    } else {
        F::ipcache(address).map_or(0, |entry| entry.flags)
    };
    if flags == 0 {
        return NOT_TRANSLATED;
    }
    let found = service::find_frontend::<F>(address, port, protocol, scope::INSIDE, flags);
    if found == service::NO_ROW {
        return if flags & address_flag::REFUSE == 0 {
            NOT_TRANSLATED
        } else {
            DropReason::NoServicePort as u32
        };
    }
    let address_of_client = if client == NODE {
        match local::config() {
            Ok(config) => F::node(config),
            Err(reason) => return reason as u32,
        }
    } else {
        F::Address::from_shared(source)
    };
    if let Err(reason) = service::check_source_range::<F>(found, address_of_client) {
        return reason as u32;
    }
    let row = found & frontend::ROW_MASK;
    // SAFETY: no preconditions.
    let hash = unsafe { bpf_get_prandom_u32() };
    match service::choose::<F>(row, hash, &source) {
        Ok(found) => *chosen = found,
        Err(reason) => return reason as u32,
    }
    if chosen.affinity != 0 {
        affinity::remember(
            &source,
            service_port_of_row(row),
            chosen.number,
            chosen.generation,
        );
    }
    TRANSLATED
}

/// Who calls: [`NODE`], the number of an endpoint, or [`FOREIGN`] for namespaces that are neither's.
#[inline(always)]
fn client_of(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let Some(config) = maps::CONFIG.get(0) else {
        return FOREIGN;
    };
    if cookie == config.netns_cookie {
        return NODE;
    }
    // SAFETY: the value is a word, copied at once.
    let Some(number) = (unsafe { maps::ENDPOINT_BY_COOKIE.get(cookie) }).copied() else {
        return FOREIGN;
    };
    match local::by_number(number) {
        Some(pod) if pod.row.netns_cookie == cookie => number,
        _ => FOREIGN,
    }
}

/// Notes a translation at the socket. Without memory for it `getpeername()` says the endpoint.
#[inline(always)]
fn remember(ctx: &SockAddrContext, translation: &Translation) {
    // SAFETY: the context is valid; the storage is used by this socket only, which the kernel has
    // locked for the call (UDP: two threads that send at once may mix up what each asked for).
    unsafe {
        let storage = maps::SOCKET_FRONTENDS.get_or_insert_ptr_mut(ctx, None);
        if storage.is_null() {
            return;
        }
        let rows = &mut (*storage).rows;
        let mut place = (*storage).next as usize & (rows.len() - 1);
        let mut known = false;
        let mut i = 0;
        while i < rows.len() {
            if is_backend(&rows[i], translation.backend, translation.backend_port) {
                place = i;
                known = true;
            }
            i += 1;
        }
        if !known {
            (*storage).next = (*storage).next.wrapping_add(1);
        }
        rows[place & (rows.len() - 1)] = *translation;
    }
}

/// The socket is connected to something that was not translated.
#[inline(always)]
fn forget(ctx: &SockAddrContext) {
    // SAFETY: as in `remember`.
    unsafe {
        let storage = maps::SOCKET_FRONTENDS.get_ptr_mut(ctx);
        if storage.is_null() {
            return;
        }
        let mut i = 0;
        while i < (*storage).rows.len() {
            (*storage).rows[i].backend_port = Port([0; 2]);
            i += 1;
        }
    }
}

/// What the process asked for when it now talks to `backend` and the port in the context.
#[inline(always)]
fn frontend_of(ctx: &SockAddrContext, backend: Ipv6) -> Option<(Ipv6, Port)> {
    let port = port(ctx);
    // SAFETY: as in `remember`.
    unsafe {
        let storage = maps::SOCKET_FRONTENDS.get_ptr_mut(ctx);
        if storage.is_null() {
            return None;
        }
        let mut i = 0;
        while i < (*storage).rows.len() {
            let row = &(*storage).rows[i];
            if is_backend(row, backend, port) {
                return Some((row.frontend, row.frontend_port));
            }
            i += 1;
        }
    }
    None
}

#[inline(always)]
fn is_backend(row: &Translation, backend: Ipv6, port: Port) -> bool {
    row.backend_port.word() != 0 && row.backend_port == port && row.backend == backend
}

/// Makes the call fail with `errno`.
#[inline(always)]
fn fail(errno: i32) -> i32 {
    // SAFETY: no preconditions.
    unsafe { bpf_set_retval(-errno) };
    DENY
}

/// Tells those who watch of a call that was refused.
#[inline(never)]
fn report(ctx: &SockAddrContext, reason: u8, destination: Ipv6, port: Port, family: u8) {
    let Some(mut entry) = maps::EVENTS.reserve(0) else {
        verdict::count(Hook::Socket, outcome::EVENT_LOST, 0);
        return;
    };
    let mut source = Ipv6::default();
    let mut endpoint = NODE;
    if let Some(pod) = local::by_number(client_of(ctx)) {
        endpoint = pod.number;
        source = if family == 4 {
            pod.row.ipv4.to_shared()
        } else {
            pod.row.ipv6
        };
    }
    entry.write(Event {
        // SAFETY: no preconditions.
        time: unsafe { bpf_ktime_get_ns() },
        kind: kind::DROP,
        reason,
        hook: Hook::Socket as u8,
        family,
        protocol: protocol_of(ctx),
        source,
        destination,
        destination_port: port,
        source_endpoint: endpoint,
        ..Event::default()
    });
    entry.submit(0);
}

/// The IPv4 address in an IPv4-mapped IPv6 address (RFC 4291 section 2.5.5.2).
#[inline(always)]
fn mapped_v4(address: Ipv6) -> Option<Ipv4> {
    let words = address.words();
    if words[0] | words[1] | (words[2] ^ MAPPED) == 0 {
        Some(Ipv4::from_word(words[3]))
    } else {
        None
    }
}

/// Third word of an IPv4-mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();

// Fields of the context are read and written one word at a time: the kernel refuses other widths.

#[inline(always)]
fn address_v4(ctx: &SockAddrContext) -> Ipv4 {
    // SAFETY: the context is valid.
    Ipv4::from_word(unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() })
}

#[inline(always)]
fn address_v6(ctx: &SockAddrContext) -> Ipv6 {
    // SAFETY: the context is valid.
    unsafe {
        let words = &raw const (*ctx.sock_addr).user_ip6;
        let word = |i: usize| words.cast::<u32>().add(i).read_volatile();
        Ipv6::from_words([word(0), word(1), word(2), word(3)])
    }
}

#[inline(always)]
fn write_v4(ctx: &SockAddrContext, address: Ipv4) {
    // SAFETY: the context is valid.
    unsafe { (&raw mut (*ctx.sock_addr).user_ip4).write_volatile(address.word()) };
}

#[inline(always)]
fn write_v6(ctx: &SockAddrContext, address: Ipv6) {
    let words = address.words();
    // SAFETY: the context is valid.
    unsafe {
        let place = (&raw mut (*ctx.sock_addr).user_ip6).cast::<u32>();
        place.write_volatile(words[0]);
        place.add(1).write_volatile(words[1]);
        place.add(2).write_volatile(words[2]);
        place.add(3).write_volatile(words[3]);
    }
}

#[inline(always)]
fn write_mapped_v4(ctx: &SockAddrContext, address: Ipv4) {
    write_v6(ctx, Ipv6::from_words([0, 0, MAPPED, address.word()]));
}

#[inline(always)]
fn port(ctx: &SockAddrContext) -> Port {
    // SAFETY: the context is valid. The port stands in the first two bytes, network byte order.
    let word = unsafe { (&raw const (*ctx.sock_addr).user_port).read_volatile() };
    Port((word as u16).to_ne_bytes())
}

#[inline(always)]
fn write_port(ctx: &SockAddrContext, port: Port) {
    let word = u32::from(port.word());
    // SAFETY: the context is valid.
    unsafe { (&raw mut (*ctx.sock_addr).user_port).write_volatile(word) };
}

#[inline(always)]
fn protocol_of(ctx: &SockAddrContext) -> u8 {
    // SAFETY: the context is valid.
    unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() as u8 }
}

/// Whether the socket has a port of its own already.
#[inline(always)]
fn is_bound(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context is valid, and has a socket.
    unsafe {
        let socket = (*ctx.sock_addr).__bindgen_anon_1.sk;
        (&raw const (*socket).src_port).read_volatile() != 0
    }
}
