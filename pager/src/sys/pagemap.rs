//! The VMM's page tables (`/proc/PID/pagemap`).

use std::fs::File;
use std::io;

use vmferry_pagemap::{IS_PRESENT, IS_SWAPPED, PageRegion, RawEntry, scan};

use crate::layout::{Hva, PAGE_SIZE};
use crate::sys::other_process;

/// Most ranges of one scan; the next scan begins behind them.
const RANGES_A_SCAN: usize = 16;

/// The reason that page tables cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PagemapError {
    /// The process is gone, and its address space with it.
    #[error("process {pid} is gone")]
    ProcessGone {
        /// The process.
        pid: u32,
    },
    /// A call failed.
    #[error("{what}")]
    Io {
        /// The call and its place.
        what: String,
        /// Its error.
        source: io::Error,
    },
}

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Nothing was ever there, or nothing is mapped there.
    Empty,
    /// A poison marker.
    PoisonMarker,
    /// A marker, a swapped page or a bad frame: the kernel does not show which. Read it.
    Hidden,
    /// Anything else: read it.
    Something,
}

impl Entry {
    /// Whether a page with contents may be there.
    pub fn may_have_contents(self) -> bool {
        matches!(self, Self::Hidden | Self::Something)
    }
}

impl From<RawEntry> for Entry {
    fn from(raw: RawEntry) -> Self {
        match raw {
            raw if raw.is_empty() => Self::Empty,
            raw if raw.is_hidden() => Self::Hidden,
            raw if raw.is_poison_marker() => Self::PoisonMarker,
            _ => Self::Something,
        }
    }
}

/// The page tables of one region of one process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    pid: u32,
    hva: Hva,
    page_size: u64,
}

impl Pagemap {
    /// Opens those of a region that begins at `hva`.
    ///
    /// # Errors
    /// The process is gone, or its page tables are hidden (proc_pid_pagemap(5): `PTRACE_MODE_READ`).
    pub fn open(pid: u32, hva: Hva, page_size: u64) -> Result<Self, PagemapError> {
        match File::open(format!("/proc/{pid}/pagemap")) {
            Ok(file) => Ok(Self { file, pid, hva, page_size }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(PagemapError::ProcessGone { pid }),
            Err(source) => Err(PagemapError::Io { what: format!("open /proc/{pid}/pagemap"), source }),
        }
    }

    /// The first of `count` pages from `page` on that is mapped, or has a marker or swap there.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn first_mapped(&self, page: u64, count: u64) -> Result<Option<u64>, PagemapError> {
        let entries = self.entries(page, count)?;
        Ok((page..).zip(entries).find(|(_, entry)| *entry != Entry::Empty).map(|(page, _)| page))
    }

    /// Whether entries can be read: not those of huge pages.
    pub fn has_entries(&self) -> bool {
        self.page_size == PAGE_SIZE
    }

    /// For each of `count` pages from `page` on, whether a poison marker is there.
    pub fn markers(&self, page: u64, count: u64) -> Result<Vec<bool>, PagemapError> {
        if self.has_entries() {
            return self.small_markers(page, count);
        }
        let mut markers = vec![false; count as usize];
        let (mut from, end) = (self.address(page) / self.page_size * self.page_size, self.address(page + count));
        while from < end {
            let mut ranges = [PageRegion::default(); RANGES_A_SCAN];
            let (found, walked) =
                match scan(&self.file, from, end.next_multiple_of(self.page_size), IS_SWAPPED, &mut ranges) {
                    Ok(scanned) => scanned,
                    // An older kernel: it has no poison on hugetlb either, or cannot show it.
                    Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                        return Ok(markers);
                    }
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                        return Err(PagemapError::ProcessGone { pid: self.pid });
                    }
                    Err(source) => {
                        return Err(PagemapError::Io { what: format!("PAGEMAP_SCAN of pid {}", self.pid), source });
                    }
                };
            for range in found {
                let huge = (range.start..range.end).step_by(self.page_size as usize);
                for start in huge.filter(|start| cannot_be_read(self.pid, *start)) {
                    let first = (start.max(self.address(page)) - self.address(page)) / PAGE_SIZE;
                    let last = (start + self.page_size).min(end).saturating_sub(self.address(page)) / PAGE_SIZE;
                    markers[first as usize..last as usize].fill(true);
                }
            }
            from = walked.max(from + self.page_size);
        }
        self.check_alive()?;
        Ok(markers)
    }

    /// A hidden entry that cannot be read is a marker, or a bad frame, which is poison as well.
    fn small_markers(&self, page: u64, count: u64) -> Result<Vec<bool>, PagemapError> {
        let entries = self.entries(page, count)?;
        let is_marker = |(page, entry): (u64, &Entry)| match entry {
            Entry::PoisonMarker => true,
            Entry::Hidden => cannot_be_read(self.pid, self.address(page)),
            Entry::Empty | Entry::Something => false,
        };
        let markers = (page..).zip(&entries).map(is_marker).collect();
        if entries.contains(&Entry::Hidden) {
            self.check_alive()?;
        }
        Ok(markers)
    }

    /// Whether a poison marker may be on one of `count` pages from `page` on. Faster than finding which.
    pub fn may_have_markers(&self, page: u64, count: u64) -> bool {
        let (from, to, mut room) = (self.address(page), self.address(page + count), [PageRegion::default()]);
        scan(&self.file, from, to, IS_SWAPPED, &mut room).map_or(true, |(found, _)| !found.is_empty())
    }

    /// The reads by process id before this call, if it succeeds, were of this address space.
    fn check_alive(&self) -> Result<(), PagemapError> {
        match scan(&self.file, self.hva.0, self.hva.0 + self.page_size, IS_SWAPPED, &mut [PageRegion::default()]) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(PagemapError::ProcessGone { pid: self.pid }),
            _ => Ok(()),
        }
    }

    /// Whether all of `count` pages from `page` on are present.
    pub fn are_present(&self, page: u64, count: u64) -> bool {
        let (from, to, mut room) = (self.address(page), self.address(page + count), [PageRegion::default()]);
        let found = scan(&self.file, from, to, IS_PRESENT, &mut room);
        found.is_ok_and(|(found, _)| found.iter().any(|range| (range.start, range.end) == (from, to)))
    }

    fn address(&self, page: u64) -> u64 {
        self.hva.0 + page * PAGE_SIZE
    }

    /// The entries of `count` pages of 4 KiB from `page` on.
    pub fn entries(&self, page: u64, count: u64) -> Result<Vec<Entry>, PagemapError> {
        match vmferry_pagemap::entries(&self.file, self.address(page), count) {
            Ok(entries) => Ok(entries.into_iter().map(Entry::from).collect()),
            // The address space is gone: the file ends at once.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(PagemapError::ProcessGone { pid: self.pid })
            }
            Err(source) => Err(PagemapError::Io { what: format!("read /proc/{}/pagemap", self.pid), source }),
        }
    }
}

/// Whether a byte of a process gives `EFAULT`: a marker does; a page that the kernel is moving does not, since the read waits.
pub fn cannot_be_read(pid: u32, at: u64) -> bool {
    other_process::read(pid, Hva(at), &mut [0]).is_err_and(|error| error.raw_os_error() == Some(libc::EFAULT))
}

#[cfg(test)]
mod tests;
