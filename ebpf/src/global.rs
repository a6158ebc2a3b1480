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
    flow, fragment, refuse,
};

/// See [`decide::decide`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn decide_v4(sender: u32, ports_known: u32) -> u32 {
    decide::decide::<V4>(sender, ports_known)
}

/// See [`decide::decide`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn decide_v6(sender: u32, ports_known: u32) -> u32 {
    decide::decide::<V6>(sender, ports_known)
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
