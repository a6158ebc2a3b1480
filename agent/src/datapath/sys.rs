//! The calls of bpf(2) that aya does not make: batches, whole-map copies as bytes, and maps of
//! maps outside an object. All raw system calls of the data path are here; the other modules see
//! owned file descriptors and byte slices whose lengths are checked.

use std::{
    ffi::CString,
    io, mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::maps::{MapData, MapInfo};
use aya_obj::generated::{
    BPF_ANY, BPF_EXIST, BPF_NOEXIST, bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type,
};

/// One call of bpf(2).
///
/// # Safety
///
/// Every pointer in `attr` must be valid for what `cmd` does with it, for the sizes of the map or
/// program that `attr` names.
pub(super) unsafe fn bpf(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: `attr` is a whole `bpf_attr`, and the caller vouches for the pointers in it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            cmd as libc::c_long,
            std::ptr::from_mut(attr),
            size_of::<bpf_attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

/// An argument of bpf(2) with every member zero.
pub(super) fn zeroed_attr() -> bpf_attr {
    // SAFETY: a union of plain integers and arrays of them; zero is valid for each.
    unsafe { mem::zeroed() }
}

/// A file descriptor as bpf(2) takes it in an unsigned member.
pub(super) fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

/// Takes ownership of the descriptor that a successful call has returned.
pub(super) fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just returned this descriptor and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A map seen as bytes: for batches and for copies of maps whose type does not matter.
#[derive(Debug)]
pub struct RawMap {
    fd: OwnedFd,
    key_size: usize,
    value_size: usize,
    max_entries: u32,
}

/// How far a walk in batches has come. The kernel's own note; 64 bytes hold the largest key.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cursor {
    place: [u64; 8],
    started: bool,
}

impl Cursor {
    /// Whether the walk is between its beginning and its end.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.started
    }
}

/// What [`RawMap::lookup_batch`] has read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Batch {
    /// Entries in the buffers.
    pub count: usize,
    /// The walk is at its end; the next call starts anew.
    pub done: bool,
}

impl RawMap {
    /// A second handle on `map`.
    ///
    /// # Errors
    ///
    /// The kernel does not tell the map's sizes, or there is no free file descriptor.
    pub fn new(map: &MapData) -> io::Result<Self> {
        let info = map.info().map_err(io::Error::other)?;
        Self::from_parts(map.fd().as_fd().try_clone_to_owned()?, &info)
    }

    fn from_parts(fd: OwnedFd, info: &MapInfo) -> io::Result<Self> {
        use aya::maps::MapType;
        let per_cpu = matches!(
            info.map_type(),
            Ok(MapType::PerCpuArray | MapType::PerCpuHash | MapType::LruPerCpuHash)
        );
        let value_size = if per_cpu {
            let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
            (info.value_size() as usize).next_multiple_of(8) * cpus
        } else {
            info.value_size() as usize
        };
        Ok(Self {
            fd,
            key_size: info.key_size() as usize,
            value_size,
            max_entries: info.max_entries(),
        })
    }

    /// Bytes of a key.
    #[must_use]
    pub fn key_size(&self) -> usize {
        self.key_size
    }

    /// Bytes of a value as user space sees it: of all processors for a per-CPU map.
    #[must_use]
    pub fn value_size(&self) -> usize {
        self.value_size
    }

    /// Entries that the map can hold.
    #[must_use]
    pub fn max_entries(&self) -> u32 {
        self.max_entries
    }

