//! Functions that the verifier checks once, by themselves, instead of at every call along every
//! path: global functions (kernel 5.6). They take words (and the context where they need it) and return a word, know
//! nothing of their caller, and find the packet in [`crate::scratch`].
//!
//! Each exists once for each family, under a name of its own: a generic function has no global
//! linkage.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};

use crate::{
    decide,
    family::{V4, V6},
    flow, fragment, nat_port, refuse, ring, route,
};

/// See [`decide::decide`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn decide_v4(skb: *mut __sk_buff, sender: u32, ports_known: u32) -> u32 {
    decide::decide::<V4>(&TcContext::new(skb), sender, ports_known)
}

/// See [`decide::decide`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn decide_v6(skb: *mut __sk_buff, sender: u32, ports_known: u32) -> u32 {
    decide::decide::<V6>(&TcContext::new(skb), sender, ports_known)
}

/// See [`flow::enter`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn commit_v4(skb: *mut __sk_buff, hook: u32, sender: u32) -> u32 {
    flow::enter::<V4>(&TcContext::new(skb), hook, sender)
}

/// See [`flow::enter`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn commit_v6(skb: *mut __sk_buff, hook: u32, sender: u32) -> u32 {
    flow::enter::<V6>(&TcContext::new(skb), hook, sender)
}

/// See [`flow::reply_tuple_is_taken`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn reply_tuple_is_taken_v4() -> u32 {
    flow::reply_tuple_is_taken::<V4>()
}

/// See [`flow::reply_tuple_is_taken`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn reply_tuple_is_taken_v6() -> u32 {
    flow::reply_tuple_is_taken::<V6>()
}

/// See [`refuse::refuse`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn refuse_v4(skb: *mut __sk_buff, sender: u32, reason: u32) -> u32 {
    refuse::refuse::<V4>(&TcContext::new(skb), sender, reason)
}

/// See [`refuse::refuse`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn refuse_v6(skb: *mut __sk_buff, sender: u32, reason: u32) -> u32 {
    refuse::refuse::<V6>(&TcContext::new(skb), sender, reason)
}

/// See [`fragment::resolve`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn resolve_ports_v4(skb: *mut __sk_buff) -> u32 {
    fragment::resolve::<V4>(&TcContext::new(skb))
}

/// See [`fragment::resolve`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn resolve_ports_v6(skb: *mut __sk_buff) -> u32 {
    fragment::resolve::<V6>(&TcContext::new(skb))
}

/// See [`fragment::send_away`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn put_together_v4(skb: *mut __sk_buff, hook: u32, endpoint: u32) -> u32 {
    fragment::send_away::<V4>(&TcContext::new(skb), hook, endpoint)
}

/// See [`fragment::send_away`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn put_together_v6(skb: *mut __sk_buff, hook: u32, endpoint: u32) -> u32 {
    fragment::send_away::<V6>(&TcContext::new(skb), hook, endpoint)
}

/// See [`route::find`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_route_v4(skb: *mut __sk_buff) -> u32 {
    route::find::<V4>(&TcContext::new(skb))
}

/// See [`route::find_source`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_source_v4(skb: *mut __sk_buff) -> u32 {
    route::find_source::<V4>(&TcContext::new(skb))
}

/// See [`route::find`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_route_v6(skb: *mut __sk_buff) -> u32 {
    route::find::<V6>(&TcContext::new(skb))
}

/// See [`route::find_source`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_source_v6(skb: *mut __sk_buff) -> u32 {
    route::find_source::<V6>(&TcContext::new(skb))
}

/// See [`flow::claim_reply_tuple`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn claim_reply_tuple_v4() -> u32 {
    flow::claim_reply_tuple::<V4>()
}

/// See [`ring::examine_place`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn examine_place_v4(place: u32) -> u32 {
    ring::examine_place::<V4>(place)
}

/// See [`nat_port::claim`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn claim_nat_port_v4(hook: u32) -> u32 {
    nat_port::claim::<V4>(hook)
}

/// See [`nat_port::examine_tenant`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn examine_tenant_v4() -> u32 {
    nat_port::examine_tenant::<V4>()
}

/// See [`flow::claim_reply_tuple`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn claim_reply_tuple_v6() -> u32 {
    flow::claim_reply_tuple::<V6>()
}

/// See [`ring::examine_place`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn examine_place_v6(place: u32) -> u32 {
    ring::examine_place::<V6>(place)
}

/// See [`nat_port::claim`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn claim_nat_port_v6(hook: u32) -> u32 {
    nat_port::claim::<V6>(hook)
}

/// See [`nat_port::examine_tenant`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn examine_tenant_v6() -> u32 {
    nat_port::examine_tenant::<V6>()
}
