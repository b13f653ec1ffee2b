//! The order of the push: pages around the latest demand first, then in ascending order.

use crate::layout::page_run::PageRun;
use crate::layout::{MemoryLayout, PageId};

/// Bytes of one chunk, the unit of the push; a chunk of huge pages is one page.
const CHUNK_BYTES: u64 = 256 << 10;

/// Number of chunks on each side of the latest demand that go first.
const NEIGHBOURS: u64 = 4;

/// The pages still to send. Hands out each given page exactly once, for any demand.
#[derive(Debug)]
pub struct PushOrder {
    regions: Vec<Lacking>,
    /// Region that the ascending walk has reached.
    walk: usize,
}

#[derive(Debug)]
struct Lacking {
    /// A bit a page, set while it is to be sent; a whole number of chunks.
    pages: Vec<u64>,
    chunk_pages: u64,
    /// Chunk that the ascending walk has reached: all before it are sent.
    walk: u64,
}

impl PushOrder {
    /// Takes the ranges that the destination lacks. The caller has checked them against the layout.
    pub fn new(layout: &MemoryLayout, lacking: impl IntoIterator<Item = PageRun>) -> Self {
        let empty = |region: &crate::layout::Region| Lacking {
            pages: vec![0; region.pages().div_ceil(64) as usize],
            chunk_pages: (CHUNK_BYTES / region.page_size).max(1),
            walk: 0,
        };
        let mut order = Self { regions: layout.regions().iter().map(empty).collect(), walk: 0 };
        for run in lacking {
            order.regions[run.region as usize].set(run.page, run.page + run.count);
        }
        order
    }

    /// The next runs to send, all of one chunk; `None` when all is sent. `demand` is the page of the latest request.
    pub fn next_chunk(&mut self, demand: Option<PageId>) -> Option<Vec<PageRun>> {
        if let Some(PageId { region, page }) = demand
            && let Some(lacking) = self.regions.get_mut(region as usize)
            && let Some(chunk) = lacking.near(page)
        {
            return Some(lacking.take(region, chunk));
        }
        while let Some(lacking) = self.regions.get_mut(self.walk) {
            if let Some(chunk) = lacking.ascending() {
                return Some(lacking.take(self.walk as u32, chunk));
            }
            self.walk += 1;
        }
        None
    }
}

impl Lacking {
    fn set(&mut self, start: u64, end: u64) {
        (start..end).for_each(|page| self.pages[(page / 64) as usize] |= 1 << (page % 64));
    }

    fn is_set(&self, page: u64) -> bool {
        self.pages.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    fn end(&self) -> u64 {
        self.pages.len() as u64 * 64
    }

    fn lacks(&self, chunk: u64) -> bool {
        let start = chunk * self.chunk_pages;
        if self.chunk_pages == 64 {
            return self.pages.get(chunk as usize).is_some_and(|word| *word != 0);
        }
        (start..start + self.chunk_pages).any(|page| self.is_set(page))
    }

    /// A chunk at or around `page` with pages to send.
    fn near(&self, page: u64) -> Option<u64> {
        let at = page / self.chunk_pages;
        let after = (0..=NEIGHBOURS).map(|distance| at + distance);
        let before = (1..=NEIGHBOURS).filter_map(|distance| at.checked_sub(distance));
        after.chain(before).find(|chunk| self.lacks(*chunk))
    }

    fn ascending(&mut self) -> Option<u64> {
        while self.walk * self.chunk_pages < self.end() {
            if self.lacks(self.walk) {
                return Some(self.walk);
            }
            self.walk += 1;
        }
        None
    }

    fn take(&mut self, region: u32, chunk: u64) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        let start = chunk * self.chunk_pages;
        for page in start..start + self.chunk_pages {
            if !self.is_set(page) {
                continue;
            }
            self.pages[(page / 64) as usize] &= !(1 << (page % 64));
            match runs.last_mut() {
                Some(run) if run.page + run.count == page => run.count += 1,
                _ => runs.push(PageRun { region, page, count: 1 }),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests;
