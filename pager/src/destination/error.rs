//! What can go wrong between the control service and the fault thread.

use std::io;

use crate::destination::page_table::file::PageFileError;
use crate::lane::connect::ConnectError;

/// The fault thread has ended, so nobody answers commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the page path has ended")]
pub struct Ended;

/// Why a destination cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The page table cannot be opened.
    #[error(transparent)]
    Table(#[from] PageFileError),
    /// The fault thread cannot be started.
    #[error("page path thread")]
    Thread(#[source] io::Error),
}

/// Why the memory of a VMM is refused.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A descriptor is no userfaultfd.
    #[error("{0}")]
    Userfaultfd(#[source] io::Error),
    /// A region names no userfaultfd.
    #[error("a destination's region needs one")]
    RegionWithoutUserfaultfd,
    /// The number of regions is not that of the layout.
    #[error("another number")]
    RegionCount,
    /// Minor faults cannot be registered, though an earlier pager wrote pages to the file.
    #[error("faults on what the file holds cannot be told of, as they were: {0}")]
    MinorFaults(#[source] io::Error),
    /// The page table describes the memory of another process.
    #[error("the page table belongs to another VMM than process {pid}")]
    ForeignTable {
        /// The process that attaches.
        pid: u32,
    },
    /// The VMM does not take the answer.
    #[error("the VMM cannot be answered: {0}")]
    Unanswered(#[source] io::Error),
}

/// Why lanes cannot be used now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// There is no memory to receive into.
    #[error("the VMM has not attached its memory")]
    NotAttached,
    /// `Preallocate` has not returned.
    #[error("memory is being allocated")]
    Allocating,
    /// The urgent lane is not connected.
    #[error("lanes are not connected: {reason}")]
    NotConnected {
        /// Why it was lost; empty: it never was connected.
        reason: String,
    },
}

/// Why `ConnectLanes` failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectLanesError {
    /// The fault thread has ended.
    #[error(transparent)]
    Ended(#[from] Ended),
    /// Lanes cannot be used now.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The source cannot be reached, or refused.
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

/// Why `Complete` failed.
#[derive(Debug, thiserror::Error)]
pub enum CompleteError {
    /// Pages are missing.
    #[error("{missing} pages are still absent")]
    Absent {
        /// How many.
        missing: u64,
    },
    /// The kernel keeps a range registered.
    #[error("UFFDIO_UNREGISTER: {0}")]
    Unregister(#[source] io::Error),
}
