//! The ipcache: what an address is, by longest prefix. It holds pod ranges and addresses of other
//! nodes, this node's own addresses and the addresses of Services; it does not hold the pods of
//! this node, which are found by their offset in the pod range.

use crate::{assert_abi_size, map_types};

/// What a prefix is. Stored as a byte.
pub mod class {
    /// Pods of another node: `next_hop` leads there.
    pub const REMOTE_PODS: u8 = 1;
    /// An address of another node: `next_hop` leads there.
    pub const REMOTE_NODE: u8 = 2;
    /// An address of this node.
    pub const THIS_NODE: u8 = 3;
    /// An address of a Service that no node has.
    pub const SERVICE: u8 = 4;
    /// A range outside, of which something is to be known: its flags.
    pub const OUTSIDE: u8 = 5;
}

/// Bits of [`IpcacheEntry::flags`].
pub mod flag {
    /// `FRONTENDS_*` has keys with this address.
    pub const FRONTENDS: u8 = 0x1;
    /// NodePorts are served at this address: keys of `FRONTENDS_*` with address zero whose value has
    /// [`crate::service::frontend::NODE_PORT`].
    pub const NODE_PORTS: u8 = 0x2;
    /// Any of the three: something may be served at this address.
    pub const SERVED: u8 = FRONTENDS | NODE_PORTS | HOST_PORTS;
    /// A port that no frontend has is refused: a ClusterIP, or a LoadBalancer address that no
    /// device of this node has.
    pub const REFUSE: u8 = 0x4;
    /// A ClusterIP: nothing from outside may have it as its source. (Load balancers and hosts with an
    /// external address may send from it.)
    pub const CLUSTER_IP: u8 = 0x8;
    /// HostPorts are served at this address: keys of `FRONTENDS_*` with address zero whose value does not
    /// have [`crate::service::frontend::NODE_PORT`]. Every address of this node has it.
    pub const HOST_PORTS: u8 = 0x10;
    /// What pods send there keeps their address (the setting `non-masquerade-cidrs`). Stands on every
    /// entry that such a range covers.
    pub const NO_MASQUERADE: u8 = 0x20;
}

/// A value of `IPCACHE_V4` and `IPCACHE_V6`. The key is the prefix length in bits (u32, byte
/// order of the machine) followed by the address.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct IpcacheEntry {
    /// One of [`class`].
    pub class: u8,
    /// Bits of [`flag`].
    pub flags: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// Number of the next hop, see [`crate::next_hop`].
    pub next_hop: u32,
    /// Identity for policies, local to this node; 0 is unknown.
    pub identity: u32,
}

assert_abi_size!(IpcacheEntry = 12);
map_types!(IpcacheEntry);
