//! The manager with a kernel that is a set, can refuse, and outlives restarts.

mod host_ports;
mod restarts;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use futures::executor::block_on;
use tempfile::TempDir;

use super::*;
use crate::{ipam::DEFAULT_REST_SECONDS, netlink::Link};

const MTU: u32 = 1450;

/// The kernel: what is installed by number, and the devices.
#[derive(Default)]
struct Kernel {
    installed: BTreeMap<u32, EndpointSpec>,
    links: Vec<Link>,
    refuse_install: bool,
    refuse_remove: bool,
    next_ifindex: u32,
}

impl Kernel {
    /// What the CNI plugin does between Allocate and Commit.
    fn wire(&mut self, spec: &EndpointSpec) -> u32 {
        self.next_ifindex += 1;
        self.links.push(Link {
            ifindex: self.next_ifindex,
            name: spec.host_ifname.clone(),
            mtu: spec.mtu,
            up: true,
            mac: Some(spec.host_mac().0),
            kind: "veth".into(),
            link_layer: crate::netlink::LinkLayer::Ethernet,
            master: None,
        });
        self.next_ifindex
    }

    fn unwire(&mut self, ifindex: u32) {
        self.links.retain(|link| link.ifindex != ifindex);
    }
}

impl Wiring for Kernel {
    async fn install(&mut self, endpoint: &EndpointSpec) -> Result<(), WiringError> {
        if self.refuse_install {
            return Err("tcx refused".into());
        }
        assert_ne!(endpoint.host_ifindex, 0);
        self.installed.insert(endpoint.number, endpoint.clone());
        Ok(())
    }

    async fn remove(&mut self, endpoint: &EndpointSpec) -> Result<(), WiringError> {
        if self.refuse_remove {
            return Err("netlink refused".into());
        }
        self.installed.remove(&endpoint.number);
        self.links.retain(|link| link.name != endpoint.host_ifname);
        Ok(())
    }
}

struct Bed {
    directory: TempDir,
    kernel: Kernel,
    manager: EndpointManager,
}

fn ranges() -> Vec<IpNet> {
    vec!["10.1.0.0/28".parse().unwrap(), "fd01::/64".parse().unwrap()]
}

