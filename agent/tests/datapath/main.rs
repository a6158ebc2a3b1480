//! The data path against the running kernel: maps, pins, links. Needs root. Every test has a BPF
//! file system of its own, and a network namespace where it needs devices.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod affinity;
mod attach;
mod device_addresses;
mod endpoints;
mod flows;
mod ipcache;
mod layout;
mod layout_crash;
mod next_hops;
mod service_sets;
mod services;
mod services_retry;
mod source_ranges;
mod support;
