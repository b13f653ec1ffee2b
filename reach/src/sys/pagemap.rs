//! The page tables of another process: `/proc/PID/pagemap`, Documentation/admin-guide/mm/pagemap.rst.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

const BASE_PAGE: u64 = 4096;
/// `ioctl(2)` of a pagemap, Linux 6.7.
const PAGEMAP_SCAN: u64 = 0xC060_6610;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
/// A page that madvise(2) made a guard (`MADV_GUARD_INSTALL`), Linux 6.15.
const ENTRY_GUARD: u64 = 1 << 58;
/// Entries that one read takes, where the kernel cannot scan.
const ENTRIES_A_READ: usize = 4096;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Debug, Default)]
struct Scan {
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

/// `struct page_region`.
#[repr(C)]
#[derive(Debug, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// Finds the first page of a range that has an entry: a page, the zero page, swap or a marker.
///
/// # Errors
/// The process has ended (`ESRCH`).
pub fn first_entry(pagemap: &File, start: u64, end: u64) -> io::Result<Option<u64>> {
    let mut found = Region::default();
    let mut scan = Scan {
        size: std::mem::size_of::<Scan>() as u64,
        start,
        end,
        vec: &raw mut found as u64,
        vec_len: 1,
        category_anyof_mask: IS_PRESENT | IS_SWAPPED,
        return_mask: IS_PRESENT | IS_SWAPPED,
        ..Scan::default()
    };
    // SAFETY: the kernel reads the struct of the size that it names, and writes `walk_end` and at most one region.
    match unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) } {
        0 => Ok(None),
        1.. => Ok(Some(found.start)),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOTTY) => first_read_entry(pagemap, start, end),
            error => Err(error),
        },
    }
}

/// For kernels before 6.7.
fn first_read_entry(pagemap: &File, start: u64, end: u64) -> io::Result<Option<u64>> {
    let mut buffer = vec![0u8; ENTRIES_A_READ * 8];
    let mut page = start / BASE_PAGE;
    while page < end / BASE_PAGE {
        let count = ENTRIES_A_READ.min((end / BASE_PAGE - page) as usize);
        let buffer = &mut buffer[..count * 8];
        pagemap.read_exact_at(buffer, page * 8)?;
        if let Some(at) = buffer.chunks_exact(8).position(|entry| word(entry) & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0) {
            return Ok(Some((page + at as u64) * BASE_PAGE));
        }
        page += count as u64;
    }
    Ok(None)
}

/// What is in place of a page that is not mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Nothing.
    Empty,
    /// A guard page of the process's own making.
    Guard,
    /// A page, swap, or a marker: which one the kernel tells only with CAP_SYS_ADMIN.
    Other,
}

/// Reads the entry of one page.
///
/// # Errors
/// The process has ended.
pub fn entry(pagemap: &File, address: u64) -> io::Result<Entry> {
    let mut entry = [0; 8];
    pagemap.read_exact_at(&mut entry, address / BASE_PAGE * 8)?;
    Ok(match word(&entry) {
        guard if guard & ENTRY_GUARD != 0 => Entry::Guard,
        empty if empty & (ENTRY_PRESENT | ENTRY_SWAPPED) == 0 => Entry::Empty,
        _ => Entry::Other,
    })
}

fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_find_the_first_page_with_an_entry() {
        let memory = vec![0u8; 64 << 20];
        let base = (memory.as_ptr() as u64).next_multiple_of(BASE_PAGE);
        let end = base + (32 << 20);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        for find in [first_entry, first_read_entry] {
            assert_eq!(find(&pagemap, base, end).unwrap(), None);
        }
        let page = base + 5000 * BASE_PAGE;
        std::hint::black_box(memory[(page - memory.as_ptr() as u64) as usize]);
        for find in [first_entry, first_read_entry] {
            assert_eq!(find(&pagemap, base, end).unwrap(), Some(page), "the page of zeros counts");
        }
    }
}
