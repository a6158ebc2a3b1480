//! The manager with a kernel that is a set, can refuse, and outlives restarts.

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
fn a_restart_keeps_what_lives_and_drops_what_does_not() {
    let mut bed = Bed::new();
    let living = bed.add("living", 0);
    bed.add("vanished", 0);
    bed.allocate("reserved", 0).unwrap();
    let vanished = bed.kernel.links[1].ifindex;
    bed.kernel.unwire(vanished);
    bed.kernel.installed.clear();

    let report = bed.restart(1);
    assert_eq!(report.living, 2);
    assert_eq!(report.vanished, [EndpointKey::new("vanished", "eth0")]);
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    assert!(report.orphans.is_empty());
    assert_eq!(bed.kernel.installed.len(), 1);
    assert_eq!(bed.kernel.installed[&1].key, living.key);
    assert_eq!(bed.allocate("living", 1).unwrap().number, living.number);
    assert_eq!(bed.allocate("new", 1).unwrap().number, 4);
}

#[test]
fn what_the_kernel_does_not_take_back_is_tried_again() {
    let mut bed = Bed::new();
    let spec = bed.add("c1", 0);
    bed.kernel.refuse_install = true;
    let report = bed.restart(1);
    assert_eq!(report.problems.len(), 1);
    assert!(report.problems[0].contains("tcx refused"));
    let state = bed.manager.get(&spec.key).unwrap().state.to_string();
    assert!(state.contains("tcx refused"), "{state}");
    assert_eq!(bed.tick(1).len(), 1);
    bed.kernel.refuse_install = false;
    assert_eq!(bed.tick(2), []);
    assert_eq!(
        bed.manager.get(&spec.key).unwrap().state,
        EndpointState::Ready
    );
}

#[test]
fn restores_without_the_allocator_file_and_with_other_ranges() {
    let mut bed = Bed::new();
    let spec = bed.add("c1", 0);
    fs::remove_file(bed.directory.path().join("ipam.json")).unwrap();
    bed.manager = EndpointManager::new(bed.directory.path(), DEFAULT_REST_SECONDS, MTU).unwrap();
    let links = bed.kernel.links.clone();
    let report = bed.manager.restore(&links, 1).unwrap();
    assert_eq!(bed.tick(1), []);
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    let refused = bed.manager.set_ranges(&["10.2.0.0/24".parse().unwrap()]);
    assert_eq!(refused, []);
    assert_eq!(
        bed.manager.get(&spec.key).unwrap().spec.addresses,
        spec.addresses
    );
    assert_eq!(bed.manager.ipam().ranges().count(), 3);
    let next = bed.allocate("c2", 1).unwrap();
    assert_eq!(next.addresses.len(), 1);
    assert_eq!(next.addresses[0].to_string(), "10.2.0.1");
    assert_ne!(next.number, spec.number);
    bed.release("c1", 2).unwrap();
    assert_eq!(bed.manager.ipam().ranges().count(), 1);
}

#[test]
fn torn_and_foreign_files_are_set_aside_and_told() {
    let mut bed = Bed::new();
    bed.add("good", 0);
    let directory = bed.directory.path().join("endpoints");
    let good = fs::read_to_string(directory.join("good-eth0.json")).unwrap();
    fs::write(directory.join("torn-eth0.json"), &good[..good.len() / 2]).unwrap();
    fs::write(directory.join("empty-eth0.json"), "").unwrap();
    fs::write(directory.join("foreign.txt"), "hello").unwrap();
    fs::write(directory.join("moved-eth0.json"), &good).unwrap();
    fs::write(
        directory.join("twin-eth0.json"),
        good.replace("\"good\"", "\"twin\""),
    )
    .unwrap();
    fs::write(
        directory.join("number-eth0.json"),
        good.replace("\"good\"", "\"number\"")
            .replace("\"number\": 1", "\"number\": 4096"),
    )
    .unwrap();
    fs::write(directory.join("x-eth0.json.tmp"), "half").unwrap();
    fs::write(bed.directory.path().join("ipam.json"), "{").unwrap();

    let report = bed.restart(1);
    assert_eq!(report.living, 1);
    assert_eq!(report.problems.len(), 7, "{:#?}", report.problems);
    let set_aside = bed.files();
    assert_eq!(set_aside.len(), 7, "{set_aside:?}");
    assert!(set_aside.contains("torn-eth0.json.quarantine"));
    assert!(bed.directory.path().join("ipam.json.quarantine").exists());
    let report = bed.restart(2);
    assert!(report.problems.is_empty(), "told once");
}

