//! Huge pages of a memfd that cannot be read through the VMM's mapping. Under a poison marker the file still gives all of
//! the page, and all of it is poison. Of a page with a bad frame the file gives all but the bad pieces of 4 KiB, and those
//! alone are lost (docs/reference/kernel-facts.md).

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, PoisonError};

use crate::layout::PAGE_SIZE;

/// Bytes that are read at once from a page in question.
const CHUNK: u64 = 256 << 10;

/// The verdicts on the huge pages of one region. A page is read as a whole once: pieces of it are asked for one by one.
#[derive(Debug)]
pub(super) struct HugePageErrors {
    page_size: u64,
    has_bad_frame: Mutex<HashMap<u64, bool>>,
}

impl HugePageErrors {
    /// Of a region of pages of this size.
    pub fn new(page_size: u64) -> Self {
        Self { page_size, has_bad_frame: Mutex::default() }
    }

    /// The VM may have run: markers and frames may have changed.
    pub fn forget(&self) {
        self.lock().clear();
    }

    /// Takes pieces of pages with a bad frame off `marked`, which begins with piece `first` of the region: the file tells
    /// which of them are lost. `pread(offset, buffer)` reads the region.
    pub fn leave_markers(&self, first: u64, marked: &mut [bool], pread: impl Fn(u64, &mut [u8]) -> io::Result<usize>) {
        for (piece, marked) in (first..).zip(marked).filter(|(_, marked)| **marked) {
            let start = piece * PAGE_SIZE / self.page_size * self.page_size;
            let judge = || (start..start + self.page_size).step_by(CHUNK as usize).any(|at| is_bad(at, &pread));
            *marked = !*self.lock().entry(start).or_insert_with(judge);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, bool>> {
        self.has_bad_frame.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether one of the pieces of a chunk is bad.
fn is_bad(at: u64, pread: &impl Fn(u64, &mut [u8]) -> io::Result<usize>) -> bool {
    let (mut chunk, mut done) = (vec![0; CHUNK as usize], 0);
    while done < chunk.len() {
        match pread(at + done as u64, &mut chunk[done..]) {
            // The file ends here.
            Ok(0) => return false,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.raw_os_error() == Some(libc::EIO),
        }
    }
    false
}

#[cfg(test)]
mod tests;
