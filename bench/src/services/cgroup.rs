//! A cgroup for the measured connections: programs attached to it see this process while it is
//! inside, and nobody else.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
    sync::{
        Once,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context as _, Result};

/// How folders begin; the number of their process and a number of their own follow.
const PREFIX: &str = "weir-bench-";

/// A folder of the cgroup2 hierarchy, gone when dropped.
#[derive(Debug)]
pub struct Cgroup {
    /// Where it is.
    pub path: PathBuf,
}

impl Cgroup {
    /// Makes one, and sees that it does not outlive this process.
    ///
    /// # Errors
    ///
    /// No cgroup2 hierarchy is mounted, or it cannot be written.
    pub fn create() -> Result<Self> {
        static ONCE: Once = Once::new();
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let root = root()?;
        ONCE.call_once(|| {
            remove_of_the_dead(&root);
            // Also after Ctrl-C, which ends the process without dropping anything.
            // SAFETY: the handler is called once, at exit, and takes nothing from this frame.
            unsafe { libc::atexit(remove_own) };
        });
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("{PREFIX}{}-{number}", process::id()));
        fs::create_dir(&path).with_context(|| format!("make the cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Moves this process into it, with all its threads, until the guard is dropped.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn enter(&self) -> Result<Inside> {
        let home = home(&root()?)?;
        move_to(&self.path)?;
        Ok(Inside { home })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Tried again at exit.
        let _ = fs::remove_dir(&self.path);
    }
}

/// This process is in a [`Cgroup`] while this lives.
#[derive(Debug)]
pub struct Inside {
    home: PathBuf,
}

impl Drop for Inside {
    fn drop(&mut self) {
        if let Err(error) = move_to(&self.home) {
            eprintln!("warning: {error:#}");
        }
    }
}

fn move_to(folder: &Path) -> Result<()> {
    let file = folder.join("cgroup.procs");
    fs::write(&file, process::id().to_string()).with_context(|| format!("write {}", file.display()))
}

/// Mount point of the hierarchy.
fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ');
            let (_device, place, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| place.into())
        })
        .context("no cgroup2 hierarchy is mounted; `cargo xtask setup` says how to")
}

/// Where this process is now.
fn home(root: &Path) -> Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .context("/proc/self/cgroup has no line of cgroup2")?;
    Ok(root.join(path))
}

/// The number of the process that made a folder.
fn owner(folder: &Path) -> Option<u32> {
    let name = folder.file_name()?.to_str()?;
    let (pid, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
    pid.parse().ok()
}

fn folders(root: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| owner(path).is_some())
}

fn remove_of_the_dead(root: &Path) {
    for folder in folders(root) {
        if owner(&folder).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // Made by another process that was killed; it harms nobody.
            let _ = fs::remove_dir(folder);
        }
    }
}

extern "C" fn remove_own() {
    let Ok(root) = root() else { return };
    for folder in folders(&root).filter(|folder| owner(folder) == Some(process::id())) {
        // Only an empty one can be removed, and this process may be in it. Nobody is left to tell.
        let _ = move_to(&root);
        let _ = fs::remove_dir(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_told_by_their_process() {
        assert_eq!(owner(Path::new("/x/weir-bench-12-0")), Some(12));
        assert_eq!(owner(Path::new("/x/weir-bench-x")), None);
        assert_eq!(owner(Path::new("/x/system.slice")), None);
    }
}
