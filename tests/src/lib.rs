//! The test bed: clusters made of network namespaces on one machine, run by the real binaries.
//!
//! A node is a namespace with an `eth0` on a common bridge and a real `weir-agent` in it; a pod is a
//! namespace that the real `weir-cni` wires; what the agents know of the cluster is a directory of
//! YAML. Tests see what a user sees: the command line, the wire, the kernel's own tools. Used by the
//! black-box tests in `tests/` and by `cargo xtask demo`; never by the product.
//!
//! Everything a cluster makes carries an id (process and number), goes when the [`Cluster`] is
//! dropped, and, should the process be killed, when the next test starts ([`reaper`]).

pub mod agent;
pub mod bpf;
pub mod capture;
pub mod cgroup;
pub mod cluster;
pub mod cni;
pub mod held;
pub mod http;
pub mod kube_proxy;
pub mod load;
pub mod netns;
pub mod node;
pub mod objects;
pub mod outside;
pub mod packet;
pub mod pod;
pub mod process;
pub mod reaper;
pub mod refusal;
pub mod sctp;
pub mod snapshot;
pub mod traffic;
pub mod tun;
pub mod wait;
pub mod witness;

pub use cluster::{Cluster, Families};
pub use node::Node;
pub use pod::Pod;
pub use wait::{wait_for, wait_until};

/// What a test returns. A failed `?` panics where it stands, so that the cluster, dropped while
/// panicking, knows to print its agents' logs.
pub type TestResult = Result<(), TestFailure>;

/// Never made: see [`TestResult`].
#[derive(Debug)]
pub enum TestFailure {}

impl From<anyhow::Error> for TestFailure {
    #[track_caller]
    fn from(error: anyhow::Error) -> Self {
        panic!("{error:#}")
    }
}

/// How many rounds a long test makes: `short` in CI, `long` with `WEIR_LONG=1` (`cargo xtask test --long`).
#[must_use]
pub fn rounds(short: usize, long: usize) -> usize {
    match std::env::var_os("WEIR_LONG") {
        Some(value) if value != "0" => long,
        _ => short,
    }
}
