//! Which blocks of preallocated memory are made of huge pages: pure.

use std::time::Duration;

/// Blocks of one step: few, because a step takes many times as long if the host must find the blocks first.
const MAX_BLOCKS_A_STEP: u64 = 4;
/// Blocks of small pages after the first dearer step of huge ones.
const FIRST_PAUSE: u64 = 4;
/// The factor for each further time.
const LONGER: u64 = 4;

/// Chooses the page size of the next blocks of 2 MiB. The first is of small pages, to measure their cost. Then huge pages
/// follow for as long as they cost no more. After that it tries a huge page again at growing intervals.
#[derive(Debug)]
pub struct HugePagePolicy {
    /// The last cost of a block of small pages.
    small: Duration,
    /// Blocks to be made of small pages before the next huge one.
    pause: u64,
    next_pause: u64,
    /// Blocks of huge pages at once.
    at_once: u64,
}

impl HugePagePolicy {
    /// Begins with small pages; `huge_pages` false: never tries huge ones.
    pub fn new(huge_pages: bool) -> Self {
        let pause = if huge_pages { 1 } else { u64::MAX };
        Self { small: Duration::ZERO, pause, next_pause: FIRST_PAUSE, at_once: 1 }
    }

    /// Whether the next blocks are to be huge pages.
    pub fn is_huge(&self) -> bool {
        self.pause == 0
    }

    /// At most so many are next.
    pub fn blocks(&self) -> u64 {
        if self.is_huge() { self.at_once } else { self.pause.min(MAX_BLOCKS_A_STEP) }
    }

    /// So many blocks were allocated, in so much CPU time.
    pub fn took(&mut self, huge: bool, blocks: u64, time: Duration) {
        let each = Duration::from_nanos(time.as_nanos() as u64 / blocks.max(1));
        if !huge {
            self.small = each;
            self.pause = self.pause.saturating_sub(blocks);
        } else if each <= self.small {
            self.at_once = (self.at_once * 2).min(MAX_BLOCKS_A_STEP);
            self.next_pause = FIRST_PAUSE;
        } else {
            self.at_once = 1;
            self.pause = self.next_pause;
            self.next_pause = self.next_pause.saturating_mul(LONGER);
        }
    }
}

#[cfg(test)]
mod tests;
