//! Where the push is received in place: the memory of a VMM's file, mapped here as well, before a page of it has come.
//!
//! The mapping is filled ahead (madvise(2), `MADV_POPULATE_WRITE`), so that a receive finds every page there. Its page tables
//! take 8 bytes a page of this process, until the last page has come.

use std::io;
use std::os::fd::AsRawFd;

use crate::lane::PAGE;
use crate::sys::nofault;
use crate::vmm::attached_memory::AttachedFile;

/// A transparent huge page on x86-64.
pub const HUGE: u64 = 2 << 20;

/// The memory of one region.
#[derive(Debug)]
pub struct Landing {
    /// What is mapped for it, of which its memory is a part.
    room: *mut libc::c_void,
    at: *mut u8,
    bytes: usize,
    /// Pages that are there, as half-open runs in ascending order, none empty, none touching the next.
    ready: Vec<(u64, u64)>,
}

// SAFETY: the mapping belongs to the whole process; it is written by system calls and `nofault::copy` only.
unsafe impl Send for Landing {}
// SAFETY: as above; whoever writes a page has claimed it.
unsafe impl Sync for Landing {}

impl Landing {
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
        let room = unsafe { libc::mmap(null, bytes + HUGE as usize, libc::PROT_NONE, nobody, -1, 0) };
        if room == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = (file.offset as usize).wrapping_sub(room as usize) % HUGE as usize;
        let at = room.wrapping_byte_add(before);
        let landing = Self { room, at: at.cast(), bytes, ready: Vec::new() };
        let (write, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: in the room, which is ours.
        if unsafe { libc::mmap(at, bytes, write, flags | libc::MAP_FIXED, file.fd.as_raw_fd(), offset) } != at {
            return Err(io::Error::last_os_error());
        }
        // A core dump shall not hold the guest's memory. SAFETY: the mapping is ours.
        unsafe { libc::madvise(at, bytes, libc::MADV_DONTDUMP) };
        Ok(landing)
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
        for page in (page..page + count).step_by((HUGE / PAGE) as usize) {
            self.advise(page, 1, libc::MADV_POPULATE_WRITE)?;
        }
        self.advise(page, count, libc::MADV_COLLAPSE)
    }

    fn advise(&self, page: u64, count: u64, advice: libc::c_int) -> io::Result<()> {
        let at = self.address(page, count).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range is in the mapping.
        while unsafe { libc::madvise(at.cast(), (count * PAGE) as usize, advice) } != 0 {
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
        let Some(at) = self.at(page, contents.len() as u64 / PAGE) else { return false };
        contents.chunks_exact(PAGE as usize).enumerate().all(|(n, contents)| {
            // SAFETY: a page of the mapping, of which nobody has a reference; `prepare` was called when it was made.
            unsafe { nofault::copy(at.wrapping_add(n * PAGE as usize), contents.as_ptr()) }
        })
    }

    /// Where `count` pages from `page` on are, if all of them are ready: to be written by system calls only.
    pub fn at(&self, page: u64, count: u64) -> Option<*mut u8> {
        let run = self.ready.partition_point(|(_, end)| *end <= page);
        let (start, end) = *self.ready.get(run)?;
        (start <= page && page.checked_add(count)? <= end).then(|| self.address(page, count)).flatten()
    }

    fn address(&self, page: u64, count: u64) -> Option<*mut u8> {
        let (offset, bytes) = (page.checked_mul(PAGE)?, count.checked_mul(PAGE)?);
        let inside = offset.checked_add(bytes)? <= self.bytes as u64;
        inside.then(|| self.at.wrapping_add(offset as usize))
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no call is under way.
        unsafe { libc::munmap(self.room, self.bytes + HUGE as usize) };
    }
}

/// Where bytes that come one after the other are to be received, by one call.
#[derive(Debug, Default)]
pub struct Places(Vec<libc::iovec>);

// SAFETY: addresses, at which only system calls write.
unsafe impl Send for Places {}

impl Places {
    /// Nowhere.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// In one buffer and nowhere else.
    pub fn only(&mut self, buffer: &mut [u8]) {
        self.clear();
        self.then(buffer.as_mut_ptr(), buffer.len());
    }

