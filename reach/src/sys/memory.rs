//! Another process's memory: process_vm_readv(2).

use std::io;

/// Reads memory into `buffer`; returns the bytes before the first that cannot be read, which may be all.
///
/// # Errors
/// `EFAULT`: not even the first byte can be read. `ESRCH`: the process has ended. `EPERM`.
pub fn read(pid: i32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: buffer.len() };
    // SAFETY: the local vector describes `buffer`; the kernel checks the remote one.
    let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}
