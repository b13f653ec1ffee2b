//! The gRPC status of each error. A status exists nowhere else in the pager: the table is here, and tested here.
//!
//! | status | meaning |
//! |---|---|
//! | `INVALID_ARGUMENT` | the request is wrong, whatever the state |
//! | `FAILED_PRECONDITION` | the request is right, but not now, not here, or not on this host |
//! | `ALREADY_EXISTS` | configured otherwise before |
//! | `RESOURCE_EXHAUSTED` | the host has no port, thread, descriptor or memory left |
//! | `UNAVAILABLE` | the source, or the VMM's memory, cannot be reached |
//! | `INTERNAL` | a fault of this program or kernel |

use tonic::{Code, Status};

use crate::destination::error::{CompleteError, ConnectLanesError, Ended, LinkError};
use crate::destination::memory::preallocate::PreallocateError;
use crate::lane::connect::ConnectError;
use crate::pager_error::PagerError;
use crate::source::SourceError;

/// An error that a call can end with.
trait HasCode: std::error::Error {
    fn code(&self) -> Code;
}

impl HasCode for PagerError {
    fn code(&self) -> Code {
        match self {
            Self::Listen { .. } => Code::InvalidArgument,
            Self::Role { .. } | Self::Unconfigured { .. } | Self::Probe(_) | Self::Destination(_) => {
                Code::FailedPrecondition
            }
            Self::ServesOther(_) | Self::ExpectsOther => Code::AlreadyExists,
            Self::NoPort { .. } | Self::Thread(_) => Code::ResourceExhausted,
            Self::LocalAddress(_) | Self::Ended(_) => Code::Internal,
        }
    }
}

impl HasCode for SourceError {
    fn code(&self) -> Code {
        match self {
            Self::Outside { .. } => Code::InvalidArgument,
            Self::NotAttached | Self::NotFrozen | Self::Frozen => Code::FailedPrecondition,
            Self::Memory(_) => Code::Unavailable,
        }
    }
}

impl HasCode for Ended {
    fn code(&self) -> Code {
        Code::Internal
    }
}

impl HasCode for LinkError {
    fn code(&self) -> Code {
        match self {
            Self::NotAttached | Self::Allocating | Self::NotConnected { .. } => Code::FailedPrecondition,
        }
    }
}

impl HasCode for ConnectError {
    fn code(&self) -> Code {
        match self {
            Self::InvalidAddress { .. } | Self::InvalidToken => Code::InvalidArgument,
            Self::Unreachable { .. } | Self::TimedOut { .. } | Self::LaneToken { .. } | Self::Lane { .. } => {
                Code::Unavailable
            }
            Self::Refused { code, .. } => *code,
        }
    }
}

impl HasCode for ConnectLanesError {
    fn code(&self) -> Code {
        match self {
            Self::Ended(error) => error.code(),
            Self::Link(error) => error.code(),
            Self::Connect(error) => error.code(),
        }
    }
}

impl HasCode for CompleteError {
    fn code(&self) -> Code {
        match self {
            Self::Absent { .. } => Code::FailedPrecondition,
            Self::Unregister(_) => Code::Internal,
        }
    }
}

impl HasCode for PreallocateError {
    fn code(&self) -> Code {
        match self {
            Self::OutsideLayout { .. } => Code::InvalidArgument,
            Self::TooLate | Self::NotAttached | Self::Touched { .. } => Code::FailedPrecondition,
            Self::Descriptor(_) | Self::NoMemory { .. } => Code::ResourceExhausted,
            Self::Unguarded { .. } | Self::Pagemap(_) | Self::Ended => Code::Internal,
        }
    }
}

/// The status of an error: its code, and its message.
fn status(error: &impl HasCode) -> Status {
    Status::new(error.code(), error.to_string())
}

macro_rules! into_status {
    ($($error:ty),+) => {$(
        impl From<$error> for Status {
            fn from(error: $error) -> Self {
                status(&error)
            }
        }
    )+};
}

into_status!(PagerError, SourceError, Ended, LinkError, ConnectLanesError, CompleteError, PreallocateError);

#[cfg(test)]
mod tests;
