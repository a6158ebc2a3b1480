//! The network configuration on standard input. Keys that are not ours are accepted (a runtime
//! adds `prevResult`, `args` and what later versions bring); a key of ours with a wrong type is
//! refused by name.

use std::{path::PathBuf, time::Duration};

use serde_json::{Map, Value};

use crate::{
    environment::Command,
    error::{CniError, code},
    port_mappings::{self, PortMapping},
    version::Version,
};

/// Default for how long an answer of the agent is waited for.
const AGENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest that a DEL waits: it can do without the agent.
const AGENT_TIMEOUT_DEL: Duration = Duration::from_secs(5);

/// The configuration, checked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Configuration {
    /// `cniVersion`.
    pub version: Version,
    /// `agentSocket`.
    pub agent_socket: PathBuf,
    /// `logFile`: a line is appended for each call.
    pub log_file: Option<PathBuf>,
    /// `agentTimeoutSeconds`, 1 to 60.
    pub agent_timeout: Duration,
    /// `runtimeConfig.portMappings`; none but for ADD.
    pub port_mappings: Vec<PortMapping>,
}

impl Configuration {
    /// Reads the JSON text for a command.
    ///
    /// # Errors
    ///
    /// Code 6 if it is no JSON, 1 for another version, 7 for a wrong field, which it names.
    pub fn read(text: &str, command: Command) -> Result<Self, CniError> {
        let fields = parse(text)?;
        let version = match string(&fields, "cniVersion")? {
            Some(text) => Version::parse(text).ok_or_else(|| {
                CniError::new(
                    code::INCOMPATIBLE_VERSION,
                    format!(
                        "cniVersion {text:?} of the network configuration is not supported; \
                         supported are {}",
                        Version::list()
                    ),
                )
            })?,
            None => {
                return Err(invalid(format!(
                    "cniVersion is missing in the network configuration; supported are {}",
                    Version::list()
                )));
            }
        };
        let Some(name) = string(&fields, "name")? else {
            return Err(invalid("name is missing in the network configuration"));
        };
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !name.chars().all(allowed) {
            return Err(invalid(format!(
                "name {name:?} of the network configuration is not a letter or digit followed by \
                 letters, digits, _ . or -"
            )));
        }
        string(&fields, "type")?;
        let agent_socket = string(&fields, "agentSocket")?.unwrap_or(weir_api::DEFAULT_SOCKET);
        if !agent_socket.starts_with('/') {
            return Err(invalid(format!(
                "agentSocket {agent_socket:?} is no absolute path; the default is {}",
                weir_api::DEFAULT_SOCKET
            )));
        }
        Ok(Self {
            version,
            agent_socket: agent_socket.into(),
            log_file: string(&fields, "logFile")?.map(PathBuf::from),
            agent_timeout: timeout(&fields)?,
            port_mappings: match command {
                Command::Add => port_mappings::read(&fields)?,
                Command::Del | Command::Version => Vec::new(),
            },
        })
    }

    /// The `cniVersion` of a text that may be wrong otherwise, for errors and VERSION.
    pub fn peek_version(text: &str) -> Option<String> {
        let fields = parse(text).ok()?;
        fields.get("cniVersion")?.as_str().map(str::to_owned)
    }

    /// How long a DEL waits for the agent.
    pub fn agent_timeout_del(&self) -> Duration {
        self.agent_timeout.min(AGENT_TIMEOUT_DEL)
    }
}

fn parse(text: &str) -> Result<Map<String, Value>, CniError> {
    let value: Value = serde_json::from_str(text).map_err(|cause| {
        CniError::with_details(
            code::DECODE_FAILURE,
            "the network configuration on standard input is no JSON",
            cause,
        )
    })?;
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(CniError::new(
            code::DECODE_FAILURE,
            format!(
                "the network configuration on standard input is {}, not an object",
                kind(&other)
            ),
        )),
    }
}

fn string<'a>(fields: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, CniError> {
    match fields.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(invalid(format!(
            "{name} of the network configuration is {}, not a string",
            kind(other)
        ))),
    }
}

fn timeout(fields: &Map<String, Value>) -> Result<Duration, CniError> {
    match fields.get("agentTimeoutSeconds") {
        None => Ok(AGENT_TIMEOUT),
        Some(value) => value
            .as_u64()
            .filter(|seconds| (1..=60).contains(seconds))
            .map(Duration::from_secs)
            .ok_or_else(|| {
                invalid(format!(
                    "agentTimeoutSeconds {value} of the network configuration is no whole number \
                     from 1 to 60"
                ))
            }),
    }
}

