//! `weir`: shows what the agent on this node does, over its socket, and what is in the kernel,
//! from the pinned maps. It changes nothing but what `cleanup` takes away of others.

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};

mod agent;
mod bpf;
mod cleanup;
mod monitor;
mod output;
mod service;
mod status;
mod table;

/// See into Weir on this node.
#[derive(Debug, Parser)]
#[command(name = "weir", version, about, arg_required_else_help = true)]
struct Arguments {
    /// The agent's socket.
    #[arg(long, value_name = "PATH", env = "WEIR_SOCKET", global = true,
          default_value = weir_api::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// A table for people, or JSON or YAML for programs (a list is an array).
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        global = true,
        default_value = "table"
    )]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

/// How output looks.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Format {
    /// Aligned columns.
    Table,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What is attached where, how full the maps are, what is dropped and what is wrong.
    Status,
    /// Services and the endpoints that serve them.
    #[command(subcommand)]
    Service(Service),
    /// Pods attached to this node.
    #[command(subcommand)]
    Endpoint(List),
    /// Nodes and how their pods are reached.
    #[command(subcommand)]
    Node(List),
    /// What is in the kernel, read from the pinned maps; works without an agent.
    Bpf(bpf::Arguments),
    /// Shows drops and new flows as they happen, one line each, until Ctrl-C.
    Monitor(monitor::Arguments),
    /// Waits until everything that the source of objects holds now is in the kernel.
    Wait(WaitArguments),
    /// Removes what kube-proxy or Cilium have left on this node; works without an agent.
    Cleanup(cleanup::Arguments),
    /// Versions of this program and of the agent.
    Version,
    /// Prints a script that completes weir's commands and options in a shell.
    ///
    /// bash: source <(weir completion bash). zsh: a file named _weir in a folder of $fpath.
    /// fish: ~/.config/fish/completions/weir.fish.
    Completion {
        /// The shell.
        #[arg(value_name = "SHELL")]
        shell: CompletionShell,
    },
}

/// Shells that scripts are made for.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum CompletionShell {
    /// Bash 4.4 or later.
    Bash,
    /// Zsh.
    Zsh,
    /// Fish.
    Fish,
}

impl CompletionShell {
    /// The script, made from the definitions of the arguments.
    fn script(self) -> Vec<u8> {
        let shell = match self {
            Self::Bash => clap_complete::Shell::Bash,
            Self::Zsh => clap_complete::Shell::Zsh,
            Self::Fish => clap_complete::Shell::Fish,
        };
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Arguments::command(), "weir", &mut script);
        script
    }
}

#[derive(Debug, Subcommand)]
enum List {
    /// Lists them all.
    List,
}

#[derive(Debug, Subcommand)]
enum Service {
    /// Lists them all, one row for each port and family.
    List,
    /// Everything about one: frontends, endpoints and why one is not used, affinity, problems.
    Get {
        /// The Service (or the pod with host ports); without a namespace in `default`.
        #[arg(value_name = "NAMESPACE/NAME")]
        name: String,
    },
}

#[derive(Debug, clap::Args)]
struct WaitArguments {
    /// Wait for the objects of the source (the only thing to wait for in this version).
    #[arg(long, required = true)]
    applied: bool,
    /// How long: 500ms, 30s, 2m.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    timeout: Duration,
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let milliseconds = match &text[digits.len()..] {
        "ms" => 1,
        "s" | "" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(milliseconds))
        // The request carries 32 bits of milliseconds.
        .filter(|&total| milliseconds != 0 && total <= u64::from(u32::MAX))
        .map(Duration::from_millis)
        .ok_or_else(|| "give a number and a unit, at most 49 days: 500ms, 30s, 2m".to_owned())
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version go to standard output and are no error.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        // `weir … | head` is no error.
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "weir: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (socket, format) = (arguments.socket.as_path(), arguments.output);
    runtime.block_on(async {
        match &arguments.command {
            Command::Status => status::status(socket, format).await,
            Command::Service(Service::List) => service::list(socket, format).await,
            Command::Service(Service::Get { name }) => service::get(socket, name, format).await,
            Command::Endpoint(List::List) => agent::endpoints(socket, format).await,
            Command::Node(List::List) => agent::nodes(socket, format).await,
            Command::Bpf(arguments) => bpf::run(arguments, socket, format).await,
            Command::Monitor(arguments) => monitor::run(arguments, socket, format).await,
            Command::Wait(arguments) => agent::wait(socket, arguments.timeout, format).await,
            Command::Cleanup(arguments) => cleanup::run(arguments, format),
            Command::Version => agent::version(socket, format).await,
            Command::Completion { shell } => output::raw(&shell.script()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn durations_have_a_unit() {
        for (text, milliseconds) in [
            ("500ms", 500),
            ("30s", 30_000),
            ("2m", 120_000),
            ("7", 7000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(milliseconds))
            );
        }
        for bad in ["", "s", "1d", "-1s", "1.5s", "50000h"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }
}
