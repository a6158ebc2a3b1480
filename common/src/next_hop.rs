//! Next hops: where a decided packet goes. Flows and the ipcache hold a number, never a route, so
//! that a changed route moves all its flows with one store.
//!
//! Numbering: 0 is none; 1 to [`ENDPOINTS_MAX`]` - 1` is the endpoint of that number on this node
//! (its row in `ENDPOINTS` is the next hop, `NEXT_HOPS` has none); [`HOST`] is the node's own
//! stack; from [`FIRST_ROW`] on, rows of `NEXT_HOPS` at index `number - FIRST_ROW`.

use crate::{
    Ipv6, assert_abi_size,
    limits::{ENDPOINTS_MAX, NEXT_HOPS_MAX},
    map_types,
};

/// No next hop.
pub const NONE: u32 = 0;
/// The node's own stack: addresses of the node, and everything no table of Weir knows.
pub const HOST: u32 = ENDPOINTS_MAX;
/// The first number that is a row of `NEXT_HOPS`.
pub const FIRST_ROW: u32 = ENDPOINTS_MAX + 1;

/// Where the node's routes lead, past its stack: the last row of `NEXT_HOPS`, which is always of the kind
/// [`kind::ROUTED`] and no node's.
pub const ROUTED: u32 = FIRST_ROW + NEXT_HOPS_MAX - 1;

/// What a row of `NEXT_HOPS` is. Stored as a byte.
pub mod kind {
    /// Free row, or a node that cannot be reached now: packets are dropped with a reason.
    pub const NONE: u8 = 0;
    /// A neighbour on a device: `bpf_redirect_neigh`.
    pub const NEIGHBOUR: u8 = 1;
    /// The node's own stack routes it.
    pub const HOST: u8 = 2;
    /// The node's routes are asked for every packet (`bpf_fib_lookup`), then as [`NEIGHBOUR`]. What they do
    /// not lead to a neighbour is the stack's.
    pub const ROUTED: u8 = 3;
}

/// A row of `NEXT_HOPS`.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct NextHop {
    /// One of [`kind`].
    pub kind: u8,
    /// Family of `gateway`: 4 or 6; 0 when it has none.
    pub gateway_family: u8,
    /// MTU of the way there in bytes (layer 3).
    pub mtu: u16,
    /// Interface index of the device.
    pub ifindex: u32,
    /// Raised when the row is given to another destination, not when its route changes.
    pub generation: u32,
    /// The neighbour to send to, in the shared form.
    pub gateway: Ipv6,
    /// This node's address towards there, in the shared form: the source of what is translated to the
    /// node. Zero if there is none of the packets' family.
    pub source: Ipv6,
}

assert_abi_size!(NextHop = 44);
map_types!(NextHop);

/// Whether the number is an endpoint of this node.
#[inline(always)]
#[must_use]
pub const fn is_endpoint(number: u32) -> bool {
    number != NONE && number < ENDPOINTS_MAX
}
