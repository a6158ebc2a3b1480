//! `weir status`: the agent's own account of itself.

use std::path::Path;

use weir_api::v1::{NatPorts, StatusRequest, StatusResponse};

use crate::{
    Format, agent, output,
    table::{Cell, Colour, Table},
};

/// Fill of a map, in percent, from which on it is worth a look.
const NEARLY_FULL: u64 = 80;

/// Asks and shows. Fails only if the agent does not answer.
pub async fn status(socket: &Path, format: Format) -> anyhow::Result<()> {
    let answer = agent::connect(socket, Some(std::time::Duration::from_secs(10)))
        .await?
        .status(StatusRequest {})
        .await
        .map_err(|status| agent::explain(&status, socket))?
        .into_inner();
    match format {
        Format::Json => output::json(&answer),
        Format::Yaml => output::yaml(&answer),
        Format::Table => output::text(&text(&answer, output::colours())),
    }
}

fn text(status: &StatusResponse, colours: bool) -> String {
    let mut text = overview(status, colours);
    let mut attached = Table::new(["PROGRAM", "DEVICE", "IFINDEX", "HOOK", "PROGRAM-ID"]);
    for attachment in &status.attachments {
        attached.row([
            attachment.program.as_str().into(),
            attachment.device.as_str().into(),
            Cell::number(attachment.ifindex),
            attachment.hook.as_str().into(),
            Cell::number(attachment.program_id),
        ]);
    }
    section(&mut text, "Attached", &attached, colours);

    let mut maps = Table::new(["MAP", "ENTRIES", "MAXIMUM", "FILL"]);
    for map in &status.maps {
        let percent = map.entries.saturating_mul(100) / map.max_entries.max(1);
        let colour = if percent >= NEARLY_FULL {
            Colour::Yellow
        } else {
            Colour::Plain
        };
        maps.row([
            map.name.as_str().into(),
            Cell::number(map.entries),
            Cell::number(map.max_entries),
            Cell::coloured(format!("{percent}%"), colour),
        ]);
    }
    section(&mut text, "Maps", &maps, colours);

    let mut forwarded = Table::new(["HOOK", "OUTCOME", "COUNT", "BYTES"]);
    let mut drops = Table::new(["HOOK", "REASON", "PACKETS", "BYTES", "MEANING"]);
    for counter in status.counters.iter().filter(|c| c.packets > 0) {
        let hook = counter.hook.as_str();
        let (packets, bytes) = (Cell::number(counter.packets), Cell::number(counter.bytes));
        if counter.drop {
            let reason = Cell::coloured(counter.name.as_str(), Colour::Red);
            let meaning = counter.description.as_str().into();
            drops.row([hook.into(), reason, packets, bytes, meaning]);
        } else {
            forwarded.row([hook.into(), counter.name.as_str().into(), packets, bytes]);
        }
    }
    section(&mut text, "Packets", &forwarded, colours);
    section(&mut text, "Drops", &drops, colours);
    text.push_str(&strangers(status));
    text
}

fn overview(status: &StatusResponse, colours: bool) -> String {
    let mut lines: Vec<(&str, String)> = vec![
        (
            "Node",
            format!("{}, kernel {}", status.node_name, status.kernel_version),
        ),
        (
            "Agent",
            format!(
                "{} (ABI {}), pid {}, up {}, {} resident",
                status.agent_version,
                status.abi_version,
                status.pid,
                output::duration(status.uptime_seconds),
                output::bytes(status.resident_bytes)
            ),
        ),
    ];
    if let Some(source) = &status.source {
        let state = if source.synced {
            Colour::Green.paint("synced", colours)
        } else {
            Colour::Yellow.paint("not synced", colours)
        };
        lines.push((
            "Source",
            format!(
                "{}, {state}, revision {}, applied {}",
                source.name, source.revision, source.applied_revision
            ),
        ));
        let objects: Vec<_> = source
            .objects
            .iter()
            .map(|(k, n)| format!("{n} {k}"))
            .collect();
        lines.push(("Objects", or_none(objects)));
    }
    lines.push(("Pod ranges", or_none(status.pod_cidrs.clone())));
    lines.push((
        "Addresses",
        format!(
            "{} in use, {} resting after their release",
            status.addresses_used, status.addresses_resting
        ),
    ));
    if let Some(ports) = &status.nat_ports {
        lines.push(("NAT ports", nat_ports(ports)));
    }
    lines.push(("MTU", status.mtu.to_string()));
    lines.push((
        "Programs",
        format!(
            "{} attached by {}, pinned in {}",
            status.attachments.len(),
            status.attach_mode,
            status.bpf_root
        ),
    ));
    if let Some(sockets) = &status.ended_sockets {
        let text = format!(
            "{} ended whose endpoint was gone, {} failed",
            sockets.ended, sockets.failed
        );
        lines.push(("Sockets", text));
    }
    let errors = status.source.iter().flat_map(|source| &source.errors);
    let mut problems: Vec<&str> = status.problems.iter().map(String::as_str).collect();
    for error in errors {
        if !problems.iter().any(|known| known.contains(error.as_str())) {
            problems.push(error);
        }
    }
    if problems.is_empty() {
        lines.push(("Problems", Colour::Green.paint("none", colours)));
    }
    let mut text = String::new();
    for (name, value) in lines {
        text.push_str(&format!("{name:<11} {value}\n"));
    }
    for (index, problem) in problems.into_iter().enumerate() {
        let name = if index == 0 { "Problems" } else { "" };
        text.push_str(&format!(
            "{name:<11} {}\n",
            Colour::Red.paint(problem, colours)
        ));
    }
    text
}

