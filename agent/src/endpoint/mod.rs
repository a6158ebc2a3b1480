//! The pods attached to this node: their numbers, addresses, files and state. The kernel is reached
//! through [`Wiring`] only; the agent's event loop is the one caller, so that nothing here is
//! shared. An endpoint is reserved (`allocate`), wired by the CNI plugin, then `commit`ted; it goes
//! by `release`, or because its device is gone.
//!
//! Times are seconds of [`boot_seconds`], or of any clock that never goes back and outlives the agent.

mod error;
mod host_port;
mod restore;
mod spec;
mod store;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use ipnet::IpNet;
use weir_common::limits::ENDPOINTS_MAX;

use self::store::{AllocatorState, Store};
pub use self::{
    error::{EndpointError, ErrorKind},
    host_port::HostPort,
    restore::RestoreReport,
    spec::{AllocateRequest, Endpoint, EndpointKey, EndpointSpec, EndpointState},
    store::StoreError,
};
use crate::ipam::{Ipam, IpamError, Pool};

/// Seconds after which a reservation that nobody committed is dropped.
pub const RESERVATION_SECONDS: u64 = 60;

/// What the kernel side failed with.
pub type WiringError = Box<dyn std::error::Error + Send + Sync>;

/// The kernel's side of an endpoint. Both calls are idempotent.
pub trait Wiring {
    /// Attaches the programs to the host side of the veth pair, enters the endpoint in the tables,
    /// makes the host's routes, neighbours and sysctls. The endpoint's `host_ifindex` is set.
    fn install(&mut self, endpoint: &EndpointSpec)
    -> impl Future<Output = Result<(), WiringError>>;

    /// The reverse, the device included if it still exists. The endpoint may never have been installed,
    /// or have been removed already. Its `host_ifindex` is 0 when it was never committed (the
    /// device, if any, has its `host_ifname` and host MAC) and when the device is known to be gone.
    fn remove(&mut self, endpoint: &EndpointSpec) -> impl Future<Output = Result<(), WiringError>>;
}

/// Counts for `weir status`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Usage {
    /// Addresses in use, over all families.
    pub addresses_used: u32,
    /// Addresses resting, over all families.
    pub addresses_resting: u32,
    /// Endpoint numbers in use.
    pub numbers_used: u32,
}

/// Seconds since the machine started (`CLOCK_BOOTTIME`): goes on over suspends and restarts of the
/// agent, and begins anew together with the run directory.
#[must_use]
pub fn boot_seconds() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_or(0, |time| time.tv_sec().unsigned_abs())
}

/// Owner of all endpoints of this node.
#[derive(Debug)]
pub struct EndpointManager {
    store: Store,
    ipam: Ipam,
    numbers: Pool,
    rest: u64,
    mtu: u32,
    endpoints: BTreeMap<EndpointKey, Endpoint>,
    /// Host interface names in use: two keys may hash alike.
    host_ifnames: HashMap<String, EndpointKey>,
}

impl EndpointManager {
    /// A manager that keeps its files in `run_dir` (made when missing). `rest`: seconds that a
    /// released number or address is left alone; `mtu`: of the pods' devices, bytes. Call
    /// [`Self::restore`] before anything else, then [`Self::tick`].
    ///
    /// # Errors
    ///
    /// [`StoreError`] if the directory cannot be made.
    pub fn new(run_dir: &Path, rest: u64, mtu: u32) -> Result<Self, StoreError> {
        Ok(Self {
            store: Store::open(run_dir)?,
            ipam: Ipam::new(rest),
            numbers: Pool::new(1, ENDPOINTS_MAX),
            rest,
            mtu,
            endpoints: BTreeMap::new(),
            host_ifnames: HashMap::new(),
        })
    }

    /// Sets the node's pod ranges; see [`Ipam::set_ranges`]. Pods keep their addresses. The datapath
    /// has to learn [`Self::pod_ranges`] before the next `commit`.
    pub fn set_ranges(&mut self, ranges: &[IpNet]) -> Vec<IpamError> {
        self.ipam.set_ranges(ranges)
    }

    /// Ranges that pods of this node have addresses of or will have, those included that left the
    /// node and only wait for their last pod.
    pub fn pod_ranges(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.ipam.ranges().map(|range| range.network)
    }

