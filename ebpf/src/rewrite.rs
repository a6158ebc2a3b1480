//! Translation of a packet: addresses and ports in place, checksums by differences that were
//! computed when the flow began.

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::bpf_l4_csum_replace,
    programs::TcContext,
};
use weir_common::{
    DropReason, Port,
    address::Address,
    checksum::{self, Summed},
    flow::{FlowEntry, flag},
    protocol,
};

use crate::{access, family::Family, icmp, packet::Packet, switches};

/// A translation of one direction of a flow.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Rewrite<A> {
    /// New source address.
    pub source: A,
    /// New destination address.
    pub destination: A,
    /// New source port.
    pub source_port: Port,
    /// New destination port.
    pub destination_port: Port,
    /// See [`FlowEntry::address_difference`].
    pub address_difference: u32,
    /// See [`FlowEntry::port_difference`].
    pub port_difference: u32,
    /// See [`FlowEntry::flags`].
    pub flags: u16,
}

impl<A: Address + Summed> Rewrite<A> {
    /// Takes over the translation that an entry holds.
    #[inline(always)]
    pub fn copy_from(&mut self, entry: &FlowEntry<A>) {
        self.source = entry.new_source;
        self.destination = entry.new_destination;
        self.source_port = entry.new_source_port;
        self.destination_port = entry.new_destination_port;
        self.address_difference = entry.address_difference;
        self.port_difference = entry.port_difference;
        self.flags = entry.flags;
    }

    /// Whether anything is rewritten at all.
    #[inline(always)]
    pub fn is_needed(&self) -> bool {
        self.flags & (flag::REWRITE_SOURCE | flag::REWRITE_DESTINATION) != 0
    }

    /// Writes addresses and ports. The layer-4 checksum is wrong until [`Self::fix_checksum`].
    #[inline(always)]
    pub fn write<F: Family<Address = A>>(
        &self,
        ctx: &TcContext,
        packet: &Packet<A>,
    ) -> Result<(), DropReason> {
        F::write_addresses(ctx, self.source, self.destination, self.address_difference)?;
        if self.port_difference != 0 && !packet.is_later_fragment() {
            self.write_ports::<F>(ctx, packet)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn write_ports<F: Family<Address = A>>(
        &self,
        ctx: &TcContext,
        packet: &Packet<A>,
    ) -> Result<(), DropReason> {
        if packet.key.protocol == F::ICMP {
            // The identifier of an echo; the port that it does not stand for is zero.
            let place = packet.l4_offset + icmp::IDENTIFIER;
            let identifier = self.source_port.word() | self.destination_port.word();
            // SAFETY: plain bytes.
            let place = unsafe { access::at::<u16>(ctx, place) }.ok_or(DropReason::Malformed)?;
            // SAFETY: checked by `at`; nobody else holds a reference into the packet.
            unsafe { *place = identifier };
            return Ok(());
        }
        // SAFETY: plain bytes.
        let ports = unsafe { access::at::<[Port; 2]>(ctx, packet.l4_offset) }
            .ok_or(DropReason::Malformed)?;
        // SAFETY: as above.
        unsafe { *ports = [self.source_port, self.destination_port] };
        Ok(())
    }

    /// Brings the layer-4 checksum in line. Invalidates pointers into the packet.
    ///
    /// Two calls when both parts change: a packet whose checksum is left to the device
    /// (`CHECKSUM_PARTIAL`) holds the sum of the pseudo-header only, in which ports have no part.
    #[inline(always)]
    pub fn fix_checksum<F: Family<Address = A>>(
        &self,
        ctx: &TcContext,
        packet: &Packet<A>,
    ) -> Result<(), DropReason> {
        let Some((offset, kind)) = checksum_of(packet) else {
            return Ok(());
        };
        let v6 = if F::NUMBER == 6 {
            switches::csum_ipv6_flag()
        } else {
            0
        };
        // That of ICMP covers no addresses (RFC 792).
        if packet.key.protocol != protocol::ICMP {
            let pseudo = kind | u64::from(BPF_F_PSEUDO_HDR) | v6;
            replace(ctx, offset, self.address_difference, pseudo)?;
        }
        if self.port_difference != 0 {
            replace(ctx, offset, self.port_difference, kind)?;
        }
        Ok(())
    }
}

#[inline(always)]
fn replace(ctx: &TcContext, offset: u32, difference: u32, flags: u64) -> Result<(), DropReason> {
    // SAFETY: the context is valid; the helper checks the offset.
    let result =
        unsafe { bpf_l4_csum_replace(ctx.skb.skb, offset, 0, u64::from(difference), flags) };
    if result == 0 {
        Ok(())
    } else {
        Err(DropReason::ChecksumUpdate)
    }
}

/// Where the checksum of a packet is, and the flag of its kind; `None` if it has none that covers
/// addresses or ports.
#[inline(always)]
fn checksum_of<A: Address>(packet: &Packet<A>) -> Option<(u32, u64)> {
    if packet.is_later_fragment() {
        return None;
    }
    match packet.key.protocol {
        protocol::TCP => Some((packet.l4_offset + 16, 0)),
        protocol::ICMP | protocol::ICMPV6 => Some((packet.l4_offset + 2, 0)),
        // Zero means none (RFC 768) and stays so.
        protocol::UDP => Some((packet.l4_offset + 6, u64::from(BPF_F_MARK_MANGLED_0))),
        _ => None,
    }
}

/// Fills in the differences and flags that follow from old and new tuple.
#[inline(always)]
pub fn complete<A: Address + Summed>(
    entry: &mut FlowEntry<A>,
    key: &weir_common::flow::FlowKey<A>,
) {
    let source = checksum::difference(key.source, entry.new_source);
    let destination = checksum::difference(key.destination, entry.new_destination);
    entry.address_difference = checksum::add(source, destination);
    let mut flags = entry.flags;
    if key.source != entry.new_source || key.source_port != entry.new_source_port {
        flags |= flag::REWRITE_SOURCE;
    }
    if key.destination != entry.new_destination
        || key.destination_port != entry.new_destination_port
    {
        flags |= flag::REWRITE_DESTINATION;
    }
    entry.flags = flags;
    // Zero says that the ports stay as they are; a change of ports never has that difference.
    entry.port_difference = if key.source_port == entry.new_source_port
        && key.destination_port == entry.new_destination_port
    {
        0
    } else {
        let source = checksum::difference(key.source_port, entry.new_source_port);
        let destination = checksum::difference(key.destination_port, entry.new_destination_port);
        checksum::add(source, destination)
    };
}
