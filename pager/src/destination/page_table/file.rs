//! The file under the page table: a header of one page, then half a byte a page of the VM, mapped shared.
//!
//! It lies in the VM's runtime directory (a tmpfs), so it outlives the pager. The header names the layout it was
//! made for; a file made for another layout is refused, never reinterpreted.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::layout::{Backing, MemoryLayout};
use crate::sys::atomic_mapping::AtomicMapping;

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
    /// Process id of the VMM that owns the memory; 0 before one attached.
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
        /// The kernel's error.
        source: io::Error,
    },
    /// It belongs to another VM or another version.
    #[error("page table {path} {reason}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The difference.
        reason: &'static str,
    },
}

/// The mapped file.
#[derive(Debug)]
pub struct PageFile {
    /// The header, then the states.
    mapping: AtomicMapping,
    path: PathBuf,
}

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
        let mapping = AtomicMapping::new(&file, HEADER + state_bytes(pages) as usize).map_err(failed)?;
        let map = Self { mapping, path: path.to_path_buf() };
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

    /// Half a byte a page: the even one of two pages in the low half.
    pub fn states(&self) -> &[AtomicU8] {
        &self.mapping.bytes()[HEADER..]
    }

    /// The same, 16 pages at a time, but for the last few.
    pub fn words(&self) -> &[AtomicU64] {
        &self.mapping.words()[HEADER / size_of::<AtomicU64>()..]
    }

    /// A word of the header.
    pub fn word(&self, word: Word) -> &AtomicU64 {
        &self.mapping.words()[word as usize]
    }

    /// Removes the file: the VM that it described is gone, or needs it no longer.
    ///
    /// # Errors
    /// The kernel's error, unless the file was gone already.
    pub fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Bytes of the states of so many pages.
fn state_bytes(pages: u64) -> u64 {
    pages.div_ceil(2)
}

/// Writes another file and renames it, so that a file of that name is always whole.
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
