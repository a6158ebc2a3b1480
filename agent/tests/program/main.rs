//! The kernel programs by themselves: the real object, maps filled by the agent's own code, and
//! packets through `BPF_PROG_TEST_RUN`: what goes in, the verdict, the bytes that come out with every
//! checksum, what was counted, and how many tables were asked. Needs root. Every test has a BPF
//! file system and a network namespace of its own.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod affinity;
mod answers;
mod at_once;
mod bed;
mod budget;
mod by_stack;
mod defrag;
mod differential;
mod errors;
mod forward;
mod fragments;
mod full;
mod host;
mod host_errors;
mod host_fragments;
mod lifetime;
mod logged;
mod lost_sources;
mod malformed;
mod masquerade;
mod nat_ports;
mod outside;
mod packet;
mod reference;
mod refusals;
mod run;
mod services;
mod sources;
mod states;
#[path = "../datapath/support.rs"]
#[allow(dead_code, reason = "the tests of the data path use the rest")]
mod support;
mod unfinished;
mod upgrade;
#[path = "../model/world/mod.rs"]
mod world;
