//! Bytes and descriptors over a unix stream socket: `sendmsg`, `recvmsg` with `SCM_RIGHTS` (unix(7)); and what a received
//! one is.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

/// Most descriptors that the kernel passes in one message (`SCM_MAX_FD`).
const MAX_PASSED: usize = 253;

/// What one `recvmsg` gave.
#[derive(Debug)]
pub struct Received {
    /// Bytes; 0 at the end of the stream.
    pub bytes: usize,
    /// Closed when dropped, so a refused message leaks none.
    pub descriptors: Vec<OwnedFd>,
    /// Descriptors were lost: this process may open no more.
    pub truncated: bool,
}

/// Room for the control data of [`MAX_PASSED`] descriptors, aligned as `cmsghdr` wants.
type ControlBuffer = [u64; 160];

/// Receives once.
///
/// # Errors
/// What the kernel said; `WouldBlock` on a non-blocking socket with nothing to read.
pub fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control: ControlBuffer = [0; 160];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is plain data; zero is valid for each field.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = std::mem::size_of::<ControlBuffer>();
    // SAFETY: every pointer in the header is to a live buffer of the length given.
    let bytes = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
    let Ok(bytes) = usize::try_from(bytes) else { return Err(io::Error::last_os_error()) };
    let truncated = message.msg_flags & libc::MSG_CTRUNC != 0;
    Ok(Received { bytes, descriptors: owned(&message), truncated })
}

fn owned(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: recvmsg filled the header; the CMSG macros stay within its control buffer.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: null or a valid header, as the macros promise.
    while let Some(control) = unsafe { header.as_ref() } {
        if control.cmsg_level == libc::SOL_SOCKET && control.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: the data of this header follows it; CMSG_LEN(0) is the header's own size.
            let (data, bytes) = unsafe { (libc::CMSG_DATA(control), control.cmsg_len - libc::CMSG_LEN(0) as usize) };
            for at in 0..bytes / std::mem::size_of::<RawFd>() {
                // SAFETY: within the data; descriptors need not be aligned.
                let fd = unsafe { data.cast::<RawFd>().add(at).read_unaligned() };
                // SAFETY: the kernel made it for us and nobody else knows of it.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: as CMSG_FIRSTHDR.
        header = unsafe { libc::CMSG_NXTHDR(message, control) };
    }
    descriptors
}

/// Sends bytes with descriptors in one `sendmsg`.
///
/// # Errors
/// What the kernel said; `InvalidInput` for more descriptors than it passes in one message; `WriteZero` if it took
/// only a part of the bytes.
pub fn send(socket: &impl AsRawFd, bytes: &[u8], descriptors: &[RawFd]) -> io::Result<()> {
    if descriptors.len() > MAX_PASSED {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut control: ControlBuffer = [0; 160];
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain data; zero is valid for each field.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    if !descriptors.is_empty() {
        let size = std::mem::size_of_val(descriptors) as u32;
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: computes a size.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(size) } as usize;
        // SAFETY: the buffer holds CMSG_SPACE of 253 descriptors, and at most so many are written.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size) as usize;
            let data = libc::CMSG_DATA(header).cast::<RawFd>();
            std::ptr::copy_nonoverlapping(descriptors.as_ptr(), data, descriptors.len());
        }
    }
    // SAFETY: every pointer in the header is to a live buffer of the length given.
    match usize::try_from(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) }) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(sent) if sent < bytes.len() => Err(io::ErrorKind::WriteZero.into()),
        Ok(_) => Ok(()),
    }
}

/// What a descriptor is open on, as `/proc/self/fd` names it, e.g. `anon_inode:[eventfd]`.
///
/// # Errors
/// readlink(2).
pub fn opened_on(fd: &OwnedFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// The status flags with which it is open (fcntl(2), `F_GETFL`).
///
/// # Errors
/// What the kernel said.
pub fn flags(fd: &OwnedFd) -> io::Result<libc::c_int> {
    // SAFETY: no memory is passed.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) } {
        -1 => Err(io::Error::last_os_error()),
        flags => Ok(flags),
    }
}
