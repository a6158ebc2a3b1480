//! Files of the endpoint manager in the run directory: one for each endpoint, and `ipam.json`. They
//! are replaced by renaming, so that a crash leaves the old or the new content; no `fsync`: a reboot
//! ends the pods that they describe, too.
//!
//! A file that is replaced trades places with the temporary one, which serves again: making and
//! deleting a file for each write would be the dearest part of adding a pod where the run directory
//! is on a disk (ext4 looks at every file deleted lately before it makes one).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::spec::{Endpoint, EndpointKey};
use crate::ipam::IpamState;

const ENDPOINTS: &str = "endpoints";
const ALLOCATOR: &str = "ipam.json";
/// What a file was before the last write, or is about to be.
const ALLOCATOR_TEMPORARY: &str = "ipam.json.tmp";
const ENDPOINT_TEMPORARY: &str = "endpoint.json.tmp";
const TEMPORARY: &str = ".tmp";
const QUARANTINE: &str = ".quarantine";

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("cannot {verb} {path}: {cause}; check space and permissions of the run directory")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// A state that cannot be written as JSON.
    #[error("cannot encode {path}: {cause}")]
    Encode {
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: serde_json::Error,
    },
}

/// Content of `ipam.json`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub(super) struct AllocatorState {
    /// Addresses.
    pub ipam: IpamState,
    /// Number at which the next search starts.
    pub next_number: u32,
    /// Numbers that rest, with the time of their release.
    pub resting_numbers: Vec<(u32, u64)>,
}

/// The files.
#[derive(Debug)]
pub(super) struct Store {
    run_dir: PathBuf,
}

impl Store {
    /// Makes the directory of the endpoints, readable by root only.
    pub fn open(run_dir: &Path) -> Result<Self, StoreError> {
        let path = run_dir.join(ENDPOINTS);
        fs::create_dir_all(&path)
            .and_then(|()| {
                use std::os::unix::fs::PermissionsExt as _;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o700))
            })
            .map_err(|cause| io_error("create", &path, cause))?;
        Ok(Self {
            run_dir: run_dir.to_owned(),
        })
    }

    pub fn save_endpoint(&self, endpoint: &Endpoint) -> Result<(), StoreError> {
        let temporary = self.run_dir.join(ENDPOINT_TEMPORARY);
        write(
            &self.endpoint_path(&endpoint.spec.key),
            &temporary,
            endpoint,
        )
    }

    pub fn remove_endpoint(&self, key: &EndpointKey) -> Result<(), StoreError> {
        let path = self.endpoint_path(key);
        match fs::remove_file(&path) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &path, cause))
            }
            _ => Ok(()),
        }
    }

    pub fn save_allocator(&self, state: &AllocatorState) -> Result<(), StoreError> {
        let temporary = self.run_dir.join(ALLOCATOR_TEMPORARY);
        write(&self.run_dir.join(ALLOCATOR), &temporary, state)
    }

    /// The allocator's state, or its default when there is none or it cannot be read; then with the
    /// reason, and the file is set aside.
    pub fn load_allocator(&self, problems: &mut Vec<String>) -> AllocatorState {
        let path = self.run_dir.join(ALLOCATOR);
        if !path.exists() {
            return AllocatorState::default();
        }
        read(&path).unwrap_or_else(|why| {
            problems.push(set_aside(&path, &why));
            AllocatorState::default()
        })
    }

    /// All endpoints that have a readable file of the right name. Others are set aside, left-overs of
    /// interrupted writes removed; either is told in `problems`.
    pub fn load_endpoints(&self, problems: &mut Vec<String>) -> Result<Vec<Endpoint>, StoreError> {
        let directory = self.run_dir.join(ENDPOINTS);
        let entries =
            fs::read_dir(&directory).map_err(|cause| io_error("read", &directory, cause))?;
        let mut endpoints = Vec::new();
        for entry in entries {
            let path = entry
                .map_err(|cause| io_error("read", &directory, cause))?
                .path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if name.ends_with(QUARANTINE) {
                continue;
            }
            if name.ends_with(TEMPORARY) {
                if let Err(cause) = fs::remove_file(&path) {
                    problems.push(io_error("remove", &path, cause).to_string());
                }
                continue;
            }
            let endpoint = read::<Endpoint>(&path).and_then(|endpoint| {
                endpoint.spec.validate()?;
                if self.endpoint_path(&endpoint.spec.key) != path {
                    return Err(format!("it describes {}", endpoint.spec.key));
                }
                Ok(endpoint)
            });
            match endpoint {
                Ok(endpoint) => endpoints.push(endpoint),
                Err(why) => problems.push(set_aside(&path, &why)),
            }
        }
        endpoints.sort_by(|a, b| a.spec.key.cmp(&b.spec.key));
        Ok(endpoints)
    }

    /// Sets the file of an endpoint aside, and says so.
    pub fn quarantine(&self, key: &EndpointKey, why: &str) -> String {
        set_aside(&self.endpoint_path(key), why)
    }

    pub fn endpoint_path(&self, key: &EndpointKey) -> PathBuf {
        let EndpointKey {
            container_id,
            ifname,
        } = key;
        self.run_dir
            .join(ENDPOINTS)
            .join(format!("{container_id}-{ifname}.json"))
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    let text = fs::read(path).map_err(|cause| cause.to_string())?;
    serde_json::from_slice(&text).map_err(|cause| cause.to_string())
}

fn write<T: Serialize>(path: &Path, temporary: &Path, value: &T) -> Result<(), StoreError> {
    let text = serde_json::to_vec_pretty(value).map_err(|cause| StoreError::Encode {
        path: path.to_owned(),
        cause,
    })?;
    fs::write(temporary, text)
        .and_then(|()| put_in_place(temporary, path))
        .map_err(|cause| {
            // Best effort: the next start removes it too.
            let _ = fs::remove_file(temporary);
            io_error("write", path, cause)
        })
}

/// Trades places with the file at `path` if there is one, and the file system can do that.
fn put_in_place(temporary: &Path, path: &Path) -> io::Result<()> {
    let exchange = RenameFlags::RENAME_EXCHANGE;
    match renameat2(AT_FDCWD, temporary, AT_FDCWD, path, exchange) {
        Err(Errno::ENOENT | Errno::EINVAL | Errno::ENOSYS) => fs::rename(temporary, path),
        result => result.map_err(io::Error::from),
    }
}

fn set_aside(path: &Path, why: &str) -> String {
    let to = with_suffix(path, QUARANTINE);
    match fs::rename(path, &to) {
        Ok(()) => format!(
            "{} cannot be used ({why}); set aside as {}",
            path.display(),
            to.display()
        ),
        Err(cause) => format!(
            "{} cannot be used ({why}), nor set aside: {cause}; remove it",
            path.display()
        ),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn io_error(verb: &'static str, path: &Path, cause: io::Error) -> StoreError {
    StoreError::Io {
        verb,
        path: path.to_owned(),
        cause,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn replacing_a_file_makes_none() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let path = directory.path().join(ALLOCATOR);
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        let state = |next_number| AllocatorState {
            next_number,
            ..AllocatorState::default()
        };
        for number in [1, 2] {
            store.save_allocator(&state(number)).unwrap();
        }
        let temporary = directory.path().join(ALLOCATOR_TEMPORARY);
        let (one, other) = (inode(&path), inode(&temporary));
        store.save_allocator(&state(3)).unwrap();
        assert_eq!((inode(&path), inode(&temporary)), (other, one));
        assert_eq!(store.load_allocator(&mut Vec::new()), state(3));
    }
}
