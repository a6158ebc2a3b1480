//! `runtimeConfig.portMappings` of the network configuration: what a runtime hands on of a pod's
//! `hostPort`s to a plugin with the capability `portMappings`
//! (<https://www.cni.dev/docs/conventions/>). Read for ADD only: a DEL needs none of it.

use std::net::IpAddr;

use serde_json::{Map, Value};

use crate::{
    configuration::{invalid, kind},
    error::CniError,
};

/// One port of the node that leads to the pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PortMapping {
    /// `hostPort`, not 0.
    pub host_port: u16,
    /// `containerPort`, not 0.
    pub container_port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: &'static str,
    /// `hostIP`; `None`: every address of the node.
    pub host_ip: Option<IpAddr>,
}

/// The mappings of a configuration. Those without a port of the node are left out, as the plugin
/// `portmap` of the CNI project does: a port that is only declared.
///
/// # Errors
///
/// Code 7, naming field and value.
pub fn read(configuration: &Map<String, Value>) -> Result<Vec<PortMapping>, CniError> {
    let runtime = match configuration.get("runtimeConfig") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(fields)) => fields,
        Some(other) => return Err(wrong("runtimeConfig", other, "an object")),
    };
    let mappings = match runtime.get("portMappings") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(mappings)) => mappings,
        Some(other) => return Err(wrong("runtimeConfig.portMappings", other, "an array")),
    };
    let mut read = Vec::new();
    for (index, mapping) in mappings.iter().enumerate() {
        let name = format!("runtimeConfig.portMappings[{index}]");
        let Value::Object(fields) = mapping else {
            return Err(wrong(&name, mapping, "an object"));
        };
        read.extend(one(&name, fields)?);
    }
    Ok(read)
}

fn one(name: &str, fields: &Map<String, Value>) -> Result<Option<PortMapping>, CniError> {
    let host_port = port(name, "hostPort", fields)?;
    let container_port = port(name, "containerPort", fields)?;
    let protocol = protocol(name, fields)?;
    let host_ip = host_ip(name, fields)?;
    if host_port == 0 {
        return Ok(None);
    }
    if container_port == 0 {
        return Err(invalid(format!(
            "{name}.containerPort of the network configuration is 0 or absent, and hostPort is \
             {host_port}; it is a number from 1 to 65535"
        )));
    }
    Ok(Some(PortMapping {
        host_port,
        container_port,
        protocol,
        host_ip,
    }))
}

/// 0 when absent.
fn port(name: &str, field: &str, fields: &Map<String, Value>) -> Result<u16, CniError> {
    match fields.get(field) {
        None | Some(Value::Null) => Ok(0),
        Some(value) => value
            .as_u64()
            .and_then(|number| u16::try_from(number).ok())
            .ok_or_else(|| {
                invalid(format!(
                    "{name}.{field} {value} of the network configuration is no whole number from 0 \
                     to 65535"
                ))
            }),
    }
}

/// TCP when absent, as in Kubernetes.
fn protocol(name: &str, fields: &Map<String, Value>) -> Result<&'static str, CniError> {
    let text = text(name, "protocol", fields)?;
    if text.is_empty() {
        return Ok("TCP");
    }
    ["TCP", "UDP", "SCTP"]
        .into_iter()
        .find(|known| known.eq_ignore_ascii_case(text))
        .ok_or_else(|| {
            invalid(format!(
                "{name}.protocol {text:?} of the network configuration is unknown; it is tcp, udp \
                 or sctp"
            ))
        })
}

fn host_ip(name: &str, fields: &Map<String, Value>) -> Result<Option<IpAddr>, CniError> {
    let text = text(name, "hostIP", fields)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        invalid(format!(
            "{name}.hostIP {text:?} of the network configuration is no IP address; leave it out for \
             every address of the node"
        ))
    })
}

fn text<'a>(name: &str, field: &str, fields: &'a Map<String, Value>) -> Result<&'a str, CniError> {
    match fields.get(field) {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(wrong(&format!("{name}.{field}"), other, "a string")),
    }
}

