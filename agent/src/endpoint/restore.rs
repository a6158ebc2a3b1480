//! Start of the agent: from the files of an earlier one and the devices that exist to the endpoints
//! that live. Called once, before anything else is asked of the manager.

use super::{Endpoint, EndpointError, EndpointManager, EndpointState, StoreError, Wiring};
use crate::netlink::Link;

/// What [`EndpointManager::restore`] found.
#[derive(Debug, Default)]
pub struct RestoreReport {
    /// Endpoints that live, reservations included.
    pub restored: usize,
    /// Endpoints whose device was gone: released.
    pub released: usize,
    /// Files set aside, ranges refused, endpoints that the kernel did not take back (they are tried
    /// again), for people.
    pub problems: Vec<String>,
    /// Devices named and built like ours that no file speaks of: a pod without state.
    pub orphans: Vec<Link>,
}

impl EndpointManager {
    /// Takes over what an earlier agent left. Endpoints whose device is gone are released; those
    /// present are installed again; reservations wait for their plugin. `links`: all devices of
    /// this node.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the directory of the endpoints cannot be read.
    pub async fn restore(
        &mut self,
        links: &[Link],
        wiring: &mut impl Wiring,
        now: u64,
    ) -> Result<RestoreReport, StoreError> {
        let mut report = RestoreReport::default();
        self.restore_allocator(now, &mut report.problems);
        for endpoint in self.store.load_endpoints(&mut report.problems)? {
            if let Err(why) = self.enter(endpoint.clone(), now) {
                let told = self.store.quarantine(&endpoint.spec.key, &why);
                report.problems.push(told);
            }
        }
        let keys: Vec<_> = self.endpoints.keys().cloned().collect();
        for key in keys {
            let Some(endpoint) = self.endpoints.get_mut(&key) else {
                continue;
            };
            let device = links.iter().find(|link| is_device_of(link, endpoint));
            let outcome: Result<(), EndpointError> = match (&endpoint.state, device) {
                (EndpointState::Reserved(_), _) => Ok(()),
                (EndpointState::Ready | EndpointState::Failing(_), Some(link)) => {
                    endpoint.spec.host_ifindex = link.ifindex;
                    self.install_again(&key, wiring).await
                }
                (EndpointState::Removing(_), _) | (_, None) => {
                    let released = self.release_one(&key, wiring, now).await;
                    report.released += usize::from(released.is_ok());
                    released
                }
            };
            if let Err(error) = outcome {
                report.problems.push(error.message);
            }
        }
        if let Err(error) = self.save_allocator() {
            report.problems.push(error.to_string());
        }
        report.restored = self.endpoints.len();
        report.orphans = links
            .iter()
            .filter(|link| is_ours(link) && !self.host_ifnames.contains_key(&link.name))
            .cloned()
            .collect();
        Ok(report)
    }

    fn restore_allocator(&mut self, now: u64, problems: &mut Vec<String>) {
        let state = self.store.load_allocator(problems);
        self.generation = state.generation;
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
        self.generation = self.generation.max(spec.generation);
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