    /// Then at `at`; joined to what ends there.
    pub fn then(&mut self, at: *mut u8, bytes: usize) {
        match self.0.last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == at.cast() => last.iov_len += bytes,
            _ => self.0.push(libc::iovec { iov_base: at.cast(), iov_len: bytes }),
        }
    }

    /// As system calls take them.
    pub fn vectors(&mut self) -> &mut [libc::iovec] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::sys::userfaultfd::memfd;

    fn file(pages: u64) -> AttachedFile {
        AttachedFile { fd: memfd("guest", (pages + 1) * PAGE).unwrap(), offset: PAGE }
    }

    #[test]
    fn only_what_was_prepared_is_ready() {
        let mut landing = Landing::new(&file(16), 16 * PAGE).unwrap();
        assert!(landing.at(0, 1).is_none());
        landing.prepare(2, 2).unwrap();
        landing.prepare(4, 1).unwrap();
        landing.prepare(8, 1).unwrap();
        let start = landing.at(2, 1).unwrap();
        for (page, count, is_ready) in
            [(2, 3, true), (3, 2, true), (4, 1, true), (1, 2, false), (4, 2, false), (8, 1, true)]
        {
            let expected = is_ready.then(|| start.wrapping_add(((page - 2) * PAGE) as usize));
            assert_eq!(landing.at(page, count), expected, "{page}+{count}");
        }
        assert!(landing.at(8, u64::MAX).is_none());
        assert!(landing.at(u64::MAX, 1).is_none());
        assert!(landing.prepare(15, 2).is_err(), "outside");
        assert!(landing.prepare(7, 1).is_err(), "not behind");
    }

    #[test]
    fn what_is_written_there_is_in_the_file() {
        let file = file(4);
        let mut landing = Landing::new(&file, 4 * PAGE).unwrap();
        landing.prepare(1, 2).unwrap();
        let at = landing.at(2, 1).unwrap();
        // SAFETY: a page of the mapping, which is there.
        unsafe { at.write_bytes(0xab, PAGE as usize) };
        let (whole, mut page) = (File::from(file.fd), [0; PAGE as usize]);
        whole.read_exact_at(&mut page, PAGE + 2 * PAGE).unwrap();
        assert_eq!(page, [0xab; PAGE as usize]);
    }

    #[test]
    fn pages_are_written_where_they_can_be() {
        let attached = file(4);
        let whole = File::from(attached.fd.try_clone().unwrap());
        let mut landing = Landing::new(&attached, 4 * PAGE).unwrap();
        landing.prepare(1, 3).unwrap();
        let contents: Vec<u8> = (0..2 * PAGE).map(|n| (n / PAGE) as u8 + 7).collect();
        assert!(landing.write(1, &contents));
        let mut written = vec![0; 2 * PAGE as usize];
        whole.read_exact_at(&mut written, PAGE + PAGE).unwrap();
        assert_eq!(written, contents);
        assert!(!landing.write(0, &contents), "not ready");
        assert!(!landing.write(3, &contents), "outside");
        // Without the end of the file there is no page to write to: SIGBUS.
        whole.set_len(PAGE + 3 * PAGE).unwrap();
        assert!(!landing.write(2, &contents));
        assert!(landing.write(1, &contents));
    }

    #[test]
    fn places_that_touch_are_one() {
        let (mut first, mut second, mut last) = ([0u8; 12], [0u8; 4], [0u8; 2]);
        let (at, elsewhere, end) = (first.as_mut_ptr(), second.as_mut_ptr(), last.as_mut_ptr());
        let mut places = Places::default();
        places.only(&mut last);
        places.clear();
        for (at, bytes) in [(at, 2), (at.wrapping_add(2), 3), (elsewhere, 4), (at.wrapping_add(9), 1), (end, 2)] {
            places.then(at, bytes);
        }
        let told: Vec<_> = places.vectors().iter().map(|v| (v.iov_base.cast(), v.iov_len)).collect();
        assert_eq!(told, [(at, 5), (elsewhere, 4), (at.wrapping_add(9), 1), (end, 2)]);
    }
}
