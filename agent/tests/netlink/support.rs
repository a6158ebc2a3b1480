//! A network namespace per test: that of a thread of its own, gone when the thread ends.

use std::{
    future::Future,
    io::Write as _,
    net::IpAddr,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use nix::sched::{CloneFlags, unshare};
use tokio::sync::mpsc;
use weir_agent::netlink::NetlinkEvent;

/// Runs a test on a thread in a network namespace of its own.
pub fn in_namespace(test: impl Future<Output = ()> + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace needs CAP_SYS_ADMIN");
        // The child inherits the namespace of the thread.
        ip("link set lo up");
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` with arguments in this thread's namespace and returns what it prints.
pub fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `ip -batch` with the lines.
pub fn ip_batch(lines: &str) {
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(lines.as_bytes()).unwrap();
    drop(stdin);
    assert!(child.wait().unwrap().success());
}

/// A switch below `/proc/sys`, as this thread's namespace has it.
pub fn read_sysctl(key: &str) -> String {
    let value = std::fs::read_to_string(format!("/proc/sys/{key}")).unwrap();
    value.trim().to_owned()
}

/// The next event; fails after ten seconds.
pub async fn next_event(events: &mut mpsc::Receiver<NetlinkEvent>) -> NetlinkEvent {
    tokio::time::timeout(Duration::from_secs(10), events.recv())
        .await
        .expect("an event within ten seconds")
        .expect("the watcher goes on")
}

/// An address and a route of a family, as `ip` takes them.
pub struct Family4And6 {
    pub address: &'static str,
    pub route: &'static str,
}

impl Family4And6 {
    pub const BOTH: [Self; 2] = [
        Self {
            address: "198.51.100.1/24",
            route: "203.0.113.0/24",
        },
        Self {
            address: "2001:db8:1::1/64",
            route: "2001:db8:2::/64",
        },
    ];
}

/// A network namespace besides the thread's, held by a process that ends with this.
pub struct OtherNamespace(Child);

impl OtherNamespace {
    pub fn new() -> Self {
        let child = Command::new("unshare")
            .args(["--net", "sleep", "300"])
            .spawn()
            .unwrap();
        let namespace = |path: String| std::fs::read_link(path).ok();
        let ours = namespace("/proc/thread-self/ns/net".to_owned());
        let deadline = Instant::now() + Duration::from_secs(10);
        let other = Self(child);
        while namespace(format!("/proc/{}/ns/net", other.pid())) == ours {
            assert!(Instant::now() < deadline, "unshare --net did not");
            std::thread::yield_now();
        }
        other
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for OtherNamespace {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// An address from its text.
pub fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A prefix from its text.
pub fn range(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// A node with one device on 192.0.2.0/24 and 2001:db8::/64 and a default route of each family.
pub fn make_underlay() {
    ip("link add eth0 type veth peer name fabric");
    ip("link set fabric up");
    ip("link set eth0 mtu 1400 up");
    ip("addr add 192.0.2.1/24 dev eth0");
    ip("addr add 2001:db8::1/64 dev eth0 nodad");
    ip("route add default via 192.0.2.254");
    ip("-6 route add default via 2001:db8::fe");
}

/// Interface index of a device of this thread's namespace.
pub fn ifindex(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).unwrap()
}
