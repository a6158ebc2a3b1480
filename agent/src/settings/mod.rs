//! The agent's settings. Each can be given as a flag, as an environment variable or as a key of
//! the YAML file named by `--config`; a flag beats a variable, a variable the file, the file the
//! default. Nothing here touches the kernel: whether a path is a bpffs is checked at start-up.

use std::{
    collections::BTreeMap,
    fmt, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use weir_common::flow::Timeouts;

use crate::{node::NodePortAddresses, objects::LabelSelector};

mod cgroup;
pub mod definitions;
mod file;
mod nat_ports;
mod parsers;

use definitions::{ALL, Definition};
use file::read_file;
pub use nat_ports::NatPorts;
use parsers::{
    absolute_path, boolean, cidrs, devices, healthz_address, label_selector, log_filter,
    log_format, mark_mask, node_name, node_port_addresses, number, source,
};

/// Name of the flag that names the YAML file.
pub const CONFIG_FLAG: &str = "config";
/// Name of the environment variable that names the YAML file.
pub const CONFIG_VARIABLE: &str = "WEIR_CONFIG";

/// The agent's settings, checked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// Where objects come from.
    pub source: SourceSetting,
    /// Name of this node's Node object.
    pub node_name: String,
    /// Directory of the socket, the lock and the endpoint state.
    pub run_dir: PathBuf,
    /// Directory for pins.
    pub bpf_root: PathBuf,
    /// Folder of the CNI configurations, which is only looked at.
    pub cni_conf_dir: PathBuf,
    /// Folder of the cgroup2 hierarchy: programs at system calls see the processes in it and below.
    pub cgroup_root: PathBuf,
    /// TCP connections to Services are translated at the socket.
    pub socket_translation: bool,
    /// TCP sockets that were translated to an endpoint that is gone are ended.
    pub end_sockets_of_gone_endpoints: bool,
    /// Fragments that come before their first are put together by the kernel.
    pub defragmentation: bool,
    /// Refusals (TCP resets, ICMP port unreachable) sent per second at most, 0 for no limit.
    pub refusals_per_second: u32,
    /// Devices to attach to; empty: to be found.
    pub devices: Vec<String>,
    /// MTU of the pods' devices, bytes; `None`: to be found.
    pub mtu: Option<u16>,
    /// Four adjacent bits of the packet mark.
    pub mark_mask: u32,
    /// Connections of one family.
    pub connections: u32,
    /// Rows of `SERVICE_STATE`.
    pub services_max: u32,
    /// Rows of `BACKENDS`.
    pub backends_max: u32,
    /// How long a released address rests.
    pub address_rest: Duration,
    /// Idle times of connections.
    pub timeouts: Timeouts,
    /// Services that are left to somebody else.
    pub exclude_services: Option<LabelSelector>,
    /// Addresses of Services that are left to somebody else.
    pub exclude_cidrs: Vec<IpNet>,
    /// Where NodePorts are served.
    pub node_port_addresses: NodePortAddresses,
    /// ClusterIPs are served for clients outside, too.
    pub cluster_ips_outside: bool,
    /// What pods send to the outside over IPv4 gets an address of this node.
    pub masquerade_v4: bool,
    /// The same over IPv6.
    pub masquerade_v6: bool,
    /// Destinations outside to which pods keep their address.
    pub non_masquerade_cidrs: Vec<IpNet>,
    /// Source ports of translated connections.
    pub nat_ports: NatPorts,
    /// Where `/healthz` is served; `None`: nowhere.
    pub healthz_address: Option<SocketAddr>,
    /// Whether RCU grace periods are shortened while programs are attached.
    pub expedite_rcu: bool,
    /// Filter of the log, as `tracing_subscriber::EnvFilter` reads it.
    pub log: String,
    /// Format of the log.
    pub log_format: LogFormat,
}

/// Where objects come from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SourceSetting {
    /// A directory of YAML files.
    Directory(PathBuf),
}

impl fmt::Display for SourceSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "dir:{}", path.display()),
        }
    }
}

/// Format of the log.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Where a value was given.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Origin {
    /// A flag.
    Flag,
    /// An environment variable.
    Environment,
    /// The YAML file, with the line of the key.
    File(PathBuf, usize),
    /// Nowhere: the default.
    Default,
}

/// A value with its origin.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Given {
    /// The value as text.
    pub value: String,
    /// Where it was given.
    pub origin: Origin,
}

