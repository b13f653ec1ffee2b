//! A file of atomic integers, mapped shared: what is stored in it outlives the process.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU8, AtomicU64};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The mapped file, unmapped when dropped.
#[derive(Debug)]
pub struct AtomicMapping {
    start: *mut c_void,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, and every access goes through atomics.
unsafe impl Send for AtomicMapping {}
// SAFETY: as above.
unsafe impl Sync for AtomicMapping {}

impl AtomicMapping {
    /// Maps a file of at least so many bytes, which nobody makes shorter.
    ///
    /// # Errors
    /// mmap(2).
    pub fn new(file: &File, bytes: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping, wherever there is room.
        let start = unsafe { mmap(null_mut(), bytes, protection, MapFlags::SHARED, file, 0) }?;
        Ok(Self { start, bytes })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: so many bytes are mapped for the life of self; AtomicU8 has the layout of u8.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.bytes) }
    }

    /// The same as words; a rest of fewer than eight bytes is left out.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: a mapping begins at a page, so the words are aligned; they end within it.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.bytes / size_of::<AtomicU64>()) }
    }
}

impl Drop for AtomicMapping {
    fn drop(&mut self) {
        // SAFETY: ours, and no reference to it outlives self.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}
