//! The kernel programs that the agent carries, and what it must find in them.

use aya_obj::Object;
use weir_common::{
    limits,
    metrics::{DEVICE_HOOKS, Hook},
    service::endpoint_set,
};

use super::{DatapathError, DatapathOptions, sockets};

/// The object that the build script has compiled.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/weir-ebpf"));

/// Not pinned: scratch space of the programs, which holds nothing beyond a packet, and the log that
/// only developers have.
const UNPINNED: [&str; 6] = [
    "SCRATCH",
    "PACKET",
    "ROUTE",
    "REFUSALS",
    "NAT_SEARCH",
    "AYA_LOGS",
];

/// What a map is, as the object defines it with the sizes of the options.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MapShape {
    /// Name, also of the pin.
    pub name: String,
    /// Number of the type (`enum bpf_map_type`).
    pub map_type: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Entries.
    pub max_entries: u32,
    /// Flags of creation.
    pub flags: u32,
}

/// Frontends of one family that there is room for, for each Service port: a load balancer's has one for its
/// ClusterIP, and one each for pods and others at its NodePort and its external addresses. A place
/// that is not used costs a pointer.
const FRONTENDS_PER_SERVICE_PORT: u32 = 4;

/// The maps whose size is an option, with that size.
pub fn sizes(options: &DatapathOptions) -> Vec<(&'static str, u32)> {
    let flows = limits::flows(options.connections);
    let frontends = options
        .services_max
        .saturating_mul(FRONTENDS_PER_SERVICE_PORT);
    vec![
        ("FLOWS_V4", flows),
        ("FLOWS_V6", flows),
        ("FLOW_RING_V4", options.connections),
        ("FLOW_RING_V6", options.connections),
        (
            "SERVICE_STATE",
            options.services_max.saturating_mul(endpoint_set::COUNT),
        ),
        ("FRONTENDS_V4", frontends),
        ("FRONTENDS_V6", frontends),
        ("AFFINITY_TIMEOUTS", options.services_max),
        ("BACKENDS", options.backends_max),
    ]
}

/// The maps of the object that are to be pinned, by name.
///
/// # Errors
///
/// The object is damaged, or lacks a program.
pub fn shapes(object: &[u8], options: &DatapathOptions) -> Result<Vec<MapShape>, DatapathError> {
    let object = Object::parse(object)
        .map_err(|error| DatapathError::Object(format!("cannot be parsed: {error}")))?;
    for program in DEVICE_HOOKS
        .map(Hook::name)
        .into_iter()
        .chain(sockets::PROGRAMS)
    {
        if !object.programs.contains_key(program) {
            return Err(DatapathError::Object(format!("has no program {program}")));
        }
    }
    let sizes = sizes(options);
    let mut shapes: Vec<MapShape> = object
        .maps
        .iter()
        .filter(|(name, _)| !name.starts_with('.') && !UNPINNED.contains(&name.as_str()))
        .map(|(name, map)| MapShape {
            name: name.clone(),
            map_type: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: sizes
                .iter()
                .find(|(sized, _)| sized == name)
                .map_or(map.max_entries(), |(_, size)| *size),
            flags: map.map_flags(),
        })
        .collect();
    shapes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(shapes)
}
