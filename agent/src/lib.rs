//! The Weir agent as a library: from Kubernetes objects to BPF maps.
//!
//! `source` → `objects` → `model` (pure) → `datapath` (the only module that touches maps);
//! `endpoint`, `ipam` and `node` own the pods of this node and the ways to other nodes; `agent`
//! ties them together in one event loop; `api` serves gRPC.

pub mod agent;
pub mod api;
pub mod datapath;
pub mod endpoint;
pub mod health;
pub mod ipam;
pub mod lock;
pub mod logging;
pub mod model;
pub mod netlink;
pub mod node;
pub mod objects;
pub mod settings;
pub mod source;
