//! Service tables: `frontends` → row of `service_state` → `slots` → `backends`.
//!
//! A Service port has a number and, for each traffic policy, a set of endpoints
//! ([`endpoint_set`]): `SERVICE_STATE` has a row for each set. The word that stands there is the
//! one switch of the set: it names the region of slots and with it all its endpoints, for all
//! frontends that lead to it at once.

use crate::{Ipv6, Port, address::Address, assert_abi_size, limits, map_types};

/// Whom a frontend serves. Stored as a byte.
pub mod scope {
    /// Clients in pods of this node and the node itself.
    pub const INSIDE: u8 = 0;
    /// Clients beyond the node's devices.
    pub const OUTSIDE: u8 = 1;
}

/// The sets of endpoints of a Service port, by the traffic policy that a frontend has
/// (`internalTrafficPolicy` and `externalTrafficPolicy` of the Service).
pub mod endpoint_set {
    /// Policy `Cluster`: endpoints everywhere, as far as topology hints do not take some out.
    pub const CLUSTER: u32 = 0;
    /// Policy `Local`: endpoints of this node.
    pub const LOCAL: u32 = 1;
    /// Sets of one Service port.
    pub const COUNT: u32 = 2;
}

/// The row of `SERVICE_STATE` of one set of Service port `number`.
#[inline(always)]
#[must_use]
pub const fn state_row(number: u32, set: u32) -> u32 {
    number * endpoint_set::COUNT + set
}

/// The number of the Service port that a row of `SERVICE_STATE`, or a value of `FRONTENDS_*`, belongs to.
#[inline(always)]
#[must_use]
pub const fn service_port_of_row(row: u32) -> u32 {
    (row & frontend::ROW_MASK) / endpoint_set::COUNT
}

/// A value of `FRONTENDS_V4` and `FRONTENDS_V6`: a word, the row of `SERVICE_STATE` ([`state_row`]) and
/// these bits above it.
pub mod frontend {
    /// Bits of the row.
    pub const ROW_MASK: u32 = 0x00ff_ffff;
    /// A client must be in one of the Service port's ranges (`SOURCE_RANGES_*`).
    pub const SOURCE_RANGES: u32 = 0x8000_0000;
    /// A NodePort, served at addresses with [`crate::ipcache::flag::NODE_PORTS`]. Without it a key with
    /// address zero is a HostPort.
    pub const NODE_PORT: u32 = 0x4000_0000;
}

/// A key of `SOURCE_RANGES_V4` and `_V6` (longest prefix): the prefix length in bits (u32, byte order of
/// the machine) followed by this. The first 32 bits of a prefix are the number of the Service port, so its
/// length is 32 and that of the range. The value is a word without meaning.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct SourceRangeKey<A> {
    /// Number of the Service port, network byte order.
    pub service_port: [u8; 4],
    /// Address of the client, or of the range.
    pub address: A,
}

assert_abi_size!(SourceRangeKey<crate::Ipv4> = 8, SourceRangeKey<Ipv6> = 20);
map_types!(SourceRangeKey<crate::Ipv4>, SourceRangeKey<Ipv6>);

/// A key of `FRONTENDS_V4` and `FRONTENDS_V6`; the value is a word, see [`frontend`].
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct FrontendKey<A> {
    /// Address of the Service. Zero: every address that the ipcache marks with
    /// [`crate::ipcache::flag::NODE_PORTS`], for NodePorts and HostPorts.
    pub address: A,
    /// Port of the Service.
    pub port: Port,
    /// IANA protocol number.
    pub protocol: u8,
    /// One of [`scope`].
    pub scope: u8,
}

assert_abi_size!(FrontendKey<crate::Ipv4> = 8, FrontendKey<Ipv6> = 20);
map_types!(FrontendKey<crate::Ipv4>, FrontendKey<Ipv6>);

/// A row of `SERVICE_STATE`, one aligned word that is read and written at once:
///
/// | bits | meaning |
/// |---|---|
/// | 0..32 | first slot of the region, counted over all chunks |
/// | 32..52 | slots in the region; 0: the Service port has no endpoint |
/// | 52..64 | [`flag`]s |
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ServiceState(pub u64);

assert_abi_size!(ServiceState = 8);
map_types!(ServiceState);

/// Bits of [`ServiceState::flags`].
pub mod flag {
    /// The row is in use. A frontend whose row does not have it is about to go away.
    pub const IN_USE: u16 = 0x001;
    /// `sessionAffinity: ClientIP`: look in `AFFINITY` first. Both sets of a Service port have it.
    pub const AFFINITY: u16 = 0x002;
}

impl ServiceState {
    /// A word from its parts. `slots` is at most [`limits::SLOTS_PER_CHUNK`].
    #[must_use]
    pub const fn new(first_slot: u32, slots: u32, flags: u16) -> Self {
        Self(first_slot as u64 | ((slots as u64 & 0xf_ffff) << 32) | ((flags as u64 & 0xfff) << 52))
    }

    /// First slot of the region, counted over all chunks.
    #[inline(always)]
    #[must_use]
    pub const fn first_slot(self) -> u32 {
        self.0 as u32
    }

