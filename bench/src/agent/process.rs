//! What a process and the maps it pinned hold in memory.

use std::{
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use aya::maps::MapData;

/// Resident memory of a process, bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Memory {
    /// All of it, `VmRSS`: the sum of the others.
    pub all: u64,
    /// Its own pages.
    pub anonymous: u64,
    /// Pages of files: its binary, shared with others that run it.
    pub file: u64,
    /// Shared memory: mapped BPF arrays.
    pub shared: u64,
}

impl Memory {
    /// Of a process now.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/status");
        let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let field = |name: &str| {
            kibibytes(&status, name).with_context(|| format!("{path} has no line {name}"))
        };
        Ok(Self {
            all: field("VmRSS:")?,
            anonymous: field("RssAnon:")?,
            file: field("RssFile:")?,
            shared: field("RssShmem:")?,
        })
    }
}

/// Bytes that the kernel charges for the maps pinned in a folder.
///
/// # Errors
///
/// A pin cannot be opened.
pub fn pinned_maps(folder: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        let map = MapData::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
        let info = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
        let info = fs::read_to_string(info)?;
        let bytes = info
            .lines()
            .find_map(|line| line.strip_prefix("memlock:")?.trim().parse::<u64>().ok());
        total += bytes.with_context(|| format!("no memlock of {}", path.display()))?;
    }
    Ok(total)
}

/// A line `NAME   123 kB`, in bytes.
fn kibibytes(status: &str, name: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(number * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_status_are_in_kibibytes() {
        let status = "VmHWM:\t    9 kB\nVmRSS:\t    12 kB\n";
        assert_eq!(kibibytes(status, "VmRSS:"), Some(12 * 1024));
        assert_eq!(kibibytes(status, "RssAnon:"), None);
    }
}