impl Given {
    /// The origin for people: `--mtu`, `WEIR_MTU`, `/etc/weir/agent.yaml:3`, `default`.
    #[must_use]
    pub fn place(&self, definition: &Definition) -> String {
        match &self.origin {
            Origin::Flag => format!("--{}", definition.name),
            Origin::Environment => definition.environment_variable(),
            Origin::File(path, line) => format!("{}:{line}", path.display()),
            Origin::Default => "default".to_owned(),
        }
    }
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("cannot read the settings file {}: {cause}; --config must name a readable YAML file", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Cause.
        cause: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("settings file {}: {cause}; it must be one YAML mapping from names of settings to values", path.display())]
    NotAMapping {
        /// The file.
        path: PathBuf,
        /// Cause, with line and column.
        cause: String,
    },
    /// A key that is no setting.
    #[error("unknown setting {key:?} in {}:{line}; {remedy}", path.display())]
    UnknownKey {
        /// The key.
        key: String,
        /// The file.
        path: PathBuf,
        /// Line of the key, from 1.
        line: usize,
        /// What to do.
        remedy: String,
    },
    /// A setting that must be given and is not.
    #[error(
        "the setting {name} is required; give it as --{name}, as {variable} or as the key {name} of the settings file: {remedy}"
    )]
    Missing {
        /// Name of the setting.
        name: &'static str,
        /// Environment variable.
        variable: String,
        /// What to give.
        remedy: &'static str,
    },
    /// A value that cannot be used.
    #[error("setting {name}: {value:?}, given by {place}: {problem}; {remedy}")]
    Invalid {
        /// Name of the setting.
        name: &'static str,
        /// The value.
        value: String,
        /// Where it was given.
        place: String,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        remedy: String,
    },
}

/// The values of all settings that were given or have a default, as text.
#[derive(Clone, Debug, Default)]
pub struct Values {
    given: BTreeMap<&'static str, Given>,
}

impl Values {
    /// Gathers the values. `flag` and `variable` look a flag (without dashes) or an environment
    /// variable up; an empty variable counts as not given, as manifests often have `value: ""`.
    ///
    /// # Errors
    ///
    /// [`SettingsError`] if the file cannot be read, is no mapping or has unknown keys.
    pub fn gather(
        flag: impl Fn(&str) -> Option<String>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, SettingsError> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let mut file = match flag(CONFIG_FLAG).or_else(|| variable(CONFIG_VARIABLE)) {
            Some(path) => read_file(Path::new(&path))?,
            None => BTreeMap::new(),
        };
        let mut given = BTreeMap::new();
        for definition in ALL {
            let from_file = file.remove(definition.name);
            let value = flag(definition.name)
                .map(|value| (value, Origin::Flag))
                .or_else(|| {
                    let value = variable(&definition.environment_variable())?;
                    Some((value, Origin::Environment))
                })
                .or(from_file)
                .or_else(|| Some((definition.default?.to_owned(), Origin::Default)));
            if let Some((value, origin)) = value {
                given.insert(definition.name, Given { value, origin });
            }
        }
        Ok(Self { given })
    }

    /// For commands that read no objects: the source need not be given then.
    pub fn without_source(&mut self) {
        self.given.entry("source").or_insert_with(|| Given {
            value: "dir:/nonexistent".to_owned(),
            origin: Origin::Default,
        });
    }

