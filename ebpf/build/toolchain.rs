//! Finds what the kernel programs are compiled with, and builds the command that compiles them.
//! It installs nothing (`cargo xtask setup` does); the agent's build script and `xtask` include
//! it as a module, so it uses the standard library only.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt, fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

/// Target of the kernel programs.
pub const TARGET: &str = "bpfel-unknown-none";
/// Cargo profile of the kernel programs.
pub const PROFILE: &str = "bpf";
/// Instruction set: v3 is known from kernel 5.12 on (atomics whose result is used).
const TARGET_CPU: &str = "v3";

/// Debian's compiler; `rustc-web` installs it under this name.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// Where `core` for the BPF target comes from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Compiler {
    /// Debian's `rustc-web` with `libstd-rust-web-dev-bpf`: `core` is there, compiled.
    Debian {
        /// The compiler.
        rustc: PathBuf,
        /// The LLVM that it was built with, for bpf-linker.
        llvm: PathBuf,
    },
    /// A nightly of rustup with `rust-src`: `core` is compiled along.
    Rustup {
        /// Its sysroot, whose `lib` holds the LLVM that bpf-linker may need.
        sysroot: PathBuf,
    },
}

/// A complete set: a compiler and the linker.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Toolchain {
    /// The compiler.
    pub compiler: Compiler,
    /// `bpf-linker`.
    pub linker: PathBuf,
}

/// What is missing.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Missing {
    /// Why neither compiler can be used, one cause for each; empty if one can.
    pub compiler: Vec<String>,
    /// `bpf-linker` is not there.
    pub linker: bool,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the eBPF toolchain is incomplete:")?;
        if !self.compiler.is_empty() {
            writeln!(
                f,
                "  no compiler has `core` for {TARGET}; either of these is needed:"
            )?;
            for cause in &self.compiler {
                writeln!(f, "    - {cause}")?;
            }
        }
        if self.linker {
            writeln!(
                f,
                "  bpf-linker is neither on PATH nor in {} (cargo install bpf-linker --version 0.10.3)",
                cargo_bin().display()
            )?;
        }
        write!(
            f,
            "`cargo xtask setup` installs what is missing; \
             WEIR_EBPF_OBJECT=FILE takes a ready object instead"
        )
    }
}

impl std::error::Error for Missing {}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.compiler {
            Compiler::Debian { rustc, .. } => write!(f, "{} (Debian)", rustc.display())?,
            Compiler::Rustup { sysroot } => write!(f, "rustup nightly ({})", sysroot.display())?,
        }
        write!(f, ", linker {}", self.linker.display())
    }
}

impl Toolchain {
    /// Looks for Debian's compiler first, as it needs no `core` compiled, then for rustup's.
    ///
    /// # Errors
    ///
    /// All that is missing, with the remedy.
    pub fn find() -> Result<Self, Missing> {
        let mut causes = Vec::new();
        let compiler = [debian, rustup]
            .into_iter()
            .find_map(|find| find().map_err(|cause| causes.push(cause)).ok());
        match (compiler, find_linker()) {
            (Some(compiler), Some(linker)) => Ok(Self { compiler, linker }),
            (compiler, linker) => Err(Missing {
                compiler: if compiler.is_some() {
                    Vec::new()
                } else {
                    causes
                },
                linker: linker.is_none(),
            }),
        }
    }

    /// A cargo command for the kernel programs: `verb` is `build` or `clippy`. The environment is
    /// a short list of what a build may depend on, so that wrappers, flags and toolchain choices
    /// of an outer cargo do not leak in. The caller adds the package and runs it.
    ///
    /// # Errors
    ///
    /// `target_dir` cannot be written.
    pub fn cargo(&self, verb: &str, workspace: &Path, target_dir: &Path) -> io::Result<Command> {
        let mut command = match &self.compiler {
            Compiler::Debian { rustc, llvm } => {
                // In a build script `CARGO` is the cargo that runs it.
                let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
                let mut command = Command::new(cargo);
                command.env_clear();
                command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
                command.env("LD_LIBRARY_PATH", folder_of_llvm(llvm, target_dir)?);
                command
            }
            Compiler::Rustup { sysroot } => {
                let mut command = Command::new("rustup");
                command.env_clear();
                command.env("LD_LIBRARY_PATH", sysroot.join("lib"));
                command.args(["run", "nightly", "cargo"]);
                command
            }
        };
        command.envs(env::vars_os().filter(|(name, _)| is_kept(name)));
        command.current_dir(workspace).arg(verb);
        if matches!(self.compiler, Compiler::Rustup { .. }) {
            command.args(["-Z", "build-std=core"]);
        }
        command
            .args(["--target", TARGET, "--profile", PROFILE])
            .arg("--target-dir")
            .arg(target_dir)
            .env("CARGO_ENCODED_RUSTFLAGS", self.rust_flags());
        Ok(command)
    }