impl Bed {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let manager = EndpointManager::new(directory.path(), DEFAULT_REST_SECONDS, MTU).unwrap();
        let mut bed = Self {
            directory,
            kernel: Kernel::default(),
            manager,
        };
        assert_eq!(bed.manager.set_ranges(&ranges()), []);
        bed
    }

    fn restart(&mut self, now: u64) -> RestoreReport {
        self.manager =
            EndpointManager::new(self.directory.path(), DEFAULT_REST_SECONDS, MTU).unwrap();
        let links = self.kernel.links.clone();
        let mut report = self.manager.restore(&links, now).unwrap();
        let refused = self.tick(now).into_iter().map(|error| error.message);
        report.problems.extend(refused);
        assert_eq!(self.manager.set_ranges(&ranges()), []);
        report
    }

    fn allocate(&mut self, container: &str, now: u64) -> Result<EndpointSpec, EndpointError> {
        self.allocate_as(&request(container), now)
    }

    fn allocate_as(
        &mut self,
        request: &AllocateRequest,
        now: u64,
    ) -> Result<EndpointSpec, EndpointError> {
        block_on(self.manager.allocate(request, &mut self.kernel, now))
    }

    fn commit(&mut self, container: &str, ifindex: u32, now: u64) -> Result<(), EndpointError> {
        let key = EndpointKey::new(container, "eth0");
        block_on(
            self.manager
                .commit(&key, ifindex, 77, &mut self.kernel, now),
        )
    }

    fn add(&mut self, container: &str, now: u64) -> EndpointSpec {
        let spec = self.allocate(container, now).unwrap();
        let ifindex = self.kernel.wire(&spec);
        self.commit(container, ifindex, now).unwrap();
        spec
    }

    fn release(&mut self, container: &str, now: u64) -> Result<(), EndpointError> {
        block_on(self.manager.release(container, "", &mut self.kernel, now))
    }

    fn tick(&mut self, now: u64) -> Vec<EndpointError> {
        block_on(self.manager.tick(&mut self.kernel, now))
    }

    fn files(&self) -> BTreeSet<String> {
        fs::read_dir(self.directory.path().join("endpoints"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[track_caller]
    fn assert_empty(&self) {
        assert_eq!(self.manager.list().len(), 0);
        assert_eq!(self.files(), BTreeSet::new());
        let usage = self.manager.usage();
        assert_eq!((usage.addresses_used, usage.numbers_used), (0, 0));
        assert!(self.manager.host_ifnames.is_empty());
        assert!(self.kernel.installed.is_empty());
    }
}

fn request(container: &str) -> AllocateRequest {
    AllocateRequest {
        container_id: container.into(),
        ifname: "eth0".into(),
        netns: format!("/run/netns/{container}"),
        pod_namespace: "shop".into(),
        pod_name: "web-0".into(),
        pod_uid: "u1".into(),
        host_ports: Vec::new(),
    }
}

#[test]
fn a_pod_comes_and_goes() {
    let mut bed = Bed::new();
    let spec = bed.allocate("c1", 5).unwrap();
    assert_eq!(spec.number, 1);
    assert_eq!(
        spec.addresses,
        [
            "10.1.0.1".parse::<std::net::IpAddr>().unwrap(),
            "fd01::1".parse().unwrap()
        ]
    );
    assert_eq!(spec.host_mac().to_string(), "0a:57:00:00:00:01");
    assert_eq!((spec.host_ifname.len(), spec.mtu), (15, MTU));
    assert_eq!(bed.allocate("c1", 6).unwrap(), spec, "the same again");
    assert!(
        bed.kernel.installed.is_empty(),
        "not before it is committed"
    );

    let ifindex = bed.kernel.wire(&spec);
    bed.commit("c1", ifindex, 6).unwrap();
    bed.commit("c1", ifindex, 7).unwrap();
    assert_eq!(bed.kernel.installed[&1].netns_cookie, 77);
    let key = &spec.key;
    assert_eq!(bed.manager.get(key).unwrap().state, EndpointState::Ready);
    assert_eq!(bed.manager.by_host_ifindex(ifindex).unwrap().spec.key, *key);
    assert_eq!(bed.files(), BTreeSet::from(["c1-eth0.json".to_owned()]));

    bed.release("c1", 8).unwrap();
    bed.release("c1", 8).unwrap();
    bed.assert_empty();
    let next = bed.add("c2", 9);
    assert_eq!(next.number, 2, "number 1 rests");
    assert_eq!(next.addresses[0].to_string(), "10.1.0.2");
}

#[test]
fn requests_that_cannot_be_are_refused_by_kind() {
    let mut bed = Bed::new();
    for (container, ifname, expected) in [
        ("", "eth0", "container_id \"\""),
        ("../x", "eth0", "container_id \"../x\""),
        ("c", "a/b", "ifname \"a/b\""),
        ("c", "sixteen-bytes-on", "ifname \"sixteen-bytes-on\""),
    ] {
        let request = AllocateRequest {
            container_id: container.into(),
            ifname: ifname.into(),
            ..AllocateRequest::default()
        };
        let result = block_on(bed.manager.allocate(&request, &mut bed.kernel, 0));
        let error = result.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert!(error.message.contains(expected), "{error}");
    }
    assert_eq!(bed.commit("c", 7, 0).unwrap_err().kind, ErrorKind::NotFound);
    bed.allocate("c", 0).unwrap();
    assert_eq!(bed.commit("c", 0, 0).unwrap_err().kind, ErrorKind::Invalid);
    bed.release("c", 0).unwrap();

    bed.manager.set_ranges(&[]);
    let error = bed.allocate("c", 0).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotReady);
    assert!(error.message.contains("spec.podCIDRs"), "{error}");
    bed.assert_empty();
}

#[test]
fn two_keys_never_share_a_file() {
    let mut bed = Bed::new();
    let mut first = request("a-b");
    first.ifname = "c".into();
    let mut second = request("a");
    second.ifname = "b-c".into();
    block_on(bed.manager.allocate(&first, &mut bed.kernel, 0)).unwrap();
    let error = block_on(bed.manager.allocate(&second, &mut bed.kernel, 0)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Invalid);
    assert!(error.message.contains("a-b-c.json"), "{error}");
}

#[test]
fn exhaustion_of_one_family_keeps_nothing_of_the_other() {
    let mut bed = Bed::new();
    for i in 0..14 {
        bed.add(&format!("c{i}"), 0);
    }
    let before = bed.manager.usage();
    let error = bed.allocate("c14", 0).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Exhausted);
    assert!(
        error.message.contains("10.1.0.0/28: 14 of 14 in use"),
        "{error}"
    );
    assert_eq!(bed.manager.usage(), before);
    bed.release("c3", 1).unwrap();
    let spec = bed.allocate("c14", 2).unwrap();
    assert_eq!(
        spec.addresses[0].to_string(),
        "10.1.0.4",
        "rested not long enough, but nothing else is free"
    );
}

#[test]
fn a_refused_install_fails_the_commit_and_stays_reserved() {
    let mut bed = Bed::new();
    let spec = bed.allocate("c1", 0).unwrap();
    let ifindex = bed.kernel.wire(&spec);
    bed.kernel.refuse_install = true;
    let error = bed.commit("c1", ifindex, 0).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Internal);
    assert!(error.message.contains("tcx refused"), "{error}");
    let state = &bed.manager.get(&spec.key).unwrap().state;
    assert_eq!(*state, EndpointState::Reserved(0));
    bed.kernel.refuse_install = false;
    bed.commit("c1", ifindex, 0).unwrap();
    bed.release("c1", 0).unwrap();
    bed.assert_empty();
}