    /// The value of a setting, if it was given or has a default.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Given> {
        self.given.get(name)
    }

    fn parse<T>(
        &self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Result<T, Refusal>,
    ) -> Result<Option<T>, SettingsError> {
        let Some((definition, given)) = definitions::find(name).zip(self.given.get(name)) else {
            return Ok(None);
        };
        parse(&given.value)
            .map(Some)
            .map_err(|refusal| SettingsError::Invalid {
                name,
                value: given.value.clone(),
                place: given.place(definition),
                problem: refusal.problem,
                remedy: refusal.remedy,
            })
    }

    fn required<T>(
        &self,
        name: &'static str,
        remedy: &'static str,
        parse: impl FnOnce(&str) -> Result<T, Refusal>,
    ) -> Result<T, SettingsError> {
        self.parse(name, parse)?
            .ok_or_else(|| SettingsError::Missing {
                name,
                variable: format!("WEIR_{}", name.to_uppercase().replace('-', "_")),
                remedy,
            })
    }

    fn number(&self, name: &'static str, min: u32, max: u32) -> Result<u32, SettingsError> {
        self.required(name, "a number", |text| number(text, min, max))
    }

    /// Checks the values.
    ///
    /// # Errors
    ///
    /// [`SettingsError`] naming the first setting that cannot be used.
    pub fn check(&self) -> Result<Settings, SettingsError> {
        Ok(Settings {
            source: self.required("source", "dir:PATH", source)?,
            node_name: match self.parse("node-name", node_name)? {
                Some(name) => name,
                None => host_name()?,
            },
            run_dir: self.required("run-dir", "a directory", absolute_path)?,
            bpf_root: self.required("bpf-root", "a directory on a bpffs", absolute_path)?,
            cni_conf_dir: self.required("cni-conf-dir", "a directory", absolute_path)?,
            cgroup_root: match self.parse("cgroup-root", cgroup::given)? {
                Some(path) => path,
                None => cgroup_root()?,
            },
            devices: self.parse("devices", devices)?.unwrap_or_default(),
            mtu: self
                .parse("mtu", |text| number(text, 1280, u32::from(u16::MAX)))?
                .and_then(|mtu| u16::try_from(mtu).ok()),
            mark_mask: self.required("mark-mask", "four adjacent bits", mark_mask)?,
            connections: self.number("connections", 1024, 8_388_608)?,
            services_max: self.number("services-max", 16, 1_048_576)?,
            backends_max: self.number("backends-max", 16, 4_194_304)?,
            address_rest: Duration::from_secs(u64::from(self.number("address-rest", 0, 86_400)?)),
            timeouts: Timeouts {
                tcp_syn: self.timeout("timeout-tcp-syn")?,
                tcp_syn_received: self.timeout("timeout-tcp-syn-received")?,
                tcp_established: self.timeout("timeout-tcp-established")?,
                tcp_fin_wait: self.timeout("timeout-tcp-fin-wait")?,
                tcp_time_wait: self.timeout("timeout-tcp-time-wait")?,
                tcp_closed: self.timeout("timeout-tcp-closed")?,
                udp: self.timeout("timeout-udp")?,
                udp_stream: self.timeout("timeout-udp-stream")?,
                icmp: self.timeout("timeout-icmp")?,
                sctp: self.timeout("timeout-sctp")?,
                sctp_established: self.timeout("timeout-sctp-established")?,
            },
            exclude_services: self.parse("exclude-services", label_selector)?.flatten(),
            exclude_cidrs: self.parse("exclude-cidrs", cidrs)?.unwrap_or_default(),
            healthz_address: self.parse("healthz-address", healthz_address)?.flatten(),
            socket_translation: self.required("socket-translation", "true or false", boolean)?,
            end_sockets_of_gone_endpoints: self.required(
                "end-sockets-of-gone-endpoints",
                "true or false",
                boolean,
            )?,
            defragmentation: self.required("defragmentation", "true or false", boolean)?,
            refusals_per_second: self.number("refusals-per-second", 0, 1_000_000)?,
            node_port_addresses: self
                .parse("nodeport-addresses", node_port_addresses)?
                .unwrap_or_default(),
            cluster_ips_outside: self.required("cluster-ips-outside", "true or false", boolean)?,
            masquerade_v4: self.required("masquerade-ipv4", "true or false", boolean)?,
            masquerade_v6: self.required("masquerade-ipv6", "true or false", boolean)?,
            non_masquerade_cidrs: self
                .parse("non-masquerade-cidrs", cidrs)?
                .unwrap_or_default(),
            nat_ports: self.required("nat-ports", "FIRST-LAST", nat_ports::parse)?,
            expedite_rcu: self.required("expedite-rcu", "true or false", boolean)?,
            log: self.required("log", "a filter", log_filter)?,
            log_format: self.required("log-format", "text or json", log_format)?,
        })
    }

    /// Times in the flow table wrap after 52 days, and are told apart up to half of that.
    fn timeout(&self, name: &'static str) -> Result<u32, SettingsError> {
        self.number(name, 1, 2_000_000)
    }

    /// Name, value and origin of every setting, one a line; what is not given shows as `-`.
    /// `settings` supplies what was found.
    #[must_use]
    pub fn table(&self, settings: &Settings) -> String {
        let rows: Vec<[String; 3]> = ALL
            .iter()
            .map(|definition| match self.given.get(definition.name) {
                Some(given) => [
                    definition.name.to_owned(),
                    given.value.clone(),
                    given.place(definition),
                ],
                None => {
                    let (value, origin) = match definition.name {
                        "node-name" => (settings.node_name.clone(), "host name"),
                        "cgroup-root" => (settings.cgroup_root.display().to_string(), "mounts"),
                        "devices" | "mtu" => ("-".to_owned(), "found at start"),
                        _ => ("-".to_owned(), "not given"),
                    };
                    [definition.name.to_owned(), value, origin.to_owned()]
                }
            })
            .collect();
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let (name_width, value_width) = (width(0).max(7), width(1).max(5));
        let mut text = format!(
            "{:name_width$}  {:value_width$}  FROM\n",
            "SETTING", "VALUE"
        );
        for [name, value, origin] in rows {
            text.push_str(&format!(
                "{name:name_width$}  {value:value_width$}  {origin}\n"
            ));
        }
        text
    }
}

/// What is wrong with a value, and what to do.
struct Refusal {
    problem: String,
    remedy: String,
}

fn refuse<T>(problem: impl Into<String>, remedy: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal {
        problem: problem.into(),
        remedy: remedy.into(),
    })
}

fn host_name() -> Result<String, SettingsError> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim().to_lowercase();
    node_name(&name).map_err(|refusal| SettingsError::Invalid {
        name: "node-name",
        value: name,
        place: "the host name".to_owned(),
        problem: refusal.problem,
        remedy: refusal.remedy,
    })
}

fn cgroup_root() -> Result<PathBuf, SettingsError> {
    const MOUNTS: &str = "/proc/self/mounts";
    let mounts = fs::read_to_string(MOUNTS).unwrap_or_default();
    cgroup::found(&mounts).map_err(|refusal| SettingsError::Invalid {
        name: "cgroup-root",
        value: String::new(),
        place: MOUNTS.to_owned(),
        problem: refusal.problem,
        remedy: refusal.remedy,
    })
}

#[cfg(test)]
mod tests;
