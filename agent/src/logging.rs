//! Sets the log up, once, at the start of the process: to standard error, for people or as JSON.

use std::io::{self, IsTerminal as _};

use tracing_subscriber::EnvFilter;

use crate::settings::LogFormat;

/// Libraries that tell every frame and every relocation: they are heard only when they are named.
const CHATTY: &str = "aya=info,aya_obj=info,h2=info,hyper=info,tonic=info,tower=info";

/// Sends everything that `filter` lets through to standard error. Colours only on a terminal.
///
/// # Errors
///
/// If the filter cannot be read or a log is set up already.
pub fn initialise(filter: &str, format: LogFormat) -> anyhow::Result<()> {
    // Of two that name the same module the later counts.
    let filter = EnvFilter::builder().parse(format!("{CHATTY},{filter}"))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    let outcome = match format {
        LogFormat::Text => builder
            .with_ansi(io::stderr().is_terminal())
            .with_target(false)
            .try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    outcome.map_err(|error| anyhow::anyhow!("cannot set the log up: {error}"))
}
