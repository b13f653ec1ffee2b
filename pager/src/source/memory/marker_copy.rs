//! A copy of the poison markers in the VMM's page tables, made while the VM is stopped. The markers end with the VMM's
//! process; the pages of a memory file stay, and the copy tells which of them may be served.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Pages that are looked up at once.
const STEP: u64 = 512;

/// The known markers of one region.
#[derive(Debug)]
pub(super) struct MarkerCopy {
    pages: u64,
    /// A whole number of the region's pages.
    step: u64,
    copied: Mutex<Copied>,
}

#[derive(Debug, Default)]
struct Copied {
    /// How often the VM was stopped.
    stop: u64,
    /// So many pages, from the first on, were looked up since the last stop.
    pages: u64,
    /// Half-open runs of those that are marked, in order.
    marked: Vec<(u64, u64)>,
}

impl MarkerCopy {
    /// Of a region of so many pages of 4 KiB, which come in groups of `page_size / 4096`; nothing is known.
    pub fn new(pages: u64, group: u64) -> Self {
        Self { pages, step: STEP.max(group), copied: Mutex::default() }
    }

    /// The VM ran since, and was stopped again.
    pub fn forget(&self) {
        let mut copied = self.lock();
        *copied = Copied { stop: copied.stop + 1, ..Copied::default() };
    }

    /// Copies the findings of `markers(first page, pages)` while it succeeds and `go_on` allows it.
    pub fn fill<E>(
        &self,
        go_on: &impl Fn() -> bool,
        markers: impl Fn(u64, u64) -> Result<Vec<bool>, E>,
    ) -> Result<(), E> {
        let (stop, mut page) = {
            let copied = self.lock();
            (copied.stop, copied.pages)
        };
        while page < self.pages && go_on() {
            let count = self.step.min(self.pages - page);
            let found = markers(page, count)?;
            let mut copied = self.lock();
            // The VM may have run since this was found.
            if copied.stop != stop || copied.pages != page {
                break;
            }
            let mut at = page;
            for run in found.chunk_by(|a, b| a == b) {
                let end = at + run.len() as u64;
                if run[0] {
                    copied.marked.push((at, end));
                }
                at = end;
            }
            page += count;
            copied.pages = page;
        }
        Ok(())
    }

    /// For each of `count` pages from `page` on, whether it is marked; `None`: not all of them were looked up.
    pub fn markers(&self, page: u64, count: u64) -> Option<Vec<bool>> {
        let (copied, end) = (self.lock(), page + count);
        if end > copied.pages {
            return None;
        }
        let mut markers = vec![false; count as usize];
        let first = copied.marked.partition_point(|run| run.1 <= page);
        for (from, to) in copied.marked[first..].iter().take_while(|run| run.0 < end) {
            markers[(from.max(&page) - page) as usize..(to.min(&end) - page) as usize].fill(true);
        }
        Some(markers)
    }

    fn lock(&self) -> MutexGuard<'_, Copied> {
        self.copied.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
