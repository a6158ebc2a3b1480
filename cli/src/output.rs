//! Writes results to standard output: a table, JSON or YAML. A closed pipe comes back as an error that
//! [`is_closed_pipe`] recognises.

use std::io::{self, IsTerminal as _, Write as _};

use serde::Serialize;

use crate::{Format, table::Table};

/// Writes a list: a table with a heading, or a JSON array.
pub fn list<T: Serialize>(
    format: Format,
    items: &[T],
    table: impl FnOnce(&[T]) -> Table,
) -> anyhow::Result<()> {
    match format {
        Format::Json => json(&items),
        Format::Yaml => yaml(&items),
        Format::Table => text(&table(items).render(colours())),
    }
}

/// Writes a value as indented JSON.
pub fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    self::text(&text)
}

/// Writes a value as a YAML document.
pub fn yaml<T: Serialize>(value: &T) -> anyhow::Result<()> {
    text(&serde_norway::to_string(value)?)
}

/// Writes text as it is, at once.
pub fn text(text: &str) -> anyhow::Result<()> {
    raw(text.as_bytes())
}

/// Writes bytes as they are, at once.
pub fn raw(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()?;
    Ok(())
}

/// Whether colours are welcome: on a terminal, unless `NO_COLOR` is set.
pub fn colours() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Whether the error says that nobody reads our output any more.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// 1023 B, 12.3 MiB.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "one digit is shown")]
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// 12s, 3m2s, 4h5m, 6d7h: the two largest units.
pub fn duration(seconds: u64) -> String {
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let (minutes, rest) = (seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest}s"),
        (0, 0, _) => format!("{minutes}m{rest}s"),
        (0, _, _) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

/// An address with its port, IPv6 in brackets; without a port the address alone.
pub fn address_port(address: &str, port: u16) -> String {
    match (port, address.contains(':')) {
        (0, _) => address.to_owned(),
        (_, true) => format!("[{address}]:{port}"),
        (_, false) => format!("{address}:{port}"),
    }
}

/// The text, or `-` for none.
pub fn or_dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1.0 KiB");
        assert_eq!(bytes(12 * 1024 * 1024 + 300 * 1024), "12.3 MiB");
        assert_eq!(bytes(u64::MAX), "16384.0 PiB");
        assert_eq!(duration(0), "0s");
        assert_eq!(duration(182), "3m2s");
        assert_eq!(duration(14_700), "4h5m");
        assert_eq!(duration(6 * 86_400 + 7 * 3600), "6d7h");
    }

    #[test]
    fn an_ipv6_address_with_a_port_stands_in_brackets() {
        assert_eq!(address_port("fd00::1", 80), "[fd00::1]:80");
        assert_eq!(address_port("10.0.0.1", 80), "10.0.0.1:80");
        assert_eq!(address_port("fd00::1", 0), "fd00::1");
    }

    #[test]
    fn a_closed_pipe_is_recognised_and_other_errors_are_not() {
        let closed = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_closed_pipe(&closed.into()));
        assert!(!is_closed_pipe(&io::Error::other("disk full").into()));
    }
}
