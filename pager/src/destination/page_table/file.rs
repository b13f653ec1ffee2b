//! The file under the page table: a header of one page, then half a byte a page of the VM, mapped shared.
//!
//! It lies in the VM's runtime directory (a tmpfs), so it outlives the pager. The header names the layout it was
//! made for; a file made for another layout is refused, never reinterpreted.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::layout::{Backing, MemoryLayout};

const HEADER: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"vmfpages");
const VERSION: u64 = 1;

/// A 64-bit word of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// Marks the file as a page table.
    Magic = 0,
    /// Version of the format.
    Version = 1,
    /// Digest of the layout.
    Digest = 2,
    /// Number of pages.
    Pages = 3,
    /// Process id of the VMM whose memory the table describes; 0 before one attached.
    VmmPid = 4,
    /// When that process was started, in clock ticks after boot: tells a recycled pid.
    VmmStart = 5,
    /// Bytes of page contents received.
    BytesReceived = 8,
    /// Fault events read.
    Faults = 9,
    /// Those of them for a page that another fault waited for already.
    DuplicateFaults = 10,
    /// Machine-check reports sent to the VMM.
    MachineChecks = 11,
}

/// Why a page file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PageFileError {
    /// Creating, reading or mapping it failed.
    #[error("page table {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It belongs to another VM or another version.
    #[error("page table {path} {reason}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What differs.
        reason: &'static str,
    },
}

/// The mapped file.
#[derive(Debug)]
pub struct PageFile {
    base: NonNull<u8>,
    /// Of the states, behind the header.
    bytes: usize,
    path: PathBuf,
}

// SAFETY: the mapping belongs to this value alone and every access goes through atomics.
unsafe impl Send for PageFile {}

impl PageFile {
    /// Opens the file, or makes it with every byte 0. The flag tells whether it was there already.
    ///
    /// # Errors
    /// [`PageFileError`]: I/O, or the file was made for another layout.
    pub fn open(path: &Path, layout: &MemoryLayout) -> Result<(Self, bool), PageFileError> {
        let pages = layout.total_pages();
        let failed = |source| PageFileError::Io { path: path.to_path_buf(), source };
        let existed = path.try_exists().map_err(failed)?;
        if !existed {
            create(path, pages, digest(layout)).map_err(failed)?;
        }
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        let foreign = |reason| PageFileError::Foreign { path: path.to_path_buf(), reason };
        if file.metadata().map_err(failed)?.len() != HEADER as u64 + state_bytes(pages) {
            return Err(foreign("has the size of another layout"));
        }
        let map = Self::map(&file, state_bytes(pages) as usize, path).map_err(failed)?;
        if map.word(Word::Magic).load(Ordering::Acquire) != MAGIC {
            return Err(foreign("is not a page table"));
        }
        if map.word(Word::Version).load(Ordering::Acquire) != VERSION {
            return Err(foreign("has another version"));
        }
        if map.word(Word::Digest).load(Ordering::Acquire) != digest(layout) {
            return Err(foreign("was made for another layout"));
        }
        Ok((map, existed))
    }

    fn map(file: &File, bytes: usize, path: &Path) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new shared mapping of a file of exactly this length; no existing mapping is replaced.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), HEADER + bytes, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned null"))?;
        Ok(Self { base, bytes, path: path.to_path_buf() })
    }

    /// Half a byte a page: the even one of two pages in the low half.
    pub fn states(&self) -> &[AtomicU8] {
        // SAFETY: `bytes` bytes after the header are mapped for the life of self; AtomicU8 has the layout of u8.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(HEADER).cast(), self.bytes) }
    }

    /// The same, 16 pages at a time, but for the last few.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the states begin at a page of memory, so they are aligned; the words end within them.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(HEADER).cast(), self.bytes / 8) }
    }

    /// A word of the header.
    pub fn word(&self, word: Word) -> &AtomicU64 {
        // SAFETY: the header is mapped for the life of self, page-aligned, and `word` lies in it.
        unsafe { &*self.base.as_ptr().cast::<AtomicU64>().add(word as usize) }
    }

    /// Removes the file: the VM that it described is gone, or needs it no longer.
    ///
    /// # Errors
    /// What the kernel said, unless the file was gone already.
    pub fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl Drop for PageFile {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and no reference to it outlives self.
        unsafe { libc::munmap(self.base.as_ptr().cast(), HEADER + self.bytes) };
    }
}

/// Bytes of the states of so many pages.
fn state_bytes(pages: u64) -> u64 {
    pages.div_ceil(2)
}

/// Written beside and renamed, so that a file of that name is always whole.
fn create(path: &Path, pages: u64, digest: u64) -> io::Result<()> {
    let beside = path.with_extension("new");
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(&beside)?;
    file.set_len(HEADER as u64 + state_bytes(pages))?;
    let words = [(Word::Magic, MAGIC), (Word::Version, VERSION), (Word::Digest, digest), (Word::Pages, pages)];
    for (word, value) in words {
        std::os::unix::fs::FileExt::write_all_at(&file, &value.to_ne_bytes(), word as u64 * 8)?;
    }
    std::fs::rename(beside, path)
}

/// FNV-1a over the regions.
fn digest(layout: &MemoryLayout) -> u64 {
    let words = layout.regions().iter().flat_map(|r| {
        let backing = match r.backing {
            Backing::Anonymous => 1,
            Backing::Memfd => 2,
        };
        [r.gpa.0, r.size, r.page_size, backing]
    });
    let fold = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    words.flat_map(u64::to_le_bytes).fold(0xcbf2_9ce4_8422_2325, fold)
}

#[cfg(test)]
mod tests;
