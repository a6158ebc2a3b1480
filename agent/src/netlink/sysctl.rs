//! The switches under `/proc/sys/net` that Weir needs, set only where they differ, with the
//! previous values kept in `RUN-DIR/sysctls.json` so that clean-up can put them back. `/proc/sys/net`
//! shows the network namespace of the thread that opens a file.
//!
//! | switch | value | why |
//! |---|---|---|
//! | `net/ipv4/ip_forward` | 1 | packets that the programs hand to the stack are routed: pod to outside, host ports |
//! | `net/ipv6/conf/all/forwarding` | 1 | the same for IPv6 |
//! | `net/ipv6/conf/DEV/accept_ra` | 2 where it is 1 | with forwarding on, 1 means that router advertisements are ignored, and the node loses its default route; set before forwarding is, which throws such routes away |
//! | `net/ipv4/ip_local_reserved_ports` | with the NAT range, where that overlaps `net/ipv4/ip_local_port_range`, and NodePorts and HostPorts within it | no process gets a port by itself that translated connections have, or at which a Service is served |
//! | `net/ipv4/conf/VETH/rp_filter` | 0 | what a pod's replies look like to the stack is translated: their source may be a Service address, which no route leads to the pod for |
//! | `net/ipv4/conf/VETH/forwarding` | 1 | as above; a new device has it from `default`, which others may have set |
//! | `net/ipv6/conf/VETH/accept_ra` | 0 | a pod is no router |
//! | `net/ipv6/conf/VETH/accept_dad` | 0 | no duplicate address detection towards the pod |
//!
//! Switches of a pod's device (`VETH`) vanish with it and are not kept. The effective `rp_filter`
//! is the greater of the device's and that of `all`: strict filtering in `all` cannot be undone per
//! device and is reported by [`strict_rp_filter`] instead of being changed under the operator's hands.

mod reserved_ports;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use reserved_ports::RESERVED_PORTS;

const PROC_SYS: &str = "/proc/sys";
/// Room for any value, bytes: every other port, with its comma.
const LONGEST: usize = 256 << 10;
const STORE: &str = "sysctls.json";

/// Why a switch could not be read, set or remembered.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// A switch cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A switch cannot be set.
    #[error("cannot write {value:?} to {path}: {source}; is /proc/sys mounted read-only?")]
    Write {
        /// The file.
        path: PathBuf,
        /// The value wanted.
        value: String,
        /// Why.
        source: io::Error,
    },
    /// The file with the previous values cannot be written.
    #[error("cannot keep the previous values of sysctls in {path}: {source}")]
    Store {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Switches of the node, and what they were before.
#[derive(Debug)]
pub struct Sysctls {
    root: PathBuf,
    store: PathBuf,
    changed: BTreeMap<String, Changed>,
}

/// A switch that was changed.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Changed {
    /// Value before.
    previous: String,
    /// Value that Weir wrote: if it is another by now, someone else wants it so.
    written: String,
}

impl Sysctls {
    /// Reads what an earlier agent left in the run directory. A file that cannot be read is
    /// reported in the log, set aside, and begun anew: the switches are then not put back at
    /// clean-up.
    pub fn open(run_dir: &Path) -> Self {
        Self::with_root(Path::new(PROC_SYS), run_dir)
    }

