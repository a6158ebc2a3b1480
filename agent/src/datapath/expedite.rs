//! Short RCU grace periods while somebody waits for one: attaching a program to a device by tcx waits
//! for a whole grace period under the kernel's RTNL lock (`tcx_entry_sync`), 5 to 15 ms on an idle
//! machine, twice per pod, and all other work on devices waits behind it. Used by the calls of the
//! data path that attach and detach.
//!
//! The switch is the kernel's own, `/sys/kernel/rcu_expedited`, and belongs to the whole machine: it
//! is on only while a [`Held`] lives, and several agents on one machine share it by locks on the file
//! that end with their processes. What an administrator has set stays: the agent writes a value of
//! its own ([`OURS`], the kernel takes any number but zero for "on"), and takes back no other.
//! `rcu_normal` outranks it, as always.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::fcntl::{Flock, FlockArg};

/// The kernel's switch (Documentation/admin-guide/kernel-parameters.txt, `rcupdate.rcu_expedited`).
const SWITCH: &str = "/sys/kernel/rcu_expedited";

/// What the agent writes: on, and by whom.
const OURS: &str = "2";
const OFF: &str = "0";

/// See the module.
#[derive(Debug)]
pub struct Expedite {
    switch: PathBuf,
    is_wanted: bool,
    has_complained: AtomicBool,
}

/// Grace periods are short while this lives.
#[derive(Debug)]
pub struct Held(Option<Flock<File>>);

impl Expedite {
    /// With `is_wanted` false it does nothing, except that it takes back what a killed agent left.
    #[must_use]
    pub fn new(is_wanted: bool) -> Self {
        Self::at(Path::new(SWITCH), is_wanted)
    }

    fn at(switch: &Path, is_wanted: bool) -> Self {
        let expedite = Self {
            switch: switch.to_path_buf(),
            is_wanted,
            has_complained: AtomicBool::new(false),
        };
        expedite.take_back();
        expedite
    }

    /// Turns the switch on, if nobody has. Where it cannot be turned that is logged once, and things
    /// take their time.
    pub fn hold(&self) -> Held {
        if !self.is_wanted {
            return Held(None);
        }
        match self.turn_on() {
            Ok(lock) => Held(Some(lock)),
            Err(error) => {
                if !self.has_complained.swap(true, Ordering::Relaxed) {
                    tracing::info!(
                        %error,
                        file = %self.switch.display(),
                        "cannot shorten RCU grace periods: adding and deleting a pod takes some ten \
                         milliseconds longer; make the file writable, or set expedite-rcu to false"
                    );
                }
                Held(None)
            }
        }
    }

    /// Turns off what an agent that was killed has left on.
    fn take_back(&self) {
        let left = self.open().and_then(|file| read(&file));
        if left.is_ok_and(|value| value == OURS) {
            let lock = self
                .open()
                .and_then(|file| lock(file, FlockArg::LockShared));
            drop(Held(lock.ok()));
        }
    }

    fn turn_on(&self) -> io::Result<Flock<File>> {
        let lock = lock(self.open()?, FlockArg::LockShared)?;
        let mut file: &File = &lock;
        if read(file)? == OFF {
            file.write_all(OURS.as_bytes())?;
        }
        Ok(lock)
    }

    fn open(&self) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(&self.switch)
    }
}

impl Drop for Held {
    /// The last of all holders turns it off.
    fn drop(&mut self) {
        let Some(lock) = self.0.take() else { return };
        if lock.relock(FlockArg::LockExclusiveNonblock).is_err() {
            return;
        }
        let mut file: &File = &lock;
        let turned_off = read(file).and_then(|value| {
            if value == OURS {
                file.write_all(OFF.as_bytes())
            } else {
                Ok(())
            }
        });
        if let Err(error) = turned_off {
            tracing::warn!(%error, "cannot turn {SWITCH} off; write 0 to it");
        }
    }
}

fn lock(file: File, how: FlockArg) -> io::Result<Flock<File>> {
    Flock::lock(file, how).map_err(|(_, error)| error.into())
}

/// The value of the switch; the next write replaces it.
fn read(mut file: &File) -> io::Result<String> {
    let mut value = String::new();
    file.rewind()?;
    file.read_to_string(&mut value)?;
    file.rewind()?;
    Ok(value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A file in place of the kernel's, which tests of the whole agent share.
    fn switch(value: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rcu_expedited");
        fs::write(&path, value).unwrap();
        (folder, path)
    }

    fn value(path: &Path) -> String {
        fs::read_to_string(path).unwrap().trim().to_owned()
    }

    #[test]
    fn on_while_anyone_holds_it() {
        let (_folder, path) = switch("0\n");
        let (one, other) = (Expedite::at(&path, true), Expedite::at(&path, true));
        let first = one.hold();
        let second = other.hold();
        let third = one.hold();
        assert_eq!(value(&path), OURS);
        drop(first);
        drop(second);
        assert_eq!(value(&path), OURS);
        drop(third);
        assert_eq!(value(&path), OFF);
    }

    #[test]
    fn what_an_administrator_has_set_stays() {
        let (_folder, path) = switch("1\n");
        let expedite = Expedite::at(&path, true);
        drop(expedite.hold());
        assert_eq!(value(&path), "1");
    }

    #[test]
    fn what_a_killed_agent_has_left_is_taken_back() {
        let (_folder, path) = switch("2\n");
        let _ = Expedite::at(&path, false);
        assert_eq!(value(&path), OFF);
    }

    #[test]
    fn but_not_from_one_that_lives() {
        let (_folder, path) = switch("0\n");
        let living = Expedite::at(&path, true);
        let held = living.hold();
        let _ = Expedite::at(&path, true);
        assert_eq!(value(&path), OURS);
        drop(held);
    }

    #[test]
    fn without_the_file_things_go_on() {
        let folder = tempfile::tempdir().unwrap();
        let expedite = Expedite::at(&folder.path().join("absent"), true);
        drop(expedite.hold());
    }
}
