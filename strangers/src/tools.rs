//! The system's own tools: run to their end in the caller's network namespace. One that is not installed is no
//! error where something is only looked at.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Command, Stdio},
};

use crate::Owner;

/// Where tools are, beside `PATH`: services often have a short one.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not there.
    #[error("{0} is not installed")]
    Missing(String),
    /// It cannot be run.
    #[error("cannot run {tool}: {cause}")]
    Run {
        /// Its name.
        tool: String,
        /// Why.
        cause: io::Error,
    },
    /// It says no.
    #[error("`{command}` failed: {said}")]
    Failed {
        /// With its arguments.
        command: String,
        /// Its standard error.
        said: String,
    },
}

/// Whether a tool is installed.
pub fn is_installed(tool: &str) -> bool {
    path(tool).is_some()
}

fn path(tool: &str) -> Option<std::path::PathBuf> {
    let variable = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&variable).chain(FOLDERS.iter().map(Into::into));
    folders
        .map(|folder| folder.join(tool))
        .find(|path| path.is_file())
}

/// Runs a tool with `input` and gives what it prints.
pub fn run(tool: &str, arguments: &[&str], input: &str) -> Result<String, ToolError> {
    let path = path(tool).ok_or_else(|| ToolError::Missing(tool.to_owned()))?;
    let failed = |cause| ToolError::Run {
        tool: tool.to_owned(),
        cause,
    };
    let mut child = Command::new(path)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let stdin = child.stdin.take();
    let input = input.to_owned();
    let output = std::thread::scope(|scope| {
        // Apart, so that neither a long input nor a long output can stall the tool.
        scope.spawn(move || {
            // One that does not read its input says why.
            let _ = stdin.map(|mut stdin| stdin.write_all(input.as_bytes()));
        });
        child.wait_with_output()
    })
    .map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let words: Vec<&str> = std::iter::once(tool)
        .chain(arguments.iter().copied())
        .collect();
    Err(ToolError::Failed {
        command: words.join(" "),
        said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// A process of the owner in the caller's network namespace: its number.
pub fn process_of(owner: Owner) -> Option<u32> {
    let inode = |path: &Path| fs::metadata(path).ok().map(|file| file.ino());
    let own = inode(Path::new("/proc/thread-self/ns/net"))?;
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .find(|pid| {
            let folder = Path::new("/proc").join(pid.to_string());
            let name = fs::read_to_string(folder.join("comm")).unwrap_or_default();
            // One that has ended has no namespace any more.
            name.trim_end() == owner.process() && inode(&folder.join("ns/net")) == Some(own)
        })
}
