//! The ABI of `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst): entries and `PAGEMAP_SCAN`. The pager and
//! `vmferry-reach` read page tables through it.

#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Bytes of a page that has one entry.
pub const BASE_PAGE: u64 = 4096;
/// Bytes of an entry.
const ENTRY_BYTES: usize = size_of::<u64>();

/// `ioctl(2)`, Linux 6.7. It shows markers of hugetlb pages, and entries do not.
const PAGEMAP_SCAN: u64 = 0xC060_6610;

/// A category of pages, for [`scan`]. Categories are joined by `|`.
pub type Category = u64;
/// A present page.
pub const IS_PRESENT: Category = 1 << 3;
/// An entry that is neither present nor empty: swap, or a marker.
pub const IS_SWAPPED: Category = 1 << 4;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// A range of addresses with pages of one category: `struct page_region`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PageRegion {
    /// First address.
    pub start: u64,
    /// Address behind the last page.
    pub end: u64,
    /// The categories of its pages, of those asked for.
    pub categories: Category,
}

/// Finds ranges in `[from, to)` with pages of one of the categories, as many as `room` takes. Returns them, and the address at
/// which the search ended.
///
/// # Errors
/// `ESRCH`: the process has ended. `ENOTTY`: the kernel is before 6.7.
pub fn scan<'a>(
    pagemap: &File,
    from: u64,
    to: u64,
    categories: Category,
    room: &'a mut [PageRegion],
) -> io::Result<(&'a [PageRegion], u64)> {
    let mut scan = ScanArguments {
        size: size_of::<ScanArguments>() as u64,
        start: from,
        end: to,
        vec: room.as_mut_ptr() as u64,
        vec_len: room.len() as u64,
        category_anyof_mask: categories,
        return_mask: categories,
        ..ScanArguments::default()
    };
    // SAFETY: a struct of the size that it says, which names room for as many ranges as it says.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
    let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
    Ok((&room[..found.min(room.len())], scan.walk_end))
}

/// The page table entry of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawEntry(pub u64);

impl RawEntry {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    /// Of a page that madvise(2) made a guard (`MADV_GUARD_INSTALL`), Linux 6.15.
    const GUARD: u64 = 1 << 58;
    /// Bits 0–54 of a swapped entry: type and offset. The kernel shows them only to a file that was opened with
    /// `CAP_SYS_ADMIN` (`pagemap_open`, fs/proc/task_mmu.c). No swapped page has an offset of 0.
    const SHOWN_MASK: u64 = (1 << 55) - 1;
    /// Bits 0–4 of a swapped entry: its type. The highest is `SWP_PTE_MARKER` (include/linux/swapops.h).
    const TYPE_MASK: u64 = 0x1f;
    const TYPE_PTE_MARKER: u64 = 0x1f;
    /// Bits 5–54 of a swapped entry: the offset, here the marker's kinds.
    const OFFSET_SHIFT: u32 = 5;
    /// `PTE_MARKER_POISONED`.
    const MARKER_POISONED: u64 = 1 << 1;

    /// Whether nothing was ever there, or nothing is mapped there.
    pub fn is_empty(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED) == 0
    }

    /// Whether the process itself made the page a guard.
    pub fn is_guard(self) -> bool {
        self.0 & Self::GUARD != 0
    }

    /// Whether it is a marker, a swapped page or a bad frame, and the kernel does not show which.
    pub fn is_hidden(self) -> bool {
        self.is_swapped() && self.0 & Self::SHOWN_MASK == 0
    }

    fn is_swapped(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED) == Self::SWAPPED
    }

    /// Whether it is a poison marker, if the kernel shows that.
    pub fn is_poison_marker(self) -> bool {
        let is_marker = self.0 & Self::TYPE_MASK == Self::TYPE_PTE_MARKER;
        self.is_swapped() && is_marker && (self.0 >> Self::OFFSET_SHIFT) & Self::MARKER_POISONED != 0
    }
}

/// Reads the entries of `count` pages from an address on.
///
/// # Errors
/// `UnexpectedEof`: the address space is gone, or the range leaves it.
pub fn entries(pagemap: &File, address: u64, count: u64) -> io::Result<Vec<RawEntry>> {
    let mut raw = vec![0u8; count as usize * ENTRY_BYTES];
    pagemap.read_exact_at(&mut raw, address / BASE_PAGE * ENTRY_BYTES as u64)?;
    Ok(raw.as_chunks::<ENTRY_BYTES>().0.iter().map(|bytes| RawEntry(u64::from_ne_bytes(*bytes))).collect())
}

#[cfg(test)]
mod tests;