/// What kind of value it is, for errors.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// An error of code 7.
pub fn invalid(message: impl Into<String>) -> CniError {
    CniError::new(code::INVALID_CONFIG, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_unknown_keys() {
        let read = Configuration::read(
            r#"{"cniVersion":"1.0.0","name":"weir","type":"weir-cni","runtimeConfig":{"x":1},
                "prevResult":{},"args":[],"capabilities":{"portMappings":true}}"#,
            Command::Add,
        )
        .unwrap();
        assert_eq!(
            read,
            Configuration {
                version: Version::V1_0_0,
                agent_socket: "/run/weir/agent.sock".into(),
                log_file: None,
                agent_timeout: Duration::from_secs(10),
                port_mappings: Vec::new(),
            }
        );
    }

    #[test]
    fn own_values() {
        let read = Configuration::read(
            r#"{"cniVersion":"0.3.1","name":"a","type":"weir-cni","agentSocket":"/x/y",
                "logFile":"/var/log/weir-cni.log","agentTimeoutSeconds":2,
                "runtimeConfig":{"portMappings":[{"hostPort":8080,"containerPort":80}]}}"#,
            Command::Add,
        )
        .unwrap();
        assert_eq!(read.agent_socket, PathBuf::from("/x/y"));
        assert_eq!(read.log_file, Some("/var/log/weir-cni.log".into()));
        assert_eq!(read.agent_timeout_del(), Duration::from_secs(2));
        assert_eq!(read.port_mappings[0].host_port, 8080);
    }

    /// A DEL must not fail on what it does not need.
    #[test]
    fn port_mappings_are_of_no_concern_to_del() {
        let text = r#"{"cniVersion":"1.1.0","name":"a","runtimeConfig":{"portMappings":7}}"#;
        assert_eq!(
            Configuration::read(text, Command::Del)
                .unwrap()
                .port_mappings,
            []
        );
        let error = Configuration::read(text, Command::Add).unwrap_err();
        assert_eq!(error.code, 7);
    }

    #[test]
    fn names_what_is_wrong() {
        for (text, code, expected) in [
            ("", 6, "is no JSON"),
            ("{", 6, "is no JSON"),
            ("[]", 6, "is an array, not an object"),
            (r#"{"name":"a"}"#, 7, "cniVersion is missing"),
            (
                r#"{"cniVersion":1,"name":"a"}"#,
                7,
                "cniVersion of the network configuration is a number",
            ),
            (
                r#"{"cniVersion":"0.2.0","name":"a"}"#,
                1,
                "cniVersion \"0.2.0\"",
            ),
            (
                r#"{"cniVersion":"2.0.0","name":"a"}"#,
                1,
                "supported are 0.3.1, 0.4.0, 1.0.0, 1.1.0",
            ),
            (r#"{"cniVersion":"1.1.0"}"#, 7, "name is missing in"),
            (r#"{"cniVersion":"1.1.0","name":""}"#, 7, "name \"\""),
            (r#"{"cniVersion":"1.1.0","name":"a/b"}"#, 7, "name \"a/b\""),
            (
                r#"{"cniVersion":"1.1.0","name":"a","type":[]}"#,
                7,
                "type of",
            ),
            (
                r#"{"cniVersion":"1.1.0","name":"a","agentSocket":true}"#,
                7,
                "agentSocket of the network configuration is a boolean",
            ),
            (
                r#"{"cniVersion":"1.1.0","name":"a","agentSocket":"run"}"#,
                7,
                "agentSocket \"run\" is no absolute path",
            ),
            (
                r#"{"cniVersion":"1.1.0","name":"a","logFile":{}}"#,
                7,
                "logFile",
            ),
            (
                r#"{"cniVersion":"1.1.0","name":"a","agentTimeoutSeconds":0}"#,
                7,
                "agentTimeoutSeconds 0",
            ),
            (
                r#"{"cniVersion":"1.1.0","name":"a","agentTimeoutSeconds":"1"}"#,
                7,
                "agentTimeoutSeconds",
            ),
        ] {
            let error = Configuration::read(text, Command::Add).unwrap_err();
            assert_eq!(error.code, code, "{text}");
            assert!(
                error.message.contains(expected),
                "{text}: {}",
                error.message
            );
        }
    }
}
