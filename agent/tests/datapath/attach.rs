use std::{collections::BTreeSet, process::Command};

use aya::programs::{SchedClassifier, TcAttachType};
use weir_agent::{
    datapath::{AttachMode, Datapath, object},
    node::devices::SourceAddresses,
};
use weir_common::metrics::Hook;

use crate::support::BpfFs;

/// Runs `test` in a thread with a network namespace of its own, which ends with the thread.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("unshare: needs root");
        test();
    })
    .join()
    .unwrap();
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn index(device: &str) -> u32 {
    nix::net::if_::if_nametoindex(device).unwrap()
}

fn open(fs: &BpfFs, mode: AttachMode) -> Datapath {
    Datapath::open_with(object::OBJECT, &fs.options(), Some(mode)).unwrap()
}

/// Ids of the programs of a hook, in the order in which they run.
fn programs(mode: AttachMode, device: &str, direction: TcAttachType) -> Vec<u32> {
    if mode == AttachMode::Tcx {
        let (_, programs) = SchedClassifier::query_tcx(device, direction).unwrap();
        return programs
            .iter()
            .map(aya::programs::ProgramInfo::id)
            .collect();
    }
    let direction = match direction {
        TcAttachType::Ingress => "ingress",
        _ => "egress",
    };
    let output = Command::new("tc")
        .args(["filter", "show", "dev", device, direction])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut words = text.split_whitespace();
    std::iter::from_fn(|| words.find(|word| *word == "id").and_then(|_| words.next()))
        .map(|id| id.parse().unwrap())
        .collect()
}

#[test]
fn the_first_program_that_is_replaced_ends_a_migration() {
    in_namespace(|| {
        let fs = BpfFs::new();
        ip("link add pod type veth peer name inside");
        ip("link add new type veth peer name other");
        let mode = AttachMode::Tcx;
        let mut datapath = open(&fs, mode);
        datapath.attach_endpoint(index("pod"), "pod").unwrap();
        drop(datapath);

        let mut options = fs.options();
        options.connections *= 2;
        let size = || {
            aya::maps::MapInfo::from_pin(fs.pin("FLOW_RING_V4"))
                .unwrap()
                .max_entries()
        };
        let mut datapath = Datapath::open_with(object::OBJECT, &options, Some(mode)).unwrap();
        // A pod that starts meanwhile has no earlier programs.
        datapath.attach_endpoint(index("new"), "new").unwrap();
        assert_eq!(size(), fs.options().connections);
        datapath.attach_endpoint(index("pod"), "pod").unwrap();
        assert_eq!(size(), options.connections);
    });
}

#[test]
fn this_kernel_is_probed() {
    let fs = BpfFs::new();
    let mode = fs.open().attach_mode();
    let has_tcx =
        aya::util::KernelVersion::current().unwrap() >= aya::util::KernelVersion::new(6, 6, 0);
    assert_eq!(mode == AttachMode::Tcx, has_tcx);
}