#[test]
fn a_device_of_ours_without_a_file_is_told() {
    let mut bed = Bed::new();
    bed.add("c1", 0);
    fs::remove_file(bed.directory.path().join("endpoints/c1-eth0.json")).unwrap();
    let report = bed.restart(1);
    assert_eq!(report.orphans.len(), 1);
    assert_eq!(report.orphans[0].ifindex, 1);
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

/// ADD, DEL, vanishing pods, refusals of the kernel and crashes in any order leave no number, address
/// or file behind, and never give one to two.
#[test]
fn random_sequences_leave_nothing_behind() {
    for seed in 1..=8 {
        let mut random = crate::ipam::Random(seed * 0x9e37_79b9_7f4a);
        let mut bed = Bed::new();
        let mut now = 0;
        for _ in 0..250 {
            now += random.below(15) as u64;
            let container = format!("c{}", random.below(20));
            bed.kernel.refuse_install = random.below(8) == 0;
            bed.kernel.refuse_remove = random.below(8) == 0;
            match random.below(10) {
                0..4 => {
                    if let Ok(spec) = bed.allocate(&container, now) {
                        let wired = bed.kernel.links.iter().find(|l| l.name == spec.host_ifname);
                        let ifindex = wired.map(|link| link.ifindex);
                        let ifindex = ifindex.unwrap_or_else(|| bed.kernel.wire(&spec));
                        // One in four plugins dies here.
                        if random.below(4) != 0 && bed.commit(&container, ifindex, now).is_err() {
                            let _ = bed.release(&container, now);
                        }
                    }
                }
                4..6 => {
                    let _ = bed.release(&container, now);
                }
                6 => {
                    let nth = random.below(20);
                    if let Some(link) = bed.kernel.links.get(nth).cloned() {
                        bed.kernel.unwire(link.ifindex);
                        let _ =
                            block_on(bed.manager.link_removed(link.ifindex, &mut bed.kernel, now));
                    }
                }
                7 => {
                    // Pods may vanish while no agent runs.
                    let nth = random.below(20);
                    if let Some(link) = bed.kernel.links.get(nth).cloned() {
                        bed.kernel.unwire(link.ifindex);
                    }
                    let report = bed.restart(now);
                    assert_eq!(report.orphans, [], "seed {seed}");
                }
                _ => {
                    bed.tick(now);
                }
            }
            check_invariants(&bed);
        }
        bed.kernel.refuse_install = false;
        bed.kernel.refuse_remove = false;
        for i in 0..20 {
            bed.release(&format!("c{i}"), now).unwrap();
        }
        bed.assert_empty();
        assert_eq!(bed.kernel.links, [], "seed {seed}");
        bed.restart(now);
        bed.assert_empty();
    }
}

#[track_caller]
fn check_invariants(bed: &Bed) {
    let endpoints: Vec<&Endpoint> = bed.manager.list().collect();
    let numbers: BTreeSet<u32> = endpoints.iter().map(|e| e.spec.number).collect();
    let addresses: BTreeSet<_> = endpoints.iter().flat_map(|e| &e.spec.addresses).collect();
    let names: BTreeSet<_> = endpoints.iter().map(|e| &e.spec.host_ifname).collect();
    assert_eq!(numbers.len(), endpoints.len());
    assert_eq!(names.len(), endpoints.len());
    assert_eq!(addresses.len(), 2 * endpoints.len());
    let usage = bed.manager.usage();
    assert_eq!(usage.numbers_used as usize, endpoints.len());
    assert_eq!(usage.addresses_used as usize, addresses.len());
    assert_eq!(bed.files().len(), endpoints.len());
    for installed in bed.kernel.installed.values() {
        assert!(bed.manager.get(&installed.key).is_some());
    }
    for endpoint in endpoints {
        if endpoint.state == EndpointState::Ready {
            assert!(bed.kernel.installed.contains_key(&endpoint.spec.number));
        }
    }
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

fn host_port(host_ip: &str, port: u16) -> HostPort {
    HostPort {
        host_ip: host_ip.parse().ok(),
        host_port: port,
        container_port: 80,
        protocol: crate::objects::Protocol::Tcp,
    }
}

fn with_host_port(container: &str, host_ip: &str, port: u16) -> AllocateRequest {
    AllocateRequest {
        host_ports: vec![host_port(host_ip, port)],
        ..request(container)
    }
}

fn served(bed: &Bed) -> Vec<&str> {
    let specs = bed.manager.with_host_ports();
    specs.map(|spec| spec.key.container_id.as_str()).collect()
}

#[test]
fn host_ports_live_as_long_as_their_pod() {
    let mut bed = Bed::new();
    bed.add("plain", 0);
    let spec = bed
        .allocate_as(&with_host_port("web", "", 8080), 0)
        .unwrap();
    assert_eq!(served(&bed), [""; 0], "not before the pod is wired");
    let ifindex = bed.kernel.wire(&spec);
    bed.commit("web", ifindex, 0).unwrap();
    assert_eq!(served(&bed), ["web"]);
    assert_eq!(bed.restart(1).problems, [""; 0]);
    assert_eq!(served(&bed), ["web"]);
    let kept = bed.manager.get(&spec.key).unwrap();
    assert_eq!(kept.spec.host_ports, [host_port("", 8080)]);

    bed.kernel.refuse_remove = true;
    bed.release("web", 1).unwrap_err();
    assert_eq!(served(&bed), [""; 0], "not while it is half gone");
    bed.allocate_as(&with_host_port("next", "", 8080), 1)
        .unwrap();
    bed.kernel.refuse_remove = false;
    assert_eq!(bed.tick(2), []);
    for container in ["plain", "next"] {
        bed.release(container, 2).unwrap();
    }
    bed.assert_empty();
}

#[test]
fn host_ports_of_a_vanished_pod_are_free() {
    let mut bed = Bed::new();
    let request = with_host_port("web", "192.0.2.1", 8080);
    let spec = bed.allocate_as(&request, 0).unwrap();
    let ifindex = bed.kernel.wire(&spec);
    bed.commit("web", ifindex, 0).unwrap();
    bed.kernel.unwire(ifindex);
    block_on(bed.manager.link_removed(ifindex, &mut bed.kernel, 1)).unwrap();
    assert_eq!(served(&bed), [""; 0]);
    let next = with_host_port("next", "192.0.2.1", 8080);
    bed.allocate_as(&next, 1).unwrap();
    bed.release("next", 1).unwrap();
    bed.assert_empty();
}

#[test]
fn two_pods_never_share_a_host_port() {
    let mut bed = Bed::new();
    bed.allocate_as(&with_host_port("first", "192.0.2.1", 8080), 0)
        .unwrap();
    for (host_ip, conflict) in [
        ("", true),
        ("0.0.0.0", true),
        ("192.0.2.1", true),
        ("::", false),
    ] {
        let request = with_host_port("second", host_ip, 8080);
        let before = bed.manager.usage();
        match bed.allocate_as(&request, 0) {
            Ok(_) => assert!(!conflict, "{host_ip:?}"),
            Err(error) => {
                assert!(conflict, "{host_ip:?}: {error}");
                assert_eq!(error.kind, ErrorKind::Conflict);
                for part in [
                    "shop/web-0 (eth0 of container first)",
                    "192.0.2.1:8080/TCP",
                    "hostPort",
                ] {
                    assert!(error.message.contains(part), "{part:?}: {error}");
                }
                assert_eq!(bed.manager.usage(), before);
            }
        }
    }
    // The same pod again is no conflict, and may say something else.
    let again = with_host_port("first", "", 9090);
    let spec = bed.allocate_as(&again, 0).unwrap();
    assert_eq!(spec.host_ports, [host_port("", 9090)]);
    bed.allocate_as(&with_host_port("third", "", 8080), 0)
        .unwrap_err();
    bed.release("second", 0).unwrap();
    bed.allocate_as(&with_host_port("third", "", 8080), 0)
        .unwrap();
}

#[test]
fn files_without_host_ports_are_read_and_wrong_ones_set_aside() {
    let mut bed = Bed::new();
    let spec = bed.add("old", 0);
    let file = bed.directory.path().join("endpoints/old-eth0.json");
    let text = fs::read_to_string(&file).unwrap();
    assert!(
        !text.contains("host_ports"),
        "as an older version writes it"
    );
    assert_eq!(bed.restart(1).problems, [""; 0]);
    assert_eq!(bed.manager.get(&spec.key).unwrap().spec.host_ports, []);
    for (wrong, expected) in [
        (
            r#"{"host_ip":null,"host_port":0,"container_port":1,"protocol":"TCP"}"#,
            "is 0",
        ),
        (
            r#"{"host_ip":"x","host_port":1,"container_port":1,"protocol":"TCP"}"#,
            "invalid",
        ),
        (
            r#"{"host_ip":null,"host_port":1,"container_port":1,"protocol":"X"}"#,
            "TCP, UDP or",
        ),
    ] {
        let start = text.strip_suffix('}').unwrap();
        fs::write(&file, format!("{start},\"host_ports\":[{wrong}]}}")).unwrap();
        let report = bed.restart(1);
        assert!(
            report.problems[0].contains(expected),
            "{:?}",
            report.problems
        );
        fs::remove_file(file.with_extension("json.quarantine")).unwrap();
    }
}
