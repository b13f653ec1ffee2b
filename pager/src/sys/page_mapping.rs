//! Pages of a file, mapped into this process and never borrowed: other processes write them, and a frame may go bad or away.
//!
//! They are read and written by system calls, which answer `EFAULT` for a lost page, and by the routines of
//! [`nofault`]. See mmap(2), madvise(2) and mincore(2).

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use crate::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use crate::sys::nofault::{self, Probe};

/// Bytes of a page, as lengths in this address space.
const PAGE: usize = PAGE_SIZE as usize;

/// An operation of madvise(2) on a run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Maps the pages for reading.
    PopulateRead,
    /// Allocates the pages, and maps them for writing.
    PopulateWrite,
    /// Puts huge pages under them.
    Collapse,
    /// Takes them out of the file.
    Remove,
    /// Takes them out of the mapping.
    Unmap,
}

/// The mapping of a range of a file, unmapped when dropped. It is left out of core dumps.
#[derive(Debug)]
pub struct PageMapping {
    /// The reserved addresses, which include the mapping.
    room: *mut c_void,
    room_bytes: usize,
    start: *mut u8,
    bytes: usize,
    is_writable: bool,
}

// SAFETY: the mapping belongs to the whole process. No reference into it exists; system calls and `nofault` access it.
unsafe impl Send for PageMapping {}
// SAFETY: as above.
unsafe impl Sync for PageMapping {}

impl PageMapping {
    /// Maps `bytes` bytes of a file from `offset` on for reading. Both are whole pages.
    ///
    /// # Errors
    /// mmap(2).
    pub fn readable(file: &impl AsRawFd, offset: u64, bytes: u64) -> io::Result<Self> {
        nofault::prepare();
        let (bytes, flags) = (bytes as usize, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: a fresh mapping, wherever there is room.
        let start = unsafe { map(null_mut(), bytes, libc::PROT_READ, flags, file.as_raw_fd(), offset) }?;
        let mapping = Self { room: start, room_bytes: bytes, start: start.cast(), bytes, is_writable: false };
        mapping.keep_out_of_core_dumps();
        Ok(mapping)
    }

    /// Maps `bytes` bytes of a file from `offset` on for reading and writing. Both are whole pages. Huge pages of the file lie
    /// at multiples of their size in the mapping as well.
    ///
    /// # Errors
    /// mmap(2).
    pub fn writable(file: &impl AsRawFd, offset: u64, bytes: u64) -> io::Result<Self> {
        nofault::prepare();
        let (bytes, room_bytes) = (bytes as usize, (bytes + HUGE_PAGE_SIZE) as usize);
        let nobody = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping, wherever there is room.
        let room = unsafe { map(null_mut(), room_bytes, libc::PROT_NONE, nobody, -1, 0) }?;
        let before = (offset as usize).wrapping_sub(room as usize) % HUGE_PAGE_SIZE as usize;
        let start = room.wrapping_byte_add(before);
        let mapping = Self { room, room_bytes, start: start.cast(), bytes, is_writable: true };
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: within the room, which nothing else uses.
        unsafe { map(start, bytes, both, flags, file.as_raw_fd(), offset) }?;
        mapping.keep_out_of_core_dumps();
        Ok(mapping)
    }

    fn keep_out_of_core_dumps(&self) {
        // SAFETY: the range is this mapping; the advice changes none of its contents.
        unsafe { libc::madvise(self.start.cast(), self.bytes, libc::MADV_DONTDUMP) };
    }

    /// Number of pages.
    #[inline]
    pub fn count(&self) -> u64 {
        (self.bytes / PAGE) as u64
    }

    /// The `count` pages from `first` on; `None`: they are not all in the mapping.
    #[inline]
    pub fn pages(&self, first: u64, count: u64) -> Option<MappedPages<'_>> {
        let is_inside = first.checked_add(count)? <= self.count();
        let start = self.start.wrapping_add(first as usize * PAGE);
        is_inside.then_some(MappedPages { start, count, is_writable: self.is_writable, mapping: PhantomData })
    }
}

impl Drop for PageMapping {
    fn drop(&mut self) {
        // SAFETY: no `MappedPages` outlives self, so no address of the mapping is in use.
        unsafe { libc::munmap(self.room, self.room_bytes) };
    }
}

