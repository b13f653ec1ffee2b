//! Why a pager refuses a call or a VMM.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use crate::destination::error::{self, DestinationError, Ended};
use crate::source::SourceError;
use crate::sys::uffd_probe::ProbeError;

/// Why a pager does not do what its daemon wants.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The pager is on the other side.
    #[error("this pager's role is {is}, the call needs {needs}")]
    Role {
        /// The role of this pager.
        is: &'static str,
        /// The role that the call needs.
        needs: &'static str,
    },
    /// The call that configures the pager comes first.
    #[error("{first} comes first")]
    Unconfigured {
        /// The call.
        first: &'static str,
    },
    /// The source serves something else already.
    #[error("serves another layout or token at {0}")]
    ServesOther(SocketAddr),
    /// The destination expects something else already.
    #[error("another layout is expected already")]
    ExpectsOther,
    /// All ports are taken.
    #[error("no free port in [{}, {}) of {ip}: {why}", .ports.start, .ports.end)]
    NoPort {
        /// The address.
        ip: IpAddr,
        /// The range.
        ports: Range<u16>,
        /// The last error, or that the range is empty.
        why: String,
    },
    /// The address cannot be listened at.
    #[error("listen at {at}: {source}")]
    Listen {
        /// The address.
        at: SocketAddr,
        /// The error of the call.
        source: io::Error,
    },
    /// The port of a listener is not known.
    #[error("local address: {0}")]
    LocalAddress(#[source] io::Error),
    /// No thread can be started.
    #[error("thread: {0}")]
    Thread(#[source] io::Error),
    /// This kernel lacks something.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The fault thread cannot be started.
    #[error("{0}{cause}", cause = cause(.0))]
    Destination(#[from] DestinationError),
    /// The fault thread has ended.
    #[error(transparent)]
    Ended(#[from] Ended),
}

fn cause(error: &DestinationError) -> String {
    std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default()
}

/// Why a VMM's memory is refused.
#[derive(Debug, thiserror::Error)]
pub enum AttachMemoryError {
    /// The pager is not configured.
    #[error("the pager expects no memory yet")]
    Unexpected,
    /// The source cannot use the memory.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The VMM of a source does not take the answer.
    #[error("the VMM cannot be answered: {0}")]
    Unanswered(#[source] io::Error),
    /// The destination cannot use the memory.
    #[error(transparent)]
    Destination(#[from] error::AttachError),
    /// The fault thread has ended.
    #[error(transparent)]
    Ended(#[from] Ended),
}
