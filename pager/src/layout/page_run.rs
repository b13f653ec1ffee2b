//! Runs of pages that travel on a lane.

use crate::proto::ErrorOrigin;

/// How a page came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// Data, asked for.
    Demand,
    /// Data, pushed.
    Push,
    /// Zeros, either way.
    Zero,
}

/// The lane of arriving pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneKind {
    /// The urgent lane.
    Urgent,
    /// A bulk lane.
    Bulk,
}

impl LaneKind {
    /// How a page with data from such a lane counts.
    pub fn arrival(self) -> Arrival {
        match self {
            Self::Urgent => Arrival::Demand,
            Self::Bulk => Arrival::Push,
        }
    }
}

/// The source's knowledge of a bad page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoisonInfo {
    /// How it was found.
    pub origin: ErrorOrigin,
    /// The guest was given a machine check for it.
    pub guest_visible: bool,
    /// Migrations that the error has travelled through.
    pub hop: u32,
}

/// Consecutive pages of 4 KiB of one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Number of the region in the layout.
    pub region: u32,
    /// First page.
    pub page: u64,
    /// Number of pages.
    pub count: u64,
}

impl PageRun {
    /// The rest behind the first `done`.
    pub fn after(self, done: u64) -> Self {
        Self { page: self.page + done, count: self.count - done, ..self }
    }
}
