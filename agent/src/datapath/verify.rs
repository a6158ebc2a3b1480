//! Loads every program into the running kernel and lets go of it again: tells whether the
//! verifier of this kernel takes them and what they cost it. Pins nothing, attaches nothing, and
//! needs no BPF file system. `weir-agent verify` calls it, and the test of the verifier budget.

use std::time::{Duration, Instant};

use aya::EbpfLoader;

use super::{
    DatapathError, DatapathOptions,
    loader::{self, Globals},
    object,
};

/// A set of switches under which the programs are loaded; the verifier removes what is off, so
/// that each set is a program of its own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Switches {
    /// As the agent runs.
    Default,
    /// With table lookups counted, as in tests.
    CountLookups,
}

impl Switches {
    /// Every set.
    pub const ALL: [Self; 2] = [Self::Default, Self::CountLookups];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::CountLookups => "count-lookups",
        }
    }
}

/// What a program costs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct VerifiedProgram {
    /// Its name.
    pub name: &'static str,
    /// Instructions that the verifier has followed over all paths; the kernel's limit is one
    /// million. `None` before kernel 5.16.
    pub verified_instructions: Option<u32>,
    /// Bytes of the instructions after the verifier has rewritten them; `None` where the kernel
    /// does not tell.
    pub translated: Option<u32>,
    /// Bytes of machine code; 0 without JIT.
    pub jited: u32,
    /// Bytes of memory that the kernel charges for it.
    pub memory: u32,
    /// Time of the system call that loads it.
    pub time: Duration,
}

/// Entries of the tables: enough to load, too few to cost memory.
const ENTRIES: u32 = 64;

/// Loads every program.
///
/// # Errors
///
/// [`DatapathError::Verifier`], with the end of the verifier's log, if the kernel refuses one;
/// [`DatapathError::Load`] if it refuses a map, or the caller has not the rights.
pub fn verify(switches: Switches) -> Result<Vec<VerifiedProgram>, DatapathError> {
    let options = DatapathOptions {
        connections: ENTRIES,
        services_max: ENTRIES,
        backends_max: ENTRIES,
        count_lookups: switches == Switches::CountLookups,
        ..DatapathOptions::default()
    };
    let globals = Globals::new(&options);
    let mut loader = EbpfLoader::new();
    globals.set(&mut loader);
    for (name, entries) in object::sizes(&options) {
        loader.map_max_entries(name, entries);
    }
    let mut ebpf = loader
        .load(object::OBJECT)
        .map_err(|error| DatapathError::Load(Box::new(error)))?;
    loader::program_names()
        .chain(loader::BARE_PROGRAMS)
        .map(|name| {
            let start = Instant::now();
            loader::load_program(&mut ebpf, name)?;
            let time = start.elapsed();
            let unknown = |error| DatapathError::Object(format!("{name}: {error}"));
            let info = ebpf
                .program(name)
                .ok_or_else(|| DatapathError::Object(format!("has no program {name}")))?
                .info()
                .map_err(unknown)?;
            Ok(VerifiedProgram {
                name,
                verified_instructions: info.verified_instruction_count(),
                translated: info.size_translated(),
                jited: info.size_jitted(),
                memory: info.memory_locked().map_err(unknown)?,
                time,
            })
        })
        .collect()
}
