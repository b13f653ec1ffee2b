//! `/proc/PID/pagemap`: what the VMM's page tables hold for a page (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::ReadError;
use crate::region_map::Hva;

/// Only 4 KiB page tables are read: a marker of a hugetlb page shows as an empty entry.
const PAGE: u64 = 4096;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Bits 0–4 of a swapped entry: its type. The highest is `SWP_PTE_MARKER` (include/linux/swapops.h).
const TYPE_MASK: u64 = 0x1f;
const TYPE_PTE_MARKER: u64 = 0x1f;
/// Bits 5–54 of a swapped entry: the offset, here the marker's kinds.
const OFFSET_SHIFT: u32 = 5;
/// `PTE_MARKER_POISONED`.
const MARKER_POISONED: u64 = 1 << 1;

/// What one entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing was ever put there, or nothing is mapped there.
    Empty,
    /// A poison marker.
    PoisonMarker,
    /// Anything else: read it.
    Something,
}

impl From<u64> for Entry {
    fn from(raw: u64) -> Self {
        if raw & (PRESENT | SWAPPED) == 0 {
            return Self::Empty;
        }
        let marker = raw & PRESENT == 0 && raw & TYPE_MASK == TYPE_PTE_MARKER;
        let poisoned = (raw >> OFFSET_SHIFT) & MARKER_POISONED != 0;
        if marker && poisoned { Self::PoisonMarker } else { Self::Something }
    }
}

/// The page tables of one region of one process.
#[derive(Debug)]
pub(super) struct Pagemap {
    file: File,
    pid: u32,
    hva: Hva,
}

impl Pagemap {
    /// `None` for huge pages, of which a pagemap tells nothing.
    pub fn open(pid: u32, hva: Hva, page_size: u64) -> Result<Option<Self>, ReadError> {
        if page_size != PAGE {
            return Ok(None);
        }
        match File::open(format!("/proc/{pid}/pagemap")) {
            Ok(file) => Ok(Some(Self { file, pid, hva })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ReadError::VmmGone { pid }),
            Err(source) => Err(ReadError::Io { what: format!("open /proc/{pid}/pagemap"), source }),
        }
    }

    /// The entries of `count` pages from `page` on.
    pub fn entries(&self, page: u64, count: u64) -> Result<Vec<Entry>, ReadError> {
        let mut raw = vec![0u8; (count * 8) as usize];
        let offset = (self.hva.0 / PAGE + page) * 8;
        match self.file.read_exact_at(&mut raw, offset) {
            Ok(()) => {}
            // The address space is gone: the file ends at once.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(ReadError::VmmGone { pid: self.pid });
            }
            Err(source) => return Err(ReadError::Io { what: format!("read /proc/{}/pagemap", self.pid), source }),
        }
        let entry = |bytes: &[u8; 8]| Entry::from(u64::from_le_bytes(*bytes));
        Ok(raw.as_chunks::<8>().0.iter().map(entry).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_told_apart() {
        assert_eq!(Entry::from(0), Entry::Empty);
        assert_eq!(Entry::from(0x4000_0000_0000_005f), Entry::PoisonMarker);
        // A uffd-wp marker, a swapped page, a present page, a soft-dirty bit alone.
        assert_eq!(Entry::from(0x4000_0000_0000_003f), Entry::Something);
        assert_eq!(Entry::from(0x4000_0000_0000_0040), Entry::Something);
        assert_eq!(Entry::from(0x8000_0000_0012_3456), Entry::Something);
        assert_eq!(Entry::from(1 << 55), Entry::Empty);
    }

    #[test]
    fn a_process_that_is_gone_is_not_empty_memory() {
        let gone = Pagemap::open(u32::MAX >> 2, Hva(0), PAGE);
        assert!(matches!(gone, Err(ReadError::VmmGone { .. })), "{gone:?}");
    }
}
