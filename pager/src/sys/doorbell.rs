//! Wakes a thread that waits in poll(2): eventfd(2).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::sys::fd_passing;

/// Rings until it is answered.
#[derive(Debug)]
pub struct Doorbell(OwnedFd);

/// Why a descriptor cannot be a doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DoorbellError {
    /// It is open on something else.
    #[error("is no eventfd")]
    NoEventfd,
    /// To ring it could take for ever.
    #[error("may block: it must be made with EFD_NONBLOCK")]
    Blocks,
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

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

    /// One that somebody else made, and waits for.
    ///
    /// # Errors
    /// [`DoorbellError`].
    pub fn adopt(fd: OwnedFd) -> Result<Self, DoorbellError> {
        if !fd_passing::opened_on(&fd).is_ok_and(|what| what.as_os_str() == "anon_inode:[eventfd]") {
            return Err(DoorbellError::NoEventfd);
        }
        if !fd_passing::flags(&fd).is_ok_and(|flags| flags & libc::O_NONBLOCK != 0) {
            return Err(DoorbellError::Blocks);
        }
        Ok(Self(fd))
    }

    /// Rings.
    pub fn ring(&self) {
        let one = 1u64;
        // SAFETY: eight bytes, as an eventfd wants. It fails only where it rings 2^64 times already.
        unsafe { libc::write(self.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Silent again, until the next ring. Whether it rang.
    pub fn answer(&self) -> bool {
        let mut rings = 0u64;
        // SAFETY: room for eight bytes. `EAGAIN` where it did not ring.
        unsafe { libc::read(self.as_raw_fd(), (&raw mut rings).cast(), 8) == 8 }
    }
}

#[cfg(test)]
mod tests;
