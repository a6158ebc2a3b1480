use weir_agent::{
    datapath::{Hop, HopRef},
    objects::Family,
};
use weir_common::{
    ipcache::class,
    next_hop::{FIRST_ROW, HOST, NextHop, kind},
};

use crate::support::{BpfFs, ReadOnly};

fn hop(family: Family, last: u8) -> Hop {
    Hop {
        ifindex: 3,
        gateway: match family {
            Family::V4 => [192, 0, 2, last].into(),
            Family::V6 => [0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last)].into(),
        },
        mtu: 1450,
        source: None,
    }
}

fn cidr(family: Family, node: u8) -> ipnet::IpNet {
    match family {
        Family::V4 => format!("10.{node}.0.0/24"),
        Family::V6 => format!("fd00:{node}::/64"),
    }
    .parse()
    .unwrap()
}

#[test]
fn a_changed_route_keeps_number_and_generation() {
    for family in [Family::V4, Family::V6] {
        let fs = BpfFs::new();
        let row = |number: u32| -> NextHop {
            fs.array("NEXT_HOPS").get(&(number - FIRST_ROW), 0).unwrap()
        };
        let mut datapath = fs.open();
        let number = datapath
            .set_hop("b", family, &[], Some(hop(family, 1)))
            .unwrap();
        let before = row(number);
        assert_eq!(
            (before.kind, before.ifindex, before.mtu),
            (kind::NEIGHBOUR, 3, 1450)
        );
        assert_eq!(
            datapath
                .set_hop("b", family, &[], Some(hop(family, 2)))
                .unwrap(),
            number
        );
        assert_ne!(row(number).gateway, before.gateway);
        assert_eq!(row(number).generation, before.generation);
        datapath.set_hop("b", family, &[], None).unwrap();
        assert_eq!(row(number).kind, kind::NONE);
        assert_eq!(row(number).generation, before.generation);
        datapath.remove_hop("b", family).unwrap();
        assert!(row(number).generation > before.generation);
        let other = if family == Family::V4 {
            Family::V6
        } else {
            Family::V4
        };
        let a = datapath
            .set_hop("c", family, &[], Some(hop(family, 1)))
            .unwrap();
        let b = datapath
            .set_hop("c", other, &[], Some(hop(family, 1)))
            .unwrap();
        assert_ne!(a, b);
    }
}

#[test]
fn numbers_are_found_again_through_the_prefixes() {
    for family in [Family::V4, Family::V6] {
        let fs = BpfFs::new();
        let mut datapath = fs.open();
        let mut numbers = Vec::new();
        for node in 1..=4u8 {
            let name = format!("node-{node}");
            let number = datapath
                .set_hop(
                    &name,
                    family,
                    &[cidr(family, node)],
                    Some(hop(family, node)),
                )
                .unwrap();
            datapath
                .set_ipcache(
                    cidr(family, node),
                    class::REMOTE_PODS,
                    0,
                    HopRef::Node(&name, family),
                )
                .unwrap();
            numbers.push(number);
        }
        drop(datapath);

        let mut datapath = fs.open();
        // Node 1 is gone, node 5 is new, and the order is another.
        let fresh = datapath
            .set_hop("node-5", family, &[cidr(family, 5)], Some(hop(family, 5)))
            .unwrap();
        assert!(
            !numbers.contains(&fresh),
            "rows in use are not given away before the sweep"
        );
        for node in (2..=4u8).rev() {
            let name = format!("node-{node}");
            let number = datapath
                .set_hop(
                    &name,
                    family,
                    &[cidr(family, node)],
                    Some(hop(family, node)),
                )
                .unwrap();
            assert_eq!(number, numbers[node as usize - 1]);
            datapath
                .set_ipcache(
                    cidr(family, node),
                    class::REMOTE_PODS,
                    0,
                    HopRef::Node(&name, family),
                )
                .unwrap();
        }
        assert_eq!(
            datapath.ipcache().next_hop(cidr(family, 1)),
            Some(numbers[0])
        );
        let pruned = datapath.prune().unwrap();
        assert_eq!((pruned.prefixes, pruned.next_hops), (1, 1));
        assert_eq!(datapath.ipcache().entries().len(), 3);
        let row: NextHop = fs
            .array("NEXT_HOPS")
            .get(&(numbers[0] - FIRST_ROW), 0)
            .unwrap();
        assert_eq!((row.kind, row.generation), (kind::NONE, 2));
    }
}