    /// Slots in the region.
    #[inline(always)]
    #[must_use]
    pub const fn slots(self) -> u32 {
        (self.0 >> 32) as u32 & 0xf_ffff
    }

    /// One or more of [`flag`].
    #[inline(always)]
    #[must_use]
    pub const fn flags(self) -> u16 {
        (self.0 >> 52) as u16
    }

    /// Where the slot that `hash` chooses stands, or `None` if there is no endpoint.
    #[inline(always)]
    #[must_use]
    pub const fn slot_for(self, hash: u32) -> Option<SlotIndex> {
        let slots = self.slots();
        if slots == 0 {
            return None;
        }
        // Multiply and shift instead of modulo: even, and without a division.
        let offset = ((hash as u64 * slots as u64) >> 32) as u32;
        Some(SlotIndex::new(self.first_slot().wrapping_add(offset)))
    }
}

/// The place of a slot: chunk (inner map), element in the chunk, and which half of the element.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SlotIndex {
    /// Index in the outer map.
    pub chunk: u32,
    /// Index in the inner map, whose elements are `u64`.
    pub element: u32,
    /// Bits that the element is shifted right by: 0 or 32.
    pub shift: u32,
}

impl SlotIndex {
    /// From the number of the slot over all chunks.
    #[inline(always)]
    #[must_use]
    pub const fn new(slot: u32) -> Self {
        let in_chunk = slot % limits::SLOTS_PER_CHUNK;
        Self {
            chunk: slot / limits::SLOTS_PER_CHUNK,
            element: in_chunk / limits::SLOTS_PER_ELEMENT,
            shift: (in_chunk % limits::SLOTS_PER_ELEMENT) * 32,
        }
    }
}

/// Elements of one chunk.
pub const ELEMENTS_PER_CHUNK: u32 = limits::SLOTS_PER_CHUNK / limits::SLOTS_PER_ELEMENT;

/// What a backend is for. Stored as a byte.
pub mod backend_state {
    /// Free row: a flow that points here is stale.
    pub const FREE: u8 = 0;
    /// Takes new connections.
    pub const ACTIVE: u8 = 1;
    /// Serves and terminates; takes new connections only while nothing else is ready.
    pub const TERMINATING: u8 = 2;
}

/// A row of `BACKENDS`: one endpoint of one Service port. Row 0 is never used.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Backend {
    /// Address in the shared form.
    pub address: Ipv6,
    /// Port.
    pub port: Port,
    /// One of [`backend_state`].
    pub state: u8,
    /// The sets it belongs to: bit [`endpoint_set::CLUSTER`], bit [`endpoint_set::LOCAL`].
    pub sets: u8,
    /// Raised each time the row is given to another endpoint or freed. UDP compares it at every
    /// packet, TCP when a connection is opened.
    pub generation: u32,
    /// Number of the Service port it belongs to.
    pub service_port: u32,
    /// Zero; room for node and zone.
    pub reserved2: u32,
}

assert_abi_size!(Backend = 32);
map_types!(Backend);

/// The part of a [`Backend`] that changes in one store: its second third, bytes 16 to 23.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BackendWord {
    /// See [`Backend::port`].
    pub port: Port,
    /// See [`Backend::state`].
    pub state: u8,
    /// See [`Backend::sets`].
    pub sets: u8,
    /// See [`Backend::generation`].
    pub generation: u32,
}

assert_abi_size!(BackendWord = 8);
const _: () = assert!(core::mem::offset_of!(Backend, port) == BackendWord::OFFSET);
const _: () = assert!(core::mem::offset_of!(Backend, generation) == BackendWord::OFFSET + 4);

impl BackendWord {
    /// Where it stands in a row, bytes.
    pub const OFFSET: usize = 16;

    /// From the word as it stands in memory.
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        let b = word.to_ne_bytes();
        Self {
            port: Port([b[0], b[1]]),
            state: b[2],
            sets: b[3],
            generation: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        }
    }
}

impl Backend {
    /// The address, as its family has it.
    #[inline(always)]
    #[must_use]
    pub fn address<A: Address>(&self) -> A {
        A::from_shared(self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_keeps_its_parts() {
        let state = ServiceState::new(u32::MAX, 65_536, flag::IN_USE);
        assert_eq!(state.first_slot(), u32::MAX);
        assert_eq!(state.slots(), 65_536);
        assert_eq!(state.flags(), flag::IN_USE);
    }

    #[test]
    fn every_slot_of_a_region_is_chosen_and_none_beyond() {
        let state = ServiceState::new(131_070, 2, 0);
        assert_eq!(
            state.slot_for(0),
            Some(SlotIndex {
                chunk: 1,
                element: 32_767,
                shift: 0
            })
        );
        assert_eq!(
            state.slot_for(u32::MAX),
            Some(SlotIndex {
                chunk: 1,
                element: 32_767,
                shift: 32
            })
        );
        assert_eq!(ServiceState::new(5, 0, 1).slot_for(7), None);
    }
}
