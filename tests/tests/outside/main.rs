//! Clients and servers beyond the nodes: NodePorts, external and load-balancer addresses from outside, and pods that
//! talk to the outside. A pod or process of a node that uses another node's NodePort is outside there, too.

mod bare;
mod bed;
mod dnat;
mod floods;
mod icmp;
mod leaks;
mod live;
mod masquerade;
mod matrix;
mod narrow;
mod nat_ports;
mod nat_views;
mod restrictions;
mod support;
mod tags;
mod uplinks;
