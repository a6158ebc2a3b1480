//! From a folder in bpffs to loaded programs and opened maps.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, MapError},
    programs::{Program, ProgramError, SchedClassifier},
};
use nix::sys::statfs::{FsType, statfs};
use weir_common::metrics::{DEVICE_HOOKS, Hook};

use super::{DatapathError, DatapathOptions, layout, object, probe, sockets, sys::RawMap};

/// `BPF_FS_MAGIC` (include/uapi/linux/magic.h).
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

/// Loaded programs, and maps by name.
pub(super) struct Loaded {
    pub ebpf: Ebpf,
    pub layout: layout::Plan,
    /// Maps that are pinned.
    pub pinned: Vec<String>,
    pub links: PathBuf,
}

/// Makes the folders, loads the object with new maps for pins that do not fit, and its programs.
pub(super) fn load(object: &[u8], options: &DatapathOptions) -> Result<Loaded, DatapathError> {
    check_bpffs(&options.bpf_root)?;
    let maps = options.bpf_root.join("maps");
    let links = options.bpf_root.join("links");
    for folder in [&maps, &links] {
        fs::create_dir_all(folder).map_err(|error| DatapathError::pin(folder, error))?;
    }

    let shapes = object::shapes(object, options)?;
    let mut layout = layout::prepare(&maps, &shapes)?;

    let globals = Globals::new(options);
    let mut loader = EbpfLoader::new();
    globals.set(&mut loader);
    for shape in &shapes {
        loader.map_pin_path(shape.name.as_str(), layout.pin(&shape.name));
    }
    for (name, entries) in object::sizes(options) {
        loader.map_max_entries(name, entries);
    }
    let mut ebpf = loader
        .load(object)
        .map_err(|error| DatapathError::Load(Box::new(error)))?;
    layout.carry_over()?;

    load_programs(&mut ebpf)?;
    Ok(Loaded {
        ebpf,
        layout,
        pinned: shapes.into_iter().map(|shape| shape.name).collect(),
        links,
    })
}

impl Loaded {
    /// Takes a map out, as the type that it has.
    pub fn map<M>(&mut self, name: &'static str) -> Result<M, DatapathError>
    where
        M: TryFrom<Map, Error = MapError>,
    {
        let wrong = |cause: String| DatapathError::Object(format!("map {name}: {cause}"));
        self.ebpf
            .take_map(name)
            .ok_or_else(|| wrong("is missing".into()))?
            .try_into()
            .map_err(|error: MapError| wrong(error.to_string()))
    }

    /// A second handle on a map that has not been taken yet.
    pub fn raw(&self, name: &'static str) -> Result<RawMap, DatapathError> {
        self.with_data(name, RawMap::new)
    }

    /// Calls `open` with a map that has not been taken yet.
    pub fn with_data<T>(
        &self,
        name: &'static str,
        open: impl FnOnce(&MapData) -> io::Result<T>,
    ) -> Result<T, DatapathError> {
        let map = self
            .ebpf
            .map(name)
            .ok_or_else(|| DatapathError::Object(format!("has no map {name}")))?;
        let data = match map {
            Map::Array(data)
            | Map::ArrayOfMaps(data)
            | Map::HashMap(data)
            | Map::LpmTrie(data)
            | Map::LruHashMap(data)
            | Map::PerCpuArray(data)
            | Map::RingBuf(data) => data,
            _ => {
                return Err(DatapathError::Object(format!(
                    "map {name} is of a type that is not expected"
                )));
            }
        };
        open(data).map_err(|source| DatapathError::Map { name, source })
    }
}

/// What the read-only globals of the programs are set to.
pub(super) struct Globals {
    mark_shift: u32,
    count_lookups: u8,
    csum_ipv6_flag: u64,
    fib_source_flag: u32,
    fib_neighbour_flag: u32,
}

impl Globals {
    /// From the options and what the kernel can do.
    pub fn new(options: &DatapathOptions) -> Self {
        let csum_ipv6_flag = probe::csum_ipv6_flag().unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot tell whether bpf_l4_csum_replace takes BPF_F_IPV6");
            0
        });
        let fib_flag = |flag| {
            probe::fib_flag(flag).unwrap_or_else(|error| {
                tracing::debug!(flag, %error, "cannot tell whether bpf_fib_lookup takes a flag");
                0
            })
        };
        Self {
            mark_shift: options.mark_shift,
            count_lookups: u8::from(options.count_lookups),
            csum_ipv6_flag,
            fib_source_flag: fib_flag(probe::FIB_SOURCE),
            fib_neighbour_flag: fib_flag(probe::FIB_SKIP_NEIGHBOUR),
        }
    }

    /// Tells the loader.
    pub fn set<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        loader
            // The programs read no kernel structures.
            .btf(None)
            .override_global("MARK_SHIFT", &self.mark_shift, true)
            .override_global("COUNT_LOOKUPS", &self.count_lookups, true)
            .override_global("CSUM_IPV6_FLAG", &self.csum_ipv6_flag, true)
            .override_global("FIB_SOURCE_FLAG", &self.fib_source_flag, true)
            .override_global("FIB_NEIGHBOUR_FLAG", &self.fib_neighbour_flag, true);
    }
}

