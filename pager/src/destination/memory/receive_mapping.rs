//! Where the push is received in place: the memory of a VMM's file, mapped here as well, before a page of it has come.
//!
//! The mapping is filled ahead (madvise(2), `MADV_POPULATE_WRITE`), so that a receive finds every page there. Its page tables
//! take 8 bytes a page of this process, until the last page has come.

use std::io;
use std::os::fd::AsRawFd;

use crate::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use crate::sys::nofault::{self, Probe};
use crate::vmm::attached_memory::AttachedFile;

/// The memory of one region.
#[derive(Debug)]
pub struct ReceiveMapping {
    /// What is mapped for it, of which its memory is a part.
    room: *mut libc::c_void,
    at: *mut u8,
    bytes: usize,
    /// Pages that are there, as half-open runs in ascending order, none empty, none touching the next.
    ready: Vec<(u64, u64)>,
}

// SAFETY: the mapping belongs to the whole process; it is written by system calls and `nofault::copy` only.
unsafe impl Send for ReceiveMapping {}
// SAFETY: as above; whoever writes a page has claimed it.
unsafe impl Sync for ReceiveMapping {}

impl ReceiveMapping {
    /// Of a region of so many bytes; nothing is ready.
    ///
    /// # Errors
    /// mmap(2).
    pub fn new(file: &AttachedFile, bytes: u64) -> io::Result<Self> {
        nofault::prepare();
        let (bytes, offset) = (bytes as usize, file.offset as libc::off_t);
        // Huge pages must lie in the mapping as they do in the file: room for one more is left, to be moved by.
        let (null, nobody) = (std::ptr::null_mut(), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a fresh mapping, wherever there is room.
        let room = unsafe { libc::mmap(null, bytes + HUGE_PAGE_SIZE as usize, libc::PROT_NONE, nobody, -1, 0) };
        if room == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = (file.offset as usize).wrapping_sub(room as usize) % HUGE_PAGE_SIZE as usize;
        let at = room.wrapping_byte_add(before);
        let receive_mapping = Self { room, at: at.cast(), bytes, ready: Vec::new() };
        let (write, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: in the room, which is ours.
        if unsafe { libc::mmap(at, bytes, write, flags | libc::MAP_FIXED, file.fd.as_raw_fd(), offset) } != at {
            return Err(io::Error::last_os_error());
        }
        // A core dump shall not hold the guest's memory. SAFETY: the mapping is ours.
        unsafe { libc::madvise(at, bytes, libc::MADV_DONTDUMP) };
        Ok(receive_mapping)
    }

    /// Makes `count` pages from `page` on ready. They lie in the region and behind all that is ready.
    ///
    /// # Errors
    /// madvise(2): no memory, or a kernel before 5.14.
    pub fn prepare(&mut self, page: u64, count: u64) -> io::Result<()> {
        let behind = self.ready.last().is_none_or(|(_, end)| *end <= page);
        if !behind {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.advise(page, count, libc::MADV_POPULATE_WRITE)?;
        match self.ready.last_mut() {
            Some((_, end)) if *end == page => *end += count,
            _ => self.ready.push((page, page + count)),
        }
        Ok(())
    }

    /// Puts huge pages under `count` pages from `page` on, which are whole huge pages of the file and of which it holds none:
    /// each is allocated and filled with zeros at once.
    ///
    /// # Errors
    /// madvise(2); some may have been made all the same. `EBUSY`: a userfaultfd is told of what the file lacks there, or on
    /// the page behind. `ENOMEM`, `EAGAIN`: no block of memory is free. `EINVAL`: the kernel is before 6.1.
    pub fn join(&self, page: u64, count: u64) -> io::Result<()> {
        // The kernel joins only what has a page at least.
        for page in (page..page + count).step_by((HUGE_PAGE_SIZE / PAGE_SIZE) as usize) {
            self.advise(page, 1, libc::MADV_POPULATE_WRITE)?;
        }
        self.advise(page, count, libc::MADV_COLLAPSE)
    }

    fn advise(&self, page: u64, count: u64, advice: libc::c_int) -> io::Result<()> {
        let at = self.address(page, count).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range is in the mapping.
        while unsafe { libc::madvise(at.cast(), (count * PAGE_SIZE) as usize, advice) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Writes whole pages from `page` on, which are claimed; `false`: not all of them, since they are not ready or cannot be
    /// written.
    #[must_use]
    pub fn write(&self, page: u64, contents: &[u8]) -> bool {
        let Some(at) = self.at(page, contents.len() as u64 / PAGE_SIZE) else { return false };
        contents.chunks_exact(PAGE_SIZE as usize).enumerate().all(|(n, contents)| {
            // SAFETY: a page of the mapping, of which nobody has a reference; `prepare` was called when it was made.
            unsafe { nofault::copy(at.wrapping_add(n * PAGE_SIZE as usize), contents.as_ptr()) }
        })
    }

    /// Reads a page back; `false`: not all of it.
    #[must_use]
    pub fn read(&self, page: u64, contents: &mut [u8]) -> bool {
        let Some(at) = self.at(page, 1).filter(|_| contents.len() == PAGE_SIZE as usize) else { return false };
        // SAFETY: a page of our own, and one of the mapping; `prepare` was called when it was made.
        unsafe { nofault::copy(contents.as_mut_ptr(), at) }
    }

    /// Gives a page another frame if its own is bad; whether it did.
    pub fn replace_bad_frame(&self, page: u64) -> bool {
        let Some(at) = self.at(page, 1) else { return false };
        // SAFETY: a page of the mapping; `prepare` was called when it was made.
        if unsafe { nofault::probe_zero(at) } != Probe::Unreadable {
            return false;
        }
        // The hole in the file leaves what this mapping has of the page.
        let replaced = self.advise(page, 1, libc::MADV_REMOVE).and_then(|()| self.advise(page, 1, libc::MADV_DONTNEED));
        match &replaced {
            Ok(()) => tracing::warn!(page, "pager.bad_frame_replaced"),
            Err(error) => tracing::error!(%error, page, "pager.bad_frame_kept"),
        }
        replaced.is_ok()
    }

    /// Where `count` pages from `page` on are, if all of them are ready: to be written by system calls only.
    pub fn at(&self, page: u64, count: u64) -> Option<*mut u8> {
        let run = self.ready.partition_point(|(_, end)| *end <= page);
        let (start, end) = *self.ready.get(run)?;
        (start <= page && page.checked_add(count)? <= end).then(|| self.address(page, count)).flatten()
    }

    fn address(&self, page: u64, count: u64) -> Option<*mut u8> {
        let (offset, bytes) = (page.checked_mul(PAGE_SIZE)?, count.checked_mul(PAGE_SIZE)?);
        let inside = offset.checked_add(bytes)? <= self.bytes as u64;
        inside.then(|| self.at.wrapping_add(offset as usize))
    }
}

impl Drop for ReceiveMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no call is under way.
        unsafe { libc::munmap(self.room, self.bytes + HUGE_PAGE_SIZE as usize) };
    }
}

#[cfg(test)]
mod tests;
