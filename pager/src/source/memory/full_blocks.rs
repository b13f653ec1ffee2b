//! Blocks of which every page is there (of a file: and none has a marker): while the VM stands still they stay so, and what is
//! not there need not be looked for page by page.

use std::sync::atomic::{AtomicU32, Ordering};

/// Pages of a block: what one page table maps.
pub(super) const BLOCK: u64 = 512;

/// What is known of each block of a region since the VM was stopped.
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

    /// Whether pages of the region lie in whole blocks. A block of which nothing is known is looked at by
    /// `look(first page, pages)`.
    pub fn has(&self, page: u64, count: u64, look: impl Fn(u64, u64) -> bool) -> bool {
        // What is found while the VM is stopped once more counts for nothing.
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
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn a_block_is_looked_at_once_a_stop() {
        let whole = FullBlocks::new(3 * BLOCK + 100);
        let looks = RefCell::new(Vec::new());
        let has = |page, count| {
            whole.has(page, count, |first, pages| {
                looks.borrow_mut().push((first, pages));
                first != BLOCK
            })
        };
        for _ in 0..2 {
            assert_eq!([has(0, 1), has(511, 1), has(512, 1)], [true, true, false]);
            assert_eq!([has(500, 64), has(1536, 100), has(1520, 64)], [false, true, true]);
            assert_eq!(looks.take(), [(0, 512), (512, 512), (1536, 100), (1024, 512)]);
            assert!(has(0, 512) && !has(0, 1636) && !has(2048, 1));
            assert_eq!(looks.take(), []);
            whole.forget();
        }
    }

    #[test]
    fn what_was_found_before_the_stop_is_not_known_after_it() {
        let whole = FullBlocks::new(BLOCK);
        assert!(whole.has(0, 1, |_, _| {
            whole.forget();
            true
        }));
        assert!(!whole.has(0, 1, |_, _| false));
    }
}
