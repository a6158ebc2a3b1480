//! Names for the numbers in the maps.

use weir_common::{
    endpoint, flow, ipcache, next_hop, protocol,
    service::{backend_state, endpoint_set, scope as frontend_scope},
};

/// TCP, UDP …, or the number.
pub fn protocol(number: u8) -> String {
    protocol::name(number).map_or_else(|| number.to_string(), str::to_owned)
}

/// Where a packet of a flow is seen.
pub fn flow_scope(scope: u8) -> String {
    match scope {
        flow::scope::POD => "pod".to_owned(),
        flow::scope::UNDERLAY => "underlay".to_owned(),
        flow::scope::HOST => "host".to_owned(),
        flow::scope::OVERLAY => "overlay".to_owned(),
        flow::scope::DEVICE => "device".to_owned(),
        other => other.to_string(),
    }
}

/// Whom a frontend serves.
pub fn frontend_scope(scope: u8) -> String {
    match scope {
        frontend_scope::INSIDE => "inside".to_owned(),
        frontend_scope::OUTSIDE => "outside".to_owned(),
        other => other.to_string(),
    }
}

/// What a backend is for.
pub fn backend_state(state: u8) -> String {
    match state {
        backend_state::FREE => "free".to_owned(),
        backend_state::ACTIVE => "active".to_owned(),
        backend_state::TERMINATING => "terminating".to_owned(),
        other => other.to_string(),
    }
}

/// The set of endpoints that a row of `SERVICE_STATE` is.
pub fn endpoint_set(state_row: u32) -> String {
    set_name(state_row % endpoint_set::COUNT)
}

/// The sets that a backend belongs to, from the bits of its row.
pub fn endpoint_sets(bits: u8) -> Vec<String> {
    let sets = (0..u8::BITS).filter(|set| u32::from(bits) & (1 << set) != 0);
    sets.map(set_name).collect()
}

fn set_name(set: u32) -> String {
    match set {
        endpoint_set::CLUSTER => "cluster".to_owned(),
        endpoint_set::LOCAL => "local".to_owned(),
        other => other.to_string(),
    }
}

/// What is said of an address in the ipcache.
pub fn ipcache_flags(flags: u8) -> Vec<String> {
    use ipcache::flag::{CLUSTER_IP, FRONTENDS, HOST_PORTS, NO_MASQUERADE, NODE_PORTS, REFUSE};
    flags_of(
        flags.into(),
        &[
            (FRONTENDS.into(), "frontends"),
            (NODE_PORTS.into(), "node-ports"),
            (REFUSE.into(), "refuse"),
            (CLUSTER_IP.into(), "cluster-ip"),
            (HOST_PORTS.into(), "host-ports"),
            (NO_MASQUERADE.into(), "no-masquerade"),
        ],
    )
}

/// What is said of a pod of this node.
pub fn endpoint_flags(flags: u16) -> Vec<String> {
    flags_of(
        flags,
        &[(
            endpoint::flag::NO_SOCKET_TRANSLATION,
            "no-socket-translation",
        )],
    )
}

/// Names of the bits that are set; bits without a name as one number.
fn flags_of(flags: u16, known: &[(u16, &str)]) -> Vec<String> {
    let mut rest = flags;
    let mut names = Vec::new();
    for (bit, name) in known {
        if flags & bit != 0 {
            names.push((*name).to_owned());
            rest &= !bit;
        }
    }
    if rest != 0 {
        names.push(format!("{rest:#x}"));
    }
    names
}

/// `a,b`, or `-` for none.
pub fn listed(names: &[String]) -> String {
    if names.is_empty() {
        "-".to_owned()
    } else {
        names.join(",")
    }
}

/// What a prefix of the ipcache is.
pub fn ipcache_class(class: u8) -> String {
    match class {
        ipcache::class::REMOTE_PODS => "remote-pods".to_owned(),
        ipcache::class::REMOTE_NODE => "remote-node".to_owned(),
        ipcache::class::THIS_NODE => "this-node".to_owned(),
        ipcache::class::SERVICE => "service".to_owned(),
        ipcache::class::OUTSIDE => "outside".to_owned(),
        other => other.to_string(),
    }
}

/// What kind of row of `NEXT_HOPS` it is.
pub fn next_hop_kind(kind: u8) -> String {
    match kind {
        next_hop::kind::NONE => "none".to_owned(),
        next_hop::kind::NEIGHBOUR => "neighbour".to_owned(),
        next_hop::kind::HOST => "host".to_owned(),
        next_hop::kind::ROUTED => "routed".to_owned(),
        other => other.to_string(),
    }
}

/// A number of a next hop: `endpoint 7`, `host`, or the number of a row.
pub fn next_hop(number: u32) -> String {
    match number {
        next_hop::NONE => "-".to_owned(),
        next_hop::HOST => "host".to_owned(),
        number if next_hop::is_endpoint(number) => format!("endpoint {number}"),
        number => format!("node {number}"),
    }
}

/// TCP flags as letters: SFRA.
pub fn tcp_flags(flags: u8) -> String {
    use protocol::tcp_flag::{ACK, FIN, RST, SYN};
    [(SYN, 'S'), (FIN, 'F'), (RST, 'R'), (ACK, 'A')]
        .iter()
        .filter(|(bit, _)| flags & bit != 0)
        .map(|(_, letter)| letter)
        .collect()
}

/// Name of a device of this network namespace, or its number.
pub fn device(ifindex: u32) -> String {
    if ifindex == 0 {
        return "any".to_owned();
    }
    nix::net::if_::if_indextoname(ifindex)
        .ok()
        .and_then(|name| name.into_string().ok())
        // nix 0.31 takes the null pointer of an unknown number for success.
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| format!("if{ifindex}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_names() {
        assert_eq!(next_hop(0), "-");
        assert_eq!(next_hop(7), "endpoint 7");
        assert_eq!(next_hop(next_hop::HOST), "host");
        assert_eq!(next_hop(next_hop::FIRST_ROW), "node 4097");
        assert_eq!(tcp_flags(0x12), "SA");
        assert_eq!(endpoint_flags(1), ["no-socket-translation"]);
        assert!(endpoint_flags(0).is_empty());
        assert_eq!(protocol(6), "TCP");
        assert_eq!(protocol(89), "89");
        assert_eq!(flow_scope(9), "9");
    }

    #[test]
    fn bits_have_names_and_unknown_ones_are_shown() {
        assert_eq!(listed(&ipcache_flags(0)), "-");
        assert_eq!(listed(&ipcache_flags(0x5)), "frontends,refuse");
        assert_eq!(listed(&ipcache_flags(0x82)), "node-ports,0x80");
        assert_eq!(listed(&endpoint_flags(1)), "no-socket-translation");
        assert_eq!(listed(&endpoint_sets(0b101)), "cluster,2");
        assert_eq!(endpoint_set(9), "local");
    }
}
