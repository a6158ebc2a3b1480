//! Versions of the CNI specification and what differs between them.

use serde_json::json;

/// A supported version of the specification.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Version {
    /// 0.3.1.
    V0_3_1,
    /// 0.4.0.
    V0_4_0,
    /// 1.0.0.
    V1_0_0,
    /// 1.1.0.
    V1_1_0,
}

impl Version {
    /// All, oldest first.
    pub const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    /// The newest: spoken when the caller did not say which it speaks.
    pub const NEWEST: Self = Self::V1_1_0;

    /// As the specification writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// From the specification's way of writing it.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.as_str() == text)
    }

    /// Supported versions, for people.
    pub fn list() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }
}

/// Answer to VERSION. `asked`: the `cniVersion` of the caller.
pub fn answer(asked: Option<&str>) -> String {
    json!({
        "cniVersion": asked.unwrap_or(Version::NEWEST.as_str()),
        "supportedVersions": Version::ALL.map(Version::as_str),
    })
    .to_string()
}