    /// Sets the MTU of later pods' devices, bytes.
    pub fn set_mtu(&mut self, mtu: u32) {
        self.mtu = mtu;
    }

    /// The allocator of addresses, to look at.
    #[must_use]
    pub fn ipam(&self) -> &Ipam {
        &self.ipam
    }

    /// All endpoints, by container and interface.
    pub fn list(&self) -> impl ExactSizeIterator<Item = &Endpoint> + '_ {
        self.endpoints.values()
    }

    /// One endpoint.
    #[must_use]
    pub fn get(&self, key: &EndpointKey) -> Option<&Endpoint> {
        self.endpoints.get(key)
    }

    /// The endpoint behind a device of this node.
    #[must_use]
    pub fn by_host_ifindex(&self, ifindex: u32) -> Option<&Endpoint> {
        self.endpoints
            .values()
            .find(|endpoint| ifindex != 0 && endpoint.spec.host_ifindex == ifindex)
    }

    /// The endpoints to which ports of the node lead now: committed, and not on their way out.
    pub fn with_host_ports(&self) -> impl Iterator<Item = &EndpointSpec> + '_ {
        self.endpoints
            .values()
            .filter(|endpoint| match endpoint.state {
                EndpointState::Ready | EndpointState::Failing(_) => true,
                EndpointState::Reserved(_) | EndpointState::Removing(_) => false,
            })
            .map(|endpoint| &endpoint.spec)
            .filter(|spec| !spec.host_ports.is_empty())
    }

    /// Counts for `weir status`.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.ipam.ranges().fold(
            Usage {
                numbers_used: self.numbers.used(),
                ..Usage::default()
            },
            |usage, range| Usage {
                addresses_used: usage.addresses_used + range.used,
                addresses_resting: usage.addresses_resting + range.resting,
                ..usage
            },
        )
    }

    /// Reserves a number, addresses and names. Asked again for the same container and interface it
    /// answers the same.
    ///
    /// # Errors
    ///
    /// `Invalid` for a name that cannot be one, `Conflict` when another endpoint has one of the host
    /// ports, `NotReady` without pod ranges, `Exhausted` without free numbers or addresses, `Internal` when the state cannot be saved or an earlier endpoint
    /// of the same name cannot be removed. Nothing is kept then.
    pub async fn allocate(
        &mut self,
        request: &AllocateRequest,
        wiring: &mut impl Wiring,
        now: u64,
    ) -> Result<EndpointSpec, EndpointError> {
        let key = EndpointKey::new(&request.container_id, &request.ifname);
        key.validate()?;
        self.check_host_ports(&key, &request.host_ports)?;
        match self.endpoints.get(&key).map(|endpoint| &endpoint.state) {
            None => {}
            Some(EndpointState::Removing(_)) => self.release_one(&key, wiring, now).await?,
            Some(_) => return self.allocate_again(&key, request, now),
        }
        self.check_file_name(&key)?;

        let spec = self.reserve_parts(key, request, now)?;
        let endpoint = Endpoint {
            spec: spec.clone(),
            state: EndpointState::Reserved(now),
        };
        if let Err(error) = self
            .store
            .save_endpoint(&endpoint)
            .and_then(|()| self.save_allocator())
        {
            // The reservation was not told to anybody; its file, if any, is read as one that was never
            // committed.
            let _ = self.store.remove_endpoint(&spec.key);
            self.give_back_unseen(&spec);
            return Err(EndpointError::internal(error.to_string()));
        }
        self.insert(endpoint);
        Ok(spec)
    }

    /// Takes an endpoint into the kernel: its veth pair is wired. Idempotent.
    ///
    /// # Errors
    ///
    /// `Invalid` for index 0, `NotFound` without a reservation, `Internal` when the kernel or the
    /// file system refuses; the reservation stays then, until it is released or too old.
    pub async fn commit(
        &mut self,
        key: &EndpointKey,
        host_ifindex: u32,
        netns_cookie: u64,
        wiring: &mut impl Wiring,
        now: u64,
    ) -> Result<(), EndpointError> {
        if host_ifindex == 0 {
            return Err(EndpointError::new(
                ErrorKind::Invalid,
                format!("host_ifindex of {key} is 0; it is the index of the host side of its veth"),
            ));
        }
        let Some(endpoint) = self.endpoints.get_mut(key) else {
            return Err(EndpointError::new(
                ErrorKind::NotFound,
                format!("nothing is reserved for {key}; call Allocate first"),
            ));
        };
        if let EndpointState::Removing(why) = &endpoint.state {
            return Err(EndpointError::internal(format!(
                "{key} is being removed: {why}; release it, then call Allocate again"
            )));
        }
        // A former device of that name is gone: names are unique, and the plugin made this one.
        endpoint.spec.host_ifindex = host_ifindex;
        endpoint.spec.netns_cookie = netns_cookie;
        endpoint.state = EndpointState::Ready;
        // Saved before it is installed: after a crash in between it is installed again.
        let installed = match self.store.save_endpoint(endpoint) {
            Ok(()) => wiring
                .install(&endpoint.spec)
                .await
                .map_err(|error| format!("cannot attach {key} to the datapath: {error}")),
            Err(error) => Err(error.to_string()),
        };
        if let Err(why) = installed {
            endpoint.state = EndpointState::Reserved(now);
            // If this fails too the file says 'ready', and the next start tries again.
            let _ = self.store.save_endpoint(endpoint);
            return Err(EndpointError::internal(why));
        }
        Ok(())
    }

    /// Forgets an interface, or every interface of the container when `ifname` is empty. Succeeds
    /// also when nothing is known of it.
    ///
    /// # Errors
    ///
    /// `Internal` when the kernel or the file system refuses; the endpoint is kept as
    /// [`EndpointState::Removing`] and [`Self::tick`] tries again. The others of the container are
    /// released all the same.
    pub async fn release(
        &mut self,
        container_id: &str,
        ifname: &str,
        wiring: &mut impl Wiring,
        now: u64,
    ) -> Result<(), EndpointError> {
        let keys: Vec<EndpointKey> = self
            .endpoints
            .keys()
            .filter(|key| {
                key.container_id == container_id && (ifname.is_empty() || key.ifname == ifname)
            })
            .cloned()
            .collect();
        self.release_all(keys, wiring, now).await
    }

    /// A device of this node is gone; if a pod was behind it, so is the pod. Returns which.
    ///
    /// # Errors
    ///
    /// As [`Self::release`].
    pub async fn link_removed(
        &mut self,
        ifindex: u32,
        wiring: &mut impl Wiring,
        now: u64,
    ) -> Result<Option<EndpointSpec>, EndpointError> {
        let Some(spec) = self.by_host_ifindex(ifindex).map(|e| e.spec.clone()) else {
            return Ok(None);
        };
        if let Some(endpoint) = self.endpoints.get_mut(&spec.key) {
            // Another device may get the index before we are done.
            endpoint.spec.host_ifindex = 0;
        }
        self.release_one(&spec.key, wiring, now).await?;
        Ok(Some(spec))
    }

    /// Something of an endpoint is missing in the kernel: the next [`Self::tick`] installs it again.
    pub fn suspect(&mut self, key: &EndpointKey, why: &str) {
        if let Some(endpoint) = self.endpoints.get_mut(key)
            && endpoint.state == EndpointState::Ready
        {
            endpoint.state = EndpointState::Failing(why.to_owned());
        }
    }

    /// To be called after [`Self::restore`] and every few seconds: installs and releases what that found, drops reservations that nobody committed in
    /// [`RESERVATION_SECONDS`], and tries again what the kernel refused. Returns what it still refuses.
    pub async fn tick(&mut self, wiring: &mut impl Wiring, now: u64) -> Vec<EndpointError> {
        let mut release = Vec::new();
        let mut install = Vec::new();
        for (key, endpoint) in &self.endpoints {
            match endpoint.state {
                EndpointState::Reserved(since)
                    if since.saturating_add(RESERVATION_SECONDS) <= now =>
                {
                    release.push(key.clone());
                }
                EndpointState::Removing(_) => release.push(key.clone()),
                EndpointState::Failing(_) => install.push(key.clone()),
                EndpointState::Reserved(_) | EndpointState::Ready => {}
            }
        }
        let mut errors = Vec::new();
        for key in release {
            errors.extend(self.release_one(&key, wiring, now).await.err());
        }
        for key in install {
            errors.extend(self.install_again(&key, wiring).await.err());
        }
        errors
    }

    fn allocate_again(
        &mut self,
        key: &EndpointKey,
        request: &AllocateRequest,
        now: u64,
    ) -> Result<EndpointSpec, EndpointError> {
        let Some(endpoint) = self.endpoints.get_mut(key) else {
            return Err(EndpointError::internal(format!("{key} vanished")));
        };
        // Its device would be taken away from under the pod that has it.
        if !matches!(endpoint.state, EndpointState::Reserved(_))
            && endpoint.spec.netns != request.netns
        {
            return Err(EndpointError::new(
                ErrorKind::Invalid,
                format!(
                    "{key} exists in the network namespace {}, not {}; call DEL for it first",
                    endpoint.spec.netns, request.netns
                ),
            ));
        }
        endpoint.spec.netns.clone_from(&request.netns);
        endpoint.spec.host_ports.clone_from(&request.host_ports);
        if let EndpointState::Reserved(since) = &mut endpoint.state {
            *since = now;
        }
        self.store
            .save_endpoint(endpoint)
            .map_err(|error| EndpointError::internal(error.to_string()))?;
        Ok(endpoint.spec.clone())
    }

    /// Takes a number, addresses and a name; all or nothing.
    fn reserve_parts(
        &mut self,
        key: EndpointKey,
        request: &AllocateRequest,
        now: u64,
    ) -> Result<EndpointSpec, EndpointError> {
        let families: Vec<_> = self.ipam.families().collect();
        if families.is_empty() {
            return Err(EndpointError::new(
                ErrorKind::NotReady,
                format!(
                    "no address for {key}: this node has no pod range yet; it comes with \
                     spec.podCIDRs of its Node object"
                ),
            ));
        }
        let number = self
            .numbers
            .take(now, self.rest)
            .or_else(|| self.numbers.take_resting())
            .ok_or_else(|| {
                EndpointError::new(
                    ErrorKind::Exhausted,
                    format!(
                        "no endpoint number for {key}: all {} are in use; remove pods from this node",
                        self.numbers.size()
                    ),
                )
            })?;
        let mut spec = EndpointSpec {
            number,
            host_ifname: self.host_ifname(&key),
            key,
            netns: request.netns.clone(),
            pod_namespace: request.pod_namespace.clone(),
            pod_name: request.pod_name.clone(),
            pod_uid: request.pod_uid.clone(),
            addresses: Vec::with_capacity(families.len()),
            ranges: Vec::with_capacity(families.len()),
            mtu: self.mtu,
            host_ifindex: 0,
            netns_cookie: 0,
            host_ports: request.host_ports.clone(),
        };
        for family in families {
            match self.ipam.allocate(family, now) {
                Ok(address) => {
                    spec.addresses.push(address);
                    spec.ranges.extend(self.ipam.range_of(address));
                }
                Err(error) => {
                    self.give_back_unseen(&spec);
                    return Err(error.into());
                }
            }
        }
        Ok(spec)
    }

    fn give_back_unseen(&mut self, spec: &EndpointSpec) {
        self.numbers.cancel(spec.number);
        for &address in &spec.addresses {
            self.ipam.cancel(address);
        }
    }

    async fn release_all(
        &mut self,
        keys: Vec<EndpointKey>,
        wiring: &mut impl Wiring,
        now: u64,
    ) -> Result<(), EndpointError> {
        let mut first_error = None;
        for key in keys {
            if let Err(error) = self.release_one(&key, wiring, now).await {
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    async fn release_one(
        &mut self,
        key: &EndpointKey,
        wiring: &mut impl Wiring,
        now: u64,
    ) -> Result<(), EndpointError> {
        let Some(endpoint) = self.endpoints.get_mut(key) else {
            return Ok(());
        };
        let removed = match wiring.remove(&endpoint.spec).await {
            Ok(()) => self
                .store
                .remove_endpoint(key)
                .map_err(|error| error.to_string()),
            Err(error) => Err(format!("cannot detach {key} from the datapath: {error}")),
        };
        if let Err(why) = removed {
            endpoint.state = EndpointState::Removing(why.clone());
            // So that it is not taken for a living one after a restart; if this fails too, its
            // device tells.
            let _ = self.store.save_endpoint(endpoint);
            return Err(EndpointError::internal(why));
        }
        if let Some(endpoint) = self.endpoints.remove(key) {
            self.host_ifnames.remove(&endpoint.spec.host_ifname);
            self.numbers.release(endpoint.spec.number, now);
            for address in endpoint.spec.addresses {
                self.ipam.release(address, now);
            }
        }
        // Without it only the rest of the released addresses is lost, and the next change saves it.
        let _ = self.save_allocator();
        Ok(())
    }

    async fn install_again(
        &mut self,
        key: &EndpointKey,
        wiring: &mut impl Wiring,
    ) -> Result<(), EndpointError> {
        let Some(endpoint) = self.endpoints.get_mut(key) else {
            return Ok(());
        };
        match wiring.install(&endpoint.spec).await {
            Ok(()) => {
                endpoint.state = EndpointState::Ready;
                Ok(())
            }
            Err(error) => {
                let why = format!("cannot attach {key} to the datapath: {error}");
                endpoint.state = EndpointState::Failing(why.clone());
                Err(EndpointError::internal(why))
            }
        }
    }

    fn insert(&mut self, endpoint: Endpoint) {
        let key = endpoint.spec.key.clone();
        self.host_ifnames
            .insert(endpoint.spec.host_ifname.clone(), key.clone());
        self.endpoints.insert(key, endpoint);
    }

    /// `a-b` + `c` and `a` + `b-c` would share a file.
    fn check_file_name(&self, key: &EndpointKey) -> Result<(), EndpointError> {
        let path = self.store.endpoint_path(key);
        let same = |other: &&EndpointKey| self.store.endpoint_path(other) == path;
        match self.endpoints.keys().find(same) {
            None => Ok(()),
            Some(other) => Err(EndpointError::new(
                ErrorKind::Invalid,
                format!("{key} and {other} would share the file {}", path.display()),
            )),
        }
    }

    /// Kubernetes' scheduler and kubelet keep such pods apart; this is for pods that neither has seen, and
    /// for a pod whose predecessor is not gone yet: the runtime tries again.
    fn check_host_ports(
        &self,
        key: &EndpointKey,
        wanted: &[HostPort],
    ) -> Result<(), EndpointError> {
        let others = self.endpoints.values().filter(|endpoint| {
            endpoint.spec.key != *key && !matches!(endpoint.state, EndpointState::Removing(_))
        });
        for other in others {
            let theirs = other.spec.host_ports.iter();
            let overlaps = |theirs: &HostPort| wanted.iter().any(|ours| ours.overlaps(theirs));
            if let Some(taken) = theirs.into_iter().find(|theirs| overlaps(theirs)) {
                return Err(EndpointError::new(
                    ErrorKind::Conflict,
                    format!(
                        "{key} wants a host port that leads to pod {} ({}) already: {taken}; delete \
                         that pod first, or give one of them another hostPort or hostIP",
                        other.spec.display_name(),
                        other.spec.key
                    ),
                ));
            }
        }
        Ok(())
    }

    /// A name for the host side that is the same for the same key, unless another endpoint has it.
    fn host_ifname(&self, key: &EndpointKey) -> String {
        let mut salt = 0;
        loop {
            let name = host_ifname(key, salt);
            if !self.host_ifnames.contains_key(&name) {
                return name;
            }
            salt += 1;
        }
    }

    fn save_allocator(&self) -> Result<(), StoreError> {
        self.store.save_allocator(&AllocatorState {
            ipam: self.ipam.state(),
            next_number: self.numbers.cursor(),
            resting_numbers: self.numbers.resting().collect(),
        })
    }
}

/// `weir` and 44 bits of the FNV-1a hash of container, interface and salt: 15 bytes.
fn host_ifname(key: &EndpointKey, salt: u8) -> String {
    let bytes = key.container_id.bytes().chain([0]);
    let bytes = bytes.chain(key.ifname.bytes()).chain([salt]);
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("weir{:011x}", (hash ^ (hash >> 44)) & 0xfff_ffff_ffff)
}
