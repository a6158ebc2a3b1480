//! Tells those who watch (`weir monitor`) of the events in the ring, with the names of pods, Services and devices on
//! them.

use std::{collections::HashMap, net::IpAddr};

use weir_common::{event::Event, metrics::outcome};

use super::{
    Agent,
    names::{Clock, Names},
};
use crate::{api::events, endpoint::EndpointManager};

/// Events handled before other work gets its turn.
const EVENTS_AT_ONCE: usize = 512;

impl Agent {
    /// Tells those who watch of an event, and of those that are there already. Without watchers
    /// events are only taken from the ring. Those left in it wake the loop again.
    pub(super) fn tell(&mut self, first: Event) {
        let watched = self.events.is_watched();
        let clock = Clock::now();
        let mut next = Some(first);
        let mut taken = 1;
        while let Some(event) = next {
            if watched {
                self.describe(&event, clock);
            }
            next = if taken < EVENTS_AT_ONCE {
                self.ring.try_next()
            } else {
                None
            };
            taken += 1;
        }
    }

    fn describe(&mut self, event: &Event, clock: Clock) {
        let device = self.device_name(event.ifindex);
        let pods = self
            .pod_names
            .get_or_insert_with(|| pod_names(&self.endpoints));
        let model = &self.model;
        self.events
            .send(Names { model, pods }.describe(event, device, clock));
    }

    fn device_name(&mut self, ifindex: u32) -> String {
        let name = || {
            nix::net::if_::if_indextoname(ifindex)
                .ok()
                .and_then(|name| name.into_string().ok())
                .filter(|name| !name.is_empty())
                .unwrap_or_else(|| format!("#{ifindex}"))
        };
        self.device_names
            .entry(ifindex)
            .or_insert_with(name)
            .clone()
    }

    /// New flows are told of only while someone wants to hear of them.
    pub(super) fn switch_flow_events(&mut self) {
        let on = self.events.wants_flows();
        if on == self.flow_events {
            return;
        }
        match self.datapath.config_mut().set_new_flow_events(on) {
            Ok(()) => self.flow_events = on,
            Err(error) => tracing::warn!(%error, on, "cannot switch the events for new flows"),
        }
    }

    pub(super) fn tell_lost_events(&mut self) {
        let Ok(counter) = self.datapath.counters().outcome(outcome::EVENT_LOST) else {
            return;
        };
        let lost = counter.packets.saturating_sub(self.events_lost);
        self.events_lost = counter.packets;
        if lost > 0 && self.events.is_watched() {
            self.events.send(events::lost(lost));
        }
    }
}

/// Addresses of the pods of this node with the names of the pods.
fn pod_names(endpoints: &EndpointManager) -> HashMap<IpAddr, String> {
    endpoints
        .list()
        .flat_map(|endpoint| {
            let spec = &endpoint.spec;
            let name = spec.display_name();
            spec.addresses
                .iter()
                .map(move |address| (*address, name.clone()))
        })
        .collect()
}
