//! `cargo xtask verify-kernel`: boots one of Debian's kernels under QEMU with nothing but the agent and a
//! shell in it, and lets the agent load every program there. Emulated, so that it needs no KVM: for
//! correctness, not for timings.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    build, prerequisites, setup,
    ui::{self, Colour},
};

mod cpio;
mod kernel;

pub use kernel::SERIES;

/// A boot takes 3 to 10 s and the verifier 10 to 25 times as long as on the machine itself.
const TIMEOUT: Duration = Duration::from_secs(300);
const INIT: &str = include_str!("vm/init.sh");
/// Lines of the console shown when the machine dies.
const TAIL: usize = 40;

/// Boots the kernel of a series and loads every program in it. One more try when the emulator loses the
/// machine before it reports.
pub fn verify(series: &str) -> Result<()> {
    setup::ensure(setup::Scope::Ci)?;
    let agent = build::dist().join("weir-agent");
    if !agent.exists() {
        build::build()?;
    }
    let kernel = kernel::fetch(series, &cache()?)?;
    let initramfs = cache()?.join(format!("initramfs-{}", std::process::id()));
    fs::write(&initramfs, contents(&agent)?)
        .with_context(|| format!("write {}", initramfs.display()))?;
    let result = boot_twice(&kernel, &initramfs);
    // Nobody needs it any more; should that fail, it is a file in a cache.
    let _ = fs::remove_file(&initramfs);
    result
}

fn boot_twice(kernel: &Path, initramfs: &Path) -> Result<()> {
    let first = match boot(kernel, initramfs)? {
        Outcome::Reported(status) => return report(status),
        Outcome::Died(why) => why,
    };
    ui::line(Colour::Yellow, "retry", &first);
    match boot(kernel, initramfs)? {
        Outcome::Reported(status) => report(status),
        Outcome::Died(second) => bail!("the virtual machine died twice: {first}; {second}"),
    }
}

fn report(status: i32) -> Result<()> {
    ensure!(
        status == 0,
        "`weir-agent verify` ended with {status} in the virtual machine"
    );
    ui::line(Colour::Green, "loaded", "every program");
    Ok(())
}

fn cache() -> Result<PathBuf> {
    let home = env::var_os("HOME").context("HOME is not set")?;
    let root = env::var_os("XDG_CACHE_HOME")
        .map_or_else(|| Path::new(&home).join(".cache"), PathBuf::from);
    let directory = root.join("weir-vm");
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    Ok(directory)
}

/// The root file system of the machine.
fn contents(agent: &Path) -> Result<Vec<u8>> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
    let mut archive = cpio::Archive::default();
    for directory in ["bin", "dev", "proc", "run", "sys", "tmp"] {
        archive.directory(directory);
    }
    archive.console();
    archive.program("init", INIT.as_bytes())?;
    let busybox = prerequisites::find_program("busybox").context("busybox is gone")?;
    archive.program("bin/busybox", &read(&busybox)?)?;
    archive.program("bin/weir-agent", &read(agent)?)?;
    Ok(archive.finish())
}

enum Outcome {
    /// The exit status of what ran in the machine.
    Reported(i32),
    /// Why there is none.
    Died(String),
}

/// Kills the machine whatever happens.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn boot(kernel: &Path, initramfs: &Path) -> Result<Outcome> {
    let mut machine = Machine(qemu(kernel, initramfs).spawn().context("run QEMU")?);
    let console = machine.0.stdout.take().context("QEMU without a console")?;
    let (send, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut console = BufReader::new(console);
        let mut line = Vec::new();
        // The console may carry bytes that are no text.
        while console.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if send.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    let deadline = Instant::now() + TIMEOUT;
    let mut booting = Vec::new();
    let mut up = false;
    let mut life = ui::Life::new("booting a virtual machine");
    loop {
        if Instant::now() > deadline {
            life.end();
            return Ok(died(&format!("nothing within {TIMEOUT:?}"), &booting));
        }
        let line = match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                life.show(None);
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => {
                life.end();
                let status = machine.0.wait()?;
                return Ok(died(&format!("QEMU ended with {status}"), &booting));
            }
        };
        life.end();
        if let Some((_, kernel)) = line.split_once("VM-KERNEL ") {
            up = true;
            ui::line(Colour::Cyan, "kernel", kernel);
            life = ui::Life::new("loading the programs");
        } else if let Some(status) = line.strip_prefix("VM-STATUS ") {
            return Ok(Outcome::Reported(status.parse().context("exit status")?));
        } else if up {
            println!("          {line}");
        } else {
            booting.push(line);
        }
    }
}

fn died(why: &str, console: &[String]) -> Outcome {
    let tail = &console[console.len().saturating_sub(TAIL)..];
    for line in tail {
        println!("          {line}");
    }
    Outcome::Died(why.to_owned())
}

fn qemu(kernel: &Path, initramfs: &Path) -> Command {
    // What takes time at boot and matters to nobody here is left out.
    let parameters = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr audit=0 \
        selinux=0 apparmor=0 tsc=reliable random.trust_cpu=on cryptomgr.notests \
        rcupdate.rcu_expedited=1 lpj=4000000";
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "tcg,thread=multi", "-cpu", "max"])
        .args(["-machine", "q35,usb=off,vmport=off,smbus=off,hpet=off"])
        .args(["-m", "1024", "-smp", "2"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", parameters])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
}
