//! The pages that a source has sent with contents. If one goes bad later, the destination may have a good copy.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::layout::page_run::PageRun;
use crate::layout::{MemoryLayout, PageId};

/// One bit a page, by region.
#[derive(Debug)]
pub(super) struct SentPages(Vec<Vec<AtomicU64>>);

impl SentPages {
    /// None of the pages of a layout.
    pub fn new(layout: &MemoryLayout) -> Self {
        let bits = |pages: u64| (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self(layout.regions().iter().map(|region| bits(region.pages())).collect())
    }

    /// Marks a run of the layout.
    pub fn mark(&self, run: PageRun) {
        let bits = &self.0[run.region as usize];
        let (mut page, end) = (run.page, run.page + run.count);
        while page < end {
            let (word, bit) = (page / 64, page % 64);
            let count = (64 - bit).min(end - page);
            bits[word as usize].fetch_or((u64::MAX >> (64 - count)) << bit, Ordering::Relaxed);
            page += count;
        }
    }

    /// Whether a page of the layout was marked.
    pub fn contains(&self, id: PageId) -> bool {
        let word = &self.0[id.region as usize][(id.page / 64) as usize];
        word.load(Ordering::Relaxed) >> (id.page % 64) & 1 == 1
    }
}

#[cfg(test)]
mod tests;
