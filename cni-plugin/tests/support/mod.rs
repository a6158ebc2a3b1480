//! What the black-box tests stand on: namespaces of their own, and an agent that obeys or misbehaves.

pub mod fake_agent;
pub mod node;