fn wrong(name: &str, value: &Value, wanted: &str) -> CniError {
    invalid(format!(
        "{name} of the network configuration is {}, not {wanted}",
        kind(value)
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read_mappings(mappings: Value) -> Result<Vec<PortMapping>, CniError> {
        let Value::Object(fields) = json!({"runtimeConfig": {"portMappings": mappings}}) else {
            unreachable!("an object was written");
        };
        read(&fields)
    }

    #[test]
    fn reads_what_containerd_sends() {
        let read = read_mappings(json!([
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
            {"hostPort": 53, "containerPort": 5353, "protocol": "UDP", "hostIP": "192.0.2.1"},
            {"hostPort": 9, "containerPort": 9, "protocol": "Sctp", "hostIP": "fd00::1", "x": []},
            {"hostPort": 65535, "containerPort": 65535},
        ]));
        let mapping = |host_port, container_port, protocol, host_ip: &str| PortMapping {
            host_port,
            container_port,
            protocol,
            host_ip: host_ip.parse().ok(),
        };
        assert_eq!(
            read.unwrap(),
            [
                mapping(8080, 80, "TCP", ""),
                mapping(53, 5353, "UDP", "192.0.2.1"),
                mapping(9, 9, "SCTP", "fd00::1"),
                mapping(65535, 65535, "TCP", ""),
            ]
        );
    }

    #[test]
    fn what_maps_nothing_is_no_error() {
        for mappings in [
            json!(null),
            json!([]),
            json!([{}]),
            json!([{"hostPort": 0, "containerPort": 80, "protocol": "tcp"}]),
            json!([{"containerPort": 80, "hostIP": null}]),
        ] {
            assert_eq!(read_mappings(mappings.clone()).unwrap(), [], "{mappings}");
        }
        for text in ["{}", r#"{"runtimeConfig":null}"#, r#"{"runtimeConfig":{}}"#] {
            assert_eq!(read(&serde_json::from_str(text).unwrap()).unwrap(), []);
        }
    }

    #[test]
    fn names_field_and_value() {
        for (mappings, expected) in [
            (json!({}), "runtimeConfig.portMappings of"),
            (
                json!([1]),
                "portMappings[0] of the network configuration is a number",
            ),
            (
                json!([{}, {"hostPort": "80", "containerPort": 80}]),
                "portMappings[1].hostPort \"80\"",
            ),
            (
                json!([{"hostPort": 65536, "containerPort": 1}]),
                "hostPort 65536",
            ),
            (json!([{"hostPort": -1, "containerPort": 1}]), "hostPort -1"),
            (
                json!([{"hostPort": 1.5, "containerPort": 1}]),
                "hostPort 1.5",
            ),
            (
                json!([{"hostPort": 1}]),
                "containerPort of the network configuration is 0",
            ),
            (
                json!([{"hostPort": 1, "containerPort": 0}]),
                "hostPort is 1",
            ),
            (
                json!([{"hostPort": 1, "containerPort": 70000}]),
                "containerPort 70000",
            ),
            (
                json!([{"hostPort": 1, "containerPort": 1, "protocol": "icmp"}]),
                "protocol \"icmp\"",
            ),
            (
                json!([{"hostPort": 1, "containerPort": 1, "protocol": 6}]),
                "protocol of the network configuration is a number",
            ),
            (
                json!([{"hostPort": 1, "containerPort": 1, "hostIP": "eth0"}]),
                "hostIP \"eth0\"",
            ),
            (
                json!([{"hostPort": 1, "containerPort": 1, "hostIP": ["::"]}]),
                "hostIP of the network configuration is an array",
            ),
        ] {
            let error = read_mappings(mappings.clone()).unwrap_err();
            assert_eq!(error.code, 7, "{mappings}");
            assert!(error.message.contains(expected), "{}", error.message);
        }
        let error = read(&serde_json::from_str(r#"{"runtimeConfig":[]}"#).unwrap()).unwrap_err();
        assert!(
            error.message.contains("runtimeConfig of"),
            "{}",
            error.message
        );
    }
}
