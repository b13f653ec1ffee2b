//! A mapping of a memory file. Pages are sent from it, without a copy by this process.
//!
//! Here user space or a copy from user space meets a memory error that nobody knows of yet. The kernel survives both, but not
//! the copy of a `pread` (docs/reference/kernel-facts.md). So every page is sent from here if it can be.
//!
//! A look allocates nothing: mincore(2) says which pages the file has, and no others are mapped. A page that was given back in
//! between is the exception. `pread` handles all other pages: it tells holes, poison and errors apart.
//! Mapping is most of the cost of the first look at a page, so a background thread maps the pages ahead.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use super::full_blocks::BLOCK;
use super::{Found, Runs, SMALL_READ};
use crate::lane::MAX_FRAME_PAGES;
use crate::sys::nofault::Probe;
use crate::sys::page_mapping::{Advice, MappedPages, PageMapping};

/// Pages that are mapped ahead by one call. Other changes of the mappings wait for that call.
const MAP_AHEAD_PAGES: u64 = 512;

/// Pages of a file, read-only.
#[derive(Debug)]
pub(super) struct ReadMapping {
    pages: PageMapping,
    /// Number of pages, from the first on, that are mapped if the file has them.
    ahead: AtomicU64,
}

impl ReadMapping {
    /// Maps `bytes` bytes of the file from `offset` on. Both are whole pages.
    pub fn new(fd: &impl AsRawFd, offset: u64, bytes: u64) -> io::Result<Self> {
        Ok(Self { pages: PageMapping::readable(fd, offset, bytes)?, ahead: AtomicU64::new(0) })
    }

    /// Maps the pages that are in the file, while `go_on` allows it.
    pub fn map_ahead(&self, go_on: &impl Fn() -> bool) {
        let mut resident = [0u8; MAP_AHEAD_PAGES as usize];
        let mut page = 0;
        while page < self.pages.count() && go_on() {
            let count = MAP_AHEAD_PAGES.min(self.pages.count() - page);
            let Some(pages) = self.pages.pages(page, count) else { return };
            let resident = &mut resident[..count as usize];
            pages.look_up(resident);
            let mut first = 0;
            for run in resident.chunk_by(|a, b| a == b) {
                let count = run.len() as u64;
                if run[0] & 1 == 1 {
                    map(pages.part(first, count));
                }
                first += count;
            }
            page += count;
            self.ahead.store(page, Ordering::Relaxed);
        }
    }

    /// Adds to `runs` the kinds of at most `count` pages from `page` on, as many as can be shown, and returns the pages.
    ///
    /// # Errors
    /// The number of pages from `page` on that cannot be shown, at least one.
    pub fn show(&self, page: u64, count: u64, runs: &mut Runs) -> Result<MappedPages<'_>, u64> {
        let pages = self.pages.pages(page, count).filter(|_| count <= MAX_FRAME_PAGES).ok_or(count)?;
        let mut resident = [0u8; MAX_FRAME_PAGES as usize];
        let resident = &mut resident[..count as usize];
        pages.look_up(resident);
        let absent = resident.iter().take_while(|page| **page & 1 == 0).count();
        if absent > 0 {
            return Err(absent as u64);
        }
        let there = resident.iter().take_while(|page| **page & 1 == 1).count();
        self.look(page, pages.part(0, there as u64), runs);
        if runs.0.is_empty() { Err(1) } else { Ok(pages) }
    }

    /// Whether all of at most a block of pages are in the file.
    pub fn has_all(&self, page: u64, count: u64) -> bool {
        let Some(pages) = self.pages.pages(page, count) else { return false };
        let mut resident = [0u8; BLOCK as usize];
        let resident = &mut resident[..count as usize];
        pages.look_up(resident);
        resident.iter().all(|page| page & 1 == 1)
    }

    /// As [`Self::show`], of pages that are all in the file. `None`: they are not in the region.
    pub fn show_resident(&self, page: u64, count: u64, runs: &mut Runs) -> Option<MappedPages<'_>> {
        let pages = self.pages.pages(page, count)?;
        self.look(page, pages, runs);
        Some(pages)
    }

    /// Adds to `runs` the kinds of pages of the file, up to one that cannot be shown. The first has number `page`.
    fn look(&self, page: u64, pages: MappedPages<'_>, runs: &mut Runs) {
        // The look at each page maps a few of them as soon.
        if pages.count() > SMALL_READ && page + pages.count() > self.ahead.load(Ordering::Relaxed) {
            map(pages);
        }
        for number in 0..pages.count() {
            runs.push(match pages.probe(number) {
                Probe::Zeros => Found::Zero(1),
                Probe::Contents => Found::Data(1),
                Probe::Unreadable => break,
            });
        }
    }
}

/// Maps pages as far as possible. The first look at a page maps it otherwise.
fn map(pages: MappedPages<'_>) {
    let _ = pages.advise(Advice::PopulateRead);
}
