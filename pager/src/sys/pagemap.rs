//! `/proc/PID/pagemap`: the VMM's page tables (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::layout::{Hva, PAGE_SIZE};
use crate::sys::other_process;

/// `ioctl(2)` of a pagemap, Linux 6.7. It shows markers of hugetlb pages, which entries do not.
const PAGEMAP_SCAN: u64 = 0xC060_6610;
/// Of `PAGEMAP_SCAN`: an entry that is present.
const PAGE_IS_PRESENT: u64 = 1 << 3;
/// Of `PAGEMAP_SCAN`: an entry that is not present and not empty.
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// Most ranges of one scan; the next scan begins behind them.
const RANGES_A_SCAN: usize = 16;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Bits 0–4 of a swapped entry: its type. The highest is `SWP_PTE_MARKER` (include/linux/swapops.h).
const TYPE_MASK: u64 = 0x1f;
const TYPE_PTE_MARKER: u64 = 0x1f;
/// Bits 5–54 of a swapped entry: the offset, here the marker's kinds.
const OFFSET_SHIFT: u32 = 5;
/// `PTE_MARKER_POISONED`.
const MARKER_POISONED: u64 = 1 << 1;
/// Bits 0–54 of a swapped entry: type and offset. The kernel shows them only to a file that was opened with
/// `CAP_SYS_ADMIN` (`pagemap_open`, fs/proc/task_mmu.c). No swapped page has an offset of 0.
const SHOWN_MASK: u64 = (1 << 55) - 1;

/// Why page tables cannot be read.
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

impl From<u64> for Entry {
    fn from(raw: u64) -> Self {
        if raw & (PRESENT | SWAPPED) == 0 {
            return Self::Empty;
        }
        if raw & PRESENT == 0 && raw & SHOWN_MASK == 0 {
            return Self::Hidden;
        }
        let marker = raw & PRESENT == 0 && raw & TYPE_MASK == TYPE_PTE_MARKER;
        let poisoned = (raw >> OFFSET_SHIFT) & MARKER_POISONED != 0;
        if marker && poisoned { Self::PoisonMarker } else { Self::Something }
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
                match self.scan(from, end.next_multiple_of(self.page_size), PAGE_IS_SWAPPED, &mut ranges) {
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
        self.scan(from, to, PAGE_IS_SWAPPED, &mut room).map_or(true, |(found, _)| !found.is_empty())
    }

    /// The reads by process id before this call, if it succeeds, were of this address space.
    fn check_alive(&self) -> Result<(), PagemapError> {
        match self.scan(self.hva.0, self.hva.0 + self.page_size, PAGE_IS_SWAPPED, &mut [PageRegion::default()]) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(PagemapError::ProcessGone { pid: self.pid }),
            _ => Ok(()),
        }
    }

    /// Whether all of `count` pages from `page` on are present.
    pub fn are_present(&self, page: u64, count: u64) -> bool {
        let (from, to, mut room) = (self.address(page), self.address(page + count), [PageRegion::default()]);
        let found = self.scan(from, to, PAGE_IS_PRESENT, &mut room);
        found.is_ok_and(|(found, _)| found.iter().any(|range| (range.start, range.end) == (from, to)))
    }

    fn address(&self, page: u64) -> u64 {
        self.hva.0 + page * PAGE_SIZE
    }

    /// Ranges of `[from, to)` with entries of a category, as many as there is room for, and how far was looked.
    fn scan<'a>(
        &self,
        from: u64,
        to: u64,
        category: u64,
        room: &'a mut [PageRegion],
    ) -> io::Result<(&'a [PageRegion], u64)> {
        let mut scan = ScanArguments {
            size: size_of::<ScanArguments>() as u64,
            start: from,
            end: to,
            vec: room.as_mut_ptr() as u64,
            vec_len: room.len() as u64,
            category_mask: category,
            return_mask: category,
            ..ScanArguments::default()
        };
        // SAFETY: a struct of the size that it says, which names room for as many ranges as it says.
        let found = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
        let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
        Ok((&room[..found.min(room.len())], scan.walk_end))
    }

    /// The entries of `count` pages of 4 KiB from `page` on.
    pub fn entries(&self, page: u64, count: u64) -> Result<Vec<Entry>, PagemapError> {
        let mut raw = vec![0u8; (count * 8) as usize];
        let offset = (self.hva.0 / PAGE_SIZE + page) * 8;
        match self.file.read_exact_at(&mut raw, offset) {
            Ok(()) => {}
            // The address space is gone: the file ends at once.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(PagemapError::ProcessGone { pid: self.pid });
            }
            Err(source) => return Err(PagemapError::Io { what: format!("read /proc/{}/pagemap", self.pid), source }),
        }
        let entry = |bytes: &[u8; 8]| Entry::from(u64::from_le_bytes(*bytes));
        Ok(raw.as_chunks::<8>().0.iter().map(entry).collect())
    }
}

/// Whether a byte of a process gives `EFAULT`: a marker does; a page that the kernel is moving does not, since the read waits.
pub fn cannot_be_read(pid: u32, at: u64) -> bool {
    other_process::read(pid, Hva(at), &mut [0]).is_err_and(|error| error.raw_os_error() == Some(libc::EFAULT))
}

#[cfg(test)]
mod tests;
