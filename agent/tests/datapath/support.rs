//! What the tests share: a private BPF file system, maps by pin, Services by description.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::PathBuf,
};

use aya::{
    Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapInfo, lpm_trie},
};
use aya_obj::generated::{BPF_F_RDONLY, bpf_attr, bpf_cmd};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use weir_agent::{
    datapath::{Datapath, DatapathOptions},
    model::{
        Backend, BackendAddress, BackendState, EndpointSet, Frontend, Scope, ServicePort,
        ServicePortKey,
    },
    objects::{Family, ObjectName, Protocol},
};
use weir_common::{
    Ipv4, Ipv6,
    ipcache::IpcacheEntry,
    service::{self, FrontendKey, ServiceState, SlotIndex},
};

/// A BPF file system that disappears with the test.
pub struct BpfFs {
    folder: tempfile::TempDir,
}

impl BpfFs {
    pub fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests load BPF programs: run them as root"
        );
        let folder = tempfile::Builder::new()
            .prefix("weir-dp-")
            .tempdir()
            .unwrap();
        mount(
            Some("bpf"),
            folder.path(),
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .expect("mount a BPF file system");
        Self { folder }
    }

    pub fn root(&self) -> PathBuf {
        self.folder.path().join("weir")
    }

    /// Small tables, so that a test costs little memory.
    pub fn options(&self) -> DatapathOptions {
        DatapathOptions {
            bpf_root: self.root(),
            connections: 1024,
            services_max: 1024,
            backends_max: 4096,
            ..DatapathOptions::default()
        }
    }

    pub fn open(&self) -> Datapath {
        Datapath::open(&self.options()).unwrap()
    }

    pub fn pin(&self, name: &str) -> PathBuf {
        self.root().join("maps").join(name)
    }

    pub fn map(&self, name: &str) -> Map {
        Map::from_map_data(MapData::from_pin(self.pin(name)).unwrap()).unwrap()
    }

    pub fn array<V: Pod>(&self, name: &str) -> Array<MapData, V> {
        self.map(name).try_into().unwrap()
    }

    pub fn hash<K: Pod, V: Pod>(&self, name: &str) -> HashMap<MapData, K, V> {
        self.map(name).try_into().unwrap()
    }

    pub fn trie<K: Pod, V: Pod>(&self, name: &str) -> LpmTrie<MapData, K, V> {
        self.map(name).try_into().unwrap()
    }

    /// Number of the Service port that a frontend leads to in the kernel.
    pub fn frontend(&self, family: Family, index: u32, port: u16) -> Option<u32> {
        self.frontend_row(cluster_ip(family, index), port, Scope::Inside)
            .map(service::service_port_of_row)
    }

    /// Row of `SERVICE_STATE` that a frontend leads to in the kernel; the unspecified address stands
    /// for all of the node.
    pub fn frontend_row(&self, address: IpAddr, port: u16, scope: Scope) -> Option<u32> {
        let port = weir_common::Port::new(port);
        let (protocol, scope) = (weir_common::protocol::TCP, scope.number());
        match address {
            IpAddr::V4(v4) => {
                let key = FrontendKey {
                    address: Ipv4::from(v4),
                    port,
                    protocol,
                    scope,
                };
                let map = self.hash::<FrontendKey<Ipv4>, u32>("FRONTENDS_V4");
                map.get(&key, 0).ok()
            }
            IpAddr::V6(v6) => {
                let key = FrontendKey {
                    address: Ipv6::from(v6),
                    port,
                    protocol,
                    scope,
                };
                let map = self.hash::<FrontendKey<Ipv6>, u32>("FRONTENDS_V6");
                map.get(&key, 0).ok()
            }
        }
    }

    /// What the ipcache says of an address itself.
    pub fn ipcache(&self, address: IpAddr) -> Option<IpcacheEntry> {
        match address {
            IpAddr::V4(v4) => {
                let trie = self.trie::<Ipv4, IpcacheEntry>("IPCACHE_V4");
                trie.get(&lpm_trie::Key::new(32, v4.into()), 0).ok()
            }
            IpAddr::V6(v6) => {
                let trie = self.trie::<Ipv6, IpcacheEntry>("IPCACHE_V6");
                trie.get(&lpm_trie::Key::new(128, v6.into()), 0).ok()
            }
        }
    }

    pub fn state(&self, number: u32) -> ServiceState {
        self.state_of(number, EndpointSet::Cluster)
    }

    pub fn state_of(&self, number: u32, set: EndpointSet) -> ServiceState {
        self.array::<ServiceState>("SERVICE_STATE")
            .get(&service::state_row(number, set.number()), 0)
            .unwrap()
    }

    /// Seconds of session affinity.
    pub fn affinity_timeout(&self, number: u32) -> u32 {
        self.array::<u32>("AFFINITY_TIMEOUTS")
            .get(&number, 0)
            .unwrap()
    }

    pub fn backend(&self, number: u32) -> service::Backend {
        self.array::<service::Backend>("BACKENDS")
            .get(&number, 0)
            .unwrap()
    }

    /// Slots of each backend, as a program would find them.
    pub fn spread(&self, number: u32) -> BTreeMap<u32, u32> {
        self.spread_of(number, EndpointSet::Cluster)
    }

    /// The same of one set.
    pub fn spread_of(&self, number: u32, set: EndpointSet) -> BTreeMap<u32, u32> {
        let word = self.state_of(number, set);
        let outer: aya::maps::ArrayOfMaps<MapData, Array<MapData, u64>> =
            self.map("SLOTS").try_into().unwrap();
        let mut spread = BTreeMap::new();
        if word.slots() == 0 {
            return spread;
        }
        let chunk = outer
            .get(&SlotIndex::new(word.first_slot()).chunk, 0)
            .unwrap();
        for slot in word.first_slot()..word.first_slot() + word.slots() {
            let index = SlotIndex::new(slot);
            let backend = (chunk.get(&index.element, 0).unwrap() >> index.shift) as u32;
            *spread.entry(backend).or_default() += 1;
        }
        spread
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        if let Err(error) = umount2(self.folder.path(), MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", self.folder.path().display());
        }
    }
}

