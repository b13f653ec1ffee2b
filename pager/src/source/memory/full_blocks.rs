//! Blocks with every page present (and, in a file, without markers). While the VM is stopped they stay so, and no page of
//! them needs a lookup of its own.

use std::sync::atomic::{AtomicU32, Ordering};

/// Pages of a block: the reach of one page table.
pub(super) const BLOCK: u64 = 512;

/// The known state of each block of a region since the VM was stopped.
#[derive(Debug)]
pub(super) struct FullBlocks {
    pages: u64,
    /// How often it was stopped.
    stops: AtomicU32,
    /// Twice the number of the stop at which a block was looked at; one more: it is whole.
    blocks: Vec<AtomicU32>,
}

impl FullBlocks {
    /// Of a region of so many pages; nothing is known.
    pub fn new(pages: u64) -> Self {
        let blocks = (0..pages.div_ceil(BLOCK)).map(|_| AtomicU32::new(0)).collect();
        Self { pages, stops: AtomicU32::new(1), blocks }
    }

    /// The VM ran since, and was stopped again.
    pub fn forget(&self) {
        self.stops.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether pages of the region lie in whole blocks. `look(first page, pages)` inspects an unknown block.
    pub fn has(&self, page: u64, count: u64, look: impl Fn(u64, u64) -> bool) -> bool {
        // Findings of an earlier stop count for nothing.
        let stop = self.stops.load(Ordering::Relaxed);
        (page / BLOCK..(page + count).div_ceil(BLOCK)).all(|number| {
            let Some(block) = self.blocks.get(number as usize) else { return false };
            let known = block.load(Ordering::Relaxed);
            if known / 2 == stop {
                return known % 2 == 1;
            }
            let first = number * BLOCK;
            let whole = look(first, BLOCK.min(self.pages - first));
            block.store(stop * 2 + u32::from(whole), Ordering::Relaxed);
            whole
        })
    }
}

#[cfg(test)]
mod tests;