    /// Reads the next entries of a walk into `keys` and `values`, as many as fit both.
    ///
    /// # Errors
    ///
    /// `ENOSPC` if one bucket of a hash map holds more entries than fit (use larger buffers),
    /// `EINVAL` or the kernel's 524 if it has no batches for this type.
    pub fn lookup_batch(
        &self,
        cursor: &mut Cursor,
        keys: &mut [u8],
        values: &mut [u8],
    ) -> io::Result<Batch> {
        let room = (keys.len() / self.key_size).min(values.len() / self.value_size);
        let mut next = [0u64; 8];
        let mut attr = zeroed_attr();
        attr.batch.in_batch = if cursor.started {
            cursor.place.as_ptr() as u64
        } else {
            0
        };
        attr.batch.out_batch = next.as_mut_ptr() as u64;
        attr.batch.keys = keys.as_mut_ptr() as u64;
        attr.batch.values = values.as_mut_ptr() as u64;
        attr.batch.count = u32::try_from(room).unwrap_or(u32::MAX);
        attr.batch.map_fd = raw(self.fd.as_fd());
        // SAFETY: `keys` and `values` hold `count` elements of the map's own sizes, and the two
        // notes of the walk are larger than any key of ours.
        let result = unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) };
        // SAFETY: the kernel writes `count` also when it fails at the end of the map.
        let count = unsafe { attr.batch.count } as usize;
        match result {
            Ok(_) => {
                *cursor = Cursor {
                    place: next,
                    started: true,
                };
                Ok(Batch { count, done: false })
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                *cursor = Cursor::default();
                Ok(Batch { count, done: true })
            }
            Err(error) => Err(error),
        }
    }

    /// Writes `keys.len() / key_size` entries with one call; maps of maps wait for one RCU grace
    /// period instead of one for each entry.
    ///
    /// # Errors
    ///
    /// `EINVAL` or the kernel's 524 if it has no batches for this type; otherwise as an update.
    pub fn update_batch(&self, keys: &[u8], values: &[u8]) -> io::Result<()> {
        let count = keys.len() / self.key_size;
        check_length(values, count * self.value_size)?;
        let mut attr = zeroed_attr();
        attr.batch.keys = keys.as_ptr() as u64;
        attr.batch.values = values.as_ptr() as u64;
        attr.batch.count = u32::try_from(count).unwrap_or(u32::MAX);
        attr.batch.map_fd = raw(self.fd.as_fd());
        // SAFETY: the lengths have been checked against the map's sizes; the kernel only reads.
        unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr) }.map(drop)
    }

    /// Reads one value; `false` if there is no such key.
    ///
    /// # Errors
    ///
    /// The kernel's, or `InvalidInput` for buffers of a wrong length.
    pub fn lookup(&self, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
        check_length(key, self.key_size)?;
        check_length(value, self.value_size)?;
        match self.element(bpf_cmd::BPF_MAP_LOOKUP_ELEM, Some(key), value.as_mut_ptr()) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes one value.
    ///
    /// # Errors
    ///
    /// The kernel's, or `InvalidInput` for buffers of a wrong length.
    pub fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.update_with(BPF_ANY, key, value)
    }

    /// Writes one value; `false` if the key is there already, and then changes nothing.
    ///
    /// # Errors
    ///
    /// As [`Self::update`].
    pub fn insert(&self, key: &[u8], value: &[u8]) -> io::Result<bool> {
        match self.update_with(BPF_NOEXIST, key, value) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes one value; `false` if there is no such key, and then changes nothing.
    ///
    /// # Errors
    ///
    /// As [`Self::update`].
    pub fn replace(&self, key: &[u8], value: &[u8]) -> io::Result<bool> {
        match self.update_with(BPF_EXIST, key, value) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn update_with(&self, flags: u32, key: &[u8], value: &[u8]) -> io::Result<()> {
        check_length(key, self.key_size)?;
        check_length(value, self.value_size)?;
        let value = value.as_ptr().cast_mut();
        self.element_with(bpf_cmd::BPF_MAP_UPDATE_ELEM, Some(key), value, flags)
    }

    /// Removes one entry; `false` if there was none.
    ///
    /// # Errors
    ///
    /// The kernel's, or `InvalidInput` for a key of a wrong length.
    pub fn delete(&self, key: &[u8]) -> io::Result<bool> {
        check_length(key, self.key_size)?;
        let none = std::ptr::null_mut();
        match self.element(bpf_cmd::BPF_MAP_DELETE_ELEM, Some(key), none) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Every key that the map holds now.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        loop {
            let mut next = vec![0; self.key_size];
            let last = keys.last().map(Vec::as_slice);
            match self.element(bpf_cmd::BPF_MAP_GET_NEXT_KEY, last, next.as_mut_ptr()) {
                Ok(()) => keys.push(next),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(keys),
                Err(error) => return Err(error),
            }
        }
    }

    fn element(&self, cmd: bpf_cmd, key: Option<&[u8]>, value: *mut u8) -> io::Result<()> {
        self.element_with(cmd, key, value, BPF_ANY)
    }

    fn element_with(
        &self,
        cmd: bpf_cmd,
        key: Option<&[u8]>,
        value: *mut u8,
        flags: u32,
    ) -> io::Result<()> {
        let mut attr = zeroed_attr();
        attr.__bindgen_anon_2.map_fd = raw(self.fd.as_fd());
        attr.__bindgen_anon_2.key = key.map_or(0, |key| key.as_ptr() as u64);
        attr.__bindgen_anon_2.__bindgen_anon_1.value = value as u64;
        attr.__bindgen_anon_2.flags = flags.into();
        // SAFETY: the callers have checked that `key` and `value` have the map's sizes.
        unsafe { bpf(cmd, &mut attr) }.map(drop)
    }
}

impl AsFd for RawMap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn check_length(bytes: &[u8], wanted: usize) -> io::Result<()> {
    if bytes.len() == wanted {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} bytes given for {wanted} of the map", bytes.len()),
        ))
    }
}

