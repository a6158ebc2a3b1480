//! Errors as the CNI specification wants them: a code, a message, details; JSON on standard output.

use serde_json::json;

/// Codes of the CNI specification 1.1.0, section "Error"; from 100 on our own.
pub mod code {
    /// The configuration's `cniVersion` is not supported.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// The container does not exist: there is nothing to clean up.
    pub const CONTAINER_UNKNOWN: u32 = 3;
    /// A necessary environment variable is missing or wrong; the message names it. Also a command
    /// that is not supported.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// Input or output failed: standard input, netlink, `/proc/sys`.
    pub const IO_FAILURE: u32 = 5;
    /// The configuration is no JSON.
    pub const DECODE_FAILURE: u32 = 6;
    /// A field of the configuration is missing or wrong; the message names it.
    pub const INVALID_CONFIG: u32 = 7;
    /// The agent is not there or not ready yet.
    pub const TRY_AGAIN: u32 = 11;
    /// The agent refuses: out of addresses, a failure of its own.
    pub const AGENT_REFUSED: u32 = 100;
    /// An interface of that name exists and is not ours.
    pub const INTERFACE_EXISTS: u32 = 101;
    /// The agent's answer cannot be used: another version?
    pub const AGENT_ANSWER: u32 = 102;
}

/// An error on its way to the runtime.
#[derive(Debug, thiserror::Error)]
#[error("{message}{}{details}", if .details.is_empty() { "" } else { ": " })]
pub struct CniError {
    /// See [`code`].
    pub code: u32,
    /// One line: object, value, remedy.
    pub message: String,
    /// More, or empty.
    pub details: String,
}

impl CniError {
    /// With a message only.
    pub fn new(code: u32, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: String::new(),
        }
    }

    /// With the cause as details.
    pub fn with_details(
        code: u32,
        message: impl Into<String>,
        details: impl std::fmt::Display,
    ) -> Self {
        Self {
            code,
            message: message.into(),
            details: details.to_string(),
        }
    }

    /// The kernel or the file system refused.
    pub fn io(message: impl Into<String>, cause: impl std::fmt::Display) -> Self {
        Self::with_details(code::IO_FAILURE, message, cause)
    }

    /// Adds what went wrong while cleaning up after this error.
    #[must_use]
    pub fn and(mut self, others: &[Self]) -> Self {
        for other in others {
            if !self.details.is_empty() {
                self.details.push_str("; ");
            }
            self.details.push_str("then, while undoing: ");
            self.details.push_str(&other.to_string());
        }
        self
    }

    /// As it goes to standard output.
    pub fn to_json(&self, cni_version: &str) -> String {
        let mut error = json!({
            "cniVersion": cni_version,
            "code": self.code,
            "msg": self.message,
        });
        if !self.details.is_empty() {
            error["details"] = self.details.clone().into();
        }
        error.to_string()
    }
}
