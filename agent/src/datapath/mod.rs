//! The only module that touches the kernel's BPF objects: loads the programs, owns the maps, attaches, applies
//! desired state, reads counters and events.
