//! Where the cgroup2 hierarchy is: the folder to whose cgroup programs at system calls are attached
//! is checked when it is given, and found among the mounts when it is not.

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::{Refusal, absolute_path, refuse};

/// Mounts that are taken before others: where systemd puts the hierarchy, alone or beside version 1.
const USUAL: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// A folder of the cgroup2 hierarchy, as the setting gives it.
pub(super) fn given(text: &str) -> Result<PathBuf, Refusal> {
    let path = absolute_path(text)?;
    let remedy = "give a folder of the cgroup2 hierarchy (`findmnt -t cgroup2` shows where it is \
                  mounted), or leave it out";
    match statfs(&path) {
        Ok(stat) if stat.filesystem_type() == CGROUP2_SUPER_MAGIC && path.is_dir() => Ok(path),
        Ok(_) => refuse("not a folder of a cgroup2 file system", remedy),
        Err(error) => refuse(error.desc(), remedy),
    }
}

/// The mount point of the hierarchy in the text of `/proc/self/mounts`.
pub(super) fn found(mounts: &str) -> Result<PathBuf, Refusal> {
    let points: Vec<PathBuf> = mounts.lines().filter_map(cgroup2_mount).collect();
    let usual = USUAL
        .into_iter()
        .find(|usual| points.iter().any(|point| point == Path::new(usual)));
    match usual
        .map(PathBuf::from)
        .or_else(|| points.into_iter().next())
    {
        Some(point) => Ok(point),
        None => refuse(
            "no cgroup2 hierarchy is mounted",
            "mount it with `mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`, or give \
             --cgroup-root a folder of one",
        ),
    }
}

/// The mount point in a line of `/proc/self/mounts`, if it is one of cgroup2.
fn cgroup2_mount(line: &str) -> Option<PathBuf> {
    let mut fields = line.split(' ');
    let (_device, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
    (kind == "cgroup2").then(|| unescape(point))
}

/// Undoes the escapes of proc(5): space, tab, newline and backslash stand as `\` and three octal
/// digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_mounts_are_taken_first() {
        const V1: &str =
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n";
        const UNIFIED: &str = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        const ONLY: &str = "cgroup2 /sys/fs/cgroup cgroup2 rw,relatime 0 0\n";
        const OTHER: &str = "none /mnt/my\\040cgroups\\134 cgroup2 rw 0 0\n";
        for (mounts, wanted) in [
            ([V1, UNIFIED, ""], "/sys/fs/cgroup/unified"),
            ([OTHER, UNIFIED, ""], "/sys/fs/cgroup/unified"),
            ([OTHER, UNIFIED, ONLY], "/sys/fs/cgroup"),
            ([V1, OTHER, ""], "/mnt/my cgroups\\"),
        ] {
            let point = found(&mounts.concat()).ok();
            assert_eq!(point.as_deref(), Some(Path::new(wanted)), "{mounts:?}");
        }
    }

    #[test]
    fn without_a_mount_the_remedy_is_named() {
        for mounts in ["", "cgroup2 /sys/fs/cgroup tmpfs rw 0 0\n", "cgroup2\n"] {
            let Err(refusal) = found(mounts) else {
                panic!("found one in {mounts:?}");
            };
            assert!(refusal.remedy.contains("mount -t cgroup2"));
        }
    }
}
