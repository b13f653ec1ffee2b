//! Reads another process's memory. The pagemap finds pages that were never there. `process_vm_readv` reads all others, and
//! answers `EFAULT` for poison.

use std::io;

use super::full_blocks::FullBlocks;
use super::{Found, ReadError, Runs, SMALL_READ, fill_buffer, pages_of};
use crate::layout::PAGE_SIZE;
use crate::layout::{Hva, Region};
use crate::sys::other_process;
use crate::sys::pagemap::{Entry, Pagemap};

/// Page table entries that are read at once.
const ENTRIES_A_READ: u64 = 1 << 16;

#[derive(Debug)]
pub(super) struct ProcessReader {
    pid: u32,
    hva: Hva,
    pages: u64,
    /// Opened once: it belongs to the address space, so a later process of the same id cannot be taken for the VMM.
    pagemap: Option<Pagemap>,
    /// Blocks with every page present.
    full_blocks: FullBlocks,
}

impl ProcessReader {
    pub fn new(pid: u32, hva: Hva, region: &Region, pagemap: Option<Pagemap>) -> Result<Self, ReadError> {
        let pages = region.size / PAGE_SIZE;
        let reader = Self { pid, hva, pages, pagemap, full_blocks: FullBlocks::new(pages) };
        match reader.readv_byte(hva.0) {
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) && reader.entry_is_empty(0)? => {
                Err(ReadError::NotMapped { hva: hva.0, pid })
            }
            Err(error) if error.raw_os_error() != Some(libc::EFAULT) => Err(reader.failed(hva.0, error)),
            _ => Ok(reader),
        }
    }

    /// See [`super::GuestMemory::stopped`].
    pub fn stopped(&self) {
        self.full_blocks.forget();
    }

    /// Reads pages `[page, page + count)` into `buffer`.
    pub fn read(&self, page: u64, count: u64, buffer: &mut [u8], runs: &mut Runs) -> Result<(), ReadError> {
        self.read_by_id(page, count, buffer, runs)?;
        // `process_vm_readv` takes a process id, and another process may have that id by now.
        if let Some(pagemap) = &self.pagemap {
            pagemap.entries(page, 1)?;
        }
        Ok(())
    }

    fn read_by_id(&self, page: u64, count: u64, buffer: &mut [u8], runs: &mut Runs) -> Result<(), ReadError> {
        // A lookup of a few pages takes as long as a read of them. In most blocks all pages are present.
        let is_unknown = |pagemap: &&Pagemap| {
            pagemap.has_entries()
                && count > SMALL_READ
                && !self.full_blocks.has(page, count, |first, pages| pagemap.are_present(first, pages))
        };
        let Some(pagemap) = self.pagemap.as_ref().filter(is_unknown) else {
            return self.read_data(page, page + count, buffer, runs);
        };
        let entries = pagemap.entries(page, count)?;
        let mut at = page;
        for run in entries.chunk_by(|a, b| a == b) {
            let end = at + run.len() as u64;
            match run[0] {
                Entry::Empty => {
                    // An unmapped page has an empty entry, too. Only a read tells them apart.
                    self.read_byte(at)?;
                    self.read_byte(end - 1)?;
                    runs.push(Found::Zero(end - at));
                }
                Entry::PoisonMarker => runs.push(Found::Poison(end - at)),
                Entry::Hidden | Entry::Something => self.read_data(at, end, pages_of(buffer, page, at, end), runs)?,
            }
            at = end;
        }
        Ok(())
    }

    /// Pages `[first, end)`; each that gives `EFAULT` is poison.
    fn read_data(&self, first: u64, end: u64, buffer: &mut [u8], runs: &mut Runs) -> Result<(), ReadError> {
        let mut page = first;
        while page < end {
            let from = self.address(page);
            let (filled, outcome) =
                fill_buffer(pages_of(buffer, first, page, end), |rest, done| self.readv(from + done, rest));
            let whole = filled as u64 / PAGE_SIZE;
            runs.push(Found::Data(whole));
            page += whole;
            match outcome {
                Ok(()) if page == end => {}
                Ok(()) => return Err(self.failed(self.address(page), io::ErrorKind::UnexpectedEof.into())),
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    if self.entry_is_empty(page)? {
                        return Err(ReadError::NotMapped { hva: self.address(page), pid: self.pid });
                    }
                    runs.push(Found::Poison(1));
                    page += 1;
                }
                Err(error) => return Err(self.failed(self.address(page), error)),
            }
        }
        Ok(())
    }

    /// Half-open runs of pages that were ever there; all pages if there are no page table entries to read.
    pub fn held(&self) -> Result<Vec<(u64, u64)>, ReadError> {
        let Some(pagemap) = self.page_entries() else { return Ok(vec![(0, self.pages)]) };
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut at = 0;
        while at < self.pages {
            let entries = pagemap.entries(at, (self.pages - at).min(ENTRIES_A_READ))?;
            for run in entries.chunk_by(|a, b| a.may_have_contents() == b.may_have_contents()) {
                let end = at + run.len() as u64;
                match runs.last_mut() {
                    _ if !run[0].may_have_contents() => {}
                    Some(last) if last.1 == at => last.1 = end,
                    _ => runs.push((at, end)),
                }
                at = end;
            }
        }
        Ok(runs)
    }

    fn read_byte(&self, page: u64) -> Result<(), ReadError> {
        let at = self.address(page);
        match self.readv_byte(at) {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                Err(ReadError::NotMapped { hva: at, pid: self.pid })
            }
            Err(error) => Err(self.failed(at, error)),
        }
    }

    fn entry_is_empty(&self, page: u64) -> Result<bool, ReadError> {
        self.page_entries().map_or(Ok(false), |pagemap| Ok(pagemap.entries(page, 1)? == [Entry::Empty]))
    }

    /// Page tables that have an entry for each page: not those of huge pages.
    fn page_entries(&self) -> Option<&Pagemap> {
        self.pagemap.as_ref().filter(|pagemap| pagemap.has_entries())
    }

    fn address(&self, page: u64) -> u64 {
        self.hva.0 + page * PAGE_SIZE
    }

    fn readv_byte(&self, from: u64) -> io::Result<usize> {
        self.readv(from, &mut [0])
    }

    /// One `process_vm_readv(2)`: bytes read, possibly fewer than asked.
    fn readv(&self, from: u64, into: &mut [u8]) -> io::Result<usize> {
        other_process::read(self.pid, Hva(from), into)
    }

    fn failed(&self, hva: u64, source: io::Error) -> ReadError {
        match source.raw_os_error() {
            Some(libc::ESRCH) => ReadError::VmmGone { pid: self.pid },
            Some(libc::EPERM) => {
                let what =
                    format!("read memory of the VMM (pid {}); the pager needs CAP_SYS_PTRACE or its user", self.pid);
                ReadError::Io { what, source }
            }
            _ => ReadError::Io { what: format!("process_vm_readv of pid {} at {hva:#x}", self.pid), source },
        }
    }
}

#[cfg(test)]
mod tests;
