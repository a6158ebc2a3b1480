//! What an object says about the translation of Service addresses at the socket.

use std::collections::BTreeMap;

/// Annotation of a Pod and label of a Namespace: `disabled` leaves the Service addresses that its pods
/// connect to for the packet level, `enabled` does not. The Pod's word counts before the Namespace's.
pub const SOCKET_TRANSLATION: &str = "weir.sh/socket-translation";

/// The value of [`SOCKET_TRANSLATION`].
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum SocketTranslation {
    /// Absent.
    #[default]
    Unsaid,
    /// `enabled`.
    Enabled,
    /// `disabled`.
    Disabled,
    /// Something else; it counts as absent.
    Unknown(String),
}

impl SocketTranslation {
    /// Out of annotations or labels.
    #[must_use]
    pub fn of(values: &BTreeMap<String, String>) -> Self {
        match values.get(SOCKET_TRANSLATION).map(String::as_str) {
            None => Self::Unsaid,
            Some("enabled") => Self::Enabled,
            Some("disabled") => Self::Disabled,
            Some(other) => Self::Unknown(other.to_owned()),
        }
    }
}