/// mmap(2).
///
/// # Safety
/// As for mmap(2): with `MAP_FIXED` nothing may use the range.
unsafe fn map(
    at: *mut c_void,
    bytes: usize,
    protection: libc::c_int,
    flags: libc::c_int,
    fd: libc::c_int,
    offset: u64,
) -> io::Result<*mut c_void> {
    // SAFETY: as the caller promises.
    match unsafe { libc::mmap(at, bytes, protection, flags, fd, offset as libc::off_t) } {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        at => Ok(at),
    }
}

/// A run of pages of a [`PageMapping`].
#[derive(Debug, Clone, Copy)]
pub struct MappedPages<'a> {
    start: *mut u8,
    count: u64,
    is_writable: bool,
    mapping: PhantomData<&'a PageMapping>,
}

impl<'a> MappedPages<'a> {
    /// Number of pages.
    #[inline]
    pub fn count(self) -> u64 {
        self.count
    }

    /// Of the first page, in this process.
    #[cfg(test)]
    pub fn address(self) -> u64 {
        self.start as u64
    }

    /// Address and length in bytes, for system calls.
    #[inline]
    pub(in crate::sys) fn raw(self) -> (*mut c_void, usize) {
        (self.start.cast(), self.count as usize * PAGE)
    }

    /// The `count` pages from the `first`-th on.
    ///
    /// # Panics
    /// They are not all in the run.
    #[inline]
    pub fn part(self, first: u64, count: u64) -> MappedPages<'a> {
        assert!(first <= self.count && count <= self.count - first, "{first} + {count} of {} pages", self.count);
        Self { start: self.start.wrapping_add(first as usize * PAGE), count, ..self }
    }

    /// Says in `resident` which of the pages are in the file, one bit of each byte (mincore(2)); none if that cannot be known.
    pub fn look_up(self, resident: &mut [u8]) {
        let (start, bytes) = self.part(0, resident.len() as u64).raw();
        // SAFETY: the range is in the mapping, and the vector has a byte for each of its pages.
        if unsafe { libc::mincore(start, bytes, resident.as_mut_ptr()) } != 0 {
            resident.fill(0);
        }
    }

    /// Applies an advice to all the pages.
    ///
    /// # Errors
    /// madvise(2).
    pub fn advise(self, advice: Advice) -> io::Result<()> {
        let advice = match advice {
            Advice::PopulateRead => libc::MADV_POPULATE_READ,
            Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
            Advice::Collapse => libc::MADV_COLLAPSE,
            Advice::Remove => libc::MADV_REMOVE,
            Advice::Unmap => libc::MADV_DONTNEED,
        };
        let (start, bytes) = self.raw();
        // SAFETY: the range is in the mapping, and nobody has a reference into it.
        while unsafe { libc::madvise(start, bytes, advice) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Looks at the `number`-th page.
    #[inline]
    pub fn probe(self, number: u64) -> Probe {
        let page = self.part(number, 1).start;
        // SAFETY: a page of the mapping: readable or SIGBUS. `prepare` was called when the mapping was made.
        unsafe { nofault::probe_zero(page) }
    }

    /// Writes whole pages from the first on. Returns whether all of them fit and were written.
    #[must_use]
    pub fn write(self, contents: &[u8]) -> bool {
        let is_possible = self.is_writable && contents.len() as u64 / PAGE_SIZE <= self.count;
        is_possible
            && contents.as_chunks::<PAGE>().0.iter().enumerate().all(|(number, contents)| {
                // SAFETY: the first page is of the mapping: writable or SIGBUS, and nobody has a reference to it. The second is
                // readable. `prepare` was called when the mapping was made.
                unsafe { nofault::copy(self.start.wrapping_add(number * PAGE), contents.as_ptr()) }
            })
    }

    /// Reads whole pages from the first on. Returns whether there are as many and all were read.
    #[must_use]
    pub fn read(self, contents: &mut [u8]) -> bool {
        contents.len() as u64 / PAGE_SIZE <= self.count
            && contents.as_chunks_mut::<PAGE>().0.iter_mut().enumerate().all(|(number, contents)| {
                // SAFETY: the first page is borrowed here alone. The second is of the mapping: readable or SIGBUS. `prepare` was
                // called when the mapping was made.
                unsafe { nofault::copy(contents.as_mut_ptr(), self.start.wrapping_add(number * PAGE)) }
            })
    }
}

#[cfg(test)]
mod tests;