#[test]
fn a_refused_removal_is_tried_again_and_frees_nothing_before() {
    let mut bed = Bed::new();
    let spec = bed.add("c1", 0);
    bed.kernel.refuse_remove = true;
    let error = bed.release("c1", 0).unwrap_err();
    assert!(error.message.contains("netlink refused"), "{error}");
    assert_eq!(bed.manager.usage().numbers_used, 1);
    assert_eq!(
        bed.allocate("c1", 1).unwrap_err().kind,
        ErrorKind::Internal,
        "not the half-removed one"
    );
    assert_eq!(bed.tick(1).len(), 1);
    // Also over a restart, where its device still exists.
    let report = bed.restart(2);
    assert_eq!((report.living, report.problems.len()), (0, 1));
    bed.kernel.refuse_remove = false;
    assert_eq!(bed.tick(2), []);
    bed.assert_empty();
    assert_ne!(bed.allocate("c1", 3).unwrap().number, spec.number);
}

#[test]
fn a_device_that_vanishes_takes_its_pod_along() {
    let mut bed = Bed::new();
    let spec = bed.add("c1", 0);
    let ifindex = bed.kernel.links[0].ifindex;
    assert_eq!(
        block_on(bed.manager.link_removed(999, &mut bed.kernel, 1)).unwrap(),
        None
    );
    bed.kernel.unwire(ifindex);
    let gone = block_on(bed.manager.link_removed(ifindex, &mut bed.kernel, 1)).unwrap();
    assert_eq!(gone.unwrap().key, spec.key);
    bed.assert_empty();
}

#[test]
fn a_pod_that_is_wired_anew_keeps_its_place() {
    let mut bed = Bed::new();
    let spec = bed.add("c1", 0);
    let former = bed.kernel.links[0].ifindex;
    bed.kernel.unwire(former);
    assert_eq!(bed.add("c1", 1).addresses, spec.addresses);
    let current = bed.kernel.links[0].ifindex;
    assert_ne!(current, former);
    // The news of the former device comes late.
    let gone = block_on(bed.manager.link_removed(former, &mut bed.kernel, 1)).unwrap();
    assert_eq!(gone, None);
    assert_eq!(bed.kernel.installed[&1].host_ifindex, current);
}

#[test]
fn a_reservation_without_a_commit_is_dropped_after_a_minute() {
    let mut bed = Bed::new();
    bed.allocate("c1", 10).unwrap();
    bed.restart(20);
    assert_eq!(bed.tick(69), []);
    assert_eq!(bed.manager.list().len(), 1);
    assert_eq!(bed.tick(70), []);
    bed.assert_empty();
}

#[test]
fn release_without_a_name_takes_every_interface_of_the_container_only() {
    let mut bed = Bed::new();
    bed.allocate("c1", 0).unwrap();
    bed.allocate("c10", 0).unwrap();
    let mut second = request("c1");
    second.ifname = "net1".into();
    block_on(bed.manager.allocate(&second, &mut bed.kernel, 0)).unwrap();
    bed.release("c1", 0).unwrap();
    let left: Vec<_> = bed.manager.list().map(|e| &e.spec.key).collect();
    assert_eq!(left, [&EndpointKey::new("c10", "eth0")]);
}

#[test]
fn names_that_hash_alike_are_told_apart() {
    let mut bed = Bed::new();
    let key = EndpointKey::new("c1", "eth0");
    let taken = host_ifname(&key, 0);
    bed.manager
        .host_ifnames
        .insert(taken.clone(), EndpointKey::new("other", "eth0"));
    let spec = bed.allocate("c1", 0).unwrap();
    assert_ne!(spec.host_ifname, taken);
    assert_eq!(spec.host_ifname.len(), 15);
    assert_eq!(host_ifname(&key, 0), taken, "the same every time");
}

#[test]
fn a_directory_that_cannot_be_written_reserves_nothing() {
    let mut bed = Bed::new();
    fs::remove_dir_all(bed.directory.path().join("endpoints")).unwrap();
    let error = bed.allocate("c1", 0).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Internal);
    assert!(error.message.contains("c1-eth0.json"), "{error}");
    let usage = bed.manager.usage();
    assert_eq!(usage, Usage::default(), "not even resting");
}

#[test]
fn a_pod_that_works_is_not_given_to_another_namespace() {
    let mut bed = Bed::new();
    let spec = bed.add("c1", 5);
    let elsewhere = AllocateRequest {
        netns: "/run/netns/other".into(),
        ..request("c1")
    };
    let error = bed.allocate_as(&elsewhere, 6).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Invalid);
    for part in ["/run/netns/c1", "/run/netns/other", "DEL"] {
        assert!(error.message.contains(part), "{part:?}: {error}");
    }
    let kept = &bed.manager.get(&spec.key).unwrap();
    assert_eq!(
        (&kept.spec.netns, &kept.state),
        (&spec.netns, &EndpointState::Ready)
    );
}