    fn with_root(root: &Path, run_dir: &Path) -> Self {
        let store = run_dir.join(STORE);
        let changed = match fs::read(&store) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                set_aside(&store, &error);
                BTreeMap::new()
            }),
            Err(_) => BTreeMap::new(),
        };
        Self {
            root: root.to_owned(),
            store,
            changed,
        }
    }

    /// Sets what the node needs; `devices` are names of devices that may live on router
    /// advertisements.
    ///
    /// # Errors
    ///
    /// The first failure. IPv6 switches of a node without IPv6 are no failure.
    pub fn set_node<'a>(
        &mut self,
        devices: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), SysctlError> {
        for device in devices {
            self.keep_router_advertisements(device)?;
        }
        self.set("net/ipv4/ip_forward", "1")?;
        let ipv6 = "net/ipv6/conf/all/forwarding";
        if self.root.join(ipv6).exists() {
            self.set(ipv6, "1")?;
        }
        Ok(())
    }

    /// Sets a switch, named by its path below `/proc/sys`, if it has another value. Returns
    /// whether it had.
    pub fn set(&mut self, key: &str, value: &str) -> Result<bool, SysctlError> {
        let path = self.root.join(key);
        let current = read(&path)?;
        if current == value {
            return Ok(false);
        }
        // Kept before it is changed: a crash between the two loses nothing.
        let previous = match self.changed.get(key) {
            Some(changed) if changed.written == current => changed.previous.clone(),
            _ => current,
        };
        let changed = Changed {
            previous,
            written: value.to_owned(),
        };
        self.changed.insert(key.to_owned(), changed);
        self.save()?;
        write(&path, value)?;
        Ok(true)
    }

    /// Switches that Weir has changed, by their paths below `/proc/sys`.
    pub fn changed(&self) -> Vec<String> {
        self.changed.keys().cloned().collect()
    }

    /// Puts back every switch that still has the value Weir gave it, forgets all, and returns what
    /// could not be put back.
    pub fn restore(&mut self) -> Vec<SysctlError> {
        let mut errors = Vec::new();
        if self.changed.contains_key(RESERVED_PORTS) {
            errors.extend(self.give_ports_back().err());
            self.changed.remove(RESERVED_PORTS);
        }
        for (key, changed) in std::mem::take(&mut self.changed) {
            let path = self.root.join(&key);
            match read(&path) {
                Ok(current) if current == changed.written => {
                    errors.extend(write(&path, &changed.previous).err());
                }
                Ok(_) => {}
                Err(SysctlError::Read { source, .. })
                    if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => errors.push(error),
            }
        }
        match fs::remove_file(&self.store) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                errors.push(SysctlError::Store {
                    path: self.store.clone(),
                    source,
                });
            }
            _ => {}
        }
        errors
    }

    fn keep_router_advertisements(&mut self, device: &str) -> Result<(), SysctlError> {
        let key = format!("net/ipv6/conf/{device}/accept_ra");
        match read(&self.root.join(&key)) {
            Ok(value) if value == "1" => self.set(&key, "2").map(drop),
            Ok(_) => Ok(()),
            // No IPv6 on this device.
            Err(SysctlError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn save(&self) -> Result<(), SysctlError> {
        let failed = |source| SysctlError::Store {
            path: self.store.clone(),
            source,
        };
        let bytes =
            serde_json::to_vec_pretty(&self.changed).map_err(|error| failed(error.into()))?;
        let temporary = self.store.with_extension("json.new");
        fs::write(&temporary, bytes).map_err(failed)?;
        fs::rename(&temporary, &self.store).map_err(failed)
    }
}

/// Keeps a damaged file for people, who may read the previous values in it.
fn set_aside(store: &Path, error: &serde_json::Error) {
    let to = store.with_extension("json.quarantine");
    let path = store.display();
    match fs::rename(store, &to) {
        Ok(()) => tracing::warn!(
            %path, %error, set_aside = %to.display(),
            "previous values of sysctls are lost: the file cannot be used"
        ),
        Err(cause) => tracing::warn!(
            %path, %error, %cause,
            "previous values of sysctls are lost: the file cannot be used, nor set aside"
        ),
    }
}

/// Sets the switches of the host side of a pod.
///
/// # Errors
///
/// The first failure; a device without IPv6 is none.
pub fn set_pod_device(name: &str) -> Result<(), SysctlError> {
    let root = Path::new(PROC_SYS);
    for (key, value) in [("rp_filter", "0"), ("forwarding", "1")] {
        set_if_different(&root.join(format!("net/ipv4/conf/{name}/{key}")), value)?;
    }
    for (key, value) in [("accept_ra", "0"), ("accept_dad", "0")] {
        let path = root.join(format!("net/ipv6/conf/{name}/{key}"));
        match set_if_different(&path, value) {
            Err(SysctlError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            outcome => outcome?,
        }
    }
    Ok(())
}

/// What is wrong when the node filters strictly by reverse path on all devices, else `None`.
pub fn strict_rp_filter() -> Option<String> {
    let path = Path::new(PROC_SYS).join("net/ipv4/conf/all/rp_filter");
    (read(&path).ok()? == "1").then(|| {
        "net.ipv4.conf.all.rp_filter is 1 (strict) and overrides the value of every pod's device: \
         replies of pods to the node may be dropped; set it to 0 or 2"
            .to_owned()
    })
}

fn set_if_different(path: &Path, value: &str) -> Result<(), SysctlError> {
    if read(path)? == value {
        return Ok(());
    }
    write(path, value)
}

/// In one read: the kernel gives a switch from its beginning and nothing after the first read, so that a list of
/// ports longer than the reader's room would be cut short.
fn read(path: &Path) -> Result<String, SysctlError> {
    let whole = || {
        let mut buffer = vec![0; LONGEST];
        let length = fs::File::open(path)?.read(&mut buffer)?;
        buffer.truncate(length);
        String::from_utf8(buffer).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    };
    match whole() {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(source) => Err(SysctlError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// With the end of a line: nothing would be written for an empty value, and the switch stay as it is.
fn write(path: &Path, value: &str) -> Result<(), SysctlError> {
    fs::write(path, format!("{value}\n")).map_err(|source| SysctlError::Write {
        path: path.to_owned(),
        value: value.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, value) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }
        root
    }

    pub fn value(root: &tempfile::TempDir, path: &str) -> String {
        read(&root.path().join(path)).unwrap()
    }

    const FORWARD: &str = "net/ipv4/ip_forward";
    const FORWARD6: &str = "net/ipv6/conf/all/forwarding";
    const RA: &str = "net/ipv6/conf/eth0.7/accept_ra";

    #[test]
    fn switches_are_set_and_put_back_by_a_later_agent() {
        let root = tree(&[(FORWARD, "0"), (FORWARD6, "0"), (RA, "1")]);
        let run_dir = tempfile::tempdir().unwrap();
        let mut sysctls = Sysctls::with_root(root.path(), run_dir.path());
        sysctls.set_node(["eth0.7", "gone0"]).unwrap();
        assert_eq!(value(&root, FORWARD), "1");
        assert_eq!(value(&root, FORWARD6), "1");
        assert_eq!(value(&root, RA), "2");
        // A second agent finds all as wanted and forgets nothing.
        let mut sysctls = Sysctls::with_root(root.path(), run_dir.path());
        sysctls.set_node(["eth0.7"]).unwrap();
        assert!(sysctls.restore().is_empty());
        assert_eq!(value(&root, FORWARD), "0");
        assert_eq!(value(&root, FORWARD6), "0");
        assert_eq!(value(&root, RA), "1");
        assert!(!run_dir.path().join(STORE).exists());
    }

    #[test]
    fn what_another_has_changed_since_is_left_alone() {
        let root = tree(&[(FORWARD, "0"), (RA, "1")]);
        let run_dir = tempfile::tempdir().unwrap();
        let mut sysctls = Sysctls::with_root(root.path(), run_dir.path());
        sysctls.set_node(["eth0.7"]).unwrap();
        fs::write(root.path().join(RA), "0").unwrap();
        assert!(sysctls.restore().is_empty());
        assert_eq!(value(&root, RA), "0");
        assert_eq!(value(&root, FORWARD), "0");
    }

    #[test]
    fn a_switch_that_is_as_wanted_is_not_remembered() {
        let root = tree(&[(FORWARD, "1")]);
        let run_dir = tempfile::tempdir().unwrap();
        let mut sysctls = Sysctls::with_root(root.path(), run_dir.path());
        sysctls.set_node([]).unwrap();
        assert!(!run_dir.path().join(STORE).exists());
        assert!(sysctls.restore().is_empty());
        assert_eq!(value(&root, FORWARD), "1");
    }

    #[test]
    fn a_damaged_file_is_set_aside() {
        let root = tree(&[(FORWARD, "0")]);
        let run_dir = tempfile::tempdir().unwrap();
        fs::write(run_dir.path().join(STORE), "{\"net").unwrap();
        let mut sysctls = Sysctls::with_root(root.path(), run_dir.path());
        sysctls.set_node([]).unwrap();
        let kept = fs::read_to_string(run_dir.path().join("sysctls.json.quarantine"));
        assert_eq!(kept.unwrap(), "{\"net");
        assert!(sysctls.restore().is_empty());
        assert_eq!(value(&root, FORWARD), "0");
    }
}
