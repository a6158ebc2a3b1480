//! What the text of each setting means: one function for each kind of value, with what is wrong and what to give
//! instead. Called by [`super::Values::check`]; nothing here reads a file or touches the kernel.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use ipnet::IpNet;

use super::{LogFormat, Refusal, SourceSetting, refuse};
use crate::{
    node::NodePortAddresses,
    objects::{LabelSelector, SelectorError},
};

pub(super) fn number(text: &str, min: u32, max: u32) -> Result<u32, Refusal> {
    let remedy = format!("give a whole number from {min} to {max}");
    match text.trim().replace('_', "").parse::<u64>() {
        Err(_) => refuse("not a whole number", remedy),
        Ok(value) => match u32::try_from(value) {
            Ok(value) if (min..=max).contains(&value) => Ok(value),
            _ => refuse("out of range", remedy),
        },
    }
}

pub(super) fn boolean(text: &str) -> Result<bool, Refusal> {
    match text.trim() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => refuse("neither true nor false", "give true or false"),
    }
}

pub(super) fn source(text: &str) -> Result<SourceSetting, Refusal> {
    if text == "kube" || text.starts_with("kube:") {
        return refuse(
            "the Kubernetes API server as a source is not in this version",
            "use dir:PATH, a directory of Kubernetes YAML",
        );
    }
    match text.strip_prefix("dir:") {
        Some(path) if Path::new(path).is_absolute() => {
            Ok(SourceSetting::Directory(PathBuf::from(path)))
        }
        Some(_) => refuse(
            "the directory is not an absolute path",
            "give dir: followed by a path that begins with /",
        ),
        None => refuse("not a known kind of source", "use dir:PATH"),
    }
}

pub(super) fn node_name(text: &str) -> Result<String, Refusal> {
    let ok = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    if text.is_empty() || text.len() > 253 || !text.chars().all(ok) {
        return refuse(
            "not the name of a Node",
            "give metadata.name of this node's Node object: lower-case letters, digits, - and .",
        );
    }
    Ok(text.to_owned())
}

pub(super) fn absolute_path(text: &str) -> Result<PathBuf, Refusal> {
    let path = PathBuf::from(text);
    let plain = path
        .components()
        .all(|c| !matches!(c, std::path::Component::ParentDir));
    if !path.is_absolute() || !plain || path.parent().is_none() {
        return refuse(
            "not an absolute path below /",
            "give a path that begins with / and has no ..",
        );
    }
    Ok(path)
}

pub(super) fn devices(text: &str) -> Result<Vec<String>, Refusal> {
    let mut names: Vec<String> = Vec::new();
    for name in text.split([',', ' ']).filter(|name| !name.is_empty()) {
        if name.len() > 15 || name.contains('/') || name == "." || name == ".." || name == "lo" {
            return refuse(
                format!("{name:?} cannot be the name of a device"),
                "give names as `ip link` shows them, separated by commas",
            );
        }
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// An empty text excludes nothing.
pub(super) fn label_selector(text: &str) -> Result<Option<LabelSelector>, Refusal> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    match LabelSelector::parse(text) {
        Ok(selector) => Ok(Some(selector)),
        Err(error) => refuse(error.to_string(), SelectorError::REMEDY),
    }
}

pub(super) fn cidrs(text: &str) -> Result<Vec<IpNet>, Refusal> {
    let words = text.split([',', ' ']).filter(|word| !word.is_empty());
    let mut cidrs = Vec::new();
    for word in words {
        match word.parse::<IpNet>() {
            Ok(IpNet::V6(cidr)) if cidr.addr().to_ipv4_mapped().is_some() => {
                return refuse(
                    format!("{word:?} is an IPv4 range in the form of IPv6, which no packet has"),
                    "give the range as IPv4",
                );
            }
            Ok(cidr) if cidr.trunc() == cidr => cidrs.push(cidr),
            Ok(cidr) => {
                return refuse(
                    format!("{word:?} has bits beyond its length"),
                    format!(
                        "give {}, or an address alone with its full length",
                        cidr.trunc()
                    ),
                );
            }
            Err(_) if word.parse::<IpAddr>().is_ok() => {
                return refuse(
                    format!("{word:?} has no length"),
                    format!("give {word}/{}", if word.contains(':') { 128 } else { 32 }),
                );
            }
            Err(_) => {
                return refuse(
                    format!("{word:?} is not a CIDR"),
                    "give CIDRs separated by commas: 169.254.20.10/32,fd00:53::/64",
                );
            }
        }
    }
    Ok(cidrs)
}

/// An empty text, or `off` where a variable cannot be empty, means nowhere.
pub(super) fn healthz_address(text: &str) -> Result<Option<SocketAddr>, Refusal> {
    const REMEDY: &str = "give an address and a port, as 0.0.0.0:10256 or [::1]:10256, or off";
    match text.trim() {
        "" | "off" => Ok(None),
        text => match text.parse::<SocketAddr>() {
            Ok(address) if address.port() != 0 => Ok(Some(address)),
            Ok(_) => refuse("port 0 is no port", REMEDY),
            Err(_) => refuse("not an address with a port", REMEDY),
        },
    }
}

pub(super) fn node_port_addresses(text: &str) -> Result<NodePortAddresses, Refusal> {
    if text.trim() == "primary" {
        return Ok(NodePortAddresses::Primary);
    }
    let ranges = cidrs(text).map_err(|refusal| Refusal {
        remedy: format!("{}; or primary alone", refusal.remedy),
        ..refusal
    })?;
    Ok(match ranges[..] {
        [] => NodePortAddresses::Found,
        _ => NodePortAddresses::Ranges(ranges),
    })
}

pub(super) fn mark_mask(text: &str) -> Result<u32, Refusal> {
    let remedy = "give four adjacent bits of 32, as 0x00f00000";
    let lower = text.trim().to_lowercase();
    let parsed = match lower.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(&digits.replace('_', ""), 16),
        None => lower.parse(),
    };
    match parsed {
        Err(_) => refuse("not a 32-bit mask", remedy),
        Ok(mask) if weir_common::mark::shift_of(mask).is_some() => Ok(mask),
        Ok(_) => refuse("not four adjacent bits", remedy),
    }
}

pub(super) fn log_filter(text: &str) -> Result<String, Refusal> {
    const REMEDY: &str =
        "give error, warn, info, debug or trace, or by module: info,weir_agent=debug";
    // Any word is taken for a module, and its filter says nothing of the others: they fall silent.
    let is_level = |word: &str| word.parse::<tracing::level_filters::LevelFilter>().is_ok();
    let is_module = |word: &str| word.contains(['=', ':', '[']);
    let mut words = text.split(',').map(str::trim);
    if let Some(word) = words.find(|word| !is_level(word) && !is_module(word)) {
        return refuse(format!("{word:?} is no level"), REMEDY);
    }
    match tracing_subscriber::EnvFilter::builder().parse(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => refuse(error.to_string(), REMEDY),
    }
}

pub(super) fn log_format(text: &str) -> Result<LogFormat, Refusal> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => refuse("not a known format", "give text or json"),
    }
}
