//! The memory of another process: process_vm_readv(2), process_madvise(2).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::fd_passing;
use crate::layout::Hva;

/// Reads from an address of a process, possibly fewer bytes than there is room for; returns how many.
///
/// # Errors
/// process_vm_readv(2): `EFAULT` if the first byte cannot be read, `ESRCH` if the process is gone.
pub fn read(pid: u32, from: Hva, into: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: from.0 as *mut libc::c_void, iov_len: into.len() };
    // SAFETY: the kernel writes at most `into`; `remote` is an address in another process, which the kernel checks.
    let n = unsafe { libc::process_vm_readv(pid as libc::pid_t, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// A descriptor of a process (pidfd_open(2)).
///
/// # Errors
/// The process is gone, or no descriptor is free.
pub fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Waits until a process ends: its pidfd becomes readable then (pidfd_open(2)).
///
/// # Errors
/// epoll_ctl(2).
pub async fn ended(process: OwnedFd) -> io::Result<()> {
    let process = fd_passing::watch_readable(process)?;
    process.readable().await.map(|mut ready| ready.retain_ready())
}

/// Puts huge pages under a range of a process (`MADV_COLLAPSE`).
///
/// # Errors
/// process_madvise(2).
pub fn collapse(process: impl AsFd, start: Hva, bytes: u64) -> io::Result<()> {
    let range = libc::iovec { iov_base: start.0 as *mut libc::c_void, iov_len: bytes as usize };
    let fd = process.as_fd().as_raw_fd();
    // SAFETY: the range is the other process's; its contents do not change.
    match unsafe { libc::syscall(libc::SYS_process_madvise, fd, &raw const range, 1, libc::MADV_COLLAPSE, 0) } {
        1.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
