//! The agent's account of itself, for `weir status` and the lists.

use std::{collections::HashSet, fs, net::IpAddr, time::Instant};

use ipnet::IpNet;
use tonic::Status;
use weir_api::v1;
use weir_common::{
    DropReason,
    metrics::{Hook, outcome},
};

use super::{Agent, nat_ports, strangers::Strangers};
use crate::{
    datapath::{AttachMode, Attachment},
    endpoint::EndpointState,
    netlink::sysctl,
    objects::{Family, Kind},
};

impl Agent {
    pub(super) fn status(&self) -> Result<v1::StatusResponse, Status> {
        let internal = |what: &str, error: &dyn std::fmt::Display| {
            Status::internal(format!("cannot read {what}: {error}"))
        };
        let counters = self.datapath.counters().all();
        let counters = counters.map_err(|error| internal("the packet counters", &error))?;
        let nat_ports = self.nat_ports();
        let nat_ports = nat_ports.map_err(|error| internal("the packet counters", &error))?;
        // Without them the rest is worth as much; the problem stands among the others.
        let attachments = self.datapath.attachments().unwrap_or_default();
        let usage = self.endpoints.usage();
        let progress = self.progress.borrow();
        let source = v1::Source {
            name: self.source.name.clone(),
            synced: self.source_state.synced,
            revision: self.source_state.revision,
            applied_revision: progress.applied,
            errors: self.source_state.errors.clone(),
            objects: self
                .model
                .object_counts()
                .into_iter()
                .map(|(kind, count)| (kind_name(kind).to_owned(), number(count)))
                .collect(),
        };
        Ok(v1::StatusResponse {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            abi_version: weir_common::ABI_VERSION,
            kernel_version: kernel_version(),
            node_name: self.settings.node_name.clone(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            source: Some(source),
            attachments: attachments
                .iter()
                .map(|a| self.attachment(a))
                .chain(self.socket_attachments())
                .collect(),
            maps: self
                .datapath
                .fill()
                .into_iter()
                .map(|fill| v1::MapFill {
                    name: fill.map.to_owned(),
                    entries: fill.entries.into(),
                    max_entries: fill.max.into(),
                })
                .collect(),
            counters: counters
                .iter()
                .map(|c| packet_counter(c.hook, c.outcome, c.counter.packets, c.counter.bytes))
                .collect(),
            pod_cidrs: self.plan.pod_cidrs.iter().map(IpNet::to_string).collect(),
            addresses_used: usage.addresses_used,
            addresses_resting: usage.addresses_resting,
            problems: self.problems(&nat_ports),
            bpf_root: self.settings.bpf_root.display().to_string(),
            resident_bytes: resident_bytes(),
            failing: number(self.rows.failed().len()),
            mtu: self.plan.mtu,
            attach_mode: self.datapath.attach_mode().name().to_owned(),
            nat_ports: Some(nat_ports),
            strangers: self.strangers.as_ref().and_then(Strangers::found),
            ended_sockets: self.settings.end_sockets_of_gone_endpoints.then_some(
                v1::EndedSockets {
                    ended: self.gone.ended,
                    failed: self.gone.failed,
                    looking: self.gone.is_looking(),
                },
            ),
        })
    }

    /// The programs of sockets; their device is the cgroup.
    fn socket_attachments(&self) -> Vec<v1::Attachment> {
        let cgroup = self.settings.cgroup_root.display().to_string();
        self.datapath
            .socket_programs()
            .into_iter()
            .map(|(program, id)| v1::Attachment {
                program: program.to_owned(),
                device: cgroup.clone(),
                ifindex: 0,
                hook: "cgroup".to_owned(),
                program_id: id,
            })
            .collect()
    }

    fn attachment(&self, attachment: &Attachment) -> v1::Attachment {
        let direction = match attachment.hook {
            Hook::FromPod | Hook::FromNetdev | Hook::FromHost | Hook::FromDefrag => "ingress",
            Hook::ToPod | Hook::ToNetdev | Hook::Socket => "egress",
        };
        let mode: AttachMode = attachment.mode;
        v1::Attachment {
            program: attachment.hook.name().to_owned(),
            device: nix::net::if_::if_indextoname(attachment.ifindex)
                .ok()
                .and_then(|name| name.into_string().ok())
                .unwrap_or_default(),
            ifindex: attachment.ifindex,
            hook: format!("{} {direction}", mode.name()),
            program_id: self
                .program_ids
                .get(attachment.hook as usize)
                .copied()
                .unwrap_or_default(),
        }
    }

    /// Everything that is wrong now.
    fn problems(&self, nat_ports: &v1::NatPorts) -> Vec<String> {
        let mut problems = Vec::new();
        if self.source_state.synced && self.model.node(&self.settings.node_name).is_none() {
            problems.push(format!(
                "the source has no Node object {}: pods get no addresses; create it, or correct \
                 the setting node-name",
                self.settings.node_name
            ));
        }
        problems.extend(self.source_state.errors.iter().cloned());
        problems.extend(self.model.problems().map(ToString::to_string));
        problems.extend(self.translations.problems(&self.settings.node_name));
        problems.extend(self.plan.problems.iter().cloned());
        if self.swept && self.model.node(&self.settings.node_name).is_some() {
            problems.extend(self.host.problems(&self.settings.node_name));
        }
        let now = Instant::now();
        for (row, failure) in self.rows.failed() {
            let wait = failure.due.saturating_duration_since(now).as_secs_f32();
            problems.push(format!(
                "{row}: {} (attempt {}, the next in {wait:.1} s)",
                failure.error, failure.attempts
            ));
        }
        for endpoint in self.endpoints.list() {
            if let EndpointState::Failing(_) | EndpointState::Removing(_) = endpoint.state {
                let name = endpoint.spec.display_name();
                problems.push(format!("pod {name} is {}", endpoint.state));
            }
        }
        problems.extend(self.unreachable_nodes());
        if let Err(error) = self.datapath.attachments() {
            problems.push(format!("cannot read what is attached: {error}"));
        }
        let missing: Vec<&str> = self.datapath.missing_pins().collect();
        if !missing.is_empty() {
            problems.push(format!(
                "pins of maps are gone from {}: {}; all goes on, but `weir bpf` cannot read them and the \
                 next start of the agent begins without what they hold",
                self.settings.bpf_root.display(),
                missing.join(", ")
            ));
        }
        problems.extend(self.notes.all().cloned());
        if self.settings.end_sockets_of_gone_endpoints && self.swept {
            let source_has_errors = !self.source_state.errors.is_empty();
            problems.extend(self.gone.problems(source_has_errors));
        }
        problems.extend(nat_ports::problem(
            self.settings.nat_ports,
            nat_ports.exhausted_in_last_minute,
        ));
        problems.extend(self.problems_with_ports());
        problems.extend(self.defrag.problem());
        problems.extend(sysctl::strict_rp_filter());
        // One cause may be met in several places.
        let mut known = HashSet::new();
        problems.retain(|problem| known.insert(problem.clone()));
        problems
    }

    /// Nodes whose pods cannot be reached, with the reason; one line for each family.
    fn unreachable_nodes(&self) -> impl Iterator<Item = String> + '_ {
        self.plan.hops.iter().filter_map(|((node, family), hop)| {
            let why = hop.as_ref().err()?;
            Some(format!(
                "pods of node {node} cannot be reached by {}: {why}",
                family.name()
            ))
        })
    }

