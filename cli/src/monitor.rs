//! `weir monitor`: events as they happen, one line each.

use std::path::Path;

use anyhow::bail;
use weir_api::v1::{MonitorEvent, MonitorRequest};

use crate::{Format, agent, output, table::Colour};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Drops only, no new flows.
    #[arg(long)]
    drops_only: bool,
    /// Stop after so many events.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

/// Shows events until `--count` is reached, Ctrl-C is pressed, or the agent goes away, which is
/// an error.
pub async fn run(arguments: &Arguments, socket: &Path, format: Format) -> anyhow::Result<()> {
    let mut client = agent::connect(socket, None).await?;
    let request = MonitorRequest {
        drops_only: arguments.drops_only,
    };
    let mut stream = client
        .monitor(request)
        .await
        .map_err(|status| agent::explain(&status, socket))?
        .into_inner();
    let colours = output::colours();
    let mut left = arguments.count;
    while left != Some(0) {
        let event = tokio::select! {
            event = stream.message() => event.map_err(|status| agent::explain(&status, socket))?,
            interrupted = tokio::signal::ctrl_c() => return Ok(interrupted?),
        };
        let Some(event) = event else {
            bail!("the agent at {} has stopped", socket.display());
        };
        match format {
            Format::Json => output::text(&format!("{}\n", serde_json::to_string(&event)?))?,
            // A stream of documents.
            Format::Yaml => {
                output::text(&format!("---\n{}", serde_norway::to_string(&event)?))?;
            }
            Format::Table => output::text(&format!("{}\n", line(&event, colours)))?,
        }
        left = left.map(|left| left - 1);
    }
    Ok(())
}

fn line(event: &MonitorEvent, colours: bool) -> String {
    let time = time_of_day(event.time);
    if event.lost > 0 {
        let text = format!("{} events lost: {}", event.lost, event.description);
        return format!("{time} {}", Colour::Yellow.paint(&text, colours));
    }
    let (kind, colour) = match event.kind.as_str() {
        "drop" => ("drop", Colour::Red),
        other => (other, Colour::Green),
    };
    let kind = colour.paint(&format!("{kind:<8}"), colours);
    let mut line = format!(
        "{time} {kind} {:<11} {:<15} {:<6} {} -> {}",
        event.hook,
        event.device,
        event.protocol,
        named(&event.source, &event.source_name),
        named(&event.destination, &event.destination_name),
    );
    if !event.backend.is_empty() {
        line.push_str(&format!(
            " => {}",
            named(&event.backend, &event.backend_name)
        ));
    }
    if !event.tcp_flags.is_empty() {
        line.push_str(&format!(" [{}]", event.tcp_flags));
    }
    line.push_str(&format!(" {} bytes", event.length));
    if !event.reason.is_empty() {
        let reason = Colour::Red.paint(&event.reason, colours);
        line.push_str(&format!(" {reason}: {}", event.description));
    }
    line
}

fn named(address: &str, name: &str) -> String {
    match (address, name) {
        ("", "") => "?".to_owned(),
        (address, "") => address.to_owned(),
        (address, name) => format!("{address} ({name})"),
    }
}

/// Time of day in UTC with milliseconds: 06:43:05.123Z.
fn time_of_day(nanoseconds: i64) -> String {
    let milliseconds = nanoseconds.rem_euclid(86_400_000_000_000) / 1_000_000;
    let (seconds, rest) = (milliseconds / 1000, milliseconds % 1000);
    format!(
        "{:02}:{:02}:{:02}.{rest:03}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drop_tells_who_where_and_why() {
        let event = MonitorEvent {
            time: 1_800_000_000_123_456_789,
            kind: "drop".into(),
            reason: "SERVICE_BACKEND_NOT_FOUND".into(),
            hook: "from_pod".into(),
            device: "weir1".into(),
            protocol: "TCP".into(),
            source: "10.0.0.7:4000".into(),
            source_name: "default/a".into(),
            destination: "10.96.0.1:80".into(),
            destination_name: "default/web:http".into(),
            length: 74,
            tcp_flags: "SYN".into(),
            description: "the Service has no endpoint".into(),
            ..MonitorEvent::default()
        };
        assert_eq!(
            line(&event, false),
            "08:00:00.123Z drop     from_pod    weir1           TCP    10.0.0.7:4000 (default/a) -> \
             10.96.0.1:80 (default/web:http) [SYN] 74 bytes SERVICE_BACKEND_NOT_FOUND: the Service \
             has no endpoint"
        );
    }

    #[test]
    fn a_new_flow_shows_its_endpoint_and_lost_events_their_number() {
        let event = MonitorEvent {
            kind: "new-flow".into(),
            backend: "10.0.1.9:8080".into(),
            ..MonitorEvent::default()
        };
        let text = line(&event, false);
        assert!(
            text.contains("new-flow") && text.contains("? -> ? => 10.0.1.9:8080"),
            "{text}"
        );
        let lost = MonitorEvent {
            kind: "lost".into(),
            lost: 12,
            ..MonitorEvent::default()
        };
        assert!(line(&lost, false).contains("12 events lost"));
    }
}