#[test]
fn a_restart_replaces_the_programs() {
    for mode in [AttachMode::Tcx, AttachMode::Clsact] {
        in_namespace(move || {
            let fs = BpfFs::new();
            ip("link add pod type veth peer name inside");
            let all = |device: &str| {
                (
                    programs(mode, device, TcAttachType::Ingress),
                    programs(mode, device, TcAttachType::Egress),
                )
            };
            let mut datapath = open(&fs, mode);
            datapath.attach_endpoint(index("pod"), "pod").unwrap();
            datapath
                .attach_device(index("inside"), "inside", SourceAddresses::default())
                .unwrap();
            let before = (all("pod"), all("inside"));
            assert_eq!((before.0.0.len(), before.0.1.len()), (1, 1));
            assert_eq!((before.1.0.len(), before.1.1.len()), (1, 1));
            drop(datapath);
            assert_eq!(
                (all("pod"), all("inside")),
                before,
                "stay attached without an agent"
            );

            let mut datapath = open(&fs, mode);
            assert_eq!(datapath.attachments().unwrap().len(), 4);
            for _ in 0..3 {
                datapath.attach_endpoint(index("pod"), "pod").unwrap();
                datapath
                    .attach_device(index("inside"), "inside", SourceAddresses::default())
                    .unwrap();
            }
            let id = |datapath: &mut Datapath, hook| {
                datapath.program(hook).unwrap().info().unwrap().id()
            };
            let after = (
                (
                    vec![id(&mut datapath, Hook::FromPod)],
                    vec![id(&mut datapath, Hook::ToPod)],
                ),
                (
                    vec![id(&mut datapath, Hook::FromNetdev)],
                    vec![id(&mut datapath, Hook::ToNetdev)],
                ),
            );
            assert_eq!((all("pod"), all("inside")), after, "replaced, not stacked");
            assert_ne!(after, before);

            datapath.detach(index("pod")).unwrap();
            datapath.detach(index("pod")).unwrap();
            assert_eq!(all("pod"), (vec![], vec![]));
            assert_eq!(all("inside"), after.1);
            let left = datapath.attachments().unwrap();
            assert!(
                left.iter()
                    .all(|a| a.ifindex == index("inside") && a.mode == mode)
            );
            assert_eq!(left.len(), 2);
        });
    }
}

#[test]
fn devices_that_are_gone_or_unwanted_are_swept() {
    for mode in [AttachMode::Tcx, AttachMode::Clsact] {
        in_namespace(move || {
            let fs = BpfFs::new();
            ip("link add dev-a type veth peer name peer-a");
            ip("link add dev-b type veth peer name peer-b");
            ip("link add dev-c type veth peer name peer-c");
            let mut datapath = open(&fs, mode);
            let indices = ["dev-a", "dev-b", "dev-c"].map(index);
            for (name, index) in ["dev-a", "dev-b", "dev-c"].into_iter().zip(indices) {
                datapath
                    .attach_device(index, name, SourceAddresses::default())
                    .unwrap();
            }
            drop(datapath);
            ip("link del dev-a");
            let datapath = open(&fs, mode);
            let keep = BTreeSet::from([indices[0], indices[1]]);
            let swept = datapath.sweep_attachments(&keep).unwrap();
            assert_eq!(swept, BTreeSet::from([indices[0], indices[2]]), "{mode:?}");
            assert_eq!(programs(mode, "dev-b", TcAttachType::Ingress).len(), 1);
            assert_eq!(programs(mode, "dev-c", TcAttachType::Ingress).len(), 0);
            assert_eq!(programs(mode, "dev-c", TcAttachType::Egress).len(), 0);
            assert_eq!(datapath.attachments().unwrap().len(), 2);
        });
    }
}

#[test]
fn an_index_that_belongs_to_another_device_now() {
    for mode in [AttachMode::Tcx, AttachMode::Clsact] {
        in_namespace(move || {
            let fs = BpfFs::new();
            ip("link add dev-a index 77 type veth peer name peer-a");
            let mut datapath = open(&fs, mode);
            datapath
                .attach_device(77, "dev-a", SourceAddresses::default())
                .unwrap();
            ip("link del dev-a");
            ip("link add dev-new index 77 type veth peer name peer-new");
            let error = datapath
                .attach_device(77, "dev-a", SourceAddresses::default())
                .unwrap_err();
            assert!(error.to_string().contains("to dev-a (index 77)"), "{error}");
            let error = datapath
                .attach_device(78, "dev-new", SourceAddresses::default())
                .unwrap_err();
            assert!(error.to_string().contains("index 77"), "{error}");
            datapath
                .attach_device(77, "dev-new", SourceAddresses::default())
                .unwrap();
            assert_eq!(programs(mode, "dev-new", TcAttachType::Ingress).len(), 1);
            assert_eq!(programs(mode, "dev-new", TcAttachType::Egress).len(), 1);
        });
    }
}
