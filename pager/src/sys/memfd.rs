//! Anonymous files (memfd_create(2)), and holes in files.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};

/// Makes a memfd of a size, for tests and probes.
///
/// # Errors
/// memfd_create(2), ftruncate(2).
pub fn memfd(name: &str, size: u64) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC)?;
    ftruncate(&fd, size)?;
    Ok(fd)
}

/// Takes bytes out of a file: they read as zeros, and the next access gets a fresh frame, also in place of a bad one.
///
/// # Errors
/// As fallocate(2) with `FALLOC_FL_PUNCH_HOLE`.
pub(crate) fn punch_hole(fd: impl AsFd, offset: u64, bytes: u64) -> io::Result<()> {
    Ok(fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, bytes)?)
}
