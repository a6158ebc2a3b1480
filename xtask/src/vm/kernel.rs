//! Debian's kernels, downloaded as packages and unpacked, never installed. Apt gets a state directory
//! of its own, so that neither the release of this machine nor its configuration matters.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::ui;

/// Series that can be had.
pub const SERIES: [&str; 2] = ["6.1", "6.12"];
/// The flavour for virtual machines; the package names the newest kernel of its suite.
const METAPACKAGE: &str = "linux-image-cloud-amd64";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const KERNEL: &str = "vmlinuz";

/// The image of the newest kernel of a series; downloaded once.
pub fn fetch(series: &str, cache: &Path) -> Result<PathBuf> {
    let directory = cache.join(series);
    let kernel = directory.join(KERNEL);
    if kernel.exists() {
        return Ok(kernel);
    }
    let (suite, archive) = match series {
        "6.1" => ("bookworm-security", "debian-security"),
        "6.12" => ("trixie", "debian"),
        other => bail!("no suite is known for kernel {other}"),
    };
    let apt = Apt::new(&directory, suite, archive)?;
    let mut update = apt.command("apt-get");
    ui::run_quietly(
        &format!("apt-get update ({suite})"),
        update.args(["-q", "update"]),
    )?;
    let package = apt.kernel_package()?;
    let mut download = apt.command("apt-get");
    download
        .args(["-q", "download", &package])
        .current_dir(&directory);
    ui::run_quietly(&format!("download {package}"), &mut download)?;
    let deb = find(&directory, |name| name.ends_with(".deb"))?;
    let unpacked = directory.join("unpacked");
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("-x").arg(&deb).arg(&unpacked);
    ui::run_quietly("unpack the kernel", &mut unpack)?;
    let image = find(&unpacked.join("boot"), |name| name.starts_with(KERNEL))?;
    fs::rename(&image, &kernel).with_context(|| format!("keep {}", image.display()))?;
    // Only the image is needed again.
    fs::remove_dir_all(&unpacked)?;
    fs::remove_file(&deb)?;
    Ok(kernel)
}

fn find(directory: &Path, wanted: impl Fn(&str) -> bool) -> Result<PathBuf> {
    fs::read_dir(directory)
        .with_context(|| format!("read {}", directory.display()))?
        .flatten()
        .find(|entry| entry.file_name().to_str().is_some_and(&wanted))
        .map(|entry| entry.path())
        .with_context(|| format!("nothing usable in {}", directory.display()))
}

/// Apt with a state directory and sources of its own.
struct Apt {
    directory: PathBuf,
}

impl Apt {
    fn new(directory: &Path, suite: &str, archive: &str) -> Result<Self> {
        let directory = directory.join("apt");
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part))?;
        }
        fs::write(directory.join("status"), "")?;
        let mirror = mirror()?;
        fs::write(
            directory.join("sources.list"),
            format!("deb [signed-by={KEYRING}] {mirror}/{archive} {suite} main\n"),
        )?;
        Ok(Self { directory })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (option, value) in [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::State::status", "status"),
            ("Dir::Cache", "cache"),
        ] {
            let path = self.directory.join(value);
            command
                .arg("-o")
                .arg(format!("{option}={}", path.display()));
        }
        // A directory below root's home is not apt's sandbox user's to write.
        command
            .args(["-o", "Dir::Etc::sourceparts=/dev/null"])
            .args(["-o", "APT::Sandbox::User=root"]);
        command
    }

    /// The package that the metapackage depends on.
    fn kernel_package(&self) -> Result<String> {
        let output = self
            .command("apt-cache")
            .args(["depends", METAPACKAGE])
            .output()
            .context("run apt-cache")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "apt-cache depends {METAPACKAGE}: {text}"
        );
        text.lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|package| package.starts_with("linux-image-"))
            .map(str::to_owned)
            .with_context(|| format!("{METAPACKAGE} names no kernel: {text}"))
    }
}

/// The mirror that this machine's apt is set up with; debian-security is its sibling.
fn mirror() -> Result<String> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI)"])
        .output()
        .context("run apt-get; Debian's kernels are had through it")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .find_map(|line| line.trim_end_matches('/').strip_suffix("/debian"))
        .map(str::to_owned)
        .context(
            "apt knows no Debian mirror: add one to /etc/apt/sources.list, then apt-get update",
        )
}
