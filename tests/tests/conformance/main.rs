//! What Kubernetes' own end-to-end tests ask of Services, as far as clients in pods and on nodes
//! are concerned. Each test names those of upstream that it stands for, with their limit of time;
//! docs/conformance.md has the whole table.
//!
//! Upstream polls until its limit, because nobody tells it when a change is in the kernel. Here
//! `wait_applied` does, so what upstream allows minutes for must hold at once.

mod affinity;
mod conntrack;
mod dual_stack;
mod endpoint_slices;
mod host_port;
mod networking;
mod node_port;
mod sctp;
mod services;
mod stray;
mod support;
mod terminating;
mod topology;
mod traffic_policy;
