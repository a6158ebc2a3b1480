use std::{collections::BTreeSet, process::Command};

use weir_agent::{datapath::Datapath, node::devices::SourceAddresses};
use weir_common::{
    Ipv4, Ipv6,
    config::{DeviceAddresses, device_flag},
    limits::DEVICES_MAX,
};

use crate::support::{BpfFs, ReadOnly};

/// Runs `test` in a thread with a network namespace of its own, with the devices `out` (index 77) and
/// `other` (index 78).
fn with_devices(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("unshare: needs root");
        let made = Command::new("ip")
            .args(["link", "add", "out", "index", "77", "type", "veth"])
            .args(["peer", "name", "other", "index", "78"])
            .status();
        assert!(made.unwrap().success());
        test();
    })
    .join()
    .unwrap();
}

fn sources(last: u8) -> SourceAddresses {
    SourceAddresses {
        v4: Some([192, 0, 2, last].into()),
        v6: Some([0x2001, 0xdb8, 0, 0, 0, 0, 0, last.into()].into()),
        sole_v6: false,
    }
}

fn row(fs: &BpfFs, ifindex: u32) -> Option<DeviceAddresses> {
    fs.hash("DEVICE_ADDRESSES").get(&ifindex, 0).ok()
}

fn expected(last: u8, flags: u32) -> DeviceAddresses {
    let sources = sources(last);
    DeviceAddresses {
        flags,
        v4: Ipv4::from(sources.v4.unwrap()),
        v6: Ipv6::from(sources.v6.unwrap()),
    }
}

fn fill(datapath: &Datapath) -> (u32, u32) {
    let fill = datapath.fill();
    let fill = fill.iter().find(|fill| fill.map == "DEVICE_ADDRESSES");
    fill.map(|fill| (fill.entries, fill.max)).unwrap()
}

#[test]
fn a_device_has_its_row_after_the_programs_and_loses_the_flag_before_them() {
    with_devices(|| {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        datapath.leave_device(77, Some(sources(1))).unwrap();
        assert_eq!(row(&fs, 77), Some(expected(1, 0)));
        // Attaching fails: what pods send there must not go out with their own address meanwhile.
        datapath
            .attach_device(77, "no-such", sources(1))
            .unwrap_err();
        assert_eq!(row(&fs, 77), None);
        datapath.attach_device(77, "out", sources(1)).unwrap();
        assert_eq!(row(&fs, 77), Some(expected(1, device_flag::ATTACHED)));
        // Another address, without a moment without the row.
        datapath.attach_device(77, "out", sources(2)).unwrap();
        assert_eq!(row(&fs, 77), Some(expected(2, device_flag::ATTACHED)));

        let refused = ReadOnly::new(&fs, "DEVICE_ADDRESSES");
        datapath.leave_device(77, Some(sources(2))).unwrap_err();
        assert!(
            datapath.is_device_attached(77),
            "not detached while the row says so"
        );
        drop(refused);
        datapath.leave_device(77, Some(sources(2))).unwrap();
        assert_eq!(row(&fs, 77), Some(expected(2, 0)));
        assert!(!datapath.is_device_attached(77));
        datapath.leave_device(77, None).unwrap();
        datapath.leave_device(77, None).unwrap();
        assert_eq!(row(&fs, 77), None);
    });
}

#[test]
fn rows_outlive_the_agent_and_those_of_vanished_devices_are_known_to_the_next() {
    with_devices(|| {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        datapath.attach_device(77, "out", sources(1)).unwrap();
        datapath.leave_device(78, Some(sources(2))).unwrap();
        datapath
            .leave_device(79, Some(SourceAddresses::default()))
            .unwrap();
        drop(datapath);

        let mut datapath = fs.open();
        assert!(datapath.devices().is_attached(77) && !datapath.devices().is_attached(78));
        assert_eq!(datapath.devices().devices(), BTreeSet::from([77, 78, 79]));
        assert_eq!(fill(&datapath), (3, DEVICES_MAX));
        assert_eq!(row(&fs, 79), Some(DeviceAddresses::default()));
        datapath.leave_device(79, None).unwrap();
        assert_eq!(row(&fs, 79), None);
        // The programs are replaced while pods go on sending.
        datapath.attach_device(77, "out", sources(1)).unwrap();
        assert_eq!(row(&fs, 77), Some(expected(1, device_flag::ATTACHED)));
    });
}

#[test]
fn a_full_table_says_what_happens() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    for ifindex in 1..=DEVICES_MAX {
        datapath
            .leave_device(1000 + ifindex, Some(sources(1)))
            .unwrap();
    }
    let error = datapath
        .leave_device(5000, Some(sources(1)))
        .unwrap_err()
        .to_string();
    for part in ["DEVICE_ADDRESSES", "full", "dropped"] {
        assert!(error.contains(part), "{part:?}: {error}");
    }
    datapath.leave_device(1001, None).unwrap();
    datapath.leave_device(5000, Some(sources(1))).unwrap();
}
