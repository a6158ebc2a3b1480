//! The list of settings: each is defined once here, and flag, environment variable, YAML key,
//! help text and `weir-agent settings` follow from it.

/// One setting. The environment variable is `WEIR_` and the name in upper case with underscores;
/// the YAML key is the name.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// Name: the flag without its dashes.
    pub name: &'static str,
    /// What its value is called in the help.
    pub value_name: &'static str,
    /// Value when nobody gives one, as text; `None` when it is found or must be given.
    pub default: Option<&'static str>,
    /// For the help.
    pub help: &'static str,
}

impl Definition {
    /// Name of the environment variable.
    #[must_use]
    pub fn environment_variable(&self) -> String {
        format!("WEIR_{}", self.name.to_uppercase().replace('-', "_"))
    }
}

const fn define(
    name: &'static str,
    value_name: &'static str,
    default: Option<&'static str>,
    help: &'static str,
) -> Definition {
    Definition {
        name,
        value_name,
        default,
        help,
    }
}

/// Every setting, in the order of the help.
pub const ALL: &[Definition] = &[
    define(
        "source",
        "SOURCE",
        None,
        "Where Kubernetes objects come from; required. dir:PATH is a directory of YAML files, \
         watched for changes",
    ),
    define(
        "node-name",
        "NAME",
        None,
        "Name of this node's Node object [default: the host name]",
    ),
    define(
        "run-dir",
        "PATH",
        Some("/run/weir"),
        "Directory for the socket, the lock and the state of endpoints; a reboot must clear it",
    ),
    define(
        "bpf-root",
        "PATH",
        Some("/sys/fs/bpf/weir"),
        "Directory on a bpffs for pinned maps and links",
    ),
    define(
        "cni-conf-dir",
        "PATH",
        Some("/etc/cni/net.d"),
        "Directory of the container runtime's CNI configurations; only looked at, for those of other \
         plugins",
    ),
    define(
        "cgroup-root",
        "PATH",
        None,
        "Folder of the cgroup2 hierarchy in which all processes are whose connections to Services \
         are translated at the socket [default: the mount point]",
    ),
    define(
        "devices",
        "NAMES",
        None,
        "The node's devices to attach to, separated by commas [default: those with a route to \
         another node or the default route, and all others that are up and have an address]",
    ),
    define(
        "mtu",
        "BYTES",
        None,
        "MTU of the pods' devices, 1280 to 65535 [default: the smallest of the devices]",
    ),
    define(
        "mark-mask",
        "MASK",
        Some("0x00f00000"),
        "Four adjacent bits of the packet mark for Weir's use",
    ),
    define(
        "connections",
        "COUNT",
        Some("131072"),
        "Size of the flow table of each family, in connections, 1024 to 8388608",
    ),
    define(
        "services-max",
        "COUNT",
        Some("65536"),
        "Service ports that fit in the tables, each counted per family, 16 to 1048576",
    ),
    define(
        "backends-max",
        "COUNT",
        Some("131072"),
        "Endpoints of Service ports that fit in the tables, 16 to 4194304",
    ),
    define(
        "address-rest",
        "SECONDS",
        Some("60"),
        "How long a released pod address is not given out again, 0 to 86400",
    ),
    define(
        "timeout-tcp-syn",
        "SECONDS",
        Some("120"),
        "Idle time of a TCP connection without an answer, 1 to 2000000",
    ),
    define(
        "timeout-tcp-syn-received",
        "SECONDS",
        Some("60"),
        "Idle time of a TCP connection whose answer is not acknowledged yet, 1 to 2000000",
    ),
    define(
        "timeout-tcp-established",
        "SECONDS",
        Some("86400"),
        "Idle time of an established TCP connection, 1 to 2000000",
    ),
    define(
        "timeout-tcp-fin-wait",
        "SECONDS",
        Some("3600"),
        "Idle time of a TCP connection closed from one side, 1 to 2000000",
    ),
    define(
        "timeout-tcp-time-wait",
        "SECONDS",
        Some("120"),
        "Idle time of a TCP connection closed from both sides, 1 to 2000000",
    ),
    define(
        "timeout-tcp-closed",
        "SECONDS",
        Some("10"),
        "Idle time of a TCP connection that was reset, 1 to 2000000",
    ),
    define(
        "timeout-udp",
        "SECONDS",
        Some("30"),
        "Idle time of a UDP flow without an answer, or shorter than two seconds, 1 to 2000000",
    ),
    define(
        "timeout-udp-stream",
        "SECONDS",
        Some("120"),
        "Idle time of a UDP flow with answers, 1 to 2000000",
    ),
    define(
        "timeout-icmp",
        "SECONDS",
        Some("30"),
        "Idle time of an ICMP echo, 1 to 2000000",
    ),
    define(
        "timeout-sctp",
        "SECONDS",
        Some("30"),
        "Idle time of an SCTP association without an answer, 1 to 2000000",
    ),
    define(
        "timeout-sctp-established",
        "SECONDS",
        Some("210"),
        "Idle time of an SCTP association with answers, 1 to 2000000",
    ),
    define(
        "socket-translation",
        "BOOL",
        Some("true"),
        "Translate TCP connections to Services at the socket instead of packet by packet: true or \
         false",
    ),
    define(
        "end-sockets-of-gone-endpoints",
        "BOOL",
        Some("false"),
        "End TCP connections that were translated at the socket when their endpoint is removed from \
         the Service (SOCK_DESTROY): true or false",
    ),
    define(
        "defragmentation",
        "BOOL",
        Some("true"),
        "Have the kernel put together datagrams whose fragments come out of order and whose ports \
         matter, instead of dropping them: true or false",
    ),
    define(
        "refusals-per-second",
        "COUNT",
        Some("1000"),
        "TCP resets and ICMP port unreachable that are sent per second at most for what no Service \
         serves, 0 to 1000000, 0 for no limit",
    ),
    define(
        "exclude-services",
        "SELECTOR",
        None,
        "Services that are left to somebody else, as a label selector: app=legacy,!weir \
         [default: none]",
    ),
    define(
        "exclude-cidrs",
        "CIDRS",
        None,
        "Addresses of Services that are left to somebody else (a node-local DNS cache), separated \
         by commas [default: none]",
    ),
    define(
        "nodeport-addresses",
        "CIDRS",
        None,
        "Addresses of the node at which NodePorts are served: ranges separated by commas, or primary, for \
         the first of each family in the status of the Node object [default: those of devices with a \
         default route and of the setting devices, and those in the status of the Node object]",
    ),
    define(
        "cluster-ips-outside",
        "BOOL",
        Some("false"),
        "Serve ClusterIPs for clients outside the nodes too: true or false",
    ),
    define(
        "masquerade-ipv4",
        "BOOL",
        Some("true"),
        "What pods send to the outside over IPv4 gets an address of this node: true or false",
    ),
    define(
        "masquerade-ipv6",
        "BOOL",
        Some("true"),
        "The same over IPv6: true or false",
    ),
    define(
        "non-masquerade-cidrs",
        "CIDRS",
        None,
        "Destinations outside to which pods keep their own address, separated by commas [default: \
         none]",
    ),
    define(
        "nat-ports",
        "FIRST-LAST",
        Some("61000-65534"),
        "Source ports of connections that get an address of this node, or another port than their own; \
         1024 to 65535, at least 16 of them",
    ),
    define(
        "healthz-address",
        "ADDRESS",
        Some("0.0.0.0:10256"),
        "Where /healthz and /livez are served for load balancers, address and port; an unspecified \
         address means all of both families, an empty text or off nowhere",
    ),
    define(
        "expedite-rcu",
        "BOOL",
        Some("true"),
        "Shorten the kernel's RCU grace periods while programs are attached to devices, for fast \
         pod starts: true or false",
    ),
    define(
        "log",
        "FILTER",
        Some("info"),
        "What is logged: error, warn, info, debug or trace, or by module: info,weir_agent=debug",
    ),
    define(
        "log-format",
        "FORMAT",
        Some("text"),
        "text for people, json for machines (one object per line)",
    ),
];

/// The setting of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Definition> {
    ALL.iter().find(|d| d.name == name)
}
