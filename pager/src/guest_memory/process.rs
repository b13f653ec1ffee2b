//! Another process's memory: the pagemap finds what was never there, `process_vm_readv` the rest and `EFAULT` the poison.

use std::io;

use super::pagemap::{Entry, Pagemap};
use super::{Found, ReadError, fill_buffer};
use crate::region_map::{Hva, Region};

#[derive(Debug)]
pub(super) struct ProcessReader {
    pid: u32,
    hva: Hva,
    page_size: u64,
    pagemap: Option<Pagemap>,
}

impl ProcessReader {
    pub fn new(pid: u32, hva: Hva, region: &Region, pagemap: Option<Pagemap>) -> Result<Self, ReadError> {
        let reader = Self { pid, hva, page_size: region.page_size, pagemap };
        match reader.readv_byte(hva.0) {
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) && reader.entry_is_empty(0)? => {
                Err(ReadError::NotMapped { hva: hva.0, pid })
            }
            Err(error) if error.raw_os_error() != Some(libc::EFAULT) => Err(reader.failed(hva.0, error)),
            _ => Ok(reader),
        }
    }

    pub fn read(&self, page: u64, count: u64, found: &mut Vec<Found>) -> Result<(), ReadError> {
        let Some(pagemap) = &self.pagemap else { return self.read_data(page, page + count, found) };
        let entries = pagemap.entries(page, count)?;
        let mut at = page;
        for run in entries.chunk_by(|a, b| a == b) {
            let end = at + run.len() as u64;
            match run[0] {
                Entry::Empty => {
                    // An empty entry is also what an unmapped page has: only reading tells them apart.
                    self.read_byte(at)?;
                    self.read_byte(end - 1)?;
                    found.push(Found::Zero(end - at));
                }
                Entry::PoisonMarker => found.push(Found::Poison(end - at)),
                Entry::Something => self.read_data(at, end, found)?,
            }
            at = end;
        }
        Ok(())
    }

    /// Pages `[page, end)`; each that gives `EFAULT` is poison.
    fn read_data(&self, mut page: u64, end: u64, found: &mut Vec<Found>) -> Result<(), ReadError> {
        while page < end {
            let from = self.address(page);
            let len = ((end - page) * self.page_size) as usize;
            let (mut buffer, outcome) = fill_buffer(len, |pointer, done| {
                // SAFETY: `pointer` has room for the `len - done` bytes that are left.
                unsafe { self.readv(from + done as u64, pointer, len - done) }
            });
            let whole = buffer.len() as u64 / self.page_size;
            buffer.truncate((whole * self.page_size) as usize);
            if whole > 0 {
                found.push(Found::Data(buffer.freeze()));
            }
            page += whole;
            match outcome {
                Ok(()) if page == end => {}
                Ok(()) => return Err(self.failed(self.address(page), io::ErrorKind::UnexpectedEof.into())),
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    if self.entry_is_empty(page)? {
                        return Err(ReadError::NotMapped { hva: self.address(page), pid: self.pid });
                    }
                    found.push(Found::Poison(1));
                    page += 1;
                }
                Err(error) => return Err(self.failed(self.address(page), error)),
            }
        }
        Ok(())
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
        self.pagemap.as_ref().map_or(Ok(false), |pagemap| Ok(pagemap.entries(page, 1)? == [Entry::Empty]))
    }

    fn address(&self, page: u64) -> u64 {
        self.hva.0 + page * self.page_size
    }

    fn readv_byte(&self, from: u64) -> io::Result<usize> {
        let mut byte = 0u8;
        // SAFETY: room for one byte.
        unsafe { self.readv(from, &mut byte, 1) }
    }

    /// One `process_vm_readv(2)`: bytes read, possibly fewer than asked.
    ///
    /// # Safety
    /// `into` has room for `len` bytes.
    unsafe fn readv(&self, from: u64, into: *mut u8, len: usize) -> io::Result<usize> {
        let local = libc::iovec { iov_base: into.cast(), iov_len: len };
        let remote = libc::iovec { iov_base: from as *mut libc::c_void, iov_len: len };
        // SAFETY: the kernel writes at most `len` bytes at `into`; `remote` is an address in another process.
        let n = unsafe { libc::process_vm_readv(self.pid as libc::pid_t, &local, 1, &remote, 1, 0) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
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