/// Makes a map outside of an object.
///
/// # Errors
///
/// The kernel's.
pub fn create_map(
    map_type: aya_obj::generated::bpf_map_type,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner: Option<BorrowedFd<'_>>,
) -> io::Result<OwnedFd> {
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_1.map_type = map_type as u32;
    attr.__bindgen_anon_1.key_size = 4;
    attr.__bindgen_anon_1.value_size = value_size;
    attr.__bindgen_anon_1.max_entries = max_entries;
    attr.__bindgen_anon_1.map_flags = flags;
    attr.__bindgen_anon_1.inner_map_fd = inner.map_or(0, raw);
    // SAFETY: map creation reads no pointer of `attr`.
    unsafe { bpf(bpf_cmd::BPF_MAP_CREATE, &mut attr) }.map(owned)
}

/// Detaches a pinned link at once. Removing its pin would do so too, but only some time later:
/// the kernel leaves the last reference to a worker.
///
/// # Errors
///
/// The file is no link, or the kernel's.
pub fn detach_link(path: &Path) -> io::Result<()> {
    let link = open_pin(path)?;
    let mut attr = zeroed_attr();
    attr.link_detach.link_fd = raw(link.as_fd());
    // SAFETY: the command reads no pointer of `attr`.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// Pins a program, a map or a link.
///
/// # Errors
///
/// The kernel's.
pub(super) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = raw(fd);
    // SAFETY: `pathname` ends with a zero byte and lives until the call returns.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens a pinned object.
fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    // SAFETY: `pathname` ends with a zero byte and lives until the call returns.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET, &mut attr) }.map(owned)
}

/// Puts a program in the place of the one in a pinned link of a cgroup (kernel 5.7).
///
/// # Errors
///
/// The file is no such link, its cgroup is gone, or the kernel's.
pub fn update_link(path: &Path, program: BorrowedFd<'_>) -> io::Result<()> {
    let link = open_pin(path)?;
    let mut attr = zeroed_attr();
    attr.link_update.link_fd = raw(link.as_fd());
    attr.link_update.__bindgen_anon_1.new_prog_fd = raw(program);
    // SAFETY: the command reads no pointer of `attr`.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// The identifier of the cgroup that a pinned link is attached to; 0 if that is gone.
///
/// # Errors
///
/// The file is no link of a cgroup, or the kernel's.
pub fn cgroup_of_link(path: &Path) -> io::Result<u64> {
    let info = link_info(path)?;
    if info.type_ != bpf_link_type::BPF_LINK_TYPE_CGROUP as u32 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it is no link of a cgroup",
        ));
    }
    // SAFETY: the member that belongs to the type.
    Ok(unsafe { info.__bindgen_anon_1.cgroup.cgroup_id })
}

/// The type of a pinned link (`enum bpf_link_type`).
///
/// # Errors
///
/// The file is no link, or the kernel's.
pub(super) fn type_of_link(path: &Path) -> io::Result<u32> {
    link_info(path).map(|info| info.type_)
}

fn link_info(path: &Path) -> io::Result<bpf_link_info> {
    let link = open_pin(path)?;
    // SAFETY: a structure of plain integers; zero is valid for each.
    let mut info: bpf_link_info = unsafe { mem::zeroed() };
    let mut attr = zeroed_attr();
    attr.info.bpf_fd = raw(link.as_fd());
    attr.info.info = &raw mut info as u64;
    attr.info.info_len = size_of::<bpf_link_info>() as u32;
    // SAFETY: `info` has the length given and lives until the call returns.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// The bytes of a map key or value.
pub fn bytes_of<T: aya::Pod>(value: &T) -> &[u8] {
    // SAFETY: `Pod` types have no padding and are plain bytes.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// The key or value that `bytes` hold.
///
/// # Panics
///
/// If `bytes` are fewer than the type has.
pub fn from_bytes<T: aya::Pod>(bytes: &[u8]) -> T {
    assert!(bytes.len() >= size_of::<T>());
    // SAFETY: long enough, and every bit pattern is valid for a `Pod` type.
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}

/// Whether an error says that this kernel has no batch operation for the map's type.
pub fn is_unsupported(error: &io::Error) -> bool {
    /// `ENOTSUPP` of the kernel, which has no name in user space.
    const ENOTSUPP: i32 = 524;
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP)
    )
}
