//! Anonymous files (memfd_create(2)).

use std::ffi::CString;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

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
