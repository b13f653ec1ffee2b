//! A mapping of a memory file, from which pages are sent without a copy of ours in between.
//!
//! An error of the memory that nobody knows of yet is met here by user space or by a copy from it, both of which the kernel
//! survives; the copy of a `pread` it does not (docs/reference/kernel-facts.md). So every page that can be is shown, be it one.
//!
//! Nothing is allocated by looking, but for a page that was given back since: only pages that are in the file are mapped,
//! which mincore(2) tells. What cannot be shown for any reason is left to `pread`, which tells holes, poison and errors apart.
//! To map a page at the first look at it costs more than all else about it, so that is done ahead.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use super::full_blocks::BLOCK;
use super::{Found, Runs, SMALL_READ};
use crate::lane::MAX_FRAME_PAGES;
use crate::layout::PAGE_SIZE;
use crate::sys::nofault::{self, Probe};

/// Pages that are mapped ahead at once: what has to wait for a mapping to change waits for no more.
const MAP_AHEAD_PAGES: usize = 512;

/// Pages of a file, read-only.
#[derive(Debug)]
pub(super) struct ReadMapping {
    at: *mut u8,
    bytes: usize,
    /// So many pages, from the first on, are mapped where they could be.
    ahead: AtomicU64,
}

// SAFETY: the mapping belongs to the whole process, and nothing is ever written through it.
unsafe impl Send for ReadMapping {}
// SAFETY: as above.
unsafe impl Sync for ReadMapping {}

impl ReadMapping {
    /// Of `bytes` bytes of the file from `offset` on, both whole pages.
    pub fn new(fd: &impl AsRawFd, offset: u64, bytes: u64) -> io::Result<Self> {
        nofault::prepare();
        let (bytes, offset) = (bytes as usize, offset as libc::off_t);
        let (null, flags) = (std::ptr::null_mut(), libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: a fresh mapping, wherever there is room.
        let at = unsafe { libc::mmap(null, bytes, libc::PROT_READ, flags, fd.as_raw_fd(), offset) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A core dump shall not hold the guest's memory. SAFETY: the mapping is ours.
        unsafe { libc::madvise(at, bytes, libc::MADV_DONTDUMP) };
        Ok(Self { at: at.cast(), bytes, ahead: AtomicU64::new(0) })
    }

    /// Maps the pages that are in the file, as long as it is told to go on.
    pub fn map_ahead(&self, go_on: &impl Fn() -> bool) {
        let mut resident = [0u8; MAP_AHEAD_PAGES];
        let mut offset = 0;
        while offset < self.bytes && go_on() {
            let resident =
                &mut resident[..(self.bytes / PAGE_SIZE as usize - offset / PAGE_SIZE as usize).min(MAP_AHEAD_PAGES)];
            self.look_up(offset, resident);
            for run in resident.chunk_by(|a, b| a == b) {
                if run[0] & 1 == 1 {
                    self.map(offset, run.len());
                }
                offset += run.len() * PAGE_SIZE as usize;
            }
            self.ahead.store(offset as u64 / PAGE_SIZE, Ordering::Relaxed);
        }
    }

    /// Which pages from a byte of the mapping on are in the file: the lowest bit of each; no others are set (mincore(2)).
    fn look_up(&self, offset: usize, resident: &mut [u8]) {
        let bytes = resident.len() * PAGE_SIZE as usize;
        // SAFETY: the range is in the mapping, and the vector has a byte for each of its pages.
        if unsafe { libc::mincore(self.at.add(offset).cast(), bytes, resident.as_mut_ptr()) } != 0 {
            resident.fill(0);
        }
    }

    /// Maps pages, as far as it goes: what is not mapped is when it is looked at.
    fn map(&self, offset: usize, pages: usize) {
        // SAFETY: pages of the mapping, for reading.
        unsafe { libc::madvise(self.at.add(offset).cast(), pages * PAGE_SIZE as usize, libc::MADV_POPULATE_READ) };
    }

    /// Tells in `runs` what pages from `page` on hold, at most `count`, as many as can be shown, and returns where they are,
    /// for as long as the window is: not to be read but by system calls, which answer `EFAULT` where a page has gone bad.
    ///
    /// # Errors
    /// How many pages from `page` on cannot be shown, at least one.
    pub fn show(&self, page: u64, count: u64, runs: &mut Runs) -> Result<*const u8, u64> {
        let (offset, bytes) = ((page * PAGE_SIZE) as usize, (count * PAGE_SIZE) as usize);
        if count > MAX_FRAME_PAGES || offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(count);
        }
        let mut resident = [0u8; MAX_FRAME_PAGES as usize];
        let resident = &mut resident[..count as usize];
        self.look_up(offset, resident);
        let absent = resident.iter().take_while(|page| **page & 1 == 0).count();
        if absent > 0 {
            return Err(absent as u64);
        }
        let there = resident.iter().take_while(|page| **page & 1 == 1).count();
        let at = self.look(page, there as u64, runs);
        if runs.0.is_empty() { Err(1) } else { Ok(at) }
    }

    /// Whether all of at most a block of pages are in the file.
    pub fn has_all(&self, page: u64, count: u64) -> bool {
        let mut resident = [0u8; BLOCK as usize];
        let resident = &mut resident[..count as usize];
        self.look_up((page * PAGE_SIZE) as usize, resident);
        resident.iter().all(|page| page & 1 == 1)
    }

    /// Tells in `runs` what pages of the region that are in the file hold, up to one that cannot be shown, and returns where
    /// they are, as [`Self::show`] does.
    pub fn look(&self, page: u64, count: u64, runs: &mut Runs) -> *const u8 {
        let offset = (page * PAGE_SIZE) as usize;
        // Few are mapped one by one, by the look at each, as soon.
        if count > SMALL_READ && page + count > self.ahead.load(Ordering::Relaxed) {
            self.map(offset, count as usize);
        }
        // SAFETY: in the mapping.
        let at = unsafe { self.at.add(offset) };
        for number in 0..count as usize {
            // SAFETY: a page of the mapping; `prepare` was called when it was made.
            runs.push(match unsafe { nofault::probe_zero(at.add(number * PAGE_SIZE as usize)) } {
                Probe::Zeros => Found::Zero(1),
                Probe::Contents => Found::Data(1),
                Probe::Unreadable => break,
            });
        }
        at
    }
}

impl Drop for ReadMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and pointers into it live no longer.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}
