//! A writable mapping of the destination's memfd. `recvmsg` writes pushed pages straight into it.
//!
//! The mapping is populated ahead (`MADV_POPULATE_WRITE`), so that a receive finds every page there. Until the last page has
//! come, its page tables take 8 bytes a page of this process.

use std::io;

use crate::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use crate::sys::nofault::Probe;
use crate::sys::page_mapping::{Advice, MappedPages, PageMapping};
use crate::vmm::attached_memory::AttachedFile;

/// The memory of one region.
#[derive(Debug)]
pub struct ReceiveMapping {
    pages: PageMapping,
    /// Populated pages, as half-open runs in ascending order. No run is empty, and none touches the next.
    ready: Vec<(u64, u64)>,
}

impl ReceiveMapping {
    /// Maps a region of this many bytes. No page is ready.
    ///
    /// # Errors
    /// mmap(2).
    pub fn new(file: &AttachedFile, bytes: u64) -> io::Result<Self> {
        Ok(Self { pages: PageMapping::writable(&file.fd, file.offset, bytes)?, ready: Vec::new() })
    }

    /// Populates `count` pages from `page` on. They lie in the region, behind all ready pages.
    ///
    /// # Errors
    /// madvise(2): no memory, or a kernel before 5.14.
    pub fn prepare(&mut self, page: u64, count: u64) -> io::Result<()> {
        let behind = self.ready.last().is_none_or(|(_, end)| *end <= page);
        if !behind {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.inside(page, count)?.advise(Advice::PopulateWrite)?;
        match self.ready.last_mut() {
            Some((_, end)) if *end == page => *end += count,
            _ => self.ready.push((page, page + count)),
        }
        Ok(())
    }

    /// Puts huge pages under `count` pages from `page` on. They are whole huge pages of the file, which has no page there yet.
    /// Each is allocated and zeroed at once.
    ///
    /// # Errors
    /// madvise(2), possibly after some huge pages were made. `EBUSY`: a userfaultfd watches the range or the page behind it
    /// for missing pages. `ENOMEM`, `EAGAIN`: no block of memory is free. `EINVAL`: the kernel is before 6.1.
    pub fn join(&self, page: u64, count: u64) -> io::Result<()> {
        // The kernel collapses only a range that has a page at least.
        for page in (page..page + count).step_by((HUGE_PAGE_SIZE / PAGE_SIZE) as usize) {
            self.inside(page, 1)?.advise(Advice::PopulateWrite)?;
        }
        self.inside(page, count)?.advise(Advice::Collapse)
    }

    /// Writes whole pages from `page` on, which are claimed. Returns whether all of them are ready and were written.
    #[must_use]
    pub fn write(&self, page: u64, contents: &[u8]) -> bool {
        self.ready(page, contents.len() as u64 / PAGE_SIZE).is_some_and(|pages| pages.write(contents))
    }

    /// Reads a page back. Returns whether it is ready and all of it was read.
    #[must_use]
    pub fn read(&self, page: u64, contents: &mut [u8]) -> bool {
        contents.len() as u64 == PAGE_SIZE && self.ready(page, 1).is_some_and(|pages| pages.read(contents))
    }

    /// Gives a page another frame if its own is bad; returns whether it did.
    pub fn replace_bad_frame(&self, page: u64) -> bool {
        let Some(bad) = self.ready(page, 1).filter(|page| page.probe(0) == Probe::Unreadable) else { return false };
        // A hole in the file leaves the page in this mapping.
        let replaced = bad.advise(Advice::Remove).and_then(|()| bad.advise(Advice::Unmap));
        match &replaced {
            Ok(()) => tracing::warn!(page, "pager.bad_frame_replaced"),
            Err(error) => tracing::error!(%error, page, "pager.bad_frame_kept"),
        }
        replaced.is_ok()
    }

    /// The `count` pages from `page` on, if all of them are ready.
    pub fn ready(&self, page: u64, count: u64) -> Option<MappedPages<'_>> {
        let run = self.ready.partition_point(|(_, end)| *end <= page);
        let (start, end) = *self.ready.get(run)?;
        (start <= page && page.checked_add(count)? <= end).then(|| self.pages.pages(page, count)).flatten()
    }

    fn inside(&self, page: u64, count: u64) -> io::Result<MappedPages<'_>> {
        self.pages.pages(page, count).ok_or(io::ErrorKind::InvalidInput.into())
    }
}

#[cfg(test)]
mod tests;
