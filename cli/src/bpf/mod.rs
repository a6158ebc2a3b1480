//! `weir bpf …`: what is in the kernel, read from the pinned maps. It needs no agent, writes
//! nothing, and shows what is there, not what should be.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use aya::maps::{Array, Map, MapData, MapInfo};
use clap::Subcommand;
use nix::time::{ClockId, clock_gettime};
use weir_common::{ABI_VERSION, config::Config, flow::now_from_nanoseconds};

use crate::{Format, agent};

mod endpoint;
mod flow;
mod ipcache;
mod lb;
mod metrics;
mod names;
mod nat;
mod nexthop;

/// Where pins are when nobody says otherwise.
const DEFAULT_ROOT: &str = "/sys/fs/bpf/weir";

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Directory of the pins [default: what the agent says, or /sys/fs/bpf/weir if none answers].
    #[arg(long, value_name = "PATH", env = "WEIR_BPF_ROOT", global = true)]
    bpf_root: Option<PathBuf>,
    #[command(subcommand)]
    table: Table,
}

#[derive(Debug, Subcommand)]
enum Table {
    /// Frontends of Services and the endpoints behind them, with their shares.
    #[command(subcommand)]
    Lb(lb::Lb),
    /// Connections that are translated or policed, one row for each direction.
    #[command(subcommand)]
    Flow(crate::List),
    /// Connections that have an address of this node in place of their own.
    #[command(subcommand)]
    Nat(crate::List),
    /// Pods of this node.
    #[command(subcommand)]
    Endpoint(crate::List),
    /// Ways to other nodes.
    #[command(subcommand)]
    Nexthop(crate::List),
    /// What is known of addresses and prefixes.
    #[command(subcommand)]
    Ipcache(crate::List),
    /// Packets by hook and outcome, drops by reason.
    #[command(subcommand)]
    Metrics(crate::List),
}

/// Shows one table.
pub async fn run(arguments: &Arguments, socket: &Path, format: Format) -> anyhow::Result<()> {
    let root = match &arguments.bpf_root {
        Some(root) => root.clone(),
        None => agent::bpf_root(socket)
            .await
            .map_or_else(|_| DEFAULT_ROOT.into(), PathBuf::from),
    };
    let pins = Pins::open(&root)?;
    match &arguments.table {
        Table::Lb(lb::Lb::List(arguments)) => lb::list(&pins, arguments, socket, format).await,
        Table::Flow(_) => flow::list(&pins, format),
        Table::Nat(_) => nat::list(&pins, format),
        Table::Endpoint(_) => endpoint::list(&pins, format),
        Table::Nexthop(_) => nexthop::list(&pins, format),
        Table::Ipcache(_) => ipcache::list(&pins, format),
        Table::Metrics(_) => metrics::list(&pins, format),
    }
}

/// Now, in the ticks of flow entries.
fn now() -> anyhow::Result<u32> {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    let nanoseconds = u64::try_from(Duration::from(time).as_nanos())?;
    Ok(now_from_nanoseconds(nanoseconds))
}

/// The directory of pinned maps of an agent.
struct Pins {
    maps: PathBuf,
}

impl Pins {
    /// Checks that the maps have the layout that this program knows.
    fn open(root: &Path) -> anyhow::Result<Self> {
        let pins = Self {
            maps: root.join("maps"),
        };
        let config: Array<_, Config> = pins.map("CONFIG")?;
        match config.get(&0, 0)?.abi_version {
            // Zero: the maps are made, but no agent has written the row yet.
            0 | ABI_VERSION => Ok(pins),
            other => bail!(
                "the maps in {} have layout {other}, this weir knows {ABI_VERSION}; use the weir \
                 that came with that agent",
                root.display()
            ),
        }
    }

    /// Entries that a pinned map can hold.
    fn capacity(&self, name: &str) -> anyhow::Result<usize> {
        let info = MapInfo::from_pin(self.maps.join(name))?;
        Ok(usize::try_from(info.max_entries())?)
    }

    /// As [`Pins::map`], of a map that agents of this layout did not always have.
    fn recent_map<T>(&self, name: &str) -> anyhow::Result<T>
    where
        T: TryFrom<Map>,
        T::Error: std::error::Error + Send + Sync + 'static,
    {
        // Other errors are told by `map`.
        if let Ok(false) = self.maps.join(name).try_exists() {
            bail!(
                "there is no map {name} in {}: the agent that made the others does not have it; \
                 install and start the agent that came with this weir",
                self.maps.display()
            );
        }
        self.map(name)
    }

    /// A pinned map, as the type that the caller knows it to be.
    fn map<T>(&self, name: &str) -> anyhow::Result<T>
    where
        T: TryFrom<Map>,
        T::Error: std::error::Error + Send + Sync + 'static,
    {
        let path = self.maps.join(name);
        let place = path.display();
        if let Err(error) = path.metadata() {
            bail!(
                "cannot open the pinned map {place}: {error}; is this the agent's bpf-root \
                 (--bpf-root), and has the agent run since the last reboot? Root is needed"
            );
        }
        let data = MapData::from_pin(&path)
            .map_err(|error| anyhow!(error))
            .with_context(|| format!("cannot open the pinned map {place}; run this as root"))?;
        let wrong = || {
            format!(
                "the pinned map {place} is not of the expected kind; use the weir that came with that agent"
            )
        };
        Map::from_map_data(data)
            .map_err(|error| anyhow!(error))
            .and_then(|map| T::try_from(map).map_err(|error| anyhow!(error)))
            .with_context(wrong)
    }
}
