//! Why the endpoint manager refuses something.

use crate::ipam::IpamError;

/// What kind of refusal it is; gRPC and metrics speak of it in their own words.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ErrorKind {
    /// The agent does not know this node's pod ranges yet: try again.
    NotReady,
    /// Numbers or addresses are used up.
    Exhausted,
    /// No such reservation.
    NotFound,
    /// The request itself is wrong.
    Invalid,
    /// Another endpoint has what is asked for.
    Conflict,
    /// The kernel or the file system refused.
    Internal,
}

/// A refusal: names the object, the value and the remedy.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct EndpointError {
    /// Its kind.
    pub kind: ErrorKind,
    /// For people.
    pub message: String,
}

impl EndpointError {
    /// From its parts.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }
}

impl From<IpamError> for EndpointError {
    fn from(error: IpamError) -> Self {
        let kind = match error {
            IpamError::NoRange(_) => ErrorKind::NotReady,
            IpamError::Exhausted { .. } => ErrorKind::Exhausted,
            IpamError::InUse(_)
            | IpamError::Outside(_)
            | IpamError::TooManyRanges(_)
            | IpamError::Overlap { .. } => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}