    pub(super) fn list_endpoints(&self) -> v1::ListEndpointsResponse {
        let mut endpoints: Vec<_> = self
            .endpoints
            .list()
            .map(|endpoint| {
                let spec = &endpoint.spec;
                v1::Endpoint {
                    number: spec.number,
                    container_id: spec.key.container_id.clone(),
                    ifname: spec.key.ifname.clone(),
                    pod_namespace: spec.pod_namespace.clone(),
                    pod_name: spec.pod_name.clone(),
                    pod_uid: spec.pod_uid.clone(),
                    addresses: spec.addresses.iter().map(IpAddr::to_string).collect(),
                    host_ifname: spec.host_ifname.clone(),
                    host_ifindex: spec.host_ifindex,
                    host_mac: spec.host_mac().to_string(),
                    pod_mac: spec.pod_mac().to_string(),
                    netns: spec.netns.clone(),
                    state: endpoint.state.to_string(),
                    // No policy selects a pod in this version.
                    egress_set: weir_common::endpoint::POLICY_SET_ALLOW_ALL,
                    ingress_set: weir_common::endpoint::POLICY_SET_ALLOW_ALL,
                    host_ports: spec.host_ports.iter().map(Into::into).collect(),
                }
            })
            .collect();
        endpoints.sort_by(|a, b| {
            (&a.pod_namespace, &a.pod_name, a.number).cmp(&(
                &b.pod_namespace,
                &b.pod_name,
                b.number,
            ))
        });
        v1::ListEndpointsResponse { endpoints }
    }

