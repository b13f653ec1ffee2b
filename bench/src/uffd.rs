//! The calls of linux/userfaultfd.h that answer a fault, for measurements without the pager.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmferry_refvm::layout::Backing;
use vmferry_refvm::memory::Region;
use vmferry_refvm::userfaultfd::{FEATURE_MINOR_SHMEM, MODE_MINOR, MODE_MISSING, Userfaultfd};

use crate::touch::PAGE;

/// `_IOR(0xAA, 0x02, struct uffdio_range)`.
const UFFDIO_WAKE: libc::c_ulong = 0x8010_AA02;
/// `_IOWR(0xAA, 0x03, struct uffdio_copy)`.
const UFFDIO_COPY: libc::c_ulong = 0xC028_AA03;
/// `_IOWR(0xAA, 0x07, struct uffdio_continue)`.
const UFFDIO_CONTINUE: libc::c_ulong = 0xC020_AA07;
/// `UFFDIO_COPY_MODE_DONTWAKE`, and the same of CONTINUE.
const DONT_WAKE: u64 = 1;
/// `UFFD_EVENT_PAGEFAULT`.
const PAGEFAULT: u8 = 0x12;
/// Bytes of `struct uffd_msg`; the address of a fault is at 16.
const MESSAGE: usize = 32;

/// How a page of a backing is put in place: its contents are copied in, or are in the page cache already.
#[derive(Debug)]
pub struct Installer {
    uffd: RawFd,
    hva: u64,
    second: Option<u64>,
}

/// A userfaultfd over a whole region, as a pager would have it.
///
/// # Errors
/// No userfaultfd, or none of that kind.
pub fn watch(region: &Region) -> io::Result<(Userfaultfd, Installer)> {
    let (features, mode) = match region.spec.backing {
        Backing::Anonymous => (0, MODE_MISSING),
        Backing::Memfd => (FEATURE_MINOR_SHMEM, MODE_MISSING | MODE_MINOR),
    };
    let uffd = Userfaultfd::new(features)?;
    uffd.register(region.hva, region.spec.size, mode)?;
    let second = region.file.as_ref().map(|file| map_again(file.as_raw_fd(), region.spec.size)).transpose()?;
    let installer = Installer { uffd: uffd.as_raw_fd(), hva: region.hva, second };
    Ok((uffd, installer))
}

/// Another mapping of a memfd, registered with no userfaultfd; it stays until the process ends.
fn map_again(file: RawFd, size: u64) -> io::Result<u64> {
    let size = usize::try_from(size).map_err(io::Error::other)?;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file, 0)
    };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at as u64) }
}

impl Installer {
    /// Has the memory be found before its contents come, where that can be done: of a memfd of `size` bytes.
    ///
    /// # Errors
    /// Of the kernel.
    pub fn make_ready(&self, size: u64) -> io::Result<()> {
        let Some(second) = self.second else { return Ok(()) };
        let size = usize::try_from(size).map_err(io::Error::other)?;
        // SAFETY: the second mapping, which is of that size and changes no content by it.
        match unsafe { libc::madvise(second as *mut libc::c_void, size, libc::MADV_POPULATE_WRITE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Where as many bytes as `buffer` has may be written before they are put in place at `at`: in the page cache, or
    /// `buffer` itself.
    pub fn room<'a>(&self, at: u64, buffer: &'a mut [u8]) -> &'a mut [u8] {
        match self.second {
            None => buffer,
            // SAFETY: pages of the second mapping, which is never unmapped; nothing else refers to them, since they are
            // not mapped anywhere else before `install`.
            Some(second) => unsafe {
                std::slice::from_raw_parts_mut((second + (at - self.hva)) as *mut u8, buffer.len())
            },
        }
    }

    /// Puts pages at `at` in place, with the contents that lie in `room`; COPY or CONTINUE.
    ///
    /// # Errors
    /// Of the kernel: EEXIST where a page is.
    pub fn install(&self, at: u64, room: &[u8], wake: bool) -> io::Result<()> {
        let (size, mode) = (room.len() as u64, if wake { 0 } else { DONT_WAKE });
        match self.second {
            None => ioctl(self.uffd, UFFDIO_COPY, &mut [at, room.as_ptr() as u64, size, mode, 0]),
            Some(_) => ioctl(self.uffd, UFFDIO_CONTINUE, &mut [at, size, mode, 0]),
        }
    }

    /// Puts pages in place from contents elsewhere, and wakes the threads that wait.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn put(&self, at: u64, contents: &[u8]) -> io::Result<()> {
        if let Some(second) = self.second {
            let room = (second + (at - self.hva)) as *mut u8;
            // SAFETY: as in `room`; the contents are of another mapping.
            unsafe { std::ptr::copy_nonoverlapping(contents.as_ptr(), room, contents.len()) };
        }
        self.install(at, contents, true)
    }

    /// Wakes the thread that waits for the page at `at`.
    ///
    /// # Errors
    /// Of the kernel.
    pub fn wake(&self, at: u64) -> io::Result<()> {
        ioctl(self.uffd, UFFDIO_WAKE, &mut [at, PAGE])
    }
}

/// Waits for the next fault, and returns the address of its page.
///
/// # Errors
/// Of the kernel.
pub fn next_fault(uffd: RawFd) -> io::Result<u64> {
    let mut message = [0u8; MESSAGE];
    loop {
        let mut ready = libc::pollfd { fd: uffd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd.
        unsafe { libc::poll(&raw mut ready, 1, -1) };
        // SAFETY: the buffer is as long as said.
        let count = unsafe { libc::read(uffd, message.as_mut_ptr().cast(), MESSAGE) };
        if count == MESSAGE as isize && message[0] == PAGEFAULT {
            let mut address = [0; 8];
            address.copy_from_slice(&message[16..24]);
            return Ok(u64::from_le_bytes(address) & !(PAGE - 1));
        }
        let error = io::Error::last_os_error();
        if count < 0 && !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) {
            return Err(error);
        }
    }
}

/// Answers faults on a thread for as long as this process runs. If `handle` fails, the process ends with the reason:
/// otherwise a thread would wait for its page for ever.
///
/// # Errors
/// No thread can be had.
pub fn answer(
    uffd: Userfaultfd,
    handle: impl FnOnce(RawFd) -> io::Result<Infallible> + Send + 'static,
) -> io::Result<()> {
    let answer = move || {
        let Err(error) = handle(uffd.as_raw_fd());
        eprintln!("faults are answered no more: {error}");
        std::process::exit(1);
    };
    std::thread::Builder::new().name("handler".into()).spawn(answer)?;
    Ok(())
}

/// All structures of these calls are of 64-bit words.
fn ioctl<const N: usize>(fd: RawFd, request: libc::c_ulong, words: &mut [u64; N]) -> io::Result<()> {
    // SAFETY: every caller in this module passes as many words as the request's structure has; the kernel checks addresses.
    if unsafe { libc::ioctl(fd, request, words.as_mut_ptr()) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
