//! Cilium's pins: maps by their names, and its folder with the links of its programs, which lose
//! their hold with it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{Findings, Owner};

/// Files and folders of Cilium below a bpffs, those that are there.
///
/// # Errors
///
/// If a folder cannot be read.
pub fn of_cilium(bpffs: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let folder = bpffs.join("cilium");
    if folder.exists() {
        found.push(folder);
    }
    let globals = match fs::read_dir(bpffs.join("tc/globals")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        globals => globals?,
    };
    for entry in globals {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("cilium_") {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Removes one of them, with all that is in it.
///
/// # Errors
///
/// If anything of it stays. That it is gone already is none.
pub fn remove(path: &Path) -> io::Result<()> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// See [`crate::look`].
pub fn look(bpffs: &Path, findings: &mut Findings) {
    let pins = findings.or_default(&format!("{}", bpffs.display()), of_cilium(bpffs));
    if let Some(first) = pins.first() {
        let more = match pins.len() {
            1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        findings.add(
            format!("pins of Cilium: {}{more}", first.display()),
            "they keep its maps in memory, and its programs attached to devices and to the cgroup",
            Owner::Cilium.remedy(),
        );
    }
}