/// While it lives every handle that this process has on a map only reads: changes fail with
/// `EPERM`, mappings with `EACCES`.
pub struct ReadOnly {
    /// The handles with what they were before.
    handles: Vec<(RawFd, OwnedFd)>,
}

impl ReadOnly {
    pub fn new(fs: &BpfFs, name: &str) -> Self {
        let id = MapInfo::from_pin(fs.pin(name)).unwrap().id();
        let handles: Vec<RawFd> = fs::read_dir("/proc/self/fdinfo")
            .unwrap()
            .filter_map(|entry| {
                let entry = entry.unwrap();
                let about = fs::read_to_string(entry.path()).ok()?;
                let this = about.lines().any(|line| line == format!("map_id:\t{id}"));
                this.then(|| entry.file_name().to_str()?.parse().ok())?
            })
            .collect();
        assert!(!handles.is_empty(), "{name} is not open");
        let read_only = open_read_only(&fs.pin(name));
        let swap = |handle: RawFd| {
            // SAFETY: `handle` is an open descriptor of this process, and the copy is ours.
            let before = unsafe { OwnedFd::from_raw_fd(libc::dup(handle)) };
            replace(handle, &read_only);
            (handle, before)
        };
        Self {
            handles: handles.into_iter().map(swap).collect(),
        }
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        for (handle, before) in &self.handles {
            replace(*handle, before);
        }
    }
}

fn replace(handle: RawFd, by: &OwnedFd) {
    // SAFETY: both are open; who owns `handle` goes on to own what it names now.
    assert_eq!(unsafe { libc::dup2(by.as_raw_fd(), handle) }, handle);
}

fn open_read_only(pin: &std::path::Path) -> OwnedFd {
    let path = CString::new(pin.as_os_str().as_bytes()).unwrap();
    // SAFETY: a union of plain integers; zero is valid for each.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.file_flags = BPF_F_RDONLY;
    // SAFETY: `attr` is whole, and the path in it ends with a zero byte and outlives the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            bpf_cmd::BPF_OBJ_GET as libc::c_long,
            &raw mut attr,
            size_of::<bpf_attr>(),
        )
    };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just returned this descriptor.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

pub fn cluster_ip(family: Family, index: u32) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(0x0a60_0000 + index)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(0xfd96 << 112 | u128::from(index))),
    }
}

pub fn pod_ip(family: Family, index: u32) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + index)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(index))),
    }
}

pub fn key(family: Family, index: u32) -> ServicePortKey {
    ServicePortKey {
        owner: ObjectName::new("test", format!("service-{index}")).into(),
        port_name: "http".into(),
        protocol: Protocol::Tcp,
        family,
        port: 80,
    }
}

pub fn backend_address(family: Family, index: u32) -> BackendAddress {
    BackendAddress {
        address: pod_ip(family, index),
        port: 8080,
    }
}

/// A Service port with one frontend, port 80 of cluster address `index`.
pub fn port(family: Family, index: u32, backends: impl IntoIterator<Item = u32>) -> ServicePort {
    ServicePort {
        frontends: BTreeSet::from([Frontend::cluster_ip(cluster_ip(family, index), 80)]),
        backends: backends
            .into_iter()
            .map(|i| (backend_address(family, i), backend(BackendState::Active)))
            .collect(),
        unused: BTreeMap::new(),
        affinity: None,
        source_ranges: None,
    }
}

pub fn backend(state: BackendState) -> Backend {
    Backend {
        state,
        ..Backend::active()
    }
}
