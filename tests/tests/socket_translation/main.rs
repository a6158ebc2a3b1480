//! Translation at the socket, with the sockets of pods and of the node: what system calls do, who is
//! left out, and what becomes of it when the agent does not run or is told otherwise.

mod calls;
mod errors;
mod gone_endpoints;
mod lasting;
mod node_ports;
mod opt_out;
mod sizes;
mod support;
