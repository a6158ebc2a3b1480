//! Session affinity: `AFFINITY` holds the endpoint that a client of a Service port has been given,
//! `AFFINITY_TIMEOUTS` how long it counts.

use crate::{Ipv6, assert_abi_size, map_types};

/// A key of `AFFINITY`.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct AffinityKey {
    /// Address of the client in the shared form; zero for the node itself, which has many.
    pub client: Ipv6,
    /// Number of the Service port.
    pub service_port: u32,
}

/// A value of `AFFINITY`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Affinity {
    /// Number of the backend.
    pub backend: u32,
    /// Generation of its row.
    pub generation: u32,
    /// When the last connection was given to it, in ticks ([`crate::flow::now_from_nanoseconds`]).
    pub last_used: u32,
    /// Zero.
    pub reserved: u32,
}

assert_abi_size!(AffinityKey = 20, Affinity = 16);
map_types!(AffinityKey, Affinity);

/// The longest `timeoutSeconds` that the Kubernetes API allows, and more than enough for times
/// that wrap after 26 days.
pub const TIMEOUT_MAX: u32 = 86_400;
/// `timeoutSeconds` of a Service that does not say.
pub const TIMEOUT_DEFAULT: u32 = 10_800;