    fn rust_flags(&self) -> OsString {
        let mut linker = OsString::from("-Clinker=");
        linker.push(&self.linker);
        let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_else(|_| env::consts::ARCH.into());
        [
            linker,
            "-Clink-arg=--btf".into(),
            // The linker tells LLVM to copy in order, and LLVM then turns every memset and memmove of more than a
            // word into a call that goes byte by byte.
            "-Clink-arg=--disable-expand-memcpy-in-order".into(),
            format!("-Ctarget-cpu={TARGET_CPU}").into(),
            // Layout of the registers of traced functions; aya-ebpf asks for it.
            format!("--cfg=bpf_target_arch=\"{arch}\"").into(),
        ]
        .join(OsStr::new("\x1f"))
    }
}

/// The path of a binary that [`Toolchain::cargo`] has built.
pub fn artifact(target_dir: &Path, name: &str) -> PathBuf {
    target_dir.join(TARGET).join(PROFILE).join(name)
}

/// Variables that a build may see: where tools and caches are, how to reach the registry, and
/// the job server.
fn is_kept(name: &OsStr) -> bool {
    const KEPT: [&str; 15] = [
        "PATH",
        "HOME",
        "USER",
        "TMPDIR",
        "LANG",
        "TERM",
        "CARGO_HOME",
        "RUSTUP_HOME",
        "MAKEFLAGS",
        "CARGO_MAKEFLAGS",
        "CARGO_BUILD_JOBS",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "CARGO_TERM_COLOR",
        "CARGO_NET_OFFLINE",
    ];
    const KEPT_PREFIXES: [&str; 3] = ["CARGO_HTTP_", "CARGO_REGISTRIES_", "CARGO_SOURCE_"];
    let Some(name) = name.to_str() else {
        return false;
    };
    KEPT.contains(&name)
        || KEPT_PREFIXES.iter().any(|p| name.starts_with(p))
        || name.to_ascii_lowercase().ends_with("_proxy")
}

fn debian() -> Result<Compiler, String> {
    let rustc = PathBuf::from(DEBIAN_RUSTC);
    let sysroot = ask(Command::new(&rustc), &["--print", "sysroot"]).ok_or_else(|| {
        format!("Debian: {DEBIAN_RUSTC} is missing (packages rustc-web, libstd-rust-web-dev-bpf)")
    })?;
    let lib = Path::new(sysroot.trim())
        .join("lib/rustlib")
        .join(TARGET)
        .join("lib");
    let has_core = fs::read_dir(&lib).is_ok_and(|entries| {
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libcore-") && name.ends_with(".rlib")
        })
    });
    if !has_core {
        return Err(format!(
            "Debian: {DEBIAN_RUSTC} has no libcore in {} (package libstd-rust-web-dev-bpf)",
            lib.display()
        ));
    }
    let llvm = debian_llvm(&rustc)?;
    Ok(Compiler::Debian { rustc, llvm })
}

/// The library of the LLVM version that the compiler names, as Debian installs it.
fn debian_llvm(rustc: &Path) -> Result<PathBuf, String> {
    let version = ask(Command::new(rustc), &["-vV"]).unwrap_or_default();
    let version = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))
        .ok_or_else(|| format!("Debian: {DEBIAN_RUSTC} -vV names no LLVM version"))?;
    let major_minor: Vec<&str> = version.trim().split('.').take(2).collect();
    let name = format!("libLLVM.so.{}", major_minor.join("."));
    fs::read_dir("/usr/lib")
        .into_iter()
        .flatten()
        .flatten()
        .map(|folder| folder.path().join(&name))
        .find(|library| library.is_file())
        .ok_or_else(|| {
            format!(
                "Debian: {name} is in no folder of /usr/lib (package libllvm{})",
                major_minor[0]
            )
        })
}

/// A folder with nothing but this LLVM: bpf-linker takes the first of any version that it finds
/// in `LD_LIBRARY_PATH`.
fn folder_of_llvm(llvm: &Path, target_dir: &Path) -> io::Result<PathBuf> {
    let folder = target_dir.join("llvm");
    fs::create_dir_all(&folder)?;
    let link = folder.join(llvm.file_name().unwrap_or_default());
    if fs::read_link(&link).ok().as_deref() != Some(llvm) {
        for entry in fs::read_dir(&folder)? {
            fs::remove_file(entry?.path())?;
        }
        symlink(llvm, &link)?;
    }
    Ok(folder)
}

fn rustup() -> Result<Compiler, String> {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "rustc"]);
    let sysroot = ask(command, &["--print", "sysroot"]).ok_or(
        "rustup: there is no nightly (rustup toolchain install nightly --component rust-src)",
    )?;
    let sysroot = PathBuf::from(sysroot.trim());
    let source = sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml");
    if source.is_file() {
        Ok(Compiler::Rustup { sysroot })
    } else {
        Err(format!(
            "rustup: the nightly has no rust-src, {} is missing \
             (rustup component add rust-src --toolchain nightly)",
            source.display()
        ))
    }
}

/// What a compiler answers, without the environment of an outer cargo.
fn ask(mut rustc: Command, question: &[&str]) -> Option<String> {
    let output = rustc
        .env_clear()
        .envs(env::vars_os().filter(|(name, _)| is_kept(name)))
        .args(question)
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then_some(text)
}

fn find_linker() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain([cargo_bin()])
        .map(|folder| folder.join("bpf-linker"))
        .find(|file| file.is_file())
}

fn cargo_bin() -> PathBuf {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .unwrap_or_else(|| PathBuf::from("/root/.cargo"))
        .join("bin")
}