#[test]
fn an_unknown_node_is_an_error_and_the_host_is_not() {
    let fs = BpfFs::new();
    let mut datapath = fs.open();
    let prefix = cidr(Family::V4, 1);
    let error = datapath
        .set_ipcache(
            prefix,
            class::REMOTE_PODS,
            0,
            HopRef::Node("nobody", Family::V4),
        )
        .unwrap_err();
    assert!(error.to_string().contains("nobody"), "{error}");
    datapath
        .set_ipcache(prefix, class::THIS_NODE, 0, HopRef::Host)
        .unwrap();
    assert_eq!(datapath.ipcache().entries()[&prefix].next_hop, HOST);
}

#[test]
fn a_row_of_an_earlier_agent_that_cannot_be_written_is_not_given_away() {
    let fs = BpfFs::new();
    let family = Family::V4;
    let prefixes = [cidr(family, 1)];
    let mut datapath = fs.open();
    let number = datapath
        .set_hop("a", family, &prefixes, Some(hop(family, 1)))
        .unwrap();
    datapath
        .set_ipcache(
            prefixes[0],
            class::REMOTE_PODS,
            0,
            HopRef::Node("a", family),
        )
        .unwrap();
    drop(datapath);

    let mut datapath = fs.open();
    let refused = ReadOnly::new(&fs, "NEXT_HOPS");
    datapath
        .set_hop("a", family, &prefixes, Some(hop(family, 2)))
        .unwrap_err();
    drop(refused);
    let other = datapath
        .set_hop("b", family, &[cidr(family, 2)], Some(hop(family, 3)))
        .unwrap();
    assert_ne!(other, number);
    let again = datapath
        .set_hop("a", family, &prefixes, Some(hop(family, 2)))
        .unwrap();
    assert_eq!(again, number);
}

#[test]
fn nodes_behind_one_gateway_share_their_rows_when_nothing_names_them() {
    for family in [Family::V4, Family::V6] {
        let fs = BpfFs::new();
        let row = |number: u32| -> NextHop {
            fs.array("NEXT_HOPS").get(&(number - FIRST_ROW), 0).unwrap()
        };
        let gateway = Some(hop(family, 1));
        let mut datapath = fs.open();
        let mut set = |node: &str, way| datapath.set_hop(node, family, &[], way).unwrap();
        let routed = ["a", "b", "c"].map(|node| set(node, gateway));
        let elsewhere = set("d", Some(hop(family, 2)));
        let before = routed.map(row);
        drop(datapath);

        // The ipcache names none of them; there is one node less, and they come in another order.
        let mut datapath = fs.open();
        let mut claimed = ["c", "a"].map(|node| {
            datapath
                .set_hop(node, family, &[cidr(family, 1)], gateway)
                .unwrap()
        });
        claimed.sort_unstable();
        assert_eq!(claimed[..], routed[..2]);
        assert_eq!(datapath.prune().unwrap().next_hops, 1);
        assert_eq!(row(elsewhere).kind, kind::NONE);
        assert_eq!(routed.map(row), before, "flows may refer to any of them");
        // One more goes: flows of the other may have its row.
        datapath.remove_hop("a", family).unwrap();
        assert_eq!(routed.map(row), before);
        // A new node gets a row that leads there already, one behind another gateway does not.
        let other = datapath
            .set_hop("e", family, &[], Some(hop(family, 3)))
            .unwrap();
        assert!(!routed.contains(&other));
        let new = datapath.set_hop("f", family, &[], gateway).unwrap();
        assert!(routed.contains(&new));
        // With the last of them a row has nobody.
        datapath.remove_hop("f", family).unwrap();
        datapath.remove_hop("c", family).unwrap();
        let left = routed.map(row).map(|row| row.kind);
        let empty = left.iter().filter(|kind| **kind == kind::NONE).count();
        assert_eq!(empty, 1, "those that nobody had go at the next start");
        drop(datapath);
        let mut datapath = fs.open();
        datapath.prune().unwrap();
        assert_eq!(routed.map(row).map(|row| row.kind), [kind::NONE; 3]);
    }
}
