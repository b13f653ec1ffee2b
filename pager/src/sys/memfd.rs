//! Anonymous files (memfd_create(2)).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Makes a memfd of a size, for tests and probes.
///
/// # Errors
/// What the kernel said.
pub fn memfd(name: &str, size: u64) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    // SAFETY: a valid C string and flags; returns a descriptor or -1.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    std::fs::File::from(fd.try_clone()?).set_len(size)?;
    Ok(fd)
}

/// Takes bytes out of a file: they read as zeros, and the next access gets a fresh frame, also in place of a bad one.
///
/// # Errors
/// As fallocate(2) with `FALLOC_FL_PUNCH_HOLE`.
pub(crate) fn punch_hole(fd: &OwnedFd, offset: u64, bytes: u64) -> io::Result<()> {
    let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no memory is passed.
    match unsafe { libc::fallocate(fd.as_raw_fd(), how, offset as libc::off_t, bytes as libc::off_t) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
