//! `weir-agent`: reads the settings, checks the machine, keeps a second agent off, and runs the
//! event loop beside the gRPC server until it is told to stop. It leaves everything in the kernel:
//! pods and connections do not notice.

use std::{
    env,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Arg, ArgMatches, Command};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::LocalSet,
};
use weir_agent::{
    agent::{
        Agent,
        cleanup::{check_directories, cleanup},
        start::{check_machine, lock},
        verify,
    },
    api, logging,
    settings::{CONFIG_FLAG, CONFIG_VARIABLE, Settings, Values, definitions},
};

/// The subcommand that loads the programs and nothing else.
const VERIFY: &str = "verify";
/// Its option.
const OUTPUT: &str = "output";

/// How long calls under way may take after the signal to stop.
const GRACE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let matches = match arguments().try_get_matches() {
        Ok(matches) => matches,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match run(&matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "weir-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Command {
    let settings = definitions::ALL.iter().map(|definition| {
        let variable = definition.environment_variable();
        let default = match definition.default {
            Some(default) => format!(" [default: {default}]"),
            None => String::new(),
        };
        Arg::new(definition.name)
            .long(definition.name)
            .value_name(definition.value_name)
            .help(format!("{}{default} [env: {variable}]", definition.help))
            .global(true)
    });
    Command::new("weir-agent")
        .version(env!("CARGO_PKG_VERSION"))
        .about("The node agent of Weir: turns Kubernetes objects into BPF maps")
        .after_help(
            "Each setting is a flag, an environment variable, or a key of the YAML file of --config: \
             a flag beats a variable, a variable the file.",
        )
        .arg(
            Arg::new(CONFIG_FLAG)
                .long(CONFIG_FLAG)
                .value_name("FILE")
                .help(format!("YAML file with settings, by their names [env: {CONFIG_VARIABLE}]"))
                .global(true),
        )
        .args(settings)
        .subcommand(
            Command::new("settings").about(
                "Shows the settings that an agent started like this would use, and where each comes \
                 from; does not ask a running one",
            ),
        )
        .subcommand(Command::new("cleanup").about(
            "Removes Weir from this node: programs on devices and on the cgroup, pins of programs and maps, routes \
             with their neighbours and rules, the devices weir-host, weir-net and weir-defrag, what was changed of \
             sysctls (NodePorts in ip_local_reserved_ports, too), and the state in the run directory. Devices \
             of pods stay; pods that still run lose their network",
        ))
        .subcommand(
            Command::new(VERIFY)
                .about(
                    "Loads every kernel program, lets go of it again, and shows what it costs the \
                     verifier; changes nothing and needs no settings",
                )
                .arg(
                    Arg::new(OUTPUT)
                        .long(OUTPUT)
                        .short('o')
                        .value_name("FORMAT")
                        .value_parser(["table", "json"])
                        .default_value("table")
                        .help("How the result is shown"),
                ),
        )
}

fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    let (command, matches) = match matches.subcommand() {
        Some((command, matches)) => (Some(command), matches),
        None => (None, matches),
    };
    if command == Some(VERIFY) {
        let format = match matches.get_one::<String>(OUTPUT).map(String::as_str) {
            Some("json") => verify::Format::Json,
            _ => verify::Format::Table,
        };
        return print(&verify::run(format)?);
    }
    let flag = |name: &str| matches.get_one::<String>(name).cloned();
    let mut values = Values::gather(flag, |name| env::var(name).ok())?;
    if command == Some("cleanup") {
        values.without_source();
    }
    let settings = values.check()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    match command {
        Some("settings") => print(&values.table(&settings)),
        Some("cleanup") => runtime.block_on(clean(&settings)),
        _ => {
            logging::initialise(&settings.log, settings.log_format)?;
            LocalSet::new().block_on(&runtime, serve(settings))
        }
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        // `weir-agent settings | head` is no error.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

async fn clean(settings: &Settings) -> anyhow::Result<()> {
    check_machine(settings)?;
    check_directories(settings).await?;
    let _lock = lock(settings)?;
    cleanup(settings, |line| {
        let _ = writeln!(io::stdout(), "{line}");
    })
    .await
}

async fn serve(settings: Settings) -> anyhow::Result<()> {
    check_machine(&settings)?;
    let _lock = lock(&settings)?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        node = settings.node_name,
        source = %settings.source,
        bpf_root = %settings.bpf_root.display(),
        "weir-agent starts"
    );
    let stop = stop_signal()?;
    let socket = settings.run_dir.join("agent.sock");
    let (mut agent, core) = Agent::start(settings).await?;
    let listener = api::bind(&socket)
        .with_context(|| format!("cannot serve on the socket {}", socket.display()))?;
    tracing::info!(socket = %socket.display(), "serving");

    let server = api::serve(listener, core, stopped(stop.clone()));
    let mut server = tokio::task::spawn_local(server);
    let outcome = agent.run(stopped(stop)).await;
    // Those who watch would stay for ever; what is under way gets a moment.
    drop(agent);
    if tokio::time::timeout(GRACE, &mut server).await.is_err() {
        server.abort();
    }
    if outcome.is_ok() {
        let _ = std::fs::remove_file(&socket);
        tracing::info!("weir-agent stops; pods and Services go on");
    }
    outcome
}

/// Turns true at SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<watch::Receiver<bool>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let (sender, receiver) = watch::channel(false);
    tokio::task::spawn_local(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let _ = sender.send(true);
        // Whoever waits for the sender to go waits for the end of the process.
        std::future::pending::<()>().await;
    });
    Ok(receiver)
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // The sender lives as long as the process.
    let _ = stop.wait_for(|stop| *stop).await;
}