    pub(super) fn list_nodes(&self) -> v1::ListNodesResponse {
        let nodes = self.model.nodes().map(|(name, node)| {
            let this_node = name == self.settings.node_name;
            v1::Node {
                name: name.to_owned(),
                this_node,
                addresses: node.addresses.iter().map(IpAddr::to_string).collect(),
                pod_cidrs: node.pod_cidrs.iter().map(IpNet::to_string).collect(),
                routes: if this_node {
                    vec!["local".to_owned()]
                } else {
                    self.routes_to(name)
                },
                zone: node.zone.clone(),
            }
        });
        v1::ListNodesResponse {
            nodes: nodes.collect(),
        }
    }

    /// How the pods of a node are reached, by family.
    fn routes_to(&self, node: &str) -> Vec<String> {
        let family = |family: Family| {
            let hop = self.plan.hops.get(&(node.to_owned(), family))?;
            Some(match hop {
                Ok(hop) => {
                    let device = nix::net::if_::if_indextoname(hop.ifindex)
                        .ok()
                        .and_then(|name| name.into_string().ok())
                        .unwrap_or_default();
                    format!("{}: native via {} dev {device}", family.name(), hop.gateway)
                }
                Err(why) => format!("{}: {why}", family.name()),
            })
        };
        [Family::V4, Family::V6]
            .into_iter()
            .filter_map(family)
            .collect()
    }
}

fn packet_counter(hook: Hook, number: u8, packets: u64, bytes: u64) -> v1::PacketCounter {
    let known = outcome::ALL.iter().find(|(outcome, _)| *outcome == number);
    let reason = DropReason::from_number(number);
    v1::PacketCounter {
        hook: hook.name().to_owned(),
        name: known.map_or(reason.name(), |(_, name)| name).to_owned(),
        drop: known.is_none(),
        packets,
        bytes,
        description: known.map_or(reason.description(), |_| "").to_owned(),
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Service => "Service",
        Kind::EndpointSlice => "EndpointSlice",
        Kind::Node => "Node",
        Kind::Pod => "Pod",
        Kind::Namespace => "Namespace",
    }
}

fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn kernel_version() -> String {
    nix::sys::utsname::uname()
        .ok()
        .and_then(|name| name.release().to_str().map(str::to_owned))
        .unwrap_or_default()
}

/// Resident memory of this process (`/proc/self/statm`, second field, in pages).
fn resident_bytes() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split_whitespace().nth(1)?.parse::<u64>().ok())
        .unwrap_or_default();
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| u64::try_from(size).ok())
        .unwrap_or(4096);
    pages * page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_told_apart() {
        let drop = packet_counter(Hook::FromPod, DropReason::NoBackend as u8, 1, 2);
        assert_eq!(
            (drop.drop, drop.name.as_str()),
            (true, "SERVICE_BACKEND_NOT_FOUND")
        );
        let local = packet_counter(Hook::FromPod, outcome::LOCAL, 1, 2);
        assert_eq!((local.drop, local.name.as_str()), (false, "LOCAL"));
    }

    #[test]
    fn this_process_has_memory_and_a_kernel() {
        assert!(resident_bytes() > 100_000);
        assert!(!kernel_version().is_empty());
    }
}
