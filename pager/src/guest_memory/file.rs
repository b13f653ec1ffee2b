//! A memfd, or a snapshot's memory file: `SEEK_DATA` finds holes, `pread` the rest and `EIO` the poison.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::pagemap::{Entry, Pagemap};
use super::{Found, ReadError, fill_buffer};
use crate::region_map::Region;

#[derive(Debug)]
pub(super) struct FileReader {
    fd: OwnedFd,
    /// Of the region's first byte in the file.
    offset: u64,
    page_size: u64,
    /// Of the VMM's mapping of the file, if it has one.
    pagemap: Option<Pagemap>,
}

impl FileReader {
    /// The file is opened again: `lseek` must not move the VMM's own offset.
    pub fn new(fd: OwnedFd, offset: u64, region: &Region, pagemap: Option<Pagemap>) -> Self {
        let again = std::fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let fd = again.map_or(fd, OwnedFd::from);
        Self { fd, offset, page_size: region.page_size, pagemap }
    }

    pub fn read(&self, page: u64, count: u64, found: &mut Vec<Found>) -> Result<(), ReadError> {
        let Some(pagemap) = &self.pagemap else { return self.read_unmarked(page, page + count, found) };
        let entries = pagemap.entries(page, count)?;
        let mut at = page;
        for run in entries.chunk_by(|a, b| (*a == Entry::PoisonMarker) == (*b == Entry::PoisonMarker)) {
            let end = at + run.len() as u64;
            if run[0] == Entry::PoisonMarker {
                found.push(Found::Poison(end - at));
            } else {
                self.read_unmarked(at, end, found)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Pages `[page, end)`, holes as zeros.
    fn read_unmarked(&self, mut page: u64, end: u64, found: &mut Vec<Found>) -> Result<(), ReadError> {
        while page < end {
            let data = self.next_data(page, end)?;
            if data > page {
                found.push(Found::Zero(data - page));
                page = data;
                continue;
            }
            page = self.read_data(page, end, found)?;
        }
        Ok(())
    }

    /// The first page of `[page, end)` that is not wholly in a hole, or `end`.
    fn next_data(&self, page: u64, end: u64) -> Result<u64, ReadError> {
        let from = self.offset + page * self.page_size;
        // SAFETY: no memory is passed.
        let at = unsafe { libc::lseek(self.fd.as_raw_fd(), from as libc::off_t, libc::SEEK_DATA) };
        if at >= 0 {
            return Ok(((at as u64 - self.offset) / self.page_size).min(end));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // No data from here to the end of the file.
            Some(libc::ENXIO) => Ok(end),
            // A file system that does not know holes.
            Some(libc::EINVAL) => Ok(page),
            _ => Err(self.failed("lseek", from, error)),
        }
    }

    /// Reads until `end` or a poisoned page, which it passes over; returns where it stands.
    fn read_data(&self, page: u64, end: u64, found: &mut Vec<Found>) -> Result<u64, ReadError> {
        let from = self.offset + page * self.page_size;
        let len = ((end - page) * self.page_size) as usize;
        let (mut buffer, outcome) = fill_buffer(len, |pointer, done| {
            let offset = (from + done as u64) as libc::off_t;
            // SAFETY: `pointer` has room for the `len - done` bytes that the kernel may write.
            let n = unsafe { libc::pread(self.fd.as_raw_fd(), pointer.cast(), len - done, offset) };
            usize::try_from(n).map_err(|_| io::Error::last_os_error())
        });
        let poisoned = match outcome {
            // Short of the end: the file ends here, and what lies beyond reads as zeros.
            Ok(()) => {
                buffer.resize(len, 0);
                false
            }
            Err(error) if error.raw_os_error() == Some(libc::EIO) => true,
            Err(error) => return Err(self.failed("pread", from, error)),
        };
        let whole = buffer.len() as u64 / self.page_size;
        buffer.truncate((whole * self.page_size) as usize);
        if whole > 0 {
            found.push(Found::Data(buffer.freeze()));
        }
        if poisoned {
            found.push(Found::Poison(1));
        }
        Ok(page + whole + u64::from(poisoned))
    }

    fn failed(&self, call: &str, offset: u64, source: io::Error) -> ReadError {
        ReadError::Io { what: format!("{call} of guest memory at file offset {offset:#x}"), source }
    }
}
