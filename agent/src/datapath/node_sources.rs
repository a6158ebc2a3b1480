//! Addresses of this node that connections are translated to, and which of them the node has lost. A connection
//! goes on with the address that it began with, as its other side knows no other; once the node has lost that address,
//! nothing comes back. [`FlowSweeper`](super::FlowSweeper) meets such connections on its walk, and removes them after a
//! while; the next packet of a flow of UDP then gets an address that the node has.
//!
//! The pauses are for addresses that come back: network managers flush a device and configure it again, and a DHCP
//! client that is restarted asks for the lease that it had. TCP and SCTP repeat what is lost meanwhile, and could not go on from
//! another address anyway: they wait for a minute, which is longer than a DHCP client takes that has to begin anew, and harms
//! nobody. UDP and echoes lose what they send meanwhile, and go on from another address: they wait for a few seconds
//! only, in which a device is usually configured again.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use weir_common::{
    flow::{self, TICKS_PER_SECOND},
    protocol,
};

/// Ticks that a flow without a connection of its own waits for its address.
const PAUSE: u32 = 3 * TICKS_PER_SECOND;
/// Ticks that a connection of TCP or SCTP waits for its address.
const LONG_PAUSE: u32 = 60 * TICKS_PER_SECOND;

/// What is known of an address in use that stands on no device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fate {
    /// The kernel is to be asked. It was not the node's since this time in ticks, when it was asked before.
    Doubtful(Option<u32>),
    /// It is the node's by a route (`ip route add local`).
    Routed,
    /// It is not the node's, since this time in ticks.
    Lost(u32),
}

#[derive(Clone, Copy, Debug)]
struct Missing {
    fate: Fate,
    /// The walk under way has met it.
    is_used: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct NodeSources {
    /// Addresses on devices of this node; `None` while they are not known.
    own: Option<BTreeSet<IpAddr>>,
    missing: BTreeMap<IpAddr, Missing>,
}

impl NodeSources {
    /// The addresses that stand on devices of this node now, on whichever.
    pub fn set_own(&mut self, own: BTreeSet<IpAddr>) {
        self.missing.retain(|address, _| !own.contains(address));
        for missing in self.missing.values_mut() {
            // Routes may have come and gone with the addresses.
            missing.fate = match missing.fate {
                Fate::Doubtful(since) => Fate::Doubtful(since),
                Fate::Routed => Fate::Doubtful(None),
                Fate::Lost(since) => Fate::Doubtful(Some(since)),
            };
        }
        self.own = Some(own);
    }

    /// Addresses in use that stand on no device: [`Self::settle`] wants to know whether they are the node's all the
    /// same.
    pub fn doubtful(&self) -> BTreeSet<IpAddr> {
        let doubtful = self.missing.iter();
        doubtful
            .filter(|(_, missing)| matches!(missing.fate, Fate::Doubtful(_)))
            .map(|(address, _)| *address)
            .collect()
    }

    /// Whether the node takes packets for a doubtful address, as its routes say at the time `now` in ticks.
    pub fn settle(&mut self, address: IpAddr, is_local: bool, now: u32) {
        if let Some(missing) = self.missing.get_mut(&address)
            && let Fate::Doubtful(since) = missing.fate
        {
            missing.fate = if is_local {
                Fate::Routed
            } else {
                Fate::Lost(since.unwrap_or(now))
            };
        }
    }

    /// Whether the kernel has said already that the node no longer has an address.
    pub fn is_known_to_be_missing(&self, address: IpAddr) -> bool {
        let missing = self.missing.get(&address);
        missing.is_some_and(|m| matches!(m.fate, Fate::Doubtful(Some(_)) | Fate::Lost(_)))
    }

    /// Notes that a connection is translated to an address, and gives whether it has waited for long enough that the
    /// node gets the address back.
    pub(super) fn is_lost(&mut self, source: IpAddr, protocol: u8, now: u32) -> bool {
        let Some(own) = &self.own else { return false };
        if own.contains(&source) {
            return false;
        }
        let missing = self.missing.entry(source).or_insert(Missing {
            fate: Fate::Doubtful(None),
            is_used: true,
        });
        missing.is_used = true;
        let pause = match protocol {
            protocol::TCP | protocol::SCTP => LONG_PAUSE,
            _ => PAUSE,
        };
        match missing.fate {
            Fate::Doubtful(_) | Fate::Routed => false,
            Fate::Lost(since) => flow::age(now, since) >= pause,
        }
    }

