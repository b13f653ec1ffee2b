//! Wakes a thread that waits in poll(2): eventfd(2).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Rings until it is answered.
#[derive(Debug)]
pub struct Doorbell(OwnedFd);

impl AsRawFd for Doorbell {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Doorbell {
    /// Silent.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes numbers only; returns a descriptor or -1.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Rings.
    pub fn ring(&self) {
        let one = 1u64;
        // SAFETY: eight bytes, as an eventfd wants. It fails only where it rings 2^64 times already.
        unsafe { libc::write(self.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Silent again, until the next ring.
    pub fn answer(&self) {
        let mut rings = 0u64;
        // SAFETY: room for eight bytes. `EAGAIN` where it did not ring.
        unsafe { libc::read(self.as_raw_fd(), (&raw mut rings).cast(), 8) };
    }
}
