//! Scattered receives and gathered sends (`struct iovec`, readv(2), recvmsg(2)): each takes several places in one call.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

use crate::sys::page_mapping::MappedPages;

/// The memory of a list of places, kept from one receive to the next.
#[derive(Debug, Default)]
pub struct IoVecs(Vec<libc::iovec>);

// SAFETY: between two receives the addresses are not used.
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// Begins an empty list.
    #[inline]
    pub fn start(&mut self) -> ReceivePlaces<'_> {
        self.0.clear();
        ReceivePlaces { vectors: &mut self.0, places: PhantomData }
    }
}

/// The places that one receive fills, in order.
#[derive(Debug)]
pub struct ReceivePlaces<'a> {
    vectors: &'a mut Vec<libc::iovec>,
    places: PhantomData<&'a mut [u8]>,
}

impl<'a> ReceivePlaces<'a> {
    /// Adds a buffer.
    #[inline]
    pub fn push(&mut self, buffer: &'a mut [u8]) {
        self.add(buffer.as_mut_ptr().cast(), buffer.len());
    }

    /// Adds pages of a file. A receive ends before the first that cannot be written.
    #[inline]
    pub fn push_pages(&mut self, pages: MappedPages<'a>) {
        let (at, bytes) = pages.raw();
        self.add(at, bytes);
    }

    /// Joins places that touch, so that the list stays short.
    #[inline]
    fn add(&mut self, at: *mut libc::c_void, bytes: usize) {
        match self.vectors.last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == at => last.iov_len += bytes,
            _ => self.vectors.push(libc::iovec { iov_base: at, iov_len: bytes }),
        }
    }

    /// Receives once from a socket, without waiting. Returns the number of bytes; 0 at the end of the stream.
    ///
    /// # Errors
    /// recvmsg(2): `WouldBlock` if nothing is there, `EFAULT` if the first place cannot be written.
    pub fn receive(self, socket: impl AsFd) -> io::Result<usize> {
        // SAFETY: a zeroed msghdr is valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.vectors.as_mut_ptr();
        message.msg_iovlen = self.vectors.len();
        // SAFETY: the places live as long as self, which borrows the buffers alone; nobody has a reference to mapped pages.
        let bytes = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        usize::try_from(bytes).map_err(|_| io::Error::last_os_error())
    }
}

/// Bytes to send, in a buffer or in the pages of a file.
#[derive(Debug, Clone, Copy)]
pub struct SendBytes<'a> {
    vector: libc::iovec,
    bytes: PhantomData<&'a [u8]>,
}

impl<'a> SendBytes<'a> {
    /// Bytes of a buffer.
    #[inline]
    pub fn of(buffer: &'a [u8]) -> Self {
        let vector = libc::iovec { iov_base: buffer.as_ptr().cast_mut().cast(), iov_len: buffer.len() };
        Self { vector, bytes: PhantomData }
    }

    /// Pages of a file.
    #[inline]
    pub fn of_pages(pages: MappedPages<'a>) -> Self {
        let (at, bytes) = pages.raw();
        Self { vector: libc::iovec { iov_base: at, iov_len: bytes }, bytes: PhantomData }
    }

    /// Number of bytes.
    #[inline]
    pub fn count(self) -> usize {
        self.vector.iov_len
    }

    /// The bytes behind the first `skipped`, at most `most`.
    #[inline]
    pub fn part(self, skipped: usize, most: usize) -> Self {
        let skipped = skipped.min(self.vector.iov_len);
        let vector = libc::iovec {
            iov_base: self.vector.iov_base.wrapping_byte_add(skipped),
            iov_len: (self.vector.iov_len - skipped).min(most),
        };
        Self { vector, ..self }
    }
}

/// Sends parts one after the other by one call. Returns the number of bytes that the kernel took.
///
/// # Errors
/// writev(2): `EFAULT` if the first byte cannot be read.
pub fn send(socket: impl AsFd, parts: [SendBytes<'_>; 2]) -> io::Result<usize> {
    let vectors = parts.map(|part| part.vector);
    // SAFETY: the kernel only reads the vectors, whose bytes live as long as `parts`.
    let bytes = unsafe { libc::writev(socket.as_fd().as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
    usize::try_from(bytes).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests;