    /// A walk is at its end: what it has not met is used no more.
    pub(super) fn end_walk(&mut self) {
        self.missing
            .retain(|_, missing| std::mem::take(&mut missing.is_used));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u32 = TICKS_PER_SECOND;

    fn set(addresses: &[&str]) -> BTreeSet<IpAddr> {
        addresses.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn an_address_is_waited_for_before_it_is_lost() {
        for (old, new) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
            let address: IpAddr = old.parse().unwrap();
            let mut sources = NodeSources::default();
            let lost = |sources: &mut NodeSources, now| {
                [protocol::UDP, protocol::ICMP, protocol::TCP, protocol::SCTP]
                    .map(|protocol| sources.is_lost(address, protocol, now))
            };
            assert_eq!(lost(&mut sources, 0), [false; 4], "nothing is known yet");
            sources.set_own(set(&[old]));
            assert_eq!(lost(&mut sources, 0), [false; 4]);
            assert!(sources.doubtful().is_empty());
            sources.set_own(set(&[new]));
            assert_eq!(lost(&mut sources, 100 * SECOND), [false; 4]);
            assert_eq!(sources.doubtful(), set(&[old]));
            sources.settle(address, false, 100 * SECOND);
            assert!(sources.doubtful().is_empty());
            assert_eq!(lost(&mut sources, 103 * SECOND - 1), [false; 4]);
            let first = [true, true, false, false];
            assert_eq!(lost(&mut sources, 103 * SECOND), first);
            assert_eq!(lost(&mut sources, 160 * SECOND - 1), first);
            assert_eq!(lost(&mut sources, 160 * SECOND), [true; 4]);
            // It is back, on whichever device, and goes again later.
            sources.set_own(set(&[old, new]));
            assert_eq!(lost(&mut sources, 170 * SECOND), [false; 4]);
            sources.set_own(set(&[new]));
            assert_eq!(lost(&mut sources, 200 * SECOND), [false; 4]);
            sources.settle(address, false, 200 * SECOND);
            assert_eq!(lost(&mut sources, 201 * SECOND), [false; 4]);
        }
    }

    #[test]
    fn an_address_by_a_route_is_the_node_s_until_the_network_changes() {
        let address: IpAddr = "203.0.113.1".parse().unwrap();
        let mut sources = NodeSources::default();
        sources.set_own(BTreeSet::new());
        sources.is_lost(address, protocol::UDP, 0);
        sources.settle(address, true, 0);
        assert!(!sources.is_lost(address, protocol::UDP, 900 * SECOND));
        assert!(sources.doubtful().is_empty());
        sources.set_own(BTreeSet::new());
        assert_eq!(sources.doubtful(), set(&["203.0.113.1"]));
    }

    #[test]
    fn an_address_that_is_lost_is_asked_about_again_and_waits_no_longer_for_that() {
        for text in ["203.0.113.1", "2001:db8::1"] {
            let address: IpAddr = text.parse().unwrap();
            let mut sources = NodeSources::default();
            sources.set_own(BTreeSet::new());
            sources.is_lost(address, protocol::UDP, 0);
            assert!(!sources.is_known_to_be_missing(address));
            sources.settle(address, false, 0);
            assert!(sources.is_lost(address, protocol::UDP, 3 * SECOND));
            // Something has changed, but not that.
            sources.set_own(BTreeSet::new());
            sources.set_own(BTreeSet::new());
            assert_eq!(sources.doubtful(), set(&[text]));
            assert!(sources.is_known_to_be_missing(address));
            assert!(!sources.is_lost(address, protocol::UDP, 4 * SECOND));
            sources.settle(address, false, 4 * SECOND);
            assert!(sources.is_lost(address, protocol::UDP, 4 * SECOND));
            // A route brings it back.
            sources.set_own(BTreeSet::new());
            sources.settle(address, true, 5 * SECOND);
            assert!(!sources.is_lost(address, protocol::UDP, 900 * SECOND));
            // Lost once more, it is waited for anew.
            sources.set_own(BTreeSet::new());
            sources.settle(address, false, 901 * SECOND);
            assert!(!sources.is_lost(address, protocol::UDP, 902 * SECOND));
        }
    }

    #[test]
    fn what_nobody_uses_is_forgotten() {
        let mut sources = NodeSources::default();
        sources.set_own(BTreeSet::new());
        sources.is_lost("192.0.2.1".parse().unwrap(), protocol::UDP, 0);
        sources.end_walk();
        assert_eq!(sources.doubtful(), set(&["192.0.2.1"]));
        sources.end_walk();
        assert!(sources.doubtful().is_empty());
    }
}
