//! Wakes a thread that waits in poll(2): eventfd(2).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;

use crate::sys::fd_passing;

/// An eventfd: readable from a ring until it is answered.
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

impl Doorbell {
    /// Makes a silent one.
    ///
    /// # Errors
    /// eventfd(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Takes one that another process made, and waits for.
    ///
    /// # Errors
    /// [`DoorbellError`].
    pub fn adopt(fd: OwnedFd) -> Result<Self, DoorbellError> {
        if !fd_passing::opened_on(&fd).is_ok_and(|what| what.as_os_str() == "anon_inode:[eventfd]") {
            return Err(DoorbellError::NoEventfd);
        }
        if !fd_passing::flags(&fd).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK)) {
            return Err(DoorbellError::Blocks);
        }
        Ok(Self(fd))
    }

    /// Rings. It fails only where it rings 2^64 times already.
    pub fn ring(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Silences it until the next ring; returns whether it rang.
    pub fn answer(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok_and(|bytes| bytes == 8)
    }
}

#[cfg(test)]
mod tests;
