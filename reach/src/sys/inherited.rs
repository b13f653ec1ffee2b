//! Descriptors that the caller passed by inheritance, named by number.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes an inherited descriptor; each number at most once.
///
/// # Errors
/// `EBADF`: no such descriptor is open. `InvalidInput`: one of the standard streams.
pub fn take(number: u32) -> io::Result<OwnedFd> {
    let Ok(fd @ 3..) = RawFd::try_from(number) else { return Err(io::ErrorKind::InvalidInput.into()) };
    // SAFETY: no memory is passed.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: open, as fcntl has just found; the program takes each number of its request once, before it opens others.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
