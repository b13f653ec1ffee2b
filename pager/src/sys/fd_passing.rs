//! Bytes and descriptors over a unix stream socket: `sendmsg`, `recvmsg` with `SCM_RIGHTS` (unix(7)).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::cmsg_space;
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most descriptors that the kernel passes in one message (`SCM_MAX_FD`).
const MAX_PASSED: usize = 253;

/// The result of one `recvmsg`.
#[derive(Debug)]
pub struct ReceivedMessage {
    /// Number of bytes; 0 at the end of the stream.
    pub bytes: usize,
    /// Closed when dropped, so a refused message leaks none.
    pub descriptors: Vec<OwnedFd>,
    /// Descriptors were lost: this process may open no more.
    pub truncated: bool,
}

/// Receives once.
///
/// # Errors
/// recvmsg(2); `WouldBlock` on a non-blocking socket with nothing to read.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<ReceivedMessage> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_PASSED))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            descriptors.extend(rights);
        }
    }
    Ok(ReceivedMessage { bytes: message.bytes, descriptors, truncated: message.flags.contains(ReturnFlags::CTRUNC) })
}

/// Sends bytes with descriptors in one `sendmsg`.
///
/// # Errors
/// sendmsg(2); `InvalidInput` for more descriptors than the kernel passes in one message; `WriteZero` if it took only a part
/// of the bytes.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_PASSED))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)? {
        sent if sent < bytes.len() => Err(io::ErrorKind::WriteZero.into()),
        _ => Ok(()),
    }
}

/// The object on which a descriptor is open, as `/proc/self/fd` names it, e.g. `anon_inode:[eventfd]`.
///
/// # Errors
/// readlink(2).
pub fn opened_on(fd: &OwnedFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// The status flags with which a descriptor is open (fcntl(2), `F_GETFL`).
///
/// # Errors
/// fcntl(2).
pub fn flags(fd: &OwnedFd) -> io::Result<OFlags> {
    Ok(fcntl_getfl(fd)?)
}

/// Watches a descriptor on the calling runtime for bytes to read, and for nothing else. The sockets of tokio wake their task for
/// room to write as well.
///
/// # Errors
/// epoll_ctl(2).
pub fn watch_readable<T: AsFd + AsRawFd>(owner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: a value that lends its descriptor keeps it open, and the result owns the value.
    Ok(unsafe { AsyncFd::register_with_interest(owner, Interest::READABLE) }?)
}
