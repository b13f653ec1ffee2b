//! Pages on their way in: what a DATA frame has brought so far, and what is told of pages that have no data.

use crate::page_table::Arrival;
use crate::proto::ErrorOrigin;

/// On which lane pages come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// The urgent lane.
    Demand,
    /// A bulk lane.
    Push,
}

impl Lane {
    /// How a page with data that came on it counts.
    pub fn arrival(self) -> Arrival {
        match self {
            Self::Demand => Arrival::Demand,
            Self::Push => Arrival::Push,
        }
    }
}

/// What the source knows of a bad page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoisonNote {
    /// How it was found.
    pub origin: ErrorOrigin,
    /// The guest was given a machine check for it.
    pub guest_visible: bool,
    /// Migrations that the error has travelled through.
    pub hop: u32,
}

/// Consecutive pages of 4 KiB of one region: at most 64 with data, any number of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Number of the region in the layout.
    pub region: u32,
    /// First page.
    pub page: u64,
    /// Number of pages.
    pub count: u64,
}

/// A DATA frame that is being received, then installed.
#[derive(Debug)]
pub struct Arriving {
    /// Which pages.
    pub pages: Pages,
    /// How they come.
    pub lane: Lane,
    /// Bytes received.
    pub received: usize,
    /// A bit a page of the frame: its bytes go where they will stay. The others go to a scratch buffer.
    pub claimed: u64,
    /// Pages of the frame that are dealt with: installed, or not wanted any more.
    pub dealt: u64,
}

impl Arriving {
    /// Bytes of the whole frame's contents.
    pub fn bytes(&self) -> usize {
        (self.pages.count * crate::lane::PAGE) as usize
    }

    /// Whether page `index` of the frame was claimed.
    pub fn has_claimed(&self, index: u64) -> bool {
        self.claimed >> index & 1 == 1
    }
}
