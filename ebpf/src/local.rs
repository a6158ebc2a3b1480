//! Endpoints of this node: who sent a packet, and whether an address is a pod's.

use aya_ebpf::programs::TcContext;
use weir_common::{
    DropReason, MacAddress,
    config::Config,
    endpoint::{self, Endpoint},
    lookup::Lookup,
};

use crate::{
    access,
    family::{Family, InPodRange},
    maps,
};

/// An endpoint and its number.
#[derive(Clone, Copy)]
pub struct Local {
    /// Number.
    pub number: u32,
    /// Row.
    pub row: &'static Endpoint,
}

/// The node's configuration.
#[inline(always)]
pub fn config() -> Result<&'static Config, DropReason> {
    maps::CONFIG.get(0).ok_or(DropReason::MissingConfig)
}

/// The endpoint on whose device the program runs. `mac` is the address in the packet that carries
/// its number, with `prefix`; a packet that carries another (broadcast, ARP, a foreign address) is found
/// by the device.
#[inline(always)]
pub fn of_device(ctx: &TcContext, prefix: [u8; 2], mac: MacAddress) -> Result<Local, DropReason> {
    let ifindex = access::ifindex(ctx);
    let number = endpoint::number_of_mac(prefix, mac);
    if number != 0 {
        return match by_number(number) {
            Some(local) if local.row.ifindex == ifindex => Ok(local),
            _ => Err(DropReason::InvalidSourceMac),
        };
    }
    maps::count_lookup(Lookup::EndpointByIfindex);
    // SAFETY: the value is a word, read at once.
    let number = unsafe { maps::ENDPOINT_BY_IFINDEX.get(ifindex) }
        .copied()
        .unwrap_or(0);
    match by_number(number) {
        Some(local) if local.row.ifindex == ifindex => Ok(local),
        _ => Err(DropReason::StaleEndpoint),
    }
}

/// The endpoint of a number, if there is one now.
#[inline(always)]
pub fn by_number(number: u32) -> Option<Local> {
    if number == 0 {
        return None;
    }
    let row = maps::ENDPOINTS.get(number)?;
    if row.ifindex == 0 {
        None
    } else {
        Some(Local { number, row })
    }
}

/// The endpoint that has an address.
#[inline(always)]
pub fn by_address<F: Family>(config: &Config, address: F::Address) -> Option<Local> {
    let InPodRange::Row(row) = F::in_pod_range(config, address) else {
        return None;
    };
    let number = *F::local_addresses().get(row)?;
    let local = by_number(number)?;
    if F::endpoint_address(local.row) == address {
        Some(local)
    } else {
        None
    }
}

/// Whether an endpoint has entries in the flow table, so that its packets must ask there.
#[inline(always)]
pub fn has_flows(number: u32) -> bool {
    maps::ENDPOINT_FLOWS
        .get(number)
        .is_some_and(|flows| *flows != 0)
}

/// Notes that an endpoint has entries in the flow table.
#[inline(always)]
pub fn note_flows(number: u32) {
    if let Some(flows) = maps::ENDPOINT_FLOWS.get_ptr_mut(number) {
        // SAFETY: a word of an array; every writer in the kernel writes the same value.
        unsafe {
            if *flows == 0 {
                *flows = 1;
            }
        }
    }
}
