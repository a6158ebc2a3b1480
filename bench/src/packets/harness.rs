//! Runs a program many times with `BPF_PROG_TEST_RUN`, each time on a packet that was restored,
//! and tells what the program alone took.

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapData, ProgramArray},
    programs::{ProgramFd, SchedClassifier, TestRun as _, TestRunOptions},
};
use weir_agent::datapath::sys::RawMap;

use super::frame::{Frame, ROOM, length};
use crate::statistics::Spread;

/// The object that the build script has compiled.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/weir-bench-ebpf"));

/// Packets that can take turns.
pub const FRAMES_MAX: u32 = 131_072;

/// `TC_ACT_REDIRECT`.
const REDIRECT: u32 = 7;

/// Offset of `ifindex` in `struct __sk_buff`, and the size of that structure.
const IFINDEX_OFFSET: usize = 40;
const SKB_SIZE: usize = 192;

/// Programs of the object.
const PROGRAMS: [&str; 7] = [
    "restore_v4",
    "restore_v6",
    "nothing",
    "sketch_hash",
    "sketch_on_demand",
    "sketch_lru",
    "sketch_nat",
];

/// A figure, its rival's, and how many times the rival's it is.
#[derive(Clone, Copy, Debug)]
pub struct Beside {
    /// Nanoseconds.
    pub own: Spread,
    /// Nanoseconds.
    pub rival: Spread,
    /// Of the pairs, not of the medians.
    pub ratio: Spread,
}

impl Beside {
    /// Without a rival: it stands for its own.
    pub fn alone(own: Spread) -> Self {
        let ratio = Spread {
            median: 1.0,
            low: 1.0,
            high: 1.0,
        };
        Self {
            own,
            rival: own,
            ratio,
        }
    }

    /// From pairs of own and rival.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn of(pairs: &[(f64, f64)]) -> Result<Self> {
        let spread =
            |value: fn(&(f64, f64)) -> f64| Spread::of(pairs.iter().map(value)).context("no pairs");
        Ok(Self {
            own: spread(|pair| pair.0)?,
            rival: spread(|pair| pair.1)?,
            ratio: spread(|pair| pair.0 / pair.1)?,
        })
    }
}

/// See the module.
pub struct Harness {
    ebpf: Ebpf,
    templates: RawMap,
    turn: Array<MapData, u64>,
    target: ProgramArray<MapData>,
    nothing: ProgramFd,
    first: Frame,
    v6: bool,
    count: u32,
}

