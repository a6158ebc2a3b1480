//! Start of the agent: from the files of an earlier one and the devices that exist to the endpoints
//! that live. Called once, before anything else is asked of the manager.

use super::{Endpoint, EndpointKey, EndpointManager, EndpointState, StoreError};
use crate::netlink::Link;

/// What [`EndpointManager::restore`] found.
#[derive(Debug, Default)]
pub struct RestoreReport {
    /// Endpoints whose device exists, and reservations.
    pub living: usize,
    /// Endpoints whose device is gone.
    pub vanished: Vec<EndpointKey>,
    /// Files set aside and ranges refused, for people.
    pub problems: Vec<String>,
    /// Devices named and built like ours that no file speaks of: a pod without state.
    pub orphans: Vec<Link>,
}

impl EndpointManager {
    /// Takes over what an earlier agent left; does not touch the kernel. Once the datapath knows
    /// [`Self::pod_ranges`], [`Self::tick`] installs the endpoints whose device exists and releases
    /// the others; reservations wait for their plugin. `links`: all devices of this node.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the directory of the endpoints cannot be read.
    pub fn restore(&mut self, links: &[Link], now: u64) -> Result<RestoreReport, StoreError> {
        let mut report = RestoreReport::default();
        self.restore_allocator(now, &mut report.problems);
        for endpoint in self.store.load_endpoints(&mut report.problems)? {
            let key = endpoint.spec.key.clone();
            if let Err(why) = self.enter(endpoint, now) {
                report.problems.push(self.store.quarantine(&key, &why));
            }
        }
        for (key, endpoint) in &mut self.endpoints {
            let device = links.iter().find(|link| is_device_of(link, endpoint));
            endpoint.spec.host_ifindex = device.map_or(0, |link| link.ifindex);
            match (&endpoint.state, device) {
                (EndpointState::Reserved(_), _) => report.living += 1,
                (EndpointState::Removing(_), _) => {}
                (EndpointState::Ready | EndpointState::Failing(_), Some(_)) => {
                    let why = "not installed since the agent started";
                    endpoint.state = EndpointState::Failing(why.into());
                    report.living += 1;
                }
                (EndpointState::Ready | EndpointState::Failing(_), None) => {
                    endpoint.state = EndpointState::Removing("its device is gone".into());
                    report.vanished.push(key.clone());
                }
            }
        }
        report.orphans = links
            .iter()
            .filter(|link| is_ours(link) && !self.host_ifnames.contains_key(&link.name))
            .cloned()
            .collect();
        if let Err(error) = self.save_allocator() {
            report.problems.push(error.to_string());
        }
        Ok(report)
    }

    fn restore_allocator(&mut self, now: u64, problems: &mut Vec<String>) {
        let state = self.store.load_allocator(problems);
        self.numbers.set_cursor(state.next_number);
        for (number, released) in state.resting_numbers {
            self.numbers.restore_resting(number, released, now);
        }
        let errors = self.ipam.restore(&state.ipam, now);
        problems.extend(errors.iter().map(ToString::to_string));
    }

    /// Enters an endpoint from its file, if nothing of it is another's.
    fn enter(&mut self, mut endpoint: Endpoint, now: u64) -> Result<(), String> {
        if let EndpointState::Reserved(since) = &mut endpoint.state {
            // Of another clock: counts from now.
            *since = (*since).min(now);
        }
        let spec = &endpoint.spec;
        if let Some(other) = self.host_ifnames.get(&spec.host_ifname) {
            return Err(format!(
                "device {} belongs to {other} already",
                spec.host_ifname
            ));
        }
        for &range in &spec.ranges {
            self.ipam
                .adopt_range(range)
                .map_err(|error| error.to_string())?;
        }
        if !self.numbers.reserve(spec.number) {
            return Err(format!("number {} belongs to another already", spec.number));
        }
        for (done, &address) in spec.addresses.iter().enumerate() {
            if let Err(error) = self.ipam.reserve(address) {
                self.numbers.cancel(spec.number);
                for &address in &spec.addresses[..done] {
                    self.ipam.cancel(address);
                }
                return Err(error.to_string());
            }
        }
        self.insert(endpoint);
        Ok(())
    }
}

fn is_device_of(link: &Link, endpoint: &Endpoint) -> bool {
    link.name == endpoint.spec.host_ifname
        && link.mac.is_none_or(|mac| mac == endpoint.spec.host_mac().0)
}

fn is_ours(link: &Link) -> bool {
    link.kind == "veth"
        && link.name.len() == 15
        && link
            .name
            .strip_prefix("weir")
            .is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_hexdigit()))
}
