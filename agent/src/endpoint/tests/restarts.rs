//! What the manager finds again after a restart, and that nothing is lost or left by crashes.

use super::*;

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