impl Harness {
    /// Loads the wrapper and its own targets.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn load() -> Result<Self> {
        let mut ebpf = EbpfLoader::new()
            .btf(None)
            .map_max_entries("TEMPLATES", FRAMES_MAX)
            .load(OBJECT)
            .context("load the benchmark's programs")?;
        for name in PROGRAMS {
            program(&mut ebpf, name)?
                .load()
                .with_context(|| format!("load {name}"))?;
        }
        let templates = ebpf.map("TEMPLATES").context("no map TEMPLATES")?;
        let aya::maps::Map::Array(data) = templates else {
            anyhow::bail!("TEMPLATES is no array")
        };
        let templates = RawMap::new(data)?;
        let mut take = |name: &str| {
            ebpf.take_map(name)
                .with_context(|| format!("no map {name}"))
        };
        let turn = take("TURN")?.try_into()?;
        let target = take("TARGET")?.try_into()?;
        let nothing = program(&mut ebpf, "nothing")?.fd()?.try_clone()?;
        Ok(Self {
            templates,
            turn,
            target,
            nothing,
            first: Frame([0; ROOM]),
            v6: false,
            count: 0,
            ebpf,
        })
    }

    /// One of the object's own targets.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    pub fn own(&mut self, name: &str) -> Result<ProgramFd> {
        Ok(program(&mut self.ebpf, name)?.fd()?.try_clone()?)
    }

    /// A map of the object's own targets.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    pub fn own_map(&self, name: &str) -> Result<RawMap> {
        use aya::maps::Map;
        match self.ebpf.map(name) {
            Some(Map::HashMap(data) | Map::LruHashMap(data)) => Ok(RawMap::new(data)?),
            _ => anyhow::bail!("no hash map {name}"),
        }
    }

    /// From now on these packets, all of one family, take turns.
    ///
    /// # Errors
    ///
    /// None or too many, or the kernel's.
    pub fn set_frames(&mut self, frames: &[Frame], v6: bool) -> Result<()> {
        self.first = *frames.first().context("no packets")?;
        self.v6 = v6;
        self.count = u32::try_from(frames.len())?;
        ensure!(self.count <= FRAMES_MAX, "{} packets", self.count);
        let keys: Vec<u8> = (0..self.count).flat_map(u32::to_ne_bytes).collect();
        let values: Vec<u8> = frames.iter().flat_map(|frame| frame.0).collect();
        self.templates.update_batch(&keys, &values)?;
        Ok(())
    }

    /// Nanoseconds that `target` takes for a packet from device `ifindex`: `repeat` packets,
    /// beginning with the first, less what the wrapper takes in a run just before or after.
    ///
    /// # Errors
    ///
    /// The kernel's, or the last packet was not redirected.
    pub fn pair(&mut self, target: &ProgramFd, ifindex: u32, repeat: u32) -> Result<f64> {
        let nothing = self.nothing.try_clone()?;
        let (without, _) = self.run(&nothing, ifindex, repeat)?;
        let (with, action) = self.run(target, ifindex, repeat)?;
        ensure!(
            action == REDIRECT,
            "the program returned {action} instead of a redirect"
        );
        Ok(with - without)
    }

    /// As many pairs as wanted, after one that is not counted.
    ///
    /// # Errors
    ///
    /// As [`Self::pair`].
    pub fn pairs(
        &mut self,
        target: &ProgramFd,
        ifindex: u32,
        repeat: u32,
        pairs: u32,
    ) -> Result<Spread> {
        self.pair(target, ifindex, repeat)?;
        let values = (0..pairs)
            .map(|_| self.pair(target, ifindex, repeat))
            .collect::<Result<Vec<_>>>()?;
        Spread::of(values).context("no pairs")
    }

    /// As [`Self::pairs`], each pair followed by one of the rival: both, and their ratio.
    ///
    /// # Errors
    ///
    /// As [`Self::pair`].
    pub fn beside(
        &mut self,
        target: &ProgramFd,
        rival: &ProgramFd,
        ifindex: u32,
        repeat: u32,
        pairs: u32,
    ) -> Result<Beside> {
        self.pair(target, ifindex, repeat)?;
        self.pair(rival, ifindex, repeat)?;
        let values = (0..pairs)
            .map(|_| {
                let own = self.pair(target, ifindex, repeat)?;
                Ok((own, self.pair(rival, ifindex, repeat)?))
            })
            .collect::<Result<Vec<_>>>()?;
        Beside::of(&values)
    }

    fn run(&mut self, target: &ProgramFd, ifindex: u32, repeat: u32) -> Result<(f64, u32)> {
        self.target.set(0, target, 0)?;
        self.turn.set(0, u64::from(self.count) << 32, 0)?;
        let mut context = [0; SKB_SIZE];
        context[IFINDEX_OFFSET..IFINDEX_OFFSET + 4].copy_from_slice(&ifindex.to_ne_bytes());
        let name = if self.v6 { "restore_v6" } else { "restore_v4" };
        let result = program(&mut self.ebpf, name)?.test_run(TestRunOptions {
            data_in: Some(&self.first.0[..length(self.v6)]),
            ctx_in: Some(&context),
            repeat,
            ..TestRunOptions::default()
        })?;
        Ok((result.duration.as_secs_f64() * 1e9, result.return_value))
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    Ok(ebpf
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?
        .try_into()?)
}
