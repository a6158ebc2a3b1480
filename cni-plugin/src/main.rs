//! The CNI plugin: a container runtime calls it for each pod (ADD) and again when the pod is gone
//! (DEL). It asks the agent for names and addresses, makes the veth pair, and tells the agent; it
//! keeps nothing. Standard output carries the result or the error as JSON, nothing else.

mod agent;
mod attach;
mod configuration;
mod environment;
mod error;
mod log;
mod netlink;
mod netns;
mod output;
mod port_mappings;
mod version;
mod wiring;

use std::{
    io::{Read as _, Write as _},
    process::ExitCode,
    time::Instant,
};

use self::{
    configuration::Configuration,
    environment::{Command, Environment},
    error::CniError,
    version::Version,
};

const USAGE: &str = "weir-cni is a CNI plugin: container runtimes call it with CNI_* variables and a network\n\
    configuration on standard input (https://www.cni.dev/docs/spec/).\n\
    \n\
    Options:\n  --version  print the version\n  --help     print this\n";

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("--version" | "-V") => {
            return print(&format!(
                "weir-cni {} (CNI {})\n",
                env!("CARGO_PKG_VERSION"),
                Version::list()
            ));
        }
        Some("--help" | "-h") => return print(USAGE),
        _ => {}
    }
    let mut input = String::new();
    match run(&mut input) {
        Ok(output) => print(&output),
        Err(error) => {
            eprintln!("weir-cni: {error}");
            let version = Configuration::peek_version(&input)
                .filter(|version| Version::parse(version).is_some());
            let version = version.as_deref().unwrap_or(Version::NEWEST.as_str());
            print(&error.to_json(version));
            ExitCode::FAILURE
        }
    }
}

/// Does what the environment says. Reads standard input into `input`.
fn run(input: &mut String) -> Result<String, CniError> {
    let variable = |name: &str| std::env::var(name).ok();
    // Without a command it is a person who calls, and standard input a terminal.
    if variable("CNI_COMMAND").is_some() {
        std::io::stdin()
            .read_to_string(input)
            .map_err(|cause| CniError::io("cannot read the network configuration", cause))?;
    }
    let command = environment::command(variable)?;
    if command == Command::Version {
        return Ok(version::answer(
            Configuration::peek_version(input).as_deref(),
        ));
    }
    let configuration = Configuration::read(input, command)?;
    let start = Instant::now();
    let result = Environment::read(command, variable)
        .and_then(|environment| execute(command, &configuration, &environment));
    if let Some(path) = &configuration.log_file {
        let outcome = match &result {
            Ok(output) if output.is_empty() => "ok".to_owned(),
            Ok(output) => output.clone(),
            Err(error) => format!("error {}: {error}", error.code),
        };
        let word = |name| variable(name).unwrap_or_default();
        let line = format!(
            "{} {} {} netns={} args={:?} {} ms: {outcome}",
            word("CNI_COMMAND"),
            word("CNI_CONTAINERID"),
            word("CNI_IFNAME"),
            word("CNI_NETNS"),
            word("CNI_ARGS"),
            start.elapsed().as_millis(),
        );
        log::append(path, &line);
    }
    result
}

fn execute(
    command: Command,
    configuration: &Configuration,
    environment: &Environment,
) -> Result<String, CniError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|cause| CniError::io("cannot start the runtime", cause))?;
    runtime.block_on(async {
        if command == Command::Add {
            return attach::add(configuration, environment).await;
        }
        for note in attach::del(configuration, environment).await? {
            eprintln!("weir-cni: {note}; the interface is gone, the agent finds that by itself");
            if let Some(path) = &configuration.log_file {
                log::append(path, &format!("DEL {}: {note}", environment.container_id));
            }
        }
        Ok(String::new())
    })
}

/// To standard output; a closed one is an error like any other.
fn print(text: &str) -> ExitCode {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("weir-cni: cannot write to standard output: {cause}");
            ExitCode::FAILURE
        }
    }
}
