//! What Kubernetes' own end-to-end tests ask of Services, of clients in pods, on nodes and beyond. Each test names those of upstream that it stands for, with their limit of time;
//! docs/conformance.md has the whole table.
//!
//! Upstream polls until its limit, because nobody tells it when a change is in the kernel. Here
//! `wait_applied` does, so what upstream allows minutes for must hold at once.

mod affinity;
mod beyond;
mod conntrack;
mod dual_stack;
mod endpoint_slices;
mod external_policy;
mod host_port;
mod load_balancer;
mod networking;
mod node_port;
mod sctp;
mod services;
mod stray;
mod support;
mod terminating;
mod topology;
mod traffic_policy;