/// Loads every program that is attached, each on a thread of its own: the verifier takes most of the
/// time that the agent needs to start.
fn load_programs(ebpf: &mut Ebpf) -> Result<(), DatapathError> {
    let names: Vec<&'static str> = program_names().collect();
    if let Some(missing) = names.iter().find(|name| ebpf.program(name).is_none()) {
        return Err(DatapathError::Object(format!("has no program {missing}")));
    }
    let results: Vec<Result<(), DatapathError>> = thread::scope(|scope| {
        let threads: Vec<_> = ebpf
            .programs_mut()
            .filter_map(|(name, program)| {
                let name = *names.iter().find(|known| **known == name)?;
                Some(scope.spawn(move || load_one(name, program)))
            })
            .collect();
        let panicked = || Err(DatapathError::Object("loading a program panicked".into()));
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| panicked()))
            .collect()
    });
    results.into_iter().collect()
}

/// Every program that is attached.
pub(super) fn program_names() -> impl Iterator<Item = &'static str> {
    DEVICE_HOOKS
        .map(Hook::name)
        .into_iter()
        .chain(sockets::PROGRAMS)
}

/// Programs for devices without a link layer. They are loaded when there is such a device.
pub(super) const BARE_PROGRAMS: [&str; 2] = ["from_netdev_bare", "to_netdev_bare"];

/// The program of a hook at the node's devices that have no link layer.
pub(super) fn bare_program(hook: Hook) -> &'static str {
    let [from_netdev, to_netdev] = BARE_PROGRAMS;
    match hook {
        Hook::FromNetdev => from_netdev,
        Hook::ToNetdev => to_netdev,
        other => other.name(),
    }
}

/// Loads a program of the object.
pub(super) fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), DatapathError> {
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| DatapathError::Object(format!("has no program {name}")))?;
    load_one(name, program)
}

fn load_one(name: &'static str, program: &mut Program) -> Result<(), DatapathError> {
    match program {
        Program::SchedClassifier(program) if program.fd().is_ok() => Ok(()),
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        other => {
            return Err(DatapathError::Object(format!(
                "program {name} is of type {:?}",
                other.prog_type()
            )));
        }
    }
    .map_err(|error| refused(name, error))
}

/// A program of the object.
pub(super) fn program<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, DatapathError> {
    ebpf.program_mut(name)
        .ok_or_else(|| DatapathError::Object(format!("has no program {name}")))?
        .try_into()
        .map_err(|error| DatapathError::Object(format!("program {name}: {error}")))
}

fn refused(program: &'static str, error: ProgramError) -> DatapathError {
    let (source, log) = match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => (io_error, verifier_log.to_string()),
        other => (io::Error::other(other), String::new()),
    };
    // The cause stands at the end of what can be megabytes.
    let lines: Vec<&str> = log.lines().rev().take(30).collect();
    DatapathError::Verifier {
        program,
        source,
        log: lines.into_iter().rev().collect::<Vec<_>>().join("\n"),
    }
}

/// Pins need a BPF file system; the nearest folder that exists tells which one it is.
fn check_bpffs(root: &Path) -> Result<(), DatapathError> {
    let existing = root
        .ancestors()
        .find(|folder| folder.exists())
        .unwrap_or(Path::new("/"));
    let kind = statfs(existing)
        .map_err(|error| DatapathError::pin(existing, error.into()))?
        .filesystem_type();
    if kind == BPF_FS_MAGIC {
        Ok(())
    } else {
        Err(DatapathError::NoBpffs {
            root: root.to_path_buf(),
        })
    }
}
