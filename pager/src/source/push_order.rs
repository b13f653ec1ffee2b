//! In which order the background push sends what the destination lacks: around the latest demand first, then ascending.

use crate::layout::page_run::PageRun;
use crate::layout::{MemoryLayout, PageId};

/// Bytes of one chunk, the unit of the push; a chunk of huge pages is one page.
const CHUNK_BYTES: u64 = 256 << 10;

/// How many chunks after and before the latest demand go first.
const NEIGHBOURS: u64 = 4;

/// What is still to be sent. Every page given is handed out exactly once, whatever the demand.
#[derive(Debug)]
pub struct PushOrder {
    regions: Vec<Lacking>,
    /// Region at which the ascending walk stands.
    walk: usize,
}

#[derive(Debug)]
struct Lacking {
    /// A bit a page, set while it is to be sent; a whole number of chunks.
    pages: Vec<u64>,
    chunk_pages: u64,
    /// Chunk at which the ascending walk stands: all before it are done.
    walk: u64,
}

impl PushOrder {
    /// From the ranges that the destination lacks; the caller has checked them against the layout.
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

    /// The next runs to send, all of one chunk; `None` when all is sent. `demand` is the page asked for last.
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

    /// A chunk that lacks something at or around `page`.
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
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::{Backing, Gpa, Region};

    fn layout(sizes: &[(u64, u64)]) -> MemoryLayout {
        let mut gpa = 0u64;
        let regions = sizes.iter().map(|(pages, page_size)| {
            let at = gpa.next_multiple_of(*page_size);
            gpa = at + pages * page_size;
            Region { gpa: Gpa(at), size: pages * page_size, page_size: *page_size, backing: Backing::Anonymous }
        });
        MemoryLayout::new(regions.collect()).unwrap()
    }

    #[test]
    fn demand_goes_first_then_its_neighbours_then_ascending() {
        let layout = layout(&[(64 * 20, 4096)]);
        let all = PageRun { region: 0, page: 0, count: 64 * 20 };
        let mut order = PushOrder::new(&layout, [all]);
        let hint = Some(PageId { region: 0, page: 64 * 10 + 3 });
        let chunks: Vec<u64> =
            std::iter::from_fn(|| order.next_chunk(hint)).map(|runs| runs[0].page / 64).take(11).collect();
        assert_eq!(chunks, [10, 11, 12, 13, 14, 9, 8, 7, 6, 0, 1]);
    }

    proptest! {
        #[test]
        fn every_page_is_handed_out_once_whatever_the_demand(
            pages in 1u64..500,
            huge in 1u64..5,
            ranges in prop::collection::vec((0u64..500, 1u64..120), 0..8),
            demand in prop::collection::vec(prop::option::of((0u32..3, 0u64..600)), 0..64),
        ) {
            let layout = layout(&[(pages, 4096), (huge, 2 << 20)]);
            let mut runs: Vec<PageRun> = ranges
                .iter()
                .filter(|(page, _)| *page < pages)
                .map(|(page, count)| PageRun { region: 0, page: *page, count: (*count).min(pages - page) })
                .collect();
            runs.push(PageRun { region: 1, page: 0, count: huge });
            let expected: std::collections::BTreeSet<(u32, u64)> =
                runs.iter().flat_map(|r| (r.page..r.page + r.count).map(|p| (r.region, p))).collect();
            let mut order = PushOrder::new(&layout, runs);
            let mut demand = demand.into_iter().cycle();
            let mut seen = std::collections::BTreeSet::new();
            loop {
                let hint = demand.next().flatten().map(|(region, page)| PageId { region, page });
                let Some(chunk) = order.next_chunk(hint) else { break };
                prop_assert!(!chunk.is_empty());
                for run in chunk {
                    for page in run.page..run.page + run.count {
                        prop_assert!(seen.insert((run.region, page)), "page {page} twice");
                    }
                }
            }
            prop_assert_eq!(seen, expected);
        }
    }
}