/// Who has ports of the range: each destination can use each of them, so there may be more users than ports.
fn nat_ports(ports: &NatPorts) -> String {
    let NatPorts {
        first,
        last,
        in_use_ipv4,
        in_use_ipv6,
        ..
    } = ports;
    format!(
        "{in_use_ipv4} in use by IPv4, {in_use_ipv6} by IPv6; {} ports for each destination ({first}-{last})",
        (last + 1).saturating_sub(*first)
    )
}

/// What others have on the node; nothing while it is not known, or there is nothing.
fn strangers(status: &StatusResponse) -> String {
    let Some(strangers) = &status.strangers else {
        return String::new();
    };
    let mut text = String::new();
    for stranger in &strangers.found {
        let (what, why, remedy) = (&stranger.what, &stranger.why, &stranger.remedy);
        text.push_str(&format!(
            "  {what}\n    {why}\n    to remove it: {remedy}\n"
        ));
    }
    for error in &strangers.errors {
        text.push_str(&format!("  {error}\n"));
    }
    if !text.is_empty() {
        text.insert_str(0, "\nStrangers on this node:\n");
    }
    text
}

fn or_none(items: Vec<String>) -> String {
    if items.is_empty() {
        "none".to_owned()
    } else {
        items.join(", ")
    }
}

fn section(text: &mut String, title: &str, table: &Table, colours: bool) {
    text.push('\n');
    if table.is_empty() {
        text.push_str(&format!("{title}: none\n"));
    } else {
        text.push_str(&table.render(colours));
    }
}

#[cfg(test)]
mod tests {
    use weir_api::v1::{
        Attachment, EndedSockets, MapFill, PacketCounter, Source, Stranger, Strangers,
    };

    use super::*;

    fn answer() -> StatusResponse {
        StatusResponse {
            agent_version: "0.1.0".into(),
            node_name: "a".into(),
            kernel_version: "6.18".into(),
            uptime_seconds: 62,
            source: Some(Source {
                name: "dir:/objects".into(),
                synced: true,
                revision: 5,
                applied_revision: 5,
                objects: [("Service".to_owned(), 2)].into(),
                ..Source::default()
            }),
            attachments: vec![Attachment {
                program: "from_netdev".into(),
                device: "eth0".into(),
                ifindex: 2,
                hook: "tcx ingress".into(),
                program_id: 77,
            }],
            maps: vec![MapFill {
                name: "FLOWS_V4".into(),
                entries: 900,
                max_entries: 1000,
            }],
            counters: vec![
                PacketCounter {
                    hook: "from_pod".into(),
                    name: "NO_BACKEND".into(),
                    drop: true,
                    packets: 3,
                    bytes: 180,
                    description: "the Service has no endpoint".into(),
                },
                PacketCounter {
                    hook: "from_pod".into(),
                    name: "LOCAL".into(),
                    packets: 0,
                    ..PacketCounter::default()
                },
            ],
            ..StatusResponse::default()
        }
    }

    #[test]
    fn all_that_is_asked_for_is_shown() {
        let text = text(&answer(), false);
        for part in [
            "dir:/objects, synced, revision 5, applied 5",
            "up 1m2s",
            "2 Service",
            "from_netdev  eth0          2  tcx ingress          77",
            "FLOWS_V4      900     1000  90%",
            "from_pod  NO_BACKEND        3    180  the Service has no endpoint",
            "Packets: none",
            "Problems    none",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }

    #[test]
    fn ended_sockets_are_counted_where_they_are_ended() {
        let mut status = answer();
        assert!(!text(&status, false).contains("Sockets"));
        status.ended_sockets = Some(EndedSockets {
            ended: 3,
            failed: 1,
            looking: false,
        });
        let text = text(&status, false);
        let line = "Sockets     3 ended whose endpoint was gone, 1 failed";
        assert!(text.contains(line), "{text}");
    }

    #[test]
    fn nat_ports_in_use_stand_beside_their_range() {
        let mut status = answer();
        assert!(!text(&status, false).contains("NAT ports"));
        status.nat_ports = Some(NatPorts {
            first: 61_000,
            last: 61_063,
            in_use_ipv4: 70,
            in_use_ipv6: 3,
            exhausted_in_last_minute: 0,
        });
        let text = text(&status, false);
        let line =
            "NAT ports   70 in use by IPv4, 3 by IPv6; 64 ports for each destination (61000-61063)";
        assert!(text.contains(line), "{text}");
    }

    #[test]
    fn strangers_are_named_with_their_remedy() {
        let mut status = answer();
        status.strangers = Some(Strangers::default());
        assert!(!text(&status, false).contains("Strangers"));
        status.strangers = Some(Strangers {
            found: vec![Stranger {
                what: "a device".into(),
                why: "it matters".into(),
                remedy: "weir cleanup --cilium".into(),
            }],
            errors: vec!["cannot look at x".into()],
        });
        let text = text(&status, false);
        let wanted = "\nStrangers on this node:\n  a device\n    it matters\n    to remove it: weir \
                      cleanup --cilium\n  cannot look at x\n";
        assert!(text.ends_with(wanted), "{text}");
    }

    #[test]
    fn problems_and_errors_of_the_source_are_shown_once() {
        let mut status = answer();
        status.problems = vec!["cannot read web.yaml:3: x".into(), "no device".into()];
        if let Some(source) = &mut status.source {
            source.errors = vec!["web.yaml:3: x".into(), "db.yaml:1: y".into()];
            source.synced = false;
        }
        let text = text(&status, false);
        assert_eq!(text.matches("web.yaml:3: x").count(), 1, "{text}");
        assert!(
            text.contains("not synced") && text.contains("db.yaml:1: y"),
            "{text}"
        );
        assert!(!text.contains("Problems    none"), "{text}");
    }
}
